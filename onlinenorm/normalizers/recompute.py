"""Where a training pass starts from, for when activation checkpointing repeats it inside backward.

A checkpointed region runs a first time without keeping its activations, and again when backward needs them. The first
pass moves the statistics, as without checkpointing; a repetition starts from where the first pass started, on copies.
What identifies a region is the object that torch keeps for it as long as its graph lives: the frame of non-reentrant
checkpointing, found in the hooks on saved tensors that are active in both passes, or the ``ctx`` of an
``autograd.Function`` that runs the layer in its forward and again in its backward, as reentrant checkpointing does.
"""

import inspect
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from onlinenorm.normalizers.batch_sizes import Sizes

_graph = torch._C._autograd


class Start(NamedTuple):
    """Statistics to start from and move, and what the other processes bring."""

    mean: Tensor
    var: Tensor
    sizes: Sizes

    def copy(self) -> "Start":
        return Start(self.mean.clone(), self.var.clone(), self.sizes)


@dataclass
class _Passes:
    """The first passes of one layer through one region, in order, and the one to be repeated next."""

    starts: list[Start] = field(default_factory=list)
    task: int | None = None
    next: int = 0

    def repeat(self) -> Start:
        task = torch._C._current_graph_task_id()  # each backward repeats a region once, from its beginning
        self.next = (self.next + 1) % len(self.starts) if task == self.task else 0
        self.task = task
        return self.starts[self.next].copy()


_regions: weakref.WeakKeyDictionary[object, dict[nn.Module, _Passes]] = weakref.WeakKeyDictionary()


def starting_point(layer: nn.Module, first: Callable[[], Start]) -> Start:
    """Where this pass of ``layer`` starts from: ``first()``, the layer's own statistics, or copies of earlier ones.

    Copies also under ``torch.no_grad()``, where nothing moves. Raises RuntimeError where a region is repeated in which
    the layer had no training pass.
    """
    learns, inside_backward = torch.is_grad_enabled(), torch._C._current_graph_task_id() != -1
    if learns and not inside_backward and _graph._top_saved_tensors_default_hooks(False) is None:
        return first()
    entered, repeated = _hooked_regions()
    if not learns or (inside_backward and repeated is None):
        functions, repeated_function = _functions_on_the_stack()
        repeated = repeated or repeated_function
        if not learns:  # unless autograd has turned gradients off for a Function's forward
            entered = entered + functions if functions else []
    passes = None if repeated is None else _regions.get(repeated, {}).get(layer)
    if passes is not None and (learns or entered):
        start = passes.repeat()
    elif repeated is not None and learns and not isinstance(repeated, BackwardCFunction):
        raise RuntimeError(
            f"{type(layer).__name__}: activation checkpointing repeats in training mode a region in which the layer "
            "had no training pass; call backward before train() or eval(), and compile all of a region or nothing"
        )
    else:
        start = first()
        if not learns and not entered:
            return start.copy()
    for region in entered:
        _regions.setdefault(region, {}).setdefault(layer, _Passes()).starts.append(start.copy())
    return start


def _hooked_regions() -> tuple[list[object], object | None]:
    """Regions of non-reentrant checkpointing: those this call is a first pass of, and the innermost it repeats."""
    hooks = []
    while (pair := _graph._top_saved_tensors_default_hooks(False)) is not None:  # only the top can be looked at
        hooks.append(pair)
        _graph._pop_saved_tensors_default_hooks()
    for pair in reversed(hooks):
        _graph._push_saved_tensors_default_hooks(*pair)
    entered = []
    for pack, _ in hooks:
        pack = inspect.unwrap(pack)
        if not inspect.isfunction(pack) or pack.__module__ != "torch.utils.checkpoint":
            continue
        held = inspect.getclosurevars(pack).nonlocals
        if "frame" in held:
            entered.append(held["frame"])
        elif "target_frame_ref" in held:
            return entered, held["target_frame_ref"]()
    return entered, None


def _functions_on_the_stack() -> tuple[list[object], object | None]:
    """``ctx`` of the autograd.Functions that run this call in their forward, and of the one that does in backward."""
    entered: list[object] = []
    frame = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name in ("forward", "backward") and code.co_argcount:
            ctx = frame.f_locals.get(code.co_varnames[0])
            if isinstance(ctx, BackwardCFunction):
                if code.co_name == "backward":
                    return entered, ctx
                if ctx.next_functions:  # autograd will want the gradient
                    entered.append(ctx)
        frame = frame.f_back
    return entered, None
