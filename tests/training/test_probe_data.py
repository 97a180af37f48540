"""Data sets of the user's own that cannot be trained on, found before a run begins."""

from dataclasses import dataclass

import numpy as np
import pytest

from onlinenorm.data import ImageDataModule
from onlinenorm.data.datasets import ArraySource, InMemoryDataset
from onlinenorm.errors import ConfigError
from onlinenorm.training.probe_data import probe_data


@dataclass(kw_only=True, eq=False, repr=False)
class Gray(ImageDataModule):
    """Gray images of 8 x 8 pixels in two classes."""

    image_size: int = 8
    in_channels: int = 1
    augmentation: str = "pad_crop"

    scale, licence = "gray squares", "CC0"
    class_names = ("dark", "bright")
    mean_std = (0.5,), (0.3,)
    shape, dtype, labels = (6, 1, 8, 8), np.uint8, np.arange(6) % 2

    def build(self):
        return self.split(self.augmentation), self.split(self.evaluation)

    def split(self, plan):
        return InMemoryDataset(ArraySource(np.zeros(self.shape, self.dtype), self.labels), plan, 1, self.seed)


def of(**changes):
    return type("Own", (Gray,), changes)()


def test_what_is_as_described_passes():
    for changes in ({}, {"image_size": 16}, {"class_names": ["a", "b", "c"]}, {"in_channels": 3}):
        probe_data(of(**changes), {"data": {"_target_": "mine.Own"}})


OPENED = r"^data\._target_: mine\.Own cannot be used \("


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"build": ImageDataModule.build}, rf"{OPENED}NotImplementedError\); its build\(\) gives two of"),
        ({"build": lambda self: self.split("none")}, rf"{OPENED}NotImplementedError: .*; its build\(\) gives two of"),
        ({"build": lambda self: (self.split("none"), ([1], [2]))}, "build gives tuple as the second of two"),
        ({"build": lambda self: {}["path"]}, f"{OPENED}KeyError: 'path'"),
        ({"dtype": np.float32}, rf"{OPENED}ValueError: images are float32 of shape \(6, 1, 8, 8\), and not uint8"),
        ({"shape": (6, 8, 8)}, rf"{OPENED}ValueError: images are uint8 of shape \(6, 8, 8\)"),
        ({"shape": (6, 8, 8, 1)}, r"a training batch is \[4, 8, 8, 1\], with 8 channels, mean_std has 1"),
        ({"shape": (5, 1, 8, 8)}, f"{OPENED}ValueError: labels are int64 of shape .* one for each of 5 images"),
        ({"labels": np.arange(6) / 2}, f"{OPENED}ValueError: labels are float64"),
        ({"labels": np.arange(6)}, "a training image has the label 5, and there are 2 class_names, for labels 0 to 1"),
        ({"labels": np.arange(6) % 2 - 1}, "a training image has the label -1"),
        ({"shape": (0, 1, 8, 8), "labels": np.arange(0)}, "a training image is needed, and its set is empty"),
        ({"class_names": "ab"}, "class_names is 'ab'; it is a list of texts"),
        ({"class_names": (1, 2)}, r"class_names is \(1, 2\); it is a list of texts"),
        ({"mean_std": (0.5, 0.3)}, r"mean_std is \(0.5, 0.3\); it is two tuples"),
        ({"mean_std": ((0.5,), (0.0,))}, "deviations, the second, are larger than 0"),
        ({"mean_std": ((0.5,) * 3, (0.3,) * 3)}, "with 1 channels, mean_std has 3"),
        ({"mean_std": ((0.5,), (0.3, 0.3))}, "it is two tuples of a number for each channel"),
        ({"shape": (6, 2, 8, 8), "mean_std": ((0.5,) * 2, (0.3,) * 2)}, "the network takes data.in_channels=1"),
        *(
            ({"scale": taken}, f"scale is '{taken}', which published figures or margins are of \\({key}\\); name it")
            for taken, key in {
                "imagenet": "imagenet",
                "ImageNet": "imagenet",
                "fashion_mnist": "fashion_mnist",
                "Fashion-MNIST": "fashion_mnist",
                "cifar 10": "cifar10",
                "ImageNet subset, not ImageNet": "imagenet-subset",
            }.items()
        ),
    ],
)
def test_what_is_not_is_told(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        probe_data(of(**changes), {"data": {"_target_": "mine.Own"}})
    assert "\n" not in str(caught.value) and str(caught.value).startswith("data._target_: mine.Own")
