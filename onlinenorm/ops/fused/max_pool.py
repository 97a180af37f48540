"""OnlineNorm, ReLU and the 3x3 max-pool of stride 2 that follows them in ImageNet networks, one kernel each way.

Forward reads x and writes pooled pixels, with 4 bits each that name the pixel of the window that was taken; backward
reads those, the pooled gradient and x. The largest of unrounded values is taken, the first among equals, as torch does;
where 16-bit rounding makes values equal, torch's takes the first of those.
"""

import torch
from torch import Tensor

from onlinenorm.ops.derivatives import differentiable_once
from onlinenorm.ops.fused import inductor_pass, single_read
from onlinenorm.ops.fused.operators import fake, operator
from onlinenorm.ops.repetition import check_first_pass
from onlinenorm.ops.spec import NormSpec

MOST_COLUMNS = 176  # of an image, for two stages of a ring in shared memory
FEWEST_PIXELS = 28 * 28  # of an image, from which on it pays


def supports(x: Tensor, spec: NormSpec) -> bool:
    """Whether to use these kernels: where single-read kernels serve, for even sizes neither small nor wide."""
    height, width = x.shape[2:]
    if height % 2 or width % 2 or width > MOST_COLUMNS or height * width < FEWEST_PIXELS:
        return False
    if not single_read.supports(x, spec) or (torch.compiler.is_compiling() and not inductor_pass.install()):
        return False
    # Tiles of layer scaling wait for one another: a pair of image rows each at worst, two in a CTA.
    return spec.error_compensation != "layer_scaling" or height // 2 <= 2 * single_read.ctas_per_slab(x)


def _pooled(x: Tensor) -> tuple[int, int, int, int]:
    samples, channels, height, width = x.shape
    return samples, channels, height // 2, width // 2


def _like_pooled(x: Tensor) -> Tensor:
    return torch.empty(_pooled(x), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _indices(x: Tensor) -> Tensor:
    return torch.empty(x.numel() // 8, dtype=torch.uint8, device=x.device)


@operator("running_mean", "running_var")
def fused_max_pool_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    alpha_fwd: float,
    alpha_bkw: float,
    eps: float,
    error_compensation: str,
    clamp_value: float,
    layer_scaling_eps: float,
    layer_scaling_group_size: int | None,
    gradient_scale: float,
    processes: int,
    group: str = "",
    counts: list[int] | None = None,
    mailbox: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled output, the table of ``single_read.forward``, and the indices (C / 64, N, pooled pixels, 32 bytes)."""
    spec = NormSpec(
        alpha_fwd, alpha_bkw, eps, error_compensation, clamp_value, layer_scaling_eps, layer_scaling_group_size,
        gradient_scale, processes, group, tuple(counts or ()), mailbox,
    )  # fmt: skip
    check_first_pass()
    with torch.cuda.device_of(x):
        y, indices = _like_pooled(x), _indices(x)
        layer = weight, bias, running_mean, running_var
        tables = single_read.launch_forward((x,), ("RELU", "POOL"), spec, layer, y, indices)
    return y, tables, indices


@fake(fused_max_pool_forward)
def _(
    x, weight, bias, running_mean, running_var, alpha_fwd, alpha_bkw, eps, error_compensation, clamp_value,
    layer_scaling_eps, layer_scaling_group_size, gradient_scale, processes, *rest,
):  # fmt: skip
    samples, channels = x.shape[:2]
    rows = single_read.table_rows(samples * processes, channels, error_compensation)
    table = x.new_empty((1, rows, 2 * channels), dtype=torch.float32)
    return _like_pooled(x), table, _indices(x)


@operator("control_u", "control_v")
def fused_max_pool_backward(
    grad: Tensor,
    skip_grad: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    tables: Tensor,
    indices: Tensor,
    control_u: Tensor,
    control_v: Tensor,
    alpha_fwd: float,
    alpha_bkw: float,
    eps: float,
    error_compensation: str,
    clamp_value: float,
    layer_scaling_eps: float,
    layer_scaling_group_size: int | None,
    gradient_scale: float,
    processes: int,
    group: str = "",
    counts: list[int] | None = None,
    mailbox: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias from that of the pooled output, grad + skip_grad."""
    spec = NormSpec(
        alpha_fwd, alpha_bkw, eps, error_compensation, clamp_value, layer_scaling_eps, layer_scaling_group_size,
        gradient_scale, processes, group, tuple(counts or ()), mailbox,
    )  # fmt: skip
    last = {"memory_format": torch.channels_last}
    grads: tuple[Tensor, ...] = grad.contiguous(**last), x.contiguous(**last)
    if skip_grad is not None:
        grads += (skip_grad.contiguous(**last),)
    flags = ("RELU", "POOL") + ("SKIP_GRAD",) * (skip_grad is not None)
    with torch.cuda.device_of(x):
        layer = weight, bias, control_u, control_v
        grad_x, grad_weight, grad_bias = single_read.launch_backward(grads, flags, spec, layer, tables, indices)
    return grad_x, grad_weight, grad_bias


@fake(fused_max_pool_backward)
def _(grad, skip_grad, x, *rest):
    of_channels = {"dtype": torch.float32}
    return torch.empty_like(x), x.new_empty(x.shape[1], **of_channels), x.new_empty(x.shape[1], **of_channels)


class OnlineNormMaxPool(torch.autograd.Function):
    """Training step; saves x, the table and the indices."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, control_u, control_v, spec):
        arguments = *spec.as_arguments(), *spec.peers, spec.mailbox
        y, tables, indices = fused_max_pool_forward(x, weight, bias, running_mean, running_var, *arguments)
        ctx.save_for_backward(x, weight, bias, tables, indices)
        # Not saved tensors: they may move between forward and backward (two forward passes before one backward).
        ctx.control_u, ctx.control_v, ctx.spec = control_u, control_v, spec
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, grad):
        x, weight, bias, tables, indices = saved
        grad_x, grad_weight, grad_bias = fused_max_pool_backward(
            grad, None, x, weight, bias, tables, indices, ctx.control_u, ctx.control_v, *ctx.spec.as_arguments(),
            *ctx.spec.peers, ctx.spec.mailbox,
        )  # fmt: skip
        grad_weight = None if weight is None else grad_weight.to(weight.dtype)
        grad_bias = None if bias is None else grad_bias.to(bias.dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None, None
