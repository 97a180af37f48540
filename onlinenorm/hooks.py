"""What hangs on modules besides their classes."""

from torch import nn
from torch.nn.modules.module import _has_any_global_hook


def are_untouched(*modules: nn.Module) -> bool:
    """Whether calls of these are their classes' ``forward`` and no more: no hook, none put in its place on one."""
    return not _has_any_global_hook() and not any(
        "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        for module in modules
    )
