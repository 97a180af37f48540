"""Tables of per-sample moments across processes: what one process with the global batch would hold."""

import torch
import torch.distributed as dist
from torch import Tensor

# its name from torch 2.14 on, and the one before
_gather_into = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


def gather_samples(tables_KNC: Tensor, processes: int) -> Tensor:
    """K tables of this process's N samples -> (K, processes x N, C) of all, in rank order, by one collective.

    Every process must call it, with the same shape.
    """
    if processes == 1:
        return tables_KNC
    gathered = tables_KNC.new_empty(processes * tables_KNC.shape[0], *tables_KNC.shape[1:])
    _gather_into(gathered, tables_KNC.contiguous())  # straight into place: lists are copied once more
    return gathered.unflatten(0, (processes, -1)).transpose(0, 1).flatten(1, 2)


def own_samples(table_MC: Tensor, processes: int) -> Tensor:
    """This process's rows of a table over all samples."""
    samples = len(table_MC) // processes
    return table_MC[first_own_sample(samples, processes) :][:samples]


def first_own_sample(samples: int, processes: int) -> int:
    """Where this process's ``samples`` begin among those of all."""
    return dist.get_rank() * samples if processes > 1 else 0


def average_over_processes(tensors: list[Tensor]) -> None:
    """Replace each tensor, on every process, by its mean over the processes."""
    flat = torch.cat([tensor.flatten().double() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))
