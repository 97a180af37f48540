"""Where a training pass starts from, for when activation checkpointing repeats it inside backward.

A checkpointed region runs a first time without keeping its activations, and again when backward needs them. The first
pass moves the statistics, as without checkpointing; a repetition starts from where the first pass started, on copies.
What identifies a region is the object that torch keeps for it as long as its graph lives: the frame of non-reentrant
checkpointing, found in the hooks on saved tensors that are active in both passes, or the ``ctx`` of an
``autograd.Function`` that runs the layer in its forward and again in its backward, as reentrant checkpointing does. Of
a Function with ``setup_context`` there is no ``ctx`` yet while its forward runs.
"""

import inspect
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, Function

from onlinenorm.normalizers.batch_sizes import Sizes

_graph = torch._C._autograd
_BACKWARD = {  # frames of these run the backward of the Function whose ``ctx`` they are given
    method.__code__ for name in ("apply", "apply_boxed") if (method := getattr(BackwardCFunction, name, None))
}


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
    the layer had no training pass, or where it cannot be told which passes a region repeats.
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
    elif learns and isinstance(repeated, BackwardCFunction) and _hides_its_context(repeated):
        raise RuntimeError(
            f"{type(layer).__name__}: the autograd.Function {_function_of(repeated).__name__} runs the layer in its "
            "backward, and as its forward has no ctx, from which statistics it should start cannot be told; define "
            "forward(ctx, ...) in place of setup_context, or use torch.utils.checkpoint"
        )
    elif passes is not None and isinstance(repeated, BackwardCFunction):
        raise RuntimeError(
            f"{type(layer).__name__}: the layer runs under torch.no_grad() in a region that reentrant checkpointing "
            "repeats, and whose first run, all under no_grad, has counted that batch too; use use_reentrant=False, or "
            "take this call out of the region"
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
    contexts: list[BackwardCFunction] = []
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        ctx = _first_argument(frame)
        if isinstance(ctx, BackwardCFunction):
            if frame.f_code in _BACKWARD:
                return _entered(contexts, ctx), ctx
            contexts.append(ctx)
        frame = frame.f_back
    return _entered(contexts), None


def _first_argument(frame: FrameType) -> object:
    code = frame.f_code
    if code.co_argcount:
        return frame.f_locals.get(code.co_varnames[0])
    if code.co_flags & inspect.CO_VARARGS:
        return next(iter(frame.f_locals.get(code.co_varnames[code.co_kwonlyargcount], ())), None)
    return None


def _entered(contexts: list[BackwardCFunction], repeated: BackwardCFunction | None = None) -> list[object]:
    """Each once, but for the one repeated and those whose gradient autograd will not want."""
    return [ctx for ctx in dict.fromkeys(contexts) if ctx is not repeated and ctx.next_functions]


def _hides_its_context(ctx: BackwardCFunction) -> bool:
    return _function_of(ctx).setup_context is not Function.setup_context


def _function_of(ctx: BackwardCFunction) -> type[Function]:
    return ctx._forward_cls  # type: ignore[attr-defined]  # set by the metaclass of Function
