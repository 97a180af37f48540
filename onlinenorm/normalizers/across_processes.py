"""Statistics that every process keeps for itself, made one before they are used or saved."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from onlinenorm.normalizers.online_norm import OnlineNorm
from onlinenorm.normalizers.sync_batch_norm import SyncBatchNorm2d
from onlinenorm.ops.across_processes import average_over_processes, gather_samples

SYNCHRONISED = (nn.SyncBatchNorm, SyncBatchNorm2d)


@torch.no_grad()
def average_statistics(model: nn.Module) -> int:
    """Replace per-process running statistics by their mean over all processes, in place; returns the layers changed.

    These are OnlineNorm layers with local statistics and BatchNorm layers that are not synchronised. Layers with global
    statistics are identical on all processes and left alone. One collective for the whole model; without a process
    group, or with one process, nothing happens. Every process must call it at the same point.
    """
    if statistics := local_statistics(model):
        average_over_processes(list(statistics.values()))
    return len({name.rpartition(".")[0] for name in statistics})


@torch.no_grad()
def gather_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Per-process running statistics of all processes: buffer name -> (processes, C), in rank order.

    With these a run continues on as many processes exactly as it was. One collective, as in `average_statistics`.
    """
    statistics = local_statistics(model)
    if not statistics:
        return {}
    flat = torch.cat([tensor.double() for tensor in statistics.values()])
    tables = gather_samples(flat[None, None], dist.get_world_size())[0].split([len(t) for t in statistics.values()], 1)
    return {name: table.to(own.dtype) for (name, own), table in zip(statistics.items(), tables, strict=True)}


def local_statistics(model: nn.Module) -> dict[str, Tensor]:
    """The buffers, by name, that differ between processes; {} where there is one process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return {}
    return {
        f"{path}.{name}".removeprefix("."): buffer
        for path, layer in model.named_modules()
        if (isinstance(layer, OnlineNorm) and layer.statistics == "local")
        or (isinstance(layer, _BatchNorm) and not isinstance(layer, SYNCHRONISED) and layer.track_running_stats)
        for name, buffer in layer.named_buffers(recurse=False)
        if buffer.is_floating_point()
    }
