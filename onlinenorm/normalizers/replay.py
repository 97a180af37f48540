"""Statistics that a pass started from, for when activation checkpointing repeats it inside backward."""

import inspect
import sys
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

Statistics = tuple[Tensor, Tensor]


class Replay:
    """What the passes of one layer through checkpointed regions started from, as long as their graphs live.

    Non-reentrant checkpointing runs a region's first pass under a pair of hooks of its own on what autograd saves, and
    its repetition out of the second of them: that hook tells which pass is repeated, however many regions use the layer
    and in whatever order they come back.
    """

    def __init__(self):
        self._passes: list[tuple[weakref.ref, Statistics]] = []

    def first_pass(self, statistics: Statistics) -> Statistics:
        """``statistics`` themselves, remembered if this pass is one that may be repeated."""
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        if hooks is not None and inspect.isfunction(hooks[1]):
            kept = tuple(tensor.clone() for tensor in statistics)
            self._passes = [entry for entry in self._passes if entry[0]() is not None]
            self._passes.append((weakref.ref(hooks[1]), kept))
        return statistics

    def repeated_pass(self) -> Statistics | None:
        """Copies of what the pass now repeated started from; None for a pass that is none of those remembered."""
        for i, (hook, kept) in enumerate(self._passes):
            if (function := hook()) is not None and _called_out_of(function):
                self._passes.append(self._passes.pop(i))  # a layer used twice in a region is repeated in that order
                return tuple(tensor.clone() for tensor in kept)
        return None


def _called_out_of(function: Callable) -> bool:
    """Whether a call of this very closure, not only of its code, is on the stack."""
    function = inspect.unwrap(function)
    code, cells = function.__code__, function.__closure__ or ()
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is code:
            values = frame.f_locals
            if all(values.get(name) is cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)):
                return True
        frame = frame.f_back
    return False
