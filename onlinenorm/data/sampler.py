"""Which images each process sees in which batch."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from onlinenorm.arguments import check_int
from onlinenorm.data.randomness import permutation
from onlinenorm.errors import ArgumentError

Request = tuple[int, int]  # (epoch, index): all that a dataset needs to make the pixels


class GlobalBatchSampler(Sampler[list[Request]]):
    """Cuts each epoch's permutation into global batches and deals each out to the processes, image by image.

    Global batch b is permutation[b B : (b + 1) B]; the last incomplete one is dropped. With A accumulated micro-batches
    and W processes, micro-batch a is the a-th part of B / A images and rank r takes positions r, r + W, ... of that.
    Taking turns within each micro-batch therefore gives back the order of one process without accumulation, and every
    process holds early and late images of it. A run continues on any number of processes: a step has the same images.

    Args:
        num_images: size of the training set.
        global_batch_size: B, the images of one optimiser step over all processes.
        seed: of the order; order and images of epoch e are functions of (seed, e).
        rank, world_size: this process and the number of processes.
        accumulate: A, the micro-batches of one optimiser step.
        epoch: the first epoch, counted from 0; Lightning moves it on through `set_epoch`.
        start_step: optimiser steps of epoch `epoch` that have been taken already. Iterating that epoch yields the
            remaining batches only, while `len` stays that of the full epoch, as Lightning expects of a resumed loader.

    Yields lists of (epoch, index). Raises ValueError where B does not divide, or exceeds the set.
    """

    def __init__(
        self,
        num_images: int,
        global_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        epoch: int = 0,
        start_step: int = 0,
    ):
        check_int("batch_size", global_batch_size, 1)
        parts = world_size * accumulate
        if global_batch_size % parts:
            raise ArgumentError(
                "batch_size",
                f"the global batch {global_batch_size} does not divide by {world_size} processes x "
                f"{accumulate} accumulated batches; choose a multiple of {parts}",
            )
        if global_batch_size > num_images:
            raise ArgumentError(
                "batch_size",
                f"{global_batch_size} exceeds the {num_images} training images, so that an epoch would hold no full "
                "batch; choose a smaller batch, or more images (data.limit_train, of synthetic ones data.num_train)",
            )
        self.num_images, self.global_batch_size, self.seed = num_images, global_batch_size, seed
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.steps = num_images // global_batch_size
        self.local_batch_size = global_batch_size // parts  # images of a batch on this process
        self.epoch = epoch
        self.start_at(epoch, start_step)

    @property
    def sampler(self) -> "GlobalBatchSampler":
        """Itself: Lightning looks for `set_epoch` at `dataloader.batch_sampler.sampler`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration that of epoch `epoch`, counted from 0."""
        self.epoch = epoch

    def start_at(self, epoch: int, step: int) -> None:
        """Makes `epoch` the next one and skips its first `step` optimiser steps, however often it is iterated."""
        check_int("epoch", epoch, 0)
        check_int("step", step, 0, self.steps)
        self.epoch, self._resumed = epoch, (epoch, step)

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[list[Request]]:
        epoch = self.epoch
        first = self._resumed[1] if self._resumed[0] == epoch else 0
        order = permutation(self.seed, epoch, self.num_images)
        local = self.local_batch_size
        for micro_batch in range(first * self.accumulate, len(self)):
            begin, end = (part * local * self.world_size for part in (micro_batch, micro_batch + 1))
            yield [(epoch, index) for index in order[begin + self.rank : end : self.world_size].tolist()]


class ValidationSampler(Sampler[list[Request]]):
    """Splits the validation set over the processes without padding: every image exactly once, in index order.

    Rank r takes images r, r + W, ... in batches of `batch_size`. All ranks have the same number of batches (a rank with
    fewer images shortens its last two), because a forward pass may hold collectives.
    """

    def __init__(self, num_images: int, batch_size: int, rank: int = 0, world_size: int = 1):
        if num_images < world_size:
            raise ArgumentError(
                "limit_val",
                f"{num_images} validation images cannot be spread over {world_size} processes; "
                "use more images or fewer processes",
            )
        check_int("val_batch_size", batch_size, 2 if world_size > 1 else 1)
        self.local_batch_size = batch_size
        self.images = range(rank, num_images, world_size)
        batches = math.ceil(math.ceil(num_images / world_size) / batch_size)
        self.bounds = [min(b * batch_size, len(self.images)) for b in range(batches)] + [len(self.images)]
        if batches > 1 and self.bounds[-2] == len(self.images):
            self.bounds[-2] -= 1

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __iter__(self) -> Iterator[list[Request]]:
        for begin, end in zip(self.bounds, self.bounds[1:], strict=False):
            yield [(0, index) for index in self.images[begin:end]]


def check_division(data: Any, batch_size: int, processes: int, accumulate: int) -> None:
    """Raises ArgumentError where batches, or the validation images, of a data module, set up, cannot be dealt out."""
    GlobalBatchSampler(data.train_images, batch_size, 0, 0, processes, accumulate)
    ValidationSampler(data.val_images, data.val_batch_size or 2, 0, processes)


def split_requests(requests: list[Request]) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and indices of a batch's requests, as two int64 arrays."""
    pairs_N2 = np.asarray(requests, dtype=np.int64)
    return pairs_N2[:, 0], pairs_N2[:, 1]
