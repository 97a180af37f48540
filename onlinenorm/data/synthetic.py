"""Random images that a network can learn to tell apart, made on the fly."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from onlinenorm.arguments import check_int
from onlinenorm.data.datasets import InMemoryDataset
from onlinenorm.data.module import ImageDataModule
from onlinenorm.data.randomness import CONTENT, hash64
from onlinenorm.errors import ArgumentError

_GRID = 7  # a class is a coarse picture of _GRID x _GRID patches
_SPARE = 1 << 16  # noise bytes beyond one image: an image's noise begins at one of so many places


class SyntheticSource:
    """Image i = (coarse random picture of its class + noise of image i) / 2, a function of (content_seed, split, i).

    The noise is a window into one random byte string, so an image costs one addition.

    Args:
        count: images. num_classes, channels, size: classes, channels, width and height.
        split: 0 training, 1 validation. content_seed: another seed is another dataset.
    """

    def __init__(self, count: int, num_classes: int, channels: int, size: int, split: int, content_seed: int):
        self._count, self._classes, self._split, self._seed = count, num_classes, split, content_seed
        self._shape = channels, size, size
        pictures = hash64(content_seed, CONTENT, 0, np.arange(num_classes * channels * _GRID * _GRID))
        self._pictures = (pictures >> np.uint64(57)).astype(np.uint8).reshape(num_classes, channels, _GRID, _GRID)
        noise = hash64(content_seed, CONTENT, 1, np.arange((channels * size * size + _SPARE) // 8 + 1))
        self._noise = noise.view(np.uint8) >> 1
        self._patch = np.arange(size) * _GRID // size

    def __len__(self) -> int:
        return self._count

    def images(self, indices: np.ndarray) -> np.ndarray:
        channels, size, _ = self._shape
        starts = hash64(self._seed, CONTENT, 3, self._split, indices) % np.uint64(_SPARE)
        rows_NCGW = self._pictures[self.labels(indices)][..., self._patch]
        out_NCHW = np.empty((len(indices), *self._shape), dtype=np.uint8)
        for n, start in enumerate(starts.tolist()):
            out_NCHW[n] = self._noise[start : start + channels * size * size].reshape(self._shape)
        for g in range(_GRID):
            in_row = np.flatnonzero(self._patch == g)
            out_NCHW[:, :, in_row[0] : in_row[-1] + 1] += rows_NCGW[:, :, g, None]
        return out_NCHW

    def labels(self, indices: np.ndarray) -> np.ndarray:
        return (hash64(self._seed, CONTENT, 2, self._split, indices) % np.uint64(self._classes)).astype(np.int64)

    def update_digest(self, digest: Any) -> None:
        """Feeds the defining numbers and a few images: they determine the rest."""
        digest.update(repr((self._count, self._classes, self._shape, self._split, self._seed)).encode())
        sample = np.arange(min(self._count, 16))
        digest.update(self.images(sample))
        digest.update(self.labels(sample))


@dataclass(kw_only=True, eq=False, repr=False)
class Synthetic(ImageDataModule):
    """Learnable random images of any size, for tests and speed measurements; nothing is read from disk.

    Args:
        num_train, num_val: images.
        classes: number of classes.
        content_seed: another seed is another dataset (`seed`, of order and augmentation, leaves the images alone).
        Others as ImageDataModule; `image_size` and `in_channels` are those of the images made.
    """

    num_train: int = 2048
    num_val: int = 512
    classes: int = 10
    content_seed: int = 0
    image_size: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("num_train", self.num_train, 1)
        check_int("num_val", self.num_val, 1)
        check_int("classes", self.classes, 2)
        check_int("in_channels", self.in_channels, 1)
        check_int("content_seed", self.content_seed, 0)
        if self.augmentation == "scale_jitter" and self.in_channels != 3:
            raise ArgumentError("augmentation", "scale_jitter adds RGB noise, which needs in_channels 3; use pad_crop")
        self.name = "synthetic"

    def build(self) -> tuple[InMemoryDataset, InMemoryDataset]:
        return (
            self._dataset(self.num_train, self.augmentation, split=0),
            self._dataset(self.num_val, self.evaluation, split=1),
        )

    def _dataset(self, count: int, plan: str, split: int) -> InMemoryDataset:
        source = SyntheticSource(count, self.classes, self.in_channels, self.image_size, split, self.content_seed)
        return InMemoryDataset(source, plan, self.crop_padding, self.seed)

    @property
    def class_names(self) -> list[str]:
        return [f"class {label}" for label in range(self.classes)]

    @property
    def scale(self) -> str:
        return "synthetic"

    @property
    def reads_root(self) -> bool:
        return False

    @property
    def licence(self) -> str:
        return "none: the images are random numbers"

    @property
    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return (0.5,) * self.in_channels, (0.2,) * self.in_channels
