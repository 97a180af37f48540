"""BatchNorm over the batches of all processes on the CPU, which torch's own SyncBatchNorm (and DDP with it) refuses."""

from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from onlinenorm.normalizers.transforms import LeafOfGraphs


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad):
        total = grad.clone()
        dist.all_reduce(total)
        return total


class SyncBatchNorm2d(LeafOfGraphs, nn.BatchNorm2d):
    """BatchNorm2d with the statistics of all processes' batches, by two sums over processes; torch's is faster on GPUs.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    with mean and population variance over the samples and positions of all processes. Training: running statistics
    move by ``momentum``, the variance unbiased. Eval, and one process: as ``BatchNorm2d``.
    """

    running_mean: Tensor  # None without track_running_stats, as are the next two
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, x: Tensor) -> Tensor:
        alone = not dist.is_initialized() or dist.get_world_size() == 1
        if not self.training or alone:
            return super().forward(x)
        self._check_input_dim(x)
        dims, shape = (0, 2, 3), (1, -1, 1, 1)
        dtype = x.dtype
        x = x.to(torch.promote_types(dtype, torch.float32))  # half precision would lose digits in the sums
        own = torch.cat([x.sum(dims), x.new_tensor([x.numel() / x.shape[1]])])
        *_, count = total = _SumOverProcesses.apply(own)
        mean_C = total[:-1] / count
        centered = x - mean_C.view(shape)
        var_C = _SumOverProcesses.apply(centered.square().sum(dims)) / count
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                factor = 1.0 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
                for running, new_C in ((self.running_mean, mean_C), (self.running_var, var_C * (count / (count - 1)))):
                    running.copy_(running.to(new_C.dtype).lerp(new_C, factor))  # as in half precision BatchNorm does
        y = centered * torch.rsqrt(var_C + self.eps).view(shape)
        return (y * self.weight.view(shape) + self.bias.view(shape) if self.affine else y).to(dtype)


def check_synchronisable(model: nn.Module, kinds: Collection[type]) -> None:
    """Raises ValueError for a BatchNorm layer in ``model`` not of ``kinds``, which would lose its ways."""
    for path, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and (type(layer) not in kinds or "forward" in vars(layer)):
            raise ValueError(
                f"{path or 'model'}: {type(layer).__name__} cannot take the statistics of all processes, as "
                f"{', '.join(kind.__name__ for kind in kinds)} can here"
            )


def synchronise_batch_norm(model: nn.Module) -> nn.Module:
    """Turn each BatchNorm2d in ``model`` into a `SyncBatchNorm2d`, in place, with all that hangs on it; returns it.

    Raises ValueError, before anything is changed, for a BatchNorm layer of another class that is not synchronised.
    """
    check_synchronisable(model, (nn.BatchNorm2d, SyncBatchNorm2d, nn.SyncBatchNorm))
    for layer in model.modules():
        if type(layer) is nn.BatchNorm2d:
            layer.__class__ = SyncBatchNorm2d  # which has the same state
    return model
