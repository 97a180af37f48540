"""What a layer needs to know of process groups, and of the DistributedDataParallel that runs it."""

import logging
import weakref

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from onlinenorm.errors import ArgumentError
from onlinenorm.ops.distributed import constant_when_compiled, process_group

logger = logging.getLogger(__name__)

GroupKey = tuple[str, tuple[int, ...]]  # name and ranks; ("", ()) stands for all processes

_kept_apart: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()


def initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def group_key(group: dist.ProcessGroup | None) -> GroupKey:
    """A group by name and ranks, which can be copied, pickled and compiled with. Raises ValueError for what is none."""
    if group is None:
        return "", ()
    if not isinstance(group, dist.ProcessGroup):
        raise ArgumentError(
            "process_group",
            f"{group!r} must be a group that this process belongs to, as torch.distributed.new_group "
            "returns, or None for all processes",
        )
    return group.group_name, tuple(dist.get_process_group_ranks(group))


def resolved_group(name: str, ranks: tuple[int, ...]) -> dist.ProcessGroup:
    """The group of that key. Raises ValueError where this program has none, as after unpickling in another."""
    try:
        group = process_group(name) if initialised() else None
    except (RuntimeError, KeyError):
        group = None
    if group is None or tuple(dist.get_process_group_ranks(group)) != ranks:
        raise ArgumentError(
            "process_group",
            f"the layer was built with a group of the processes {', '.join(map(str, ranks))}, which "
            "does not exist here; set layer.process_group to one that does, or to None for all processes",
        )
    return group


@constant_when_compiled
def group_size(name: str, ranks: tuple[int, ...]) -> int:
    """Processes of a group; 1 without torch.distributed."""
    if name:
        return resolved_group(name, ranks).size()
    return dist.get_world_size() if initialised() else 1


@constant_when_compiled
def keep_streams_apart() -> None:
    """Exempt layers with a stream of their own from the DistributedDataParallel whose forward pass this is.

    It would overwrite their statistics with those of rank 0 before each pass. The first pass, before which all
    processes still have what rank 0 had when the network was wrapped, is early enough.
    """
    ddp = DistributedDataParallel._get_active_ddp_module()
    if ddp is None or ddp in _kept_apart:
        return
    _kept_apart.add(ddp)
    layers = {p: layer for p, layer in ddp.module.named_modules() if getattr(layer, "has_own_stream", False)}
    if ddp.will_sync_module_buffers():
        logger.info(
            "DistributedDataParallel has started the own streams of %d OnlineNorm layers from those of rank 0; from "
            "now on it leaves them alone, so that a process may load statistics of its own",
            len(layers),
        )
    ddp.parameters_to_ignore |= {
        f"{path}.{name}".removeprefix(".")
        for path, layer in layers.items()
        for name, _ in layer.named_buffers(recurse=False)
    }
    ddp._assign_modules_buffers()
