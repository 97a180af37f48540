"""Batches that workers decode, on the device before the training step asks for them."""

import collections
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from onlinenorm.data.prefetch import Batch, prefetch, transfer_rest
from onlinenorm.data.sampler import GlobalBatchSampler, Request, ValidationSampler
from onlinenorm.data.workers import PREFETCHED, worker_loader

_PART = 16  # images that a worker makes at once, at least: each costs the main process a message
AHEAD = 4 * PREFETCHED  # parts that a worker holds ready


class DeviceLoader:
    """A loader of the batches that the dataset itself would give, with images and labels on `device`.

    Every batch is cut over the workers, so that the first of an epoch, too, is the work of all of them. A thread copies
    the parts from pinned memory into one tensor on the device, on a stream of its own, while earlier batches train.
    Indices stay in host memory, where they are looked at.

    Args:
        dataset: makes a batch of a list of requests.
        batch_sampler: which images make which batch.
        device: where the batches are wanted.
        workers: processes that make them; 0: the thread does.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_sampler: GlobalBatchSampler | ValidationSampler,
        device: torch.device,
        workers: int,
    ):
        self.dataset, self.batch_sampler, self.device, self.num_workers = dataset, batch_sampler, device, workers
        self._parts = Parts(batch_sampler, part_size(batch_sampler.local_batch_size, workers))
        self._loader = worker_loader(dataset, self._parts, workers, AHEAD, _inline)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        parts = iter(self._loader)  # here, not in the thread: it may start processes
        return prefetch((join(batch, self.device) for batch in self._parts.together(parts)), self.device)


class Parts:
    """The batches of a sampler in parts of at most `size` requests, and their parts together again."""

    def __init__(self, batches: Iterable[list[Request]], size: int):
        self.batches, self.size = batches, size
        self._counts: collections.deque[int] = collections.deque()  # parts of the batches that have been cut

    def __iter__(self) -> Iterator[list[Request]]:
        counts: collections.deque[int] = collections.deque()
        self._counts = counts
        for batch in self.batches:
            firsts = range(0, len(batch), self.size)
            counts.append(len(firsts))
            for first in firsts:
                yield batch[first : first + self.size]

    def together(self, parts: Iterable[Any]) -> Iterator[list[Any]]:
        """Lists of what was made of the parts of each batch; they come in order."""
        batch = []
        for part in parts:
            batch.append(part)
            if len(batch) == self._counts[0]:
                self._counts.popleft()
                yield batch
                batch = []


def part_size(batch_size: int, workers: int) -> int:
    """Images of a part: a worker's share of a batch, or more where that is little; all without workers."""
    return max(-(-batch_size // workers), _PART) if workers else batch_size


def join(parts: list[tuple], device: torch.device) -> Batch:
    """One batch of its parts (images, and arrays of the rest), its images and labels on `device`."""
    images = [part[0] for part in parts]
    first = images[0]
    # in the memory format of the parts, so that each is one copy
    strides = (first[0].numel(), *first.stride()[1:])
    joined = torch.empty_strided((sum(map(len, images)), *first.shape[1:]), strides, dtype=first.dtype, device=device)
    for place, part in zip(joined.split([len(part) for part in images]), images, strict=True):
        place.copy_(part, non_blocking=True)
    rest = zip(*(part[1:] for part in parts), strict=True)
    return (joined, *transfer_rest([torch.from_numpy(np.concatenate(arrays)) for arrays in rest], device))


def _inline(batch: Batch) -> tuple:
    # small arrays travel in the message itself, where a tensor takes shared memory and a file descriptor each
    images, *rest = batch
    return (images, *(tensor.numpy() for tensor in rest))
