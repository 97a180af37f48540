"""The gradient of a training pass is found by a control process, which has no derivative of its own."""

import functools
from collections.abc import Callable

import torch

_MESSAGE = (
    b"OnlineNorm in training mode cannot be differentiated twice (once_differentiable): its backward pass is a control "
    b"process and has no derivative; for a gradient penalty call eval() on the norms, or use norms without state"
)


def differentiable_once(backward: Callable) -> Callable:
    """As torch's ``once_differentiable``, which does not notice that a gradient depends on what was saved for it.

    That goes unnoticed where the gradient coming in is a constant, as behind the last layer of a network.
    """

    @functools.wraps(backward)
    def wrapper(ctx, *gradients):
        with torch.no_grad():
            found = backward(ctx, *gradients)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return found
        fails = torch._C._functions.DelayedError(_MESSAGE, len(found))
        return fails(*[None if gradient is None else gradient.detach().requires_grad_() for gradient in found])

    return wrapper
