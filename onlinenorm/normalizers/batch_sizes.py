"""How many samples each process brings to a pass: told to all, so that batches need not be of one size.

A collective has one shape on all processes, so each must know the others' sizes before it. Who exchanges sizes, and
when, must depend on the order of calls alone, which is the same on all processes, and not on a process's own batch.
On the CPU every layer does, as the answer is there at once. On a GPU the host would wait for the answer, and as nearly
every layer of a network sees the batch that its first layer saw, it is the first layer of a pass of the network that
exchanges, and layers that have not followed it before; one that did and whose batch is another now is an error.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from onlinenorm.ops.distributed import process_group


@dataclass(frozen=True)
class Sizes:
    """What the processes bring: ``counts`` of samples in rank order, empty where all are equal, and whether their
    images have as many pixels."""

    counts: tuple[int, ...] = ()
    same_pixels: bool = True


@dataclass
class _Pass:
    """One pass of a network: whose it is, the layers it has gone through, and what was last exchanged in it."""

    network: Callable[[], DistributedDataParallel | None]
    samples: int
    sizes: Sizes
    layers: weakref.WeakSet = field(default_factory=weakref.WeakSet)


_passes: dict[str, _Pass] = {}  # by process group
_follows: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def exchanged_sizes(layer: nn.Module, x_NCHW: Tensor, group: str) -> Sizes:
    """The batches of all processes at this call of ``layer``; every process of the group must make the call.

    Not while a CUDA graph is captured, whose shapes are fixed and which cannot wait for the host: all are taken to be
    equal. Raises ValueError, on every process, where one has an empty batch, and RuntimeError where this process's
    batch is not the one it was taken for.
    """
    if not _host_waits(x_NCHW):
        return _exchange(x_NCHW, group)
    if x_NCHW.is_cuda and torch.cuda.is_current_stream_capturing():
        return Sizes()
    samples, network = len(x_NCHW), DistributedDataParallel._get_active_ddp_module()
    here = _passes.get(group)
    if here is None or here.network() is not network or layer in here.layers:
        owner = (lambda: None) if network is None else weakref.ref(network)
        here = _passes[group] = _Pass(owner, samples, _exchange(x_NCHW, group))
    elif not _follows.get(layer, False):
        sizes = _exchange(x_NCHW, group)
        _follows[layer] = sizes == here.sizes and samples == here.samples
        here.samples, here.sizes = samples, sizes
    elif samples != here.samples:
        raise RuntimeError(
            f"{type(layer).__name__}: got {samples} samples, and the layer before it in this pass {here.samples}; in "
            "its first pass it got as many, and so the processes do not exchange sizes for it, on which GPUs would "
            "wait; give it the whole batch, or statistics='local'"
        )
    here.layers.add(layer)
    return here.sizes


def _host_waits(x_NCHW: Tensor) -> bool:
    """Whether reading what a collective brings holds up the host, which otherwise runs ahead of the device."""
    return x_NCHW.is_cuda


def _exchange(x_NCHW: Tensor, group: str) -> Sizes:
    samples, _, height, width = x_NCHW.shape
    counts, pixels = zip(*_of_all(torch.tensor([samples, height * width], device=x_NCHW.device), group), strict=True)
    if 0 in counts:
        raise ValueError(
            f"the batch of process {counts.index(0)} is empty (samples of each: {', '.join(map(str, counts))}); global "
            "statistics need at least one sample of every process, so drop the last batch or divide it more evenly"
        )
    return Sizes(() if len(set(counts)) == 1 else counts, len(set(pixels)) == 1)


def _of_all(own: Tensor, group: str) -> list[list[int]]:
    """One row of whole numbers from each process, in rank order."""
    peers = process_group(group)
    table = [torch.empty_like(own) for _ in range(dist.get_world_size(peers))]
    dist.all_gather(table, own, group=peers)
    return torch.stack(table).tolist()


# An operator for the compiler not to look into. It changes nothing; what seems to have no effect would be left out.
@torch.library.custom_op("onlinenorm::check_even_batches", mutates_args=("running_mean",))
def check_even_batches(running_mean: Tensor, samples: int, group: str) -> None:
    """Raises ValueError, on every process, where compiled programs have batches of different sizes."""
    counts = [row[0] for row in _of_all(torch.tensor([samples]), group)]
    if len(set(counts)) > 1:
        raise ValueError(
            f"samples of each process: {', '.join(map(str, counts))}; in compiled programs global statistics need "
            "batches of one size, so drop the last batch, divide it evenly or leave the layer out of torch.compile"
        )


@check_even_batches.register_fake
def _(running_mean, samples, group):
    return None
