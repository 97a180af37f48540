"""Map-style datasets that make whole batches: a list of (epoch, index) in, a tuple of tensors out.

A batch is (images uint8, labels int64, indices int64), and for scale_jitter in training a fourth tensor, the colour
shifts N x 3. Images are N x C x H x W, for ten_crop N x 10 x C x H x W.
"""

import copy
import functools
import hashlib
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from onlinenorm.data.decoders import DECODERS, named_warnings
from onlinenorm.data.index import FolderIndex
from onlinenorm.data.limits import LimitedSource
from onlinenorm.data.prefetch import Batch
from onlinenorm.data.randomness import uniforms
from onlinenorm.data.sampler import Request, split_requests
from onlinenorm.data.transforms import DRAWS, DRAWS_OF, PLANS, Planner, colour_shifts, follow_plan, shift_and_mirror
from onlinenorm.data.unreadable import no_memory
from onlinenorm.errors import DataError

SEARCH = 1000  # images looked at for a readable replacement; more in a row means the disk is gone, not a file


class PixelSource(Protocol):
    """Images of equal size that are in memory or made on demand."""

    def __len__(self) -> int: ...

    def images(self, indices: np.ndarray) -> np.ndarray:
        """uint8, N x C x H x W; the caller may keep but not change it."""
        ...

    def labels(self, indices: np.ndarray) -> np.ndarray:
        """int64, N."""
        ...

    def update_digest(self, digest: Any) -> None:
        """Feeds the content to a hashlib object."""
        ...


class ArraySource:
    """Images and labels held as arrays; `images_NCHW` uint8, `labels_N` any integer type. Else raises ValueError."""

    def __init__(self, images_NCHW: np.ndarray, labels_N: np.ndarray):
        if images_NCHW.dtype != np.uint8 or images_NCHW.ndim != 4:
            raise ValueError(
                f"images are {images_NCHW.dtype} of shape {images_NCHW.shape}, and not uint8 of N, C, H, W"
            )
        if not np.issubdtype(labels_N.dtype, np.integer) or labels_N.shape != images_NCHW.shape[:1]:
            raise ValueError(
                f"labels are {labels_N.dtype} of shape {labels_N.shape}, and not whole numbers, one for each of "
                f"{len(images_NCHW)} images"
            )
        self._images_NCHW = np.ascontiguousarray(images_NCHW)
        self._labels_N = labels_N.astype(np.int64)

    def __len__(self) -> int:
        return len(self._labels_N)

    def images(self, indices: np.ndarray) -> np.ndarray:
        return self._images_NCHW[indices]

    def labels(self, indices: np.ndarray) -> np.ndarray:
        return self._labels_N[indices]

    def update_digest(self, digest: Any) -> None:
        digest.update(repr(self._images_NCHW.shape).encode())
        digest.update(self._images_NCHW)
        digest.update(self._labels_N)


class InMemoryDataset(Dataset):
    """Images of one size, augmented a batch at a time.

    pad_crop, none and center_crop keep the native size and work on the whole batch at once (center_crop and none are
    the image itself). The other plans, made for photographs, are followed image by image at the native size.

    Args:
        source: the pixels.
        plan: a key of `transforms.PLANS`.
        padding: black pixels around the image for pad_crop.
        seed: of the augmentation.
    """

    def __init__(self, source: PixelSource, plan: str, padding: int, seed: int):
        self.source, self.plan, self.padding, self.seed = source, plan, padding, seed

    def __len__(self) -> int:
        return len(self.source)

    def labels(self) -> np.ndarray:
        """Of all images."""
        return self.source.labels(np.arange(len(self)))

    def limited(self, chosen: np.ndarray) -> "InMemoryDataset":
        """The same of some images, by their indices."""
        twin = copy.copy(self)
        twin.source = LimitedSource(self.source, chosen)
        return twin

    def __getitems__(self, requests: list[Request]) -> Batch:
        epochs, indices = split_requests(requests)
        draws_NK = self.draws(epochs, indices)
        images_NCHW, labels_N = self.originals(indices)
        batch = self.augment(images_NCHW, draws_NK), labels_N, torch.from_numpy(indices)
        return (*batch, torch.from_numpy(colour_shifts(draws_NK))) if self.plan == "scale_jitter" else batch

    @property
    def keeps_size(self) -> bool:
        """Whether the plan keeps the images' size, so that `augment` works on whole batches on any device."""
        return self.plan in ("pad_crop", "none", "center_crop")

    def originals(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """(images, labels) as they are."""
        return torch.from_numpy(self.source.images(indices)), torch.from_numpy(self.source.labels(indices))

    def draws(self, epochs: np.ndarray, indices: np.ndarray) -> np.ndarray:
        """The random numbers that the plan reads for images in epochs, N x DRAWS."""
        return uniforms(self.seed, epochs, indices, DRAWS, DRAWS_OF.get(self.plan))

    def augment(self, images_NCHW: torch.Tensor, draws_NK: np.ndarray) -> torch.Tensor:
        """What the network sees of original images, given their random numbers."""
        if self.plan == "pad_crop":
            return shift_and_mirror(images_NCHW, self.padding, draws_NK)
        return images_NCHW if self.keeps_size else self._planned(images_NCHW, draws_NK)

    def _planned(self, images_NCHW: torch.Tensor, draws_NK: np.ndarray) -> torch.Tensor:
        _, _, height, width = images_NCHW.shape
        crops = [
            follow_plan(image_CHW, PLANS[self.plan](width, height, width, self.padding, draws_K))
            for image_CHW, draws_K in zip(images_NCHW, draws_NK, strict=True)
        ]
        return _channels_first(torch.from_numpy(np.stack(crops)))


class FolderDataset(Dataset):
    """Encoded images of a `FolderIndex`, decoded, cropped and mirrored in the worker.

    An unreadable image is replaced by the next readable one of the index, so that a batch never shrinks, and reported
    in the batch itself: its index i becomes -i - 1, and in validation its label becomes -1. What that means
    (raise or skip) is decided in the main process by `ImageDataModule.on_before_batch_transfer`.

    Args:
        index: the files.
        plan: a key of `transforms.PLANS`.
        crop_size: width and height of the result.
        padding: of pad_crop.
        decoder: a key of `decoders.DECODERS`.
        seed: of the augmentation.
        training: whether an unreadable image takes its replacement's label (else -1).
    """

    def __init__(
        self, index: FolderIndex, plan: str, crop_size: int, padding: int, decoder: str, seed: int, training: bool
    ):
        self.index, self.plan, self.crop_size, self.padding = index, plan, crop_size, padding
        self.decoder, self.seed, self.training = decoder, seed, training

    def __len__(self) -> int:
        return len(self.index)

    def labels(self) -> np.ndarray:
        """Of all images."""
        return self.index.labels

    def limited(self, chosen: np.ndarray) -> "FolderDataset":
        """The same of some images, by their indices."""
        twin = copy.copy(self)
        twin.index = self.index.take(chosen)
        return twin

    def __getitems__(self, requests: list[Request]) -> Batch:
        epochs, indices = split_requests(requests)
        draws_NK = uniforms(self.seed, epochs, indices, DRAWS)
        labels = np.empty(len(indices), dtype=np.int64)
        reported = indices.copy()
        images = None
        for n, wanted in enumerate(indices.tolist()):
            labels[n], reported[n], crops_KHWC = self.readable(wanted, draws_NK[n])
            if images is None:
                images = torch.empty((len(indices), *crops_KHWC.shape), dtype=torch.uint8)
            images[n] = torch.from_numpy(crops_KHWC)
        assert images is not None
        batch = _channels_first(images), torch.from_numpy(labels), torch.from_numpy(reported)
        return (*batch, torch.from_numpy(colour_shifts(draws_NK))) if self.plan == "scale_jitter" else batch

    def planner(self, draws_K: np.ndarray) -> Planner:
        """(width, height) of an image -> its plan, for these random numbers."""
        return functools.partial(PLANS[self.plan], crop_size=self.crop_size, padding=self.padding, draws=draws_K)

    def decode(self, index: int, draws_K: np.ndarray) -> np.ndarray:
        """Crops of one image, crops x H x W x 3; raises whatever the file system or the decoder raises."""
        data = self.index.read(index)
        with named_warnings() as reading:
            reading.file = self.index.path(index)
            return DECODERS[self.decoder](data, self.planner(draws_K))

    def failure(self, index: int) -> str:
        """Why image `index` cannot be read, in words."""
        try:
            self.decode(index, np.zeros(DRAWS))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "it could not be read the first time, and can be now"

    def readable(self, wanted: int, draws_K: np.ndarray) -> tuple[int, int, np.ndarray]:
        """(label, index as reported in the batch, crops) of an image, or of the next one that can be read."""
        for offset in range(min(SEARCH, len(self))):
            candidate = (wanted + offset) % len(self)
            try:
                crops_KHWC = self.decode(candidate, draws_K)
            except MemoryError as error:
                raise no_memory(self.index.path(candidate)) from error
            except Exception:  # a damaged file makes decoders raise almost anything
                continue
            if candidate == wanted:
                return int(self.index.labels[wanted]), wanted, crops_KHWC
            return int(self.index.labels[candidate]) if self.training else -1, -wanted - 1, crops_KHWC
        raise DataError(
            f"none of {min(SEARCH, len(self))} images in a row can be read, the first being "
            f"{self.index.path(wanted)} ({self.failure(wanted)}); is the disk still mounted?",
            key="root",
        )


def fingerprint(parts: list[Any]) -> str:
    """sha256 of what the parts (sources or indexes) feed through `update_digest`, in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        part.update_digest(digest)
    return digest.hexdigest()


def _channels_first(images_NKHWC: torch.Tensor) -> torch.Tensor:
    # a view: memory stays N, H, W, C (channels_last), which is what decoders write and GPUs read
    images_NKCHW = images_NKHWC.permute(0, 1, 4, 2, 3)
    return images_NKCHW[:, 0] if images_NKCHW.shape[1] == 1 else images_NKCHW
