"""What is wrong with a data set before a network trains on it: what it says of itself against two batches of it."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from onlinenorm.data.datasets import FolderDataset, InMemoryDataset
from onlinenorm.data.nvjpeg_dataset import NvjpegDataset
from onlinenorm.data.nvjpeg_loader import NO_GPU
from onlinenorm.errors import ConfigError
from onlinenorm.scales import LABEL, is_label, published_label
from onlinenorm.training.targets import NAMED, own_errors

TRIED = 4  # images of each split
BUILD = "; its build() gives two of InMemoryDataset or FolderDataset, the training and the validation set"
WHAT = "; onlinenorm.data.ImageDataModule says what a data set provides"


def probe_data(data: Any, config: dict[str, Any]) -> None:
    """Raises ConfigError for a data set, set up, that lacks what a run and its table need, or needs a GPU on the CPU.

    One of the user's own is used as well: a batch of each split, and all labels.
    """
    name = config["data"]["_target_"]
    for key in ("scale", "licence", "class_names", "mean_std"):
        try:
            value = getattr(data, key)
        except (NotImplementedError, AttributeError):
            raise ConfigError(f"data._target_: {name} has no {key}{WHAT}") from None
        if key == "scale" and not is_label(value):
            raise ConfigError(f"data._target_: {name}.scale is {value!r}; it is {LABEL}, such as flowers")
        if key == "licence" and (not isinstance(value, str) or not value.strip() or "\n" in value):
            raise ConfigError(f"data._target_: {name}.licence is {value!r}; say in a line how the images may be used")
    if name in NAMED["data"]:
        return _check_decoder(data, config)
    if known := published_label("scales", data.scale):
        raise ConfigError(
            f"data._target_: {name}.scale is {data.scale!r}, which published figures or margins are of ({known}); name "
            "it otherwise"
        )
    with own_errors("data", name, "cannot be used", BUILD):
        _check_described(data, name)
        _check_decoder(data, config)
        for split, dataset, place in zip(("training", "validation"), data._sets, ("first", "second"), strict=True):
            if not isinstance(dataset, InMemoryDataset | FolderDataset):
                raise ConfigError(
                    f"data._target_: {name}.build gives {type(dataset).__name__} as the {place} of two, and not an "
                    f"InMemoryDataset or FolderDataset, the {split} set"
                )
            _check_labels(dataset, data.num_classes, f"{name}: a {split} image")
            if not isinstance(dataset, NvjpegDataset):  # whose batches need a GPU
                _check_batch(data, dataset, f"{name}: a {split} batch")


def _check_decoder(data: Any, config: dict[str, Any]) -> None:
    if isinstance(data._sets[0], NvjpegDataset) and config["trainer"]["accelerator"] != "gpu":
        raise ConfigError(f"data.decoder: {NO_GPU}")


def _check_described(data: Any, name: str) -> None:
    names, statistics = data.class_names, data.mean_std
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(each, str) for each in names):
        raise ConfigError(f"data._target_: {name}.class_names is {names!r}; it is a list of texts, one a class")
    numbers = [list(map(float, each)) if isinstance(each, Sequence) else [] for each in statistics]
    lengths = {len(each) for each in numbers}
    if len(numbers) != 2 or len(lengths) != 1 or lengths == {0}:
        raise ConfigError(
            f"data._target_: {name}.mean_std is {statistics!r}; it is two tuples of a number for each channel of the "
            "images, as (0.5,), (0.3,) for gray ones"
        )
    if not all(map(math.isfinite, numbers[0])) or not all(0 < each < math.inf for each in numbers[1]):
        raise ConfigError(
            f"data._target_: {name}.mean_std is {statistics!r}; deviations, the second, are larger than 0, and all are "
            "in units of [0, 1]"
        )


def _check_labels(dataset: InMemoryDataset | FolderDataset, classes: int, what: str) -> None:
    labels = dataset.labels()
    if not len(labels):
        raise ConfigError(f"data._target_: {what} is needed, and its set is empty; see what build() finds")
    if labels.min() < 0 or labels.max() >= classes:
        wrong = labels.max() if labels.max() >= classes else labels.min()
        raise ConfigError(
            f"data._target_: {what} has the label {wrong}, and there are {classes} class_names, for labels 0 to "
            f"{classes - 1}; mend either"
        )


def _check_batch(data: Any, dataset: InMemoryDataset | FolderDataset, what: str) -> None:
    images, labels, _, *colour = dataset.__getitems__([(0, index) for index in range(min(TRIED, len(dataset)))])
    if images.dtype != torch.uint8 or images.dim() not in (4, 5):
        raise ConfigError(f"data._target_: {what} is {images.dtype}, {list(images.shape)}, and not uint8, [N, C, H, W]")
    channels, described = images.shape[-3], len(data.mean_std[0])
    if channels != described or channels not in (1, data.in_channels):
        raise ConfigError(
            f"data._target_: {what} is {list(images.shape)}, with {channels} channels, mean_std has {described}, and "
            f"the network takes data.in_channels={data.in_channels}; the first two are the same, and so is the "
            "third, but for gray images, which are repeated"
        )
    x = data.network_input(images, *colour)
    if x.shape[-3:] != (data.in_channels, data.image_size, data.image_size) or not x.isfinite().all():
        raise ConfigError(
            f"data._target_: {what} becomes {list(x.shape)} for the network, or what is not finite; see to mean_std, "
            f"and that images have data.image_size={data.image_size} pixels a side"
        )
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise ConfigError(f"data._target_: {what} has labels {labels.dtype}, {list(labels.shape)}, and not int64, [N]")
