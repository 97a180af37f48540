"""How many samples each process brings to a pass: told to all, so that batches need not be of one size.

A collective has one shape on all processes, so each must know the others' sizes before it. As nearly every layer of a
network sees the batch that its first layer saw, sizes are exchanged once a pass of the network, by the first layer, and
by layers that have not followed it before. Who exchanges depends on the order of calls alone, which is the same on all
processes.
"""

import weakref
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from onlinenorm.ops.distributed import process_group


@dataclass(frozen=True)
class Sizes:
    """What the processes bring: ``counts`` of samples in rank order, empty where all are equal, and whether their
    images have as many pixels."""

    counts: tuple[int, ...] = ()
    same_pixels: bool = True


@dataclass
class _Pass:
    """One pass of a network: the layers it has gone through, and what was last exchanged in it."""

    samples: int
    sizes: Sizes
    layers: weakref.WeakSet = field(default_factory=weakref.WeakSet)


_passes: dict[str, _Pass] = {}  # by process group
_follows: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def exchanged_sizes(layer: nn.Module, x_NCHW: Tensor, group: str) -> Sizes:
    """The batches of all processes at this call of ``layer``; every process of the group must make the call.

    Not while a CUDA graph is captured, whose shapes are fixed and which cannot wait for the host: all are taken to be
    equal. Raises ValueError, on every process, where one has an empty batch.
    """
    if x_NCHW.is_cuda and torch.cuda.is_current_stream_capturing():
        return Sizes()
    samples = len(x_NCHW)
    here = _passes.get(group)
    if here is None or layer in here.layers:
        here = _passes[group] = _Pass(samples, _exchange(x_NCHW, group))
    elif not _follows.get(layer, False) or samples != here.samples:
        sizes = _exchange(x_NCHW, group)
        _follows[layer] = sizes.counts == here.sizes.counts
        here.samples, here.sizes = samples, sizes
    here.layers.add(layer)
    return here.sizes


def _exchange(x_NCHW: Tensor, group: str) -> Sizes:
    samples, _, height, width = x_NCHW.shape
    peers = process_group(group)
    own = torch.tensor([samples, height * width], device=x_NCHW.device)
    table = [torch.empty_like(own) for _ in range(dist.get_world_size(peers))]
    dist.all_gather(table, own, group=peers)
    counts, pixels = zip(*torch.stack(table).tolist(), strict=True)
    if 0 in counts:
        raise ValueError(
            f"the batch of process {counts.index(0)} is empty (samples of each: {', '.join(map(str, counts))}); global "
            "statistics need at least one sample of every process, so drop the last batch or divide it more evenly"
        )
    return Sizes(() if len(set(counts)) == 1 else counts, len(set(pixels)) == 1)
