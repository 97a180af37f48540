"""Sets of decoded images whole in the device's memory, cropped, resized and mirrored there."""

import copy
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from onlinenorm.data import decoded
from onlinenorm.data.datasets import SEARCH, FolderDataset, InMemoryDataset
from onlinenorm.data.prefetch import Batch, prefetch, to_device
from onlinenorm.data.randomness import uniforms
from onlinenorm.data.resize import crop_table, most_taps, resize_crops
from onlinenorm.data.sampler import GlobalBatchSampler, ValidationSampler, split_requests
from onlinenorm.data.transforms import DRAWS, DRAWS_OF, colour_shifts, plan_rows

# made at once, a few large kernels in place of some small ones a batch: bytes of crops, and images
_CHUNK, _IMAGES = 1 << 26, 8192


class GpuCache(NamedTuple):
    """The N images of a set in a device's memory, and what is known of them.

    channels: of the images. crop_size: of their crops. shown_N: the image that stands in for each, itself where it can
    be read. reported_N: indices as batches have them, int64. labels_N: int64, on the device.
    """

    images: decoded.DecodedImages
    channels: int
    crop_size: int
    shown_N: np.ndarray
    reported_N: torch.Tensor
    labels_N: torch.Tensor


class _LoadedOnce:
    """Gives what `load` returns, loaded at the first call, once for all threads; pickled and deep copies load anew."""

    def __init__(self, *arguments: Any):
        self._arguments, self._lock = arguments, threading.Lock()
        self._loaded: GpuCache | None = None

    def __call__(self) -> GpuCache:
        with self._lock:
            if self._loaded is None:
                self._loaded = load(*self._arguments)
            return self._loaded

    def __reduce__(self) -> tuple:
        return type(self), self._arguments


class GpuCacheLoader:
    """A loader of the batches that the dataset itself would give, with images and labels on `device`.

    Pixels are those of workers, bit for bit, and so is what stands in for images that cannot be read. Indices stay in
    host memory, where they are looked at. Batches are made ahead in a thread, on a stream of their own. The set stays
    in the device's memory as long as a loader of it lives; a data module keeps one as long as it lives itself.

    Args:
        dataset: the images; all of them are decoded and copied to the device at the first batch.
        batch_sampler: which images make which batch.
        device: where the images are kept and augmented.
        workers: processes that decode.
        keep: decoded images are kept in a file for the next run.
    """

    num_workers = 0

    def __init__(
        self,
        dataset: InMemoryDataset | FolderDataset,
        batch_sampler: GlobalBatchSampler | ValidationSampler,
        device: torch.device,
        workers: int = 0,
        keep: bool = False,
    ):
        if device.type == "cuda" and device.index is None:  # as trainers name it, for one set in memory and not two
            device = torch.device("cuda", torch.cuda.current_device())
        self.dataset, self.batch_sampler, self.device = dataset, batch_sampler, device
        self._cache = _LoadedOnce(dataset, device, workers, keep)

    def with_sampler(self, batch_sampler: GlobalBatchSampler | ValidationSampler) -> "GpuCacheLoader":
        """A loader of other batches of the same images, which are decoded once for both."""
        loader = copy.copy(self)
        loader.batch_sampler = batch_sampler
        return loader

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        self._cache()
        return prefetch(self._batches(), self.device)

    def _batches(self) -> Iterator[Batch]:
        batches, cache = iter(self.batch_sampler), self._cache()
        crops = 10 if self.dataset.plan == "ten_crop" else 1
        images = min(_IMAGES, _CHUNK // (crops * cache.channels * cache.crop_size**2))
        while chunk := _take(batches, images):
            epochs, indices = split_requests([request for batch in chunk for request in batch])
            draws_NK = uniforms(self.dataset.seed, epochs, indices, DRAWS, DRAWS_OF.get(self.dataset.plan))
            on_device = to_device(torch.from_numpy(indices), self.device)
            reported_N = cache.reported_N[indices]
            if self.device.type == "cuda":
                reported_N = reported_N.pin_memory()  # its parts are copied at the steps, which do not wait for that
            parts = [self._augment(indices, on_device, draws_NK), cache.labels_N[on_device], reported_N]
            if self.dataset.plan == "scale_jitter":
                parts.append(to_device(torch.from_numpy(colour_shifts(draws_NK)), self.device))
            sizes = [len(batch) for batch in chunk]
            yield from zip(*(part.split(sizes) for part in parts), strict=True)

    def _augment(self, indices: np.ndarray, on_device: torch.Tensor, draws_NK: np.ndarray) -> torch.Tensor:
        dataset, cache = self.dataset, self._cache()
        images = cache.images
        if isinstance(dataset, InMemoryDataset) and dataset.keeps_size:
            width, height = images.sizes_N2[0].tolist()
            images_NCHW = images.pixels_B.view(-1, cache.channels, height, width)
            return dataset.augment(images_NCHW[on_device], draws_NK)
        shown_N = cache.shown_N[indices]
        rows_NK9 = plan_rows(dataset.plan, images.sizes_N2[shown_N], cache.crop_size, dataset.padding, draws_NK)
        crops = rows_NK9.shape[1]
        of_crops = shown_N.repeat(crops)
        table = crop_table(
            rows_NK9.reshape(-1, 9), images.starts_N[of_crops], images.sizes_N2[of_crops], images.of_torch_N[of_crops]
        )
        crops_MCHW = resize_crops(
            images.pixels_B, to_device(torch.from_numpy(table), self.device), most_taps(table), cache.crop_size,
            cache.channels,
        )  # fmt: skip
        return crops_MCHW.unflatten(0, (-1, crops)) if crops > 1 else crops_MCHW


def load(dataset: InMemoryDataset | FolderDataset, device: torch.device, workers: int, keep: bool) -> GpuCache:
    """All images of a set on `device`; arguments as of `GpuCacheLoader`."""
    labels_N = dataset.labels().astype(np.int64)
    shown_N = reported_N = np.arange(len(dataset))
    if isinstance(dataset, InMemoryDataset):
        images = decoded.in_memory_images(dataset, device)
        channels = len(images.pixels_B) // (len(dataset) * int(images.sizes_N2[0].prod()))
        crop_size = int(images.sizes_N2[0, 0])
    else:
        if keep:
            images = decoded.on_device(decoded.kept_images(dataset, workers, device), device)
        else:
            images = decoded.decode_images(
                dataset, workers, device, lambda size: torch.empty(size, dtype=torch.uint8, device=device)
            )
        channels, crop_size = 3, dataset.crop_size
        shown_N = _readable(dataset, images)
        replaced_N = shown_N != reported_N
        reported_N = np.where(replaced_N, -reported_N - 1, reported_N)
        labels_N = np.where(replaced_N, labels_N[shown_N] if dataset.training else -1, labels_N)
    return GpuCache(
        images, channels, crop_size, shown_N, torch.from_numpy(reported_N), torch.from_numpy(labels_N).to(device)
    )


def _readable(dataset: FolderDataset, images: decoded.DecodedImages) -> np.ndarray:
    """For each image itself, or where it cannot be read the next one that can, as `FolderDataset.readable` finds it."""
    count = len(dataset)
    good = np.flatnonzero(images.sizes_N2[:, 0])
    ahead = np.concatenate([good, good[:1] + count])
    shown_N = ahead[np.searchsorted(good, np.arange(count))] if len(good) else np.full(count, count + SEARCH)
    if len(far := np.flatnonzero(shown_N - np.arange(count) >= SEARCH)):
        dataset.readable(int(far[0]), np.zeros(DRAWS))  # raises, and says what is wrong
    return shown_N % count


def _take(batches: Iterator[list], images: int) -> list[list]:
    """Batches until they hold `images` images, one at least, or all that are left."""
    chunk: list[list] = []
    while sum(map(len, chunk)) < max(images, 1) and (batch := next(batches, None)) is not None:
        chunk.append(batch)
    return chunk
