"""OnlineNorm at the end of a residual block and on its shortcut, their sum and its ReLU, one kernel each way.

Forward reads the inputs of both norms and writes relu(norm(x) + norm(shortcut's x)) and its ReLU's bits; what the
shortcut's norm gives never goes through memory. Backward reads the gradient once for both, and writes those of both
inputs; where that does not pay (``tiling.SHORTCUT_TUNINGS``), it is a kernel of each layer. Both layers have a state of
their own and the same constants.
"""

import torch
from torch import Tensor

from onlinenorm.ops.derivatives import differentiable_once
from onlinenorm.ops.fused import inductor_pass, single_read
from onlinenorm.ops.fused.operators import fake, like, operator
from onlinenorm.ops.repetition import check_first_pass
from onlinenorm.ops.spec import NormSpec


def supports(x: Tensor, shortcut_x: Tensor, spec: NormSpec) -> bool:
    """Whether to use these kernels: where single-read kernels serve and forward pays, for inputs alike."""
    if not _pays("forward", x, spec):
        return False
    if shortcut_x.shape != x.shape or shortcut_x.dtype != x.dtype:
        return False
    if not single_read.supports(x, spec, shortcut=True):
        return False
    return not torch.compiler.is_compiling() or inductor_pass.install()


def of_shortcut_alone(spec: NormSpec) -> NormSpec:
    """The constants of the second layer, where it is served by a kernel of its own."""
    # not by dataclasses.replace, which not every torch traces
    fields = *spec.as_arguments(), *spec.peers, spec.shortcut_mailbox
    return NormSpec(*fields)


def _pays(direction: str, x: Tensor, spec: NormSpec) -> bool:
    """Whether one kernel for both layers is faster than two."""
    samples, _, height, width = x.shape
    scaled = spec.error_compensation == "layer_scaling"
    return single_read.shortcut_tuning_for(direction, scaled, samples, height * width) is not None


@operator("running_mean", "running_var", "shortcut_mean", "shortcut_var")
def fused_shortcut_forward(
    x: Tensor,
    shortcut_x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    shortcut_weight: Tensor | None,
    shortcut_bias: Tensor | None,
    shortcut_mean: Tensor,
    shortcut_var: Tensor,
    alpha_fwd: float,
    alpha_bkw: float,
    eps: float,
    error_compensation: str,
    clamp_value: float,
    layer_scaling_eps: float,
    layer_scaling_group_size: int | None,
    gradient_scale: float,
    processes: int = 1,
    group: str = "",
    mailbox: int = 0,
    shortcut_mailbox: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, the tables of both layers as of ``single_read.forward`` (2, rows, 2 C), and the ReLU's bits."""
    spec = NormSpec(
        alpha_fwd, alpha_bkw, eps, error_compensation, clamp_value, layer_scaling_eps, layer_scaling_group_size,
        gradient_scale, processes, group, (), mailbox, shortcut_mailbox,
    )  # fmt: skip
    check_first_pass()
    with torch.cuda.device_of(x):
        y, mask = torch.empty_like(x), _mask(x)
        tables = single_read.launch_forward(
            (x, like(shortcut_x, x)), ("RELU", "RESIDUAL", "SHORTCUT"), spec, (weight, bias, running_mean, running_var),
            y, mask, (shortcut_weight, shortcut_bias, shortcut_mean, shortcut_var),
        )  # fmt: skip
    return y, tables, mask


def _mask(x: Tensor) -> Tensor:
    return torch.empty(single_read.mask_size(x), dtype=torch.uint8, device=x.device)


@fake(fused_shortcut_forward)
def _(x, *rest):
    samples, channels = x.shape[:2]
    error_compensation, processes = rest[12], rest[17] if len(rest) > 17 else 1
    rows = single_read.table_rows(samples * processes, channels, error_compensation)
    return torch.empty_like(x), x.new_empty((2, rows, 2 * channels), dtype=torch.float32), _mask(x)


@operator("control_u", "control_v", "shortcut_u", "shortcut_v")
def fused_shortcut_backward(
    grad: Tensor,
    skip_grad: Tensor | None,
    x: Tensor,
    shortcut_x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shortcut_weight: Tensor | None,
    shortcut_bias: Tensor | None,
    tables: Tensor,
    mask: Tensor,
    control_u: Tensor,
    control_v: Tensor,
    shortcut_u: Tensor,
    shortcut_v: Tensor,
    alpha_fwd: float,
    alpha_bkw: float,
    eps: float,
    error_compensation: str,
    clamp_value: float,
    layer_scaling_eps: float,
    layer_scaling_group_size: int | None,
    gradient_scale: float,
    processes: int = 1,
    group: str = "",
    mailbox: int = 0,
    shortcut_mailbox: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of both inputs, then of weight and bias of each layer, from grad + skip_grad of the output."""
    spec = NormSpec(
        alpha_fwd, alpha_bkw, eps, error_compensation, clamp_value, layer_scaling_eps, layer_scaling_group_size,
        gradient_scale, processes, group, (), mailbox, shortcut_mailbox,
    )  # fmt: skip
    tensors = (grad, x, shortcut_x) if skip_grad is None else (grad, x, shortcut_x, skip_grad)
    inputs: tuple[Tensor, ...] = tuple(tensor.contiguous(memory_format=torch.channels_last) for tensor in tensors)
    if not _pays("backward", x, spec):
        other_grad = inputs[3] if len(inputs) > 3 else None
        layer = weight, bias, tables[:1], control_u, control_v
        shortcut = shortcut_weight, shortcut_bias, tables[1:], shortcut_u, shortcut_v
        with torch.cuda.device_of(x):
            grad_x, residual, *of_layer = single_read.backward(
                inputs[0], other_grad, inputs[1], mask, *layer, spec, relu=True
            )
            assert residual is not None, "there is a mask"
            grad_shortcut_x, _, *of_shortcut = single_read.backward(
                residual, None, inputs[2], None, *shortcut, of_shortcut_alone(spec), relu=False
            )
        return grad_x, grad_shortcut_x, of_layer[0], of_layer[1], of_shortcut[0], of_shortcut[1]
    flags = ("RELU", "RESIDUAL", "SHORTCUT") + ("SKIP_GRAD",) * (skip_grad is not None)
    with torch.cuda.device_of(x):
        grad_shortcut_x = torch.empty_like(inputs[1])
        grad_x, grad_weight, grad_bias, *of_shortcut = single_read.launch_backward(
            inputs, flags, spec, (weight, bias, control_u, control_v), tables, single_read.aligned(mask),
            grad_shortcut_x, (shortcut_weight, shortcut_bias, shortcut_u, shortcut_v),
        )  # fmt: skip
    return grad_x, grad_shortcut_x, grad_weight, grad_bias, of_shortcut[0], of_shortcut[1]


@fake(fused_shortcut_backward)
def _(grad, skip_grad, x, *rest):
    of_parameters = [x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(4)]
    return torch.empty_like(x), torch.empty_like(x), *of_parameters


def _exchange(spec: NormSpec) -> tuple[int, str, int, int]:
    return spec.processes, spec.group, spec.mailbox, spec.shortcut_mailbox


class OnlineNormShortcut(torch.autograd.Function):
    """Training step of both layers; saves their inputs, tables and the ReLU's bits."""

    @staticmethod
    def forward(ctx, x, shortcut_x, weight, bias, mean, var, u, v, *rest):
        *shortcut, spec = rest
        y, tables, mask = fused_shortcut_forward(
            x, shortcut_x, weight, bias, mean, var, *shortcut[:4], *spec.as_arguments(), *_exchange(spec)
        )
        ctx.save_for_backward(x, shortcut_x, weight, bias, *shortcut[:2], tables, mask)
        # Not saved tensors: they may move between forward and backward (two forward passes before one backward).
        ctx.controls, ctx.spec = (u, v, *shortcut[4:]), spec
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, grad):
        grad_x, grad_shortcut_x, *found = fused_shortcut_backward(
            grad, None, *saved, *ctx.controls, *ctx.spec.as_arguments(), *_exchange(ctx.spec)
        )
        parameters = saved[2:6]
        weight, bias, shortcut_weight, shortcut_bias = (
            None if parameter is None else gradient.to(parameter.dtype)
            for parameter, gradient in zip(parameters, found, strict=True)
        )
        state = (None,) * 4
        return grad_x, grad_shortcut_x, weight, bias, *state, shortcut_weight, shortcut_bias, *state, None
