"""Statistics that every process keeps for itself, made one before they are used or saved."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from onlinenorm.normalizers.data_parallel import group_key, initialised
from onlinenorm.normalizers.online_norm import OnlineNorm
from onlinenorm.normalizers.sync_batch_norm import SyncBatchNorm2d
from onlinenorm.ops.across_processes import average_over_processes, gather_samples


@torch.no_grad()
def average_statistics(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> int:
    """Replace running statistics that differ between processes by their mean, in place; returns the layers changed.

    These are OnlineNorm layers with local statistics or over a smaller group than ``process_group`` (None: all
    processes), and BatchNorm layers that are not synchronised over it. Layers with global statistics are identical on
    all processes and left alone. One collective for the whole model; without torch.distributed, or with one process,
    nothing happens. Every process of the group must call it at the same point.
    """
    if statistics := local_statistics(model, process_group):
        average_over_processes(list(statistics.values()), process_group)
    return len({name.rpartition(".")[0] for name in statistics})


@torch.no_grad()
def gather_statistics(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """Running statistics that differ between processes: buffer name -> (processes, C), in rank order.

    With these a run continues on as many processes exactly as it was. One collective, as in `average_statistics`.
    """
    statistics = local_statistics(model, process_group)
    if not statistics:
        return {}
    flat = torch.cat([tensor.double() for tensor in statistics.values()])
    processes, group = dist.get_world_size(process_group), group_key(process_group)[0]
    tables = gather_samples(flat[None, None], processes, group)[0].split([len(t) for t in statistics.values()], 1)
    return {name: table.to(own.dtype) for (name, own), table in zip(statistics.items(), tables, strict=True)}


def local_statistics(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """The buffers, by name, that differ between the processes of a group; {} where there is one process."""
    if not initialised() or (processes := dist.get_world_size(process_group)) == 1:
        return {}
    return {
        f"{path}.{name}".removeprefix("."): buffer
        for path, layer in model.named_modules()
        if isinstance(layer, (OnlineNorm, _BatchNorm)) and _shared_by(layer) < processes
        for name, buffer in layer.named_buffers(recurse=False)
        if buffer.is_floating_point()
    }


def _shared_by(layer: OnlineNorm | _BatchNorm) -> int:
    """Processes that hold the same statistics as this one in ``layer``."""
    if isinstance(layer, SyncBatchNorm2d) or (isinstance(layer, OnlineNorm) and layer.statistics == "global"):
        return dist.get_world_size(getattr(layer, "process_group", None))
    return dist.get_world_size(layer.process_group) if isinstance(layer, nn.SyncBatchNorm) else 1
