"""The fused kernels as torch operators: what they mutate, what they return, and how gradients flow."""

from collections.abc import Callable

import torch
from torch import Tensor

from onlinenorm.ops.derivatives import differentiable_once
from onlinenorm.ops.distributed import total_samples
from onlinenorm.ops.fused import single_read as single_read_path
from onlinenorm.ops.fused import two_pass as two_pass_path
from onlinenorm.ops.repetition import check_first_pass
from onlinenorm.ops.spec import NormSpec


def dense(x: Tensor) -> Tensor:
    """x itself if it is dense in channels_last or channels-first order, else a copy that is."""
    if x.is_contiguous(memory_format=torch.channels_last) or x.is_contiguous():
        return x
    return x.contiguous()


def like(tensor: Tensor, x: Tensor) -> Tensor:
    """``tensor`` in the memory order of x, which is dense."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    return tensor.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def spread(value: Tensor, x: Tensor) -> Tensor:
    """``value`` (N, C, 1, 1) at every pixel, in the memory order of x, which is dense."""
    numbers = 16 // x.element_size()  # moved as one: torch's kernel for what repeats goes from element to element
    value = value.reshape(x.shape[:2])
    if x.shape[1] % numbers or not x.is_contiguous(memory_format=torch.channels_last):
        return like(value[..., None, None].expand_as(x), x)
    samples, channels, height, width = x.shape
    rows, value = x.new_empty(samples, height, width, channels), value.contiguous()
    if value.data_ptr() % 16 or value.storage_offset() % numbers:
        value = value.clone()
    rows.view(torch.complex128).copy_(value[:, None, None].view(torch.complex128))
    return rows.permute(0, 3, 1, 2)


def _or_empty(tensor: Tensor | None, x: Tensor) -> Tensor:
    """Operators return tensors only; an empty one stands for None."""
    return x.new_empty(0) if tensor is None else tensor


def _or_none(tensor: Tensor) -> Tensor | None:
    return tensor if tensor.numel() else None


_library = torch.library.Library("onlinenorm", "DEF")


def operator(*mutated: str) -> Callable[[Callable], torch._ops.OpOverload]:
    """Make a function torch's operator onlinenorm::<name>, its schema from its annotations.

    As ``torch.library.custom_op`` does, less three layers of Python around each call: half the cost of calling it, and
    of no use here, since the gradient is that of ``OnlineNormFunction`` and nothing saves a buffer for backward.
    """

    def register(function: Callable) -> torch._ops.OpOverload:
        name, schema = function.__name__, torch.library.infer_schema(function, mutates_args=mutated)
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        # Around a graph break dynamo would trace into what the dispatcher calls.
        _library.impl(name, torch._disable_dynamo(function), "CompositeExplicitAutograd")
        return getattr(torch.ops.onlinenorm, name).default

    return register


def fake(overload: torch._ops.OpOverload) -> Callable[[Callable], Callable]:
    """Shapes and strides of an operator's results, for tracing."""
    return torch.library.register_fake(overload.name(), lib=_library)


@operator("running_mean", "running_var")
def fused_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    single_read: bool,
    relu: bool,
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
    """Training forward over a dense x, with the single-read kernels if ``single_read``.

    Returns the output, the tables of the path, and what else backward needs: the bits of a ReLU behind a residual
    (single-read), 1 / zeta (M, groups) of layer scaling (two passes), or nothing. Tables are (1, rows, 2 C) of
    single-read kernels and (2, M, 2 C) of two passes, M samples of all processes. Those of four dimensions Inductor
    would take for images, and store anew in channels_last.
    """
    spec = NormSpec(
        alpha_fwd, alpha_bkw, eps, error_compensation, clamp_value, layer_scaling_eps, layer_scaling_group_size,
        gradient_scale, processes, group, tuple(counts or ()), mailbox,
    )  # fmt: skip
    check_first_pass()
    path = single_read_path if single_read else two_pass_path
    residual = None if residual is None else like(residual, x)
    with torch.cuda.device_of(x):
        y, tables, mask_or_rzeta = path.forward(x, residual, weight, bias, running_mean, running_var, spec, relu)
    return y, tables if single_read else tables.flatten(2), _or_empty(mask_or_rzeta, x)


@fake(fused_forward)
def _(
    x, residual, weight, bias, running_mean, running_var, single_read, relu, alpha_fwd, alpha_bkw, eps,
    error_compensation, clamp_value, layer_scaling_eps, layer_scaling_group_size, gradient_scale, processes, group="",
    counts=None, mailbox=0,
):  # fmt: skip
    samples, channels = total_samples(x.shape[0], processes, group, counts), x.shape[1]
    mask_or_rzeta, tables = x.new_empty(0), (2, samples, 2 * channels)
    if single_read:
        tables = 1, single_read_path.table_rows(samples, channels, error_compensation), 2 * channels
        if relu and residual is not None:
            mask_or_rzeta = x.new_empty(single_read_path.mask_size(x), dtype=torch.uint8)
    elif error_compensation == "layer_scaling":
        mask_or_rzeta = x.new_empty((samples, channels // (layer_scaling_group_size or channels)), dtype=torch.float32)
    return torch.empty_like(x), x.new_empty(tables, dtype=torch.float32), mask_or_rzeta


@operator("control_u", "control_v")
def fused_backward(
    grad: Tensor,
    skip_grad: Tensor | None,
    x: Tensor,
    out: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    tables: Tensor,
    mask_or_rzeta: Tensor,
    control_u: Tensor,
    control_v: Tensor,
    residual_gradient: bool,
    single_read: bool,
    relu: bool,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training backward of the gradient grad + skip_grad: gradients of x, residual (or nothing), weight and bias.

    A gradient that is the same for all pixels may come as (N, C, 1, 1).
    """
    spec = NormSpec(
        alpha_fwd, alpha_bkw, eps, error_compensation, clamp_value, layer_scaling_eps, layer_scaling_group_size,
        gradient_scale, processes, group, tuple(counts or ()), mailbox,
    )  # fmt: skip
    if single_read:  # hooks on saved tensors, such as save_on_cpu, may have given x back in another order
        x = x.contiguous(memory_format=torch.channels_last)
    given = grad.data_ptr()
    grad = like(grad, x) if grad.shape == x.shape else spread(grad, x)
    skip_grad, state = None if skip_grad is None else like(skip_grad, x), (control_u, control_v)
    with torch.cuda.device_of(x):
        if single_read:
            gradients = single_read_path.backward(
                grad, skip_grad, x, _or_none(mask_or_rzeta), weight, bias, tables, *state, spec, relu,
                grad.data_ptr() != given,
            )  # fmt: skip
        else:
            tables = tables.unflatten(2, (-1, 2))
            gradients = two_pass_path.backward(
                grad, skip_grad, x, out, weight, bias, tables, _or_none(mask_or_rzeta), *state, spec, relu,
                residual_gradient,
            )  # fmt: skip
    grad_x, grad_residual, grad_weight, grad_bias = gradients
    return grad_x, _or_empty(grad_residual, x), grad_weight, grad_bias


@fake(fused_backward)
def _(grad, skip_grad, x, out, weight, bias, tables, mask_or_rzeta, control_u, control_v, residual_gradient, *rest):
    channels = x.shape[1]
    table = {"dtype": torch.float32}
    return (
        torch.empty_like(x),
        torch.empty_like(x) if residual_gradient else x.new_empty(0),
        x.new_empty(channels, **table),
        x.new_empty(channels, **table),
    )


@operator()
def fused_evaluate(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    relu: bool,
    alpha_fwd: float,
    alpha_bkw: float,
    eps: float,
    error_compensation: str,
    clamp_value: float,
    layer_scaling_eps: float,
    layer_scaling_group_size: int | None,
    gradient_scale: float,
) -> Tensor:
    """Forward over a dense x with frozen statistics."""
    spec = NormSpec(
        alpha_fwd, alpha_bkw, eps, error_compensation, clamp_value, layer_scaling_eps, layer_scaling_group_size
    )
    residual = None if residual is None else like(residual, x)
    with torch.cuda.device_of(x):
        return two_pass_path.evaluate(x, residual, weight, bias, running_mean, running_var, spec, relu)


@fake(fused_evaluate)
def _(x, *rest):
    return torch.empty_like(x)


class OnlineNormFunction(torch.autograd.Function):
    """Training step; saves x and tables and recomputes the masks, but for a ReLU behind a residual."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, running_mean, running_var, control_u, control_v, spec, relu):
        single_read = single_read_path.supports(x, spec)
        y, tables, mask_or_rzeta = fused_forward(
            x, residual, weight, bias, running_mean, running_var, single_read, relu, *spec.as_arguments(), *spec.peers,
            spec.mailbox,
        )  # fmt: skip
        ctx.has_residual, ctx.single_read, ctx.relu, ctx.spec = residual is not None, single_read, relu, spec
        reads_output = relu and residual is not None and not single_read
        ctx.save_for_backward(x, y if reads_output else None, weight, bias, tables, mask_or_rzeta)
        # Not saved tensors: they may move between forward and backward (two forward passes before one backward).
        ctx.control_u, ctx.control_v = control_u, control_v
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, grad):
        x, out, weight, bias, tables, mask_or_rzeta = saved
        masked = ctx.has_residual and ctx.relu
        grad_x, grad_residual, grad_weight, grad_bias = fused_backward(
            grad, None, x, out, weight, bias, tables, mask_or_rzeta, ctx.control_u, ctx.control_v, masked,
            ctx.single_read, ctx.relu, *ctx.spec.as_arguments(), *ctx.spec.peers, ctx.spec.mailbox,
        )  # fmt: skip
        if not masked:
            grad_residual = grad if ctx.has_residual else None
        grad_weight = None if weight is None else grad_weight.to(weight.dtype)
        grad_bias = None if bias is None else grad_bias.to(bias.dtype)
        return grad_x, grad_residual, grad_weight, grad_bias, None, None, None, None, None, None
