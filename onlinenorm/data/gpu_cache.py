"""Small sets whole in the device's memory, augmented there many batches at a time."""

from collections.abc import Iterator

import numpy as np
import torch

from onlinenorm.data.datasets import Batch, InMemoryDataset
from onlinenorm.data.sampler import GlobalBatchSampler, ValidationSampler, split_requests

_IMAGES = 8192  # made at once: a few large kernels in place of some small ones a batch


class GpuCacheLoader:
    """A loader of the batches that the dataset itself would give, with images and labels on `device`.

    Pixels are those of workers, bit for bit. Indices stay in host memory, where they are looked at.

    Args:
        dataset: the images; all of them are copied to the device at the first batch.
        batch_sampler: which images make which batch.
        device: where the images are kept and augmented.
    """

    num_workers = 0

    def __init__(
        self, dataset: InMemoryDataset, batch_sampler: GlobalBatchSampler | ValidationSampler, device: torch.device
    ):
        self.dataset, self.batch_sampler, self.device = dataset, batch_sampler, device
        self._everything: tuple[torch.Tensor, torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        if self._everything is None:
            images, labels = self.dataset.originals(np.arange(len(self.dataset)))
            self._everything = images.to(self.device), labels.to(self.device)
        images, labels = self._everything
        batches = iter(self.batch_sampler)
        while chunk := _take(batches, _IMAGES):
            epochs, indices = split_requests([request for batch in chunk for request in batch])
            host = torch.from_numpy(indices)
            on_device = host.to(self.device)
            augmented = self.dataset.augment(images[on_device], self.dataset.draws(epochs, indices))
            sizes = [len(batch) for batch in chunk]
            yield from zip(augmented.split(sizes), labels[on_device].split(sizes), host.split(sizes), strict=True)


def _take(batches: Iterator[list], images: int) -> list[list]:
    """Batches until they hold `images` images, or all that are left."""
    chunk: list[list] = []
    while sum(map(len, chunk)) < images and (batch := next(batches, None)) is not None:
        chunk.append(batch)
    return chunk
