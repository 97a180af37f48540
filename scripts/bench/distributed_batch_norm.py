"""BatchNorm over the batches of all processes as a user of torch.compile would write it."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives  # a public name from torch 2.14 on


def _summed(x: Tensor) -> Tensor:
    everyone = dist.group.WORLD
    assert everyone is not None, "the caller has several processes"
    return collectives.wait_tensor(collectives.all_reduce(x, "sum", everyone))


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return _summed(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _summed(grad.contiguous())


class TracedSyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d with the statistics of all processes' batches, of operators that torch.compile traces as one graph.

        y = (x - mean) / sqrt(var + eps) * weight + bias

    torch compiles its own SyncBatchNorm in pieces, between whose kernels nothing is fused. One sum over processes each
    way, as in that: of values and their squares, and of their gradients. Processes have batches of one size.
    """

    running_mean: Tensor  # never None here, as are the next
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x)
        dims, shape, samples = (0, 2, 3), (1, -1, 1, 1), x.numel() // x.shape[1] * dist.get_world_size()
        values = x.float()
        mean, square = _SumOverProcesses.apply(torch.stack([values.sum(dims), values.square().sum(dims)])) / samples
        var = square - mean.square()
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (samples / (samples - 1)), self.momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return ((values - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)).to(x.dtype)
