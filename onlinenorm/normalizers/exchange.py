"""How the layers of a network came by the statistics of other processes, for those who tell of it."""

from typing import NamedTuple

import torch.distributed as dist
from torch import nn

from onlinenorm.normalizers import data_parallel
from onlinenorm.normalizers.online_norm import OnlineNorm
from onlinenorm.ops.distributed import exchanging, gathers_by_machine, late, process_group, refusals

__all__ = ["Exchange", "exchange_of", "late"]

_KERNELS = "kernels exchange what they read once: 16 bits, channels_last, channels in whole 64s, on Hopper or later"

_TWO_STEPS = "small messages between machines, then within each"


class Exchange(NamedTuple):
    """Layers with global statistics of several processes.

    processes: the most that share statistics. by_kernels: layers whose kernels store moments into the other processes'
    memory. gathered: layers whose moments come by collectives. reason: why those do, "" where there are none.
    """

    processes: int
    by_kernels: int
    gathered: int
    reason: str


def exchange_of(network: nn.Module) -> Exchange | None:
    """What a network's layers did in the training passes so far; None where none shares statistics with a process."""
    if not data_parallel.initialised():
        return None
    layers = [layer for layer in network.modules() if isinstance(layer, OnlineNorm) and layer.statistics == "global"]
    sizes = {layer: data_parallel.group_size(*layer._group) for layer in layers}
    several = [layer for layer in layers if sizes[layer] > 1]
    if not several:
        return None
    gathered = [layer for layer in several if layer._mailbox not in exchanging]
    reasons = dict.fromkeys(_why_gathered(layer) for layer in gathered)
    return Exchange(max(sizes.values()), len(several) - len(gathered), len(gathered), "; ".join(reasons))


def _why_gathered(layer: OnlineNorm) -> str:
    if layer.exchange != "auto":
        return f"exchange={layer.exchange}"
    backend = layer.resolve_backend(layer.running_mean.device)
    if backend != "fused":
        return f"backend={backend}, which has no kernels for it"
    group = process_group(layer._group[0]) or dist.group.WORLD
    assert group is not None, "its size was asked for"
    reason = refusals.get(group.group_name) or _KERNELS
    return f"{reason}; {_TWO_STEPS}" if gathers_by_machine(layer._group[0]) else reason
