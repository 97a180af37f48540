"""Statistics that every process keeps for itself, made one before they are used or saved."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from onlinenorm.normalizers.data_parallel import group_key, initialised
from onlinenorm.normalizers.online_norm import OnlineNorm
from onlinenorm.normalizers.sync_batch_norm import SyncBatchNorm2d
from onlinenorm.ops.distributed import gather_samples

# Of OnlineNorm and the synchronised BatchNorms.
_SYNCHRONISED = {"running_mean", "running_var", "num_batches_tracked", "control_u", "control_v"}


@torch.no_grad()
def average_statistics(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> int:
    """Replace running statistics that differ between processes by what is `merged` of them; returns the layers changed.

    These are the buffers of OnlineNorm layers with local statistics or over a smaller group than ``process_group``
    (None: all processes), of BatchNorm layers that are not synchronised over it, and of every other layer but those
    with an attribute ``statistics = "global"``, which says that they are identical on all processes; of a
    configuration's normalizer also parameters that are not trained, in which some keep statistics. One collective for
    the whole model; without torch.distributed, or with one process, nothing happens. Every process of the group must
    call it at the same point.
    """
    statistics = local_statistics(model, process_group)
    for name, table in gather_statistics(model, process_group).items():
        statistics[name].copy_(merged(table))
    return len({name.rpartition(".")[0] for name in statistics})


def merged(table: Tensor) -> Tensor:
    """One buffer for all processes from a row each: the mean of real or complex numbers, the largest of counts."""
    if table.is_floating_point() or table.is_complex():
        return table.to(torch.complex128 if table.is_complex() else torch.float64).mean(0).to(table.dtype)
    return table.amax(0)


@torch.no_grad()
def gather_statistics(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """Running statistics that differ between processes: buffer name -> (processes, ...), in rank order.

    With these a run continues on as many processes exactly as it was. One collective, as in `average_statistics`.
    """
    statistics = local_statistics(model, process_group)
    if not statistics:
        return {}
    # as bytes, which leave every dtype as it is
    rows = [tensor.contiguous().flatten().view(torch.uint8) for tensor in statistics.values()]
    processes, group = dist.get_world_size(process_group), group_key(process_group)[0]
    tables = gather_samples(torch.cat(rows)[None, None], processes, group)[0].split([len(row) for row in rows], 1)
    return {
        name: table.clone(memory_format=torch.contiguous_format).view(own.dtype).view(processes, *own.shape)
        for (name, own), table in zip(statistics.items(), tables, strict=True)
    }


def local_statistics(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """The buffers, by name, that may differ between the processes of a group; {} where there is one process."""
    if not initialised() or (processes := dist.get_world_size(process_group)) == 1:
        return {}
    return {
        f"{path}.{name}".removeprefix("."): tensor
        for path, layer in model.named_modules()
        for name, tensor in _state(layer)
        if _shared_by(layer, name) < processes
    }


def _state(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from layer.named_buffers(recurse=False)
    if getattr(layer, "is_normalizer", False):
        yield from ((name, p) for name, p in layer.named_parameters(recurse=False) if not p.requires_grad)


def _shared_by(layer: nn.Module, name: str) -> int:
    """Processes that hold the same as this one in a buffer of ``layer``."""
    synchronised = isinstance(layer, (SyncBatchNorm2d, nn.SyncBatchNorm))
    known = isinstance(layer, OnlineNorm) or synchronised
    if known and name not in _SYNCHRONISED:  # a subclass keeps it
        return 1
    if synchronised or getattr(layer, "statistics", None) == "global":
        return dist.get_world_size(getattr(layer, "process_group", None))
    return 1
