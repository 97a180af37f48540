"""Batch Renormalization: BatchNorm whose training output is moved towards that of evaluation."""

import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from onlinenorm.arguments import check_int
from onlinenorm.errors import ArgumentError
from onlinenorm.normalizers.precision import FullPrecision
from onlinenorm.normalizers.transforms import LeafOfGraphs

# The schedule of the paper, which has momentum 0.01, in time constants of the moving statistics, 1 / momentum batches.
WARMUP, R_MAX_REACHED, D_MAX_REACHED = 50, 400, 250


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class _BatchRenorm(LeafOfGraphs, FullPrecision, _BatchNorm):
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float | None

    def __init__(
        self,
        num_features: int,
        r_max: float = 3.0,
        d_max: float = 5.0,
        warmup_steps: int | None = None,
        r_max_steps: int | None = None,
        d_max_steps: int | None = None,
        eps: float = 1e-5,
        momentum: float = 0.01,
        affine: bool = True,
        device=None,
        dtype=None,
    ):
        check_int("num_features", num_features, 1)
        for key, value, low in (("r_max", r_max, 1), ("d_max", d_max, 0)):
            if not _is_number(value) or not low <= value < math.inf:
                raise ArgumentError(key, f"{value!r} must be a number of at least {low}")
        for key, value, high in (("momentum", momentum, 1), ("eps", eps, sys.float_info.max)):
            if not _is_number(value) or not 0 < value <= high:
                raise ArgumentError(key, f"{value!r} must be a number with 0 < {key}{' <= 1' * (high == 1)}")
        check_int("warmup_steps", warmup_steps, 0, optional=True)
        warmup = round(WARMUP / momentum) if warmup_steps is None else warmup_steps
        check_int("r_max_steps", r_max_steps, warmup, optional=True)
        check_int("d_max_steps", d_max_steps, warmup, optional=True)
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        super().__init__(num_features, eps, momentum, affine, device=device, dtype=dtype)
        self.r_max, self.d_max = float(r_max), float(d_max)
        self.warmup_steps = warmup
        self.r_max_steps = max(warmup, round(R_MAX_REACHED / momentum)) if r_max_steps is None else r_max_steps
        self.d_max_steps = max(warmup, round(D_MAX_REACHED / momentum)) if d_max_steps is None else d_max_steps

    def limits(self) -> tuple[Tensor, Tensor]:
        """(r_max, d_max) of the next training batch, without dimensions, by the batches that were before it."""
        r_share, d_share = self._share(self.r_max_steps), self._share(self.d_max_steps)
        return 1 + (self.r_max - 1) * r_share, self.d_max * d_share

    def _share(self, last: int) -> Tensor:
        """How much of the way from ``warmup_steps`` to ``last`` batches is behind, 0 to 1."""
        steps = self.num_batches_tracked.to(self.running_mean.dtype)
        if self.momentum is None:
            return torch.zeros_like(steps)
        if last == self.warmup_steps:
            return (steps >= last).to(steps.dtype)
        return ((steps - self.warmup_steps) / (last - self.warmup_steps)).clamp(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        self._check_state()
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                f"{type(self).__name__}: activation checkpointing repeats the layer inside backward, when its moving "
                "statistics have gone on; leave the layer out of checkpointed regions, or use OnlineNorm or BatchNorm"
            )
        with torch.no_grad():  # r and d are constants to the gradient
            dims = [dim for dim in range(x.dim()) if dim != 1]
            var_C, mean_C = torch.var_mean(x.to(self.running_mean.dtype), dims, correction=0)
            deviation_C, moving_C = (torch.sqrt(var + self.eps) for var in (var_C, self.running_var))
            r_max, d_max = self.limits()
            r_C = (deviation_C / moving_C).clamp(1 / r_max, r_max)
            d_C = ((mean_C - self.running_mean) / moving_C).clamp(-d_max, d_max)
        weight, bias = r_C, d_C
        if self.affine:  # (y r + d) weight + bias, as BatchNorm with another weight and bias
            weight, bias = self.weight * r_C, torch.addcmul(self.bias, self.weight, d_C)
        y = F.batch_norm(x, None, None, weight, bias, training=True, eps=self.eps)
        with torch.no_grad():
            self.num_batches_tracked += 1
            share = 1 / self.num_batches_tracked.to(mean_C.dtype) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean_C, share)
            # the paper averages deviations, of which E[r] = 1; kept as the variance that evaluation takes
            moving_C.lerp_(deviation_C, share)
            self.running_var.copy_((moving_C.square() - self.eps).clamp(min=0))
        return y

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, r_max={self.r_max:g}, d_max={self.d_max:g}, warmup_steps={self.warmup_steps}, "
            f"r_max_steps={self.r_max_steps}, d_max_steps={self.d_max_steps}, eps={self.eps:g}, "
            f"momentum={self.momentum}, affine={self.affine}"
        )


_DOCUMENTATION = r"""Normalise each channel of {layout} by a batch's statistics, corrected towards the moving ones.

    y = ((x - mean_B) / sigma_B * r + d) * weight + bias
    r = clip(sigma_B / sigma, 1 / r_max, r_max),   d = clip((mean_B - mean) / sigma, -d_max, d_max)

    with mean_B and sigma_B = sqrt(var_B + eps) of the batch, mean and sigma moving averages of them over the batches
    before, and r and d constants to the gradient. Where nothing is clipped, the output is that of evaluation; with
    ``r_max`` 1 and ``d_max`` 0 it is BatchNorm's.

    Training: each batch moves the statistics by ``momentum`` after it was normalised. Limits follow
    ``num_batches_tracked``: 1 and 0 during the first ``warmup_steps`` batches, then in a line to ``r_max`` and
    ``d_max``. Eval: y = (x - running_mean) / sqrt(running_var + eps) * weight + bias, as BatchNorm, whose state it has;
    running_var + eps is the square of sigma. Activation checkpointing of a training pass is an error.

    ``torch.optim.swa_utils.update_bn`` estimates the statistics anew: while it has set ``momentum`` to None, they are
    means over batches, which are normalised as by BatchNorm. Batches are then counted from the first of these, so that
    training which goes on may begin with the warm-up.

    Args:
        num_features: channels C.
        r_max: limit of r at the end of its schedule, at least 1.
        d_max: limit of d at the end of its schedule, at least 0, in deviations.
        warmup_steps: batches that are normalised as by BatchNorm; None: 50 / momentum.
        r_max_steps: batches after which r_max is reached, at least warmup_steps; None: 400 / momentum.
        d_max_steps: batches after which d_max is reached, at least warmup_steps; None: 250 / momentum. With momentum
            0.01 these are the paper's 5,000, 40,000 and 25,000.
        eps: added to the variance, > 0.
        momentum: share of a batch in the moving statistics, 0 < momentum <= 1.
        affine: whether there are weight and bias.
        device, dtype: of parameters and state; float32, or float64 when asked for, never half precision.

    Shapes:
        x and output {layout}; the output has the dtype and memory format of x.

    Raises:
        ValueError: an argument outside its range; an input of another rank; a training batch with one value a channel.

    Source: Ioffe 2017, arXiv:1702.03275, algorithm 1 and section 4.1.
    """


class BatchRenorm1d(_BatchRenorm, nn.BatchNorm1d):
    __doc__ = _DOCUMENTATION.format(layout="(N, C) or (N, C, L)")


class BatchRenorm2d(_BatchRenorm, nn.BatchNorm2d):
    __doc__ = _DOCUMENTATION.format(layout="(N, C, H, W)")
