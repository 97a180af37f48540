"""BatchNorm over the batches of all processes on the CPU, which torch's own SyncBatchNorm (and DDP with it) refuses."""

import torch
import torch.distributed as dist
from torch import Tensor, nn


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


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d with the statistics of all processes' batches, by two sums over processes; torch's is faster on GPUs.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    with mean and population variance over the samples and positions of all processes. Training: running statistics
    move by ``momentum``, the variance unbiased. Eval, and one process: as ``BatchNorm2d``.
    """

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
                self.running_mean.lerp_(mean_C, factor)
                self.running_var.lerp_(var_C * (count / (count - 1)), factor)
        y = centered * torch.rsqrt(var_C + self.eps).view(shape)
        return (y * self.weight.view(shape) + self.bias.view(shape) if self.affine else y).to(dtype)


def synchronise_batch_norm(model: nn.Module) -> nn.Module:
    """Replace each BatchNorm2d in ``model`` by a `SyncBatchNorm2d` with its parameters and buffers; returns it."""
    if type(model) is nn.BatchNorm2d:
        layer = SyncBatchNorm2d(model.num_features, model.eps, model.momentum, model.affine, model.track_running_stats)
        layer._parameters, layer._buffers, layer.training = model._parameters, model._buffers, model.training
        return layer
    for name, child in list(model.named_children()):
        if (replaced := synchronise_batch_norm(child)) is not child:
            setattr(model, name, replaced)
    return model
