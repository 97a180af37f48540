"""Programs that look into a layer: torch.fx, torch.func, torch.export, torch.jit, torch.autograd.forward_ad."""

import functools

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from onlinenorm.ops.distributed import constant_when_compiled


class LeafOfGraphs(nn.Module):
    """A layer whose call torch.fx takes as one node, hooks and subclasses included, like those of torch.nn."""

    def __call__(self, *arguments, **keywords):
        for argument in (*arguments, *keywords.values()):
            if isinstance(argument, torch.fx.Proxy):
                tracer = argument.tracer  # which may note whose call a node belongs to
                return tracer.call_module(self, functools.partial(self._as_node, tracer), arguments, keywords)
        return super().__call__(*arguments, **keywords)

    def _as_node(self, tracer: torch.fx.Tracer, *arguments, **keywords) -> torch.fx.Proxy:
        return tracer.create_proxy("call_module", tracer.path_of_module(self), arguments, keywords)


@constant_when_compiled
def _exports() -> bool:
    return torch.compiler.is_exporting()  # traced by torch 2.11, it is True for all that is compiled


def check_training_is_differentiated_once(layer: nn.Module, x: Tensor) -> None:
    """Raises RuntimeError under what would need a derivative of the training pass, or would drop its backward pass."""
    name = type(layer).__name__
    if _exports():
        raise RuntimeError(
            f"{name}: an exported program holds the forward pass alone, and in training mode the backward pass is not "
            "its derivative; call eval() before torch.export"
        )
    if torch.compiler.is_compiling():
        return
    if torch.jit.is_tracing():
        raise RuntimeError(f"{name}: torch.jit.trace would record one training batch as a constant; call eval() first")
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{name}: in training mode samples follow each other and state moves, which torch.func transforms (grad, "
            "vmap, jvp, ...) cannot follow; call eval() on the layer, or take gradients by backward()"
        )
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise RuntimeError(
            f"{name}: in training mode gradients are those of a control process in the backward pass, and there are "
            "none in forward mode; call eval() on the layer, or take gradients by backward()"
        )
