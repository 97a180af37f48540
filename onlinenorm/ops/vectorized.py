"""OnlineNorm on per-sample moments: the algorithm of ``reference`` without its loop.

All that couples samples are the moments of each (sample, channel), so a training pass is one reduction over the tensor,
a scan over tables of shape (N, C), and one elementwise pass. With y = (x - m) / s and the moments mu, q of x::

    Y = mean(y) = (mu - m) / s         V = var(y) = q / s^2         Q = mean(y^2) = V + Y^2
    G = mean(g)                        GY = mean(g y)
    v <- (1 - k Q) v + GY              u <- (1 - k) u + (G - k v Y) / s           (both with the old v)
    gx = g / s - (k v / s) y - k u     grad_weight = HW sum_n GY_w                grad_bias = HW sum_n G_w

Both recurrences are linear and are solved by an associative scan of compositions (a, b) of h -> a h + b. As the
coefficient 1 - k Q may be zero or negative during warm-up, the scan neither divides by it nor takes logarithms. Where
large coefficients follow each other, compositions leave the range that their values stay in, and where a gradient is
not finite, the recurrence is not linear: such batches are walked through, sample by sample.
Layer scaling reads its per-sample scale off the same moments: mean(w^2) = (weight Y + bias)^2 + weight^2 V, and so the
projection of the gradient: mean(g w) = (weight Y + bias) G + weight mean(g (y - Y)). The bias may cancel weight Y, so
that squares multiplied out would lose all digits.
"""

import torch
from torch import Tensor

from onlinenorm.ops.derivatives import differentiable_once
from onlinenorm.ops.distributed import gather_samples, own_samples, total_samples
from onlinenorm.ops.reference import (
    add_residual_relu,
    channel_groups,
    compute_dtype,
    evaluate,
    move_if_finite,
    per_channel,
)
from onlinenorm.ops.repetition import check_first_pass
from onlinenorm.ops.spec import NormSpec

__all__ = ["evaluate", "train_step"]

MOST_GROWTH = 10.0  # in bits, of values composed by a scan, and so of the rounding it adds to that of a walk


def moments(x_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance (N, C) of each sample's channels.

    Two passes: the difference of mean square and squared mean loses all digits where the mean is large.
    """
    mean_NC = x_NCHW.mean((2, 3))
    return mean_NC, (x_NCHW - per_channel(mean_NC)).square_().mean((2, 3))


def linear_recurrence(coefficient, addend_NC: Tensor, initial_C: Tensor) -> tuple[Tensor, Tensor]:
    """Solve h[n + 1] = coefficient[n] h[n] + addend[n] from h[0]; returns (h[0..N-1], h[N]).

    ``coefficient`` is a table (N, C) or one number. Doubling scan: log2(N) rounds, each composing the maps of twice as
    many samples.
    """
    a, b, reach = coefficient, addend_NC, 1
    constant = isinstance(a, float)
    b = torch.cat([(a if constant else a[:1]) * initial_C + b[:1], b[1:]])
    while reach < len(b):
        if constant:
            b = torch.cat([b[:reach], torch.add(b[reach:], b[:-reach], alpha=a)])
            a = a * a
        else:
            b = torch.cat([b[:reach], torch.addcmul(b[reach:], a[reach:], b[:-reach])])
            a = torch.cat([a[:reach], a[reach:] * a[:-reach]])
        reach *= 2
    return torch.cat([initial_C[None], b[:-1]]), b[-1]


# The scans are custom operators: they move state, and across processes they hold the collective, which torch.compile
# need not look into. N rows enter; M = processes x N rows, of all samples in the order of the global batch, leave.
@torch.library.custom_op("onlinenorm::scan_statistics", mutates_args=("running_mean", "running_var"))
def scan_statistics(
    mean_NC: Tensor,
    var_NC: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    alpha_fwd: float,
    eps: float,
    processes: int,
    group: str,
    counts: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tables (M, C) of m, 1 / s, Y and V for every sample; moves the running statistics past the batch."""
    check_first_pass()
    mean_MC, var_MC = gather_samples(torch.stack([mean_NC, var_NC]), processes, group, counts)
    m_MC, mean = linear_recurrence(alpha_fwd, (1 - alpha_fwd) * mean_MC, running_mean.to(mean_NC.dtype))
    d_MC = mean_MC - m_MC
    innovation_MC = (1 - alpha_fwd) * (var_MC + alpha_fwd * d_MC * d_MC)
    before_MC, var = linear_recurrence(alpha_fwd, innovation_MC, running_var.to(mean_NC.dtype))
    running_mean.copy_(mean)
    running_var.copy_(var)
    rstd_MC = torch.rsqrt(before_MC + eps)
    return m_MC, rstd_MC, d_MC * rstd_MC, var_MC * rstd_MC * rstd_MC


@scan_statistics.register_fake
def _(mean_NC, var_NC, running_mean, running_var, alpha_fwd, eps, *peers):
    samples, channels = mean_NC.shape
    return tuple(mean_NC.new_empty(total_samples(samples, *peers), channels) for _ in range(4))


@torch.library.custom_op("onlinenorm::scan_control", mutates_args=("control_u", "control_v"))
def scan_control(
    g_NC: Tensor,
    gy_NC: Tensor,
    y_MC: Tensor,
    spread_MC: Tensor,
    rstd_MC: Tensor,
    control_u: Tensor,
    control_v: Tensor,
    alpha_bkw: float,
    gradient_scale: float,
    processes: int,
    group: str,
    counts: list[int],
) -> tuple[Tensor, Tensor]:
    """Controls (u, v), each (M, C), in units of the gradient, for every sample; moves the state past the batch."""
    k = 1 - alpha_bkw
    g_MC, gy_MC = gather_samples(torch.stack([g_NC, gy_NC]) * gradient_scale, processes, group, counts)
    decay_MC = 1 - k * (spread_MC + y_MC * y_MC)
    before = control_u.to(g_NC.dtype), control_v.to(g_NC.dtype)

    def scan():
        v_MC, v = linear_recurrence(decay_MC, gy_MC, before[1])
        u_MC, u = linear_recurrence(alpha_bkw, (g_MC - k * v_MC * y_MC) * rstd_MC, before[0])
        return u_MC, v_MC, u, v

    def walk():
        u_MC, v_MC = torch.empty_like(y_MC), torch.empty_like(y_MC)
        u, v = before
        for n in range(len(y_MC)):
            u_MC[n], v_MC[n] = u, v
            drift = (g_MC[n] - k * v * y_MC[n]) * rstd_MC[n]
            u, v = move_if_finite(u, v, alpha_bkw * u + drift, decay_MC[n] * v + gy_MC[n])
        return u_MC, v_MC, u, v

    # A capture cannot ask the device which of them it takes.
    if g_NC.is_cuda and torch.cuda.is_current_stream_capturing():
        u_MC, v_MC, u, v = walk()
    else:
        u_MC, v_MC, u, v = scan()
        growth = decay_MC.abs().clamp_(min=1).log2_().sum(0)
        # a control that is not finite at one sample is not at the last
        if not (u.isfinite() & v.isfinite() & (growth <= MOST_GROWTH)).all():
            u_MC, v_MC, u, v = walk()
    control_u.copy_(u)
    control_v.copy_(v)
    return u_MC / gradient_scale, v_MC / gradient_scale


@scan_control.register_fake
def _(g_NC, gy_NC, y_MC, *rest):
    return torch.empty_like(y_MC), torch.empty_like(y_MC)


def _inverse_layer_scale(y_NC, spread_NC, weight_C, bias_C, spec: NormSpec) -> Tensor:
    """1 / zeta (N, C) of layer scaling, from the moments Y and V of the normalised values."""
    square_NC = (weight_C * y_NC + bias_C).square() + weight_C.square() * spread_NC
    square_NC = torch.where(y_NC.isinf(), y_NC.abs(), square_NC)  # of infinite pixels, whose variance is NaN
    return torch.rsqrt(channel_groups(square_NC, spec) + spec.layer_scaling_eps)


class _OnlineNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, control_u, control_v, spec):
        dtype = compute_dtype(x, running_mean)
        x_NCHW = x.to(dtype)
        weight_C = torch.ones_like(running_mean, dtype=dtype) if weight is None else weight.to(dtype)
        bias_C = torch.zeros_like(weight_C) if bias is None else bias.to(dtype)
        mean_NC, var_NC = moments(x_NCHW)
        tables = scan_statistics(mean_NC, var_NC, running_mean, running_var, spec.alpha_fwd, spec.eps, *spec.peers)
        m_NC, rstd_NC, y_NC, spread_NC = (own_samples(table, *spec.peers) for table in tables)
        scale_NC, shift_NC = weight_C * rstd_NC, bias_C.expand_as(rstd_NC)
        if spec.error_compensation == "layer_scaling":
            rzeta_NC = _inverse_layer_scale(y_NC, spread_NC, weight_C, bias_C, spec)
            scale_NC, shift_NC = scale_NC * rzeta_NC, shift_NC * rzeta_NC
        else:
            rzeta_NC = None
        # of the running mean alone, so that a pixel that is not finite stays one pixel until the next sample
        z = torch.addcmul(per_channel(shift_NC), x_NCHW - per_channel(m_NC), per_channel(scale_NC))
        if spec.error_compensation == "clamp":
            z = z.clamp(-spec.clamp_value, spec.clamp_value)  # not in place, see below
        ctx.save_for_backward(x, weight, bias, rzeta_NC, *tables)
        # Not saved tensors: they may move between forward and backward (two forward passes before one backward).
        ctx.control_u, ctx.control_v, ctx.spec = control_u, control_v, spec
        # Compiled by torch 2.11, an output that shares memory with another value gets that value's gradient: zero.
        return z if z.dtype == x.dtype else z.to(x.dtype)

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, grad_z):
        x, weight, bias, rzeta_NC, *tables = saved
        spec, k = ctx.spec, 1 - ctx.spec.alpha_bkw
        m_NC, rstd_NC, y_NC, spread_NC = (own_samples(table, *spec.peers) for table in tables)
        dtype = m_NC.dtype
        weight_C = torch.ones_like(m_NC[0]) if weight is None else weight.to(dtype)
        bias_C = torch.zeros_like(weight_C) if bias is None else bias.to(dtype)
        y = (x.to(dtype) - per_channel(m_NC)).mul_(per_channel(rstd_NC))
        g = grad_z.to(dtype)
        if spec.error_compensation == "clamp":
            w = (y * per_channel(weight_C)).add_(per_channel(bias_C))
            g = torch.where(w.abs_() < spec.clamp_value, g, 0)
        g_NC = g.mean((2, 3))
        slope_NC, pull_y_NC, pull_NC = weight_C, 0, 0
        if rzeta_NC is None:
            gy_NC = (g * y).mean((2, 3))
        else:
            # g_w = (g - kappa w) / zeta with w = weight y + bias and kappa = mean over the group of g w / zeta^2.
            apart_NC = (g * (y - per_channel(y_NC))).mean((2, 3))
            w_NC = weight_C * y_NC + bias_C
            kappa_NC = channel_groups((weight_C * apart_NC + w_NC * g_NC) * rzeta_NC, spec) * rzeta_NC
            g_NC = (g_NC - kappa_NC * w_NC) * rzeta_NC
            gy_NC = y_NC * g_NC + (apart_NC - kappa_NC * weight_C * spread_NC) * rzeta_NC
            slope_NC = weight_C * rzeta_NC
            pull_y_NC, pull_NC = slope_NC * kappa_NC * weight_C, slope_NC * kappa_NC * bias_C
        pixels = x.shape[2] * x.shape[3]
        grad_weight = None if weight is None else (gy_NC.sum(0) * pixels).to(weight.dtype)
        grad_bias = None if bias is None else (g_NC.sum(0) * pixels).to(bias.dtype)
        controls = scan_control(
            weight_C * g_NC,
            weight_C * gy_NC,
            *(tables[2], tables[3], tables[1]),
            ctx.control_u,
            ctx.control_v,
            spec.alpha_bkw,
            spec.gradient_scale,
            *spec.peers,
        )
        u_NC, v_NC = (own_samples(table, *spec.peers) for table in controls)
        grad_x = g * per_channel(slope_NC * rstd_NC)
        grad_x.sub_(y.mul_(per_channel((k * v_NC + pull_y_NC) * rstd_NC)))
        grad_x.sub_(per_channel(k * u_NC + pull_NC * rstd_NC))
        return grad_x.to(x.dtype), grad_weight, grad_bias, None, None, None, None, None


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
    """relu(norm(x) + residual) in training mode for (N, C, H, W), all samples at once.

    Same contract as ``reference.train_step``: the forward pass moves ``running_mean`` and ``running_var`` in place, the
    backward pass ``control_u`` and ``control_v``.
    """
    z = _OnlineNorm.apply(x, weight, bias, running_mean, running_var, control_u, control_v, spec)
    return add_residual_relu(z, residual, relu)
