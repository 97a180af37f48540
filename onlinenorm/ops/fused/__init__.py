"""OnlineNorm as GPU kernels: same function and signatures as ``reference`` and ``vectorized``.

Importing this package imports Triton. On a machine without a GPU the kernels run in Triton's interpreter when
``TRITON_INTERPRET=1`` is set before the first import. Under torch.compile the first training pass puts
``inductor_pass`` into Inductor.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from onlinenorm.errors import ArgumentError
from onlinenorm.ops import vectorized
from onlinenorm.ops.fused import inductor_pass, max_pool, shortcut
from onlinenorm.ops.fused.kernels.forward import apply_kernel
from onlinenorm.ops.fused.operators import OnlineNormFunction, dense, fused_evaluate
from onlinenorm.ops.spec import NormSpec

__all__ = ["evaluate", "train_step", "train_step_max_pool", "train_step_shortcut"]

INTERPRETED = "Interpreted" in type(apply_kernel).__name__  # by Triton, on the CPU
Layer = tuple[Tensor | None, Tensor | None, Tensor, Tensor, Tensor, Tensor]  # weight, bias, mean, variance, u, v
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def train_step(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    control_u: Tensor,
    control_v: Tensor,
    spec: NormSpec,
    relu: bool = False,
) -> Tensor:
    """relu(norm(x) + residual) in training mode for (N, C, H, W), in one fused operator each way.

    Same contract as ``reference.train_step``. float64 (input or state) is served by the PyTorch backend. A residual of
    another dtype than x is converted first.
    """
    state = running_mean, running_var, control_u, control_v
    _check_device(x)
    if not _kernels_serve(x, running_mean):
        return vectorized.train_step(x, residual, weight, bias, *state, spec, relu)
    if torch.compiler.is_compiling():
        inductor_pass.install()
    residual = None if residual is None else residual.to(x.dtype)
    return OnlineNormFunction.apply(dense(x), residual, weight, bias, *state, spec, relu)


def train_step_max_pool(
    x, residual, weight, bias, running_mean, running_var, control_u, control_v, spec, relu
) -> Tensor:
    """max_pool2d(train_step(...), kernel_size=3, stride=2, padding=1), in one operator each way where there is one."""
    state = running_mean, running_var, control_u, control_v
    if relu and residual is None and _kernels_serve(x, running_mean) and max_pool.supports(x, spec):
        return max_pool.OnlineNormMaxPool.apply(x, weight, bias, *state, spec)
    return F.max_pool2d(train_step(x, residual, weight, bias, *state, spec, relu), 3, 2, 1)


def train_step_shortcut(x: Tensor, shortcut_x: Tensor, layer: Layer, shortcut_layer: Layer, spec: NormSpec) -> Tensor:
    """relu(norm(x) + norm(shortcut_x)) of two layers of equal constants, in one operator each way if there is one."""
    if _kernels_serve(x, layer[2]) and _kernels_serve(x, shortcut_layer[2]) and shortcut.supports(x, shortcut_x, spec):
        return shortcut.OnlineNormShortcut.apply(x, shortcut_x, *layer, *shortcut_layer, spec)
    residual = train_step(shortcut_x, None, *shortcut_layer, shortcut.of_shortcut_alone(spec))
    return train_step(x, residual, *layer, spec, True)


def evaluate(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    spec: NormSpec,
    relu: bool = False,
) -> Tensor:
    """relu(norm(x) + residual) with frozen statistics; one kernel, or ordinary PyTorch where gradients are wanted."""
    _check_device(x)
    inputs = (x, residual, weight, bias)
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    if differentiable or transformed or not _kernels_serve(x, running_mean) or x.numel() == 0:
        return vectorized.evaluate(x, residual, weight, bias, running_mean, running_var, spec, relu)
    residual = None if residual is None else residual.to(x.dtype)
    return fused_evaluate(dense(x), residual, weight, bias, running_mean, running_var, relu, *spec.as_arguments())


def _check_device(x: Tensor) -> None:
    if x.device.type == "cpu" and not INTERPRETED:
        raise ArgumentError(
            "backend", "'fused' needs a GPU, and this input is on the CPU; use backend='auto' or 'torch'"
        )


def _kernels_serve(x: Tensor, state: Tensor) -> bool:
    return x.dtype in KERNEL_DTYPES and state.dtype == torch.float32
