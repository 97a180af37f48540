"""Validation batches, the same in every epoch, kept as they came the first time."""

from collections.abc import Iterator
from typing import Any

import torch

from onlinenorm.data.decoded import free_memory
from onlinenorm.data.prefetch import Batch

SHARE = 0.25  # of the free memory of a device, at most


class KeptBatches:
    """A loader of batches that do not change, decoded once where their device has room for them.

    They are kept, on the device that they come on, where all images take at most `SHARE` of what is free there when the
    first batch comes, and all could be read; the loader is then let go, and its workers end. Else it makes them anew
    each time.

    Args:
        loader: of the batches of a FolderDataset.
    """

    def __init__(self, loader: Any):
        self.dataset, self.batch_sampler, self.num_workers = loader.dataset, loader.batch_sampler, loader.num_workers
        self.loader: Any = loader  # None once the batches are kept
        self._kept: list[Batch] = []

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._kept) if self._kept else self._made()

    def _made(self) -> Iterator[Batch]:
        kept: list[Batch] = []
        keeps = None
        try:
            for batch in self.loader:
                images, _, indices, *_ = batch
                if keeps is None:
                    keeps = fits(images.nbytes // len(images) * len(self.dataset), images.device)
                keeps = keeps and bool((indices.numpy() >= 0).all())  # an unreadable image is tried again
                if keeps:
                    # a copy, as what workers send lies in shared memory, which is small
                    kept.append(batch if images.is_cuda else tuple(tensor.clone() for tensor in batch))
                else:
                    kept.clear()
                if len(kept) == len(self):
                    self._kept = kept
                yield batch
        finally:  # also where nobody asks for more than the last batch
            if self._kept:
                self.loader = None


def fits(needed: int, device: torch.device) -> bool:
    """Whether so many bytes are at most `SHARE` of the free memory of `device`; of a GPU, of what nobody has reserved.

    What is reserved and unused may be a captured graph's own.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory(device)
    return free is not None and needed <= SHARE * free
