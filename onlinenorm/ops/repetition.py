"""Training passes inside backward: those of activation checkpointing, which must not start from moved statistics."""

import threading
from collections.abc import Callable

import torch
from torch import Tensor

_thread = threading.local()


def with_known_start(step: Callable[..., Tensor], *arguments) -> Tensor:
    """Run a training pass whose caller has seen to what it starts from, also inside backward."""
    _thread.known = True
    try:
        return step(*arguments)
    finally:
        _thread.known = False


def check_first_pass() -> None:
    """Raises RuntimeError for a pass inside backward that nobody has seen to: compiled code repeats it by itself."""
    if torch._C._current_graph_task_id() != -1 and not getattr(_thread, "known", False):
        raise RuntimeError(
            "OnlineNorm: activation checkpointing under torch.compile repeats a training pass, from statistics that "
            "have moved since; leave this layer out of the checkpointed region, or the region out of torch.compile"
        )
