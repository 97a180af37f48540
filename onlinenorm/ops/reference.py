r"""OnlineNorm as a loop over samples: the definition of correct that the other backends are held to.

For sample n of channel c, with k = 1 - alpha_bkw, s = sqrt(var + eps) and the state (mean m, variance var, controls
u and v) as the samples before n left it::

    forward    y = (x - m) / s                          d = mean(x) - m
               var <- a var + (1 - a) Var(x) + a (1 - a) d^2          m <- m + (1 - a) d           (a = alpha_fwd)
    affine     w = weight * y + bias
    compensate clamp: z = min(max(w, -c), c)    layer scaling: z = w / zeta, zeta^2 = eps_ls + mean of w^2 (group, H, W)
    backward   g = gradient with respect to y (through error compensation and affine)
               t = g - k v y                            v <- v + mean(t y)
               gx = t / s - k u                         u <- u + mean(gx)

A sample whose v or u would not be finite (its gradient overflowed, as under a loss scale that is too large) leaves both
as they were; the gradients it passes on are not finite, for the scaler to see.

The backward pass is a control process that keeps gradients orthogonal to y and to 1 on average over the stream of
samples. It is not the derivative of the forward pass, so gradcheck does not apply. At a tie |w| = c the clamp passes no
gradient. Sources: Chiley et al., Online Normalization for Training Neural Networks, arXiv:1905.05894, and the numpy
code that accompanies it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from onlinenorm.errors import ArgumentError
from onlinenorm.ops.derivatives import differentiable_once
from onlinenorm.ops.repetition import check_first_pass
from onlinenorm.ops.spec import NormSpec


def compute_dtype(x: Tensor, state: Tensor) -> torch.dtype:
    """Precision inside an op: float64 where input or state has it, else float32."""
    return torch.float64 if torch.float64 in (x.dtype, state.dtype) else torch.float32


def add_residual_relu(z: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """relu(z + residual), each part only where asked for; the result keeps the dtype of z."""
    if residual is not None:
        z = z + residual.to(z.dtype)
    return torch.relu(z) if relu else z


def per_channel(values_C: Tensor) -> Tensor:
    """(..., C) -> (..., C, 1, 1), to broadcast over the pixels."""
    return values_C[..., None, None]


def channel_groups(values_C: Tensor, spec: NormSpec) -> Tensor:
    """Mean of (..., C) over each layer-scaling group, repeated back to (..., C)."""
    channels = values_C.shape[-1]
    size = spec.layer_scaling_group_size or channels
    grouped = values_C.reshape(*values_C.shape[:-1], channels // size, size)
    return grouped.mean(-1, keepdim=True).expand_as(grouped).reshape(values_C.shape)


def layer_scale(w_NCHW: Tensor, spec: NormSpec) -> Tensor:
    """zeta (N, C): root mean square of w over channel group and pixels."""
    return torch.sqrt(channel_groups(w_NCHW.square().mean((-2, -1)), spec) + spec.layer_scaling_eps)


def apply_error_compensation(w_NCHW: Tensor, spec: NormSpec) -> Tensor:
    """Apply the error compensation to affine outputs, differentiably (the eval-mode path of every PyTorch backend)."""
    if spec.error_compensation == "clamp":
        return F.hardtanh(w_NCHW, -spec.clamp_value, spec.clamp_value)  # no gradient at a tie, as in training
    if spec.error_compensation == "layer_scaling":
        return w_NCHW / per_channel(layer_scale(w_NCHW, spec))
    return w_NCHW


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
    """Normalise (N, C, H, W) with frozen statistics; gradients are the ordinary ones and no state changes."""
    dtype = compute_dtype(x, running_mean)
    mean_C, var_C = running_mean.to(dtype), running_var.to(dtype)
    scale_C = torch.rsqrt(var_C + spec.eps)
    if weight is not None:
        scale_C = scale_C * weight.to(dtype)
    w = (x.to(dtype) - per_channel(mean_C)) * per_channel(scale_C)
    if bias is not None:
        w = w + per_channel(bias.to(dtype))
    return add_residual_relu(apply_error_compensation(w, spec).to(x.dtype), residual, relu)


def affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """w = weight * y + bias per channel; None stands for 1 and 0."""
    if weight is not None:
        y = y * per_channel(weight.to(y.dtype))
    return y if bias is None else y + per_channel(bias.to(y.dtype))


def move_if_finite(u: Tensor, v: Tensor, next_u: Tensor, next_v: Tensor) -> tuple[Tensor, Tensor]:
    """(next_u, next_v) in channels where both are finite, (u, v) in the others."""
    moves = next_u.isfinite() & next_v.isfinite()
    return torch.where(moves, next_u, u), torch.where(moves, next_v, v)


# Custom operators make the loops opaque to torch.compile, and declare which state they move.
@torch.library.custom_op("onlinenorm::reference_forward", mutates_args=("running_mean", "running_var"))
def forward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Training forward over (N, C, H, W): output z, normalised y, deviations s (N, C); moves mean and variance."""
    check_first_pass()
    spec = NormSpec(
        alpha_fwd, alpha_bkw, eps, error_compensation, clamp_value, layer_scaling_eps, layer_scaling_group_size
    )
    dtype = compute_dtype(x, running_mean)
    a = alpha_fwd
    m, var = running_mean.to(dtype, copy=True), running_var.to(dtype, copy=True)
    y, s_NC = torch.empty_like(x, dtype=dtype), x.new_empty(x.shape[:2], dtype=dtype)
    for n, x_CHW in enumerate(x.to(dtype)):
        s_NC[n] = torch.sqrt(var + eps)
        y[n] = (x_CHW - per_channel(m)) / per_channel(s_NC[n])
        q, mu = torch.var_mean(x_CHW, (1, 2), correction=0)
        d = mu - m
        var = a * var + (1 - a) * q + a * (1 - a) * d * d
        m = m + (1 - a) * d
    running_mean.copy_(m)
    running_var.copy_(var)
    z = torch.empty_like(x).copy_(apply_error_compensation(affine(y, weight, bias), spec))
    return z, y, s_NC


@forward.register_fake
def _(x, weight, bias, running_mean, running_var, *spec):
    dtype = compute_dtype(x, running_mean)
    return torch.empty_like(x), torch.empty_like(x, dtype=dtype), x.new_empty(x.shape[:2], dtype=dtype)


@torch.library.custom_op("onlinenorm::reference_backward", mutates_args=("control_u", "control_v"))
def backward(
    grad_z: Tensor,
    y: Tensor,
    s_NC: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Training backward: gradients of x, weight and bias from that of z; moves the controls u and v."""
    spec = NormSpec(
        alpha_fwd, alpha_bkw, eps, error_compensation, clamp_value, layer_scaling_eps, layer_scaling_group_size
    )
    k = 1 - alpha_bkw
    g = grad_z.to(y.dtype)
    w = affine(y, weight, bias)
    if error_compensation == "clamp":
        g = torch.where(w.abs() < clamp_value, g, 0)
    elif error_compensation == "layer_scaling":
        zeta = per_channel(layer_scale(w, spec))
        z = w / zeta
        g = (g - z * per_channel(channel_groups((g * z).mean((2, 3)), spec))) / zeta
    grad_weight, grad_bias = (g * y).sum((0, 2, 3)), g.sum((0, 2, 3))
    if weight is not None:
        g = g * per_channel(weight.to(y.dtype))
    u, v = control_u.to(y.dtype, copy=True), control_v.to(y.dtype, copy=True)
    grad_x = torch.empty_like(y)
    for n in range(len(y)):
        t = g[n] * gradient_scale - per_channel(k * v) * y[n]
        gx = t / per_channel(s_NC[n]) - per_channel(k * u)
        grad_x[n] = gx / gradient_scale
        u, v = move_if_finite(u, v, u + gx.mean((1, 2)), v + (t * y[n]).mean((1, 2)))
    control_u.copy_(u)
    control_v.copy_(v)
    return grad_x.to(grad_z.dtype, copy=True), grad_weight, grad_bias


@backward.register_fake
def _(grad_z, y, s_NC, *rest):
    return torch.empty_like(y, dtype=grad_z.dtype), s_NC.new_empty(y.shape[1]), s_NC.new_empty(y.shape[1])


class _OnlineNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, control_u, control_v, spec):
        z, y, s_NC = forward(x, weight, bias, running_mean, running_var, *spec.as_arguments())
        ctx.save_for_backward(x, y, s_NC, weight, bias)
        # Not saved tensors: they may move between forward and backward (two forward passes before one backward).
        ctx.control_u, ctx.control_v, ctx.spec = control_u, control_v, spec
        return z

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, grad_z):
        _, y, s_NC, weight, bias = saved
        grad_x, grad_weight, grad_bias = backward(
            grad_z, y, s_NC, weight, bias, ctx.control_u, ctx.control_v, *ctx.spec.as_arguments()
        )
        grad_weight = None if weight is None else grad_weight.to(weight.dtype)
        grad_bias = None if bias is None else grad_bias.to(bias.dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None, None


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
    """relu(norm(x) + residual) in training mode for (N, C, H, W), one sample after the other.

    The forward pass moves ``running_mean`` and ``running_var`` in place, the backward pass ``control_u`` and
    ``control_v``. Output dtype and memory format are those of x. Raises ValueError across processes: the loop sees the
    samples of one.
    """
    if spec.processes > 1:
        raise ArgumentError(
            "backend",
            "'reference' loops over the samples of one process and cannot form global statistics of "
            f"{spec.processes}; use backend='torch', or statistics='local'",
        )
    z = _OnlineNorm.apply(x, weight, bias, running_mean, running_var, control_u, control_v, spec)
    return add_residual_relu(z, residual, relu)
