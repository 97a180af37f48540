"""The gradient of a training pass is found by a control process, which has no derivative of its own."""

import functools
from collections.abc import Callable

import torch

_TWICE = (
    "OnlineNorm in training mode cannot be differentiated twice (once_differentiable): its backward pass is a control "
    "process and has no derivative; for a gradient penalty call eval() on the norms, or use norms without state"
)
_BATCHED = (
    "OnlineNorm: in training mode samples follow each other and state moves, which vmap (here by is_grads_batched or "
    "vectorize) cannot follow; call eval() on the layer, or take gradients one after the other"
)


class _NoDerivative(torch.autograd.Function):
    """The first ``count`` tensors as they are, and an error where they are differentiated by any of all tensors."""

    @staticmethod
    def forward(ctx, count, *tensors):
        return tensors[:count]

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError(_TWICE)


def differentiable_once(backward: Callable) -> Callable:
    """Make ``backward(ctx, saved, *gradients)`` the backward of an autograd.Function, by which saved tensors are given.

    As torch's ``once_differentiable``, which does not notice that a gradient depends on what was saved for it, nor that
    it is differentiated by chosen inputs alone. Tensors by which the gradient could be differentiated must be saved.
    """

    @functools.wraps(backward)
    def wrapper(ctx, *gradients):
        saved = ctx.saved_tensors  # once: checkpointing gives them up as it does
        if torch.compiler.is_compiling():
            with torch.no_grad():
                return backward(ctx, saved, *gradients)
        if any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in gradients):
            raise RuntimeError(_BATCHED)
        with torch.no_grad():
            found = backward(ctx, saved, *gradients)
        return _NoDerivative.apply(len(found), *found, *gradients, *saved) if torch.is_grad_enabled() else found

    return wrapper
