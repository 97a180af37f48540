"""ImageNet, or any set laid out as train/ and val/ class folders."""

import os
from dataclasses import dataclass
from pathlib import Path

from onlinenorm.data.datasets import FolderDataset
from onlinenorm.data.errors import DataError
from onlinenorm.data.index import EXTENSIONS, FolderIndex, list_classes, load_index, name_few
from onlinenorm.data.module import ImageDataModule

_PUBLISHED = 1000, 1_281_167, 50_000  # classes, training and validation images of ILSVRC 2012

_LAYOUT = """\
Expected: ROOT/train/CLASS/*.JPEG and ROOT/val/CLASS/*.JPEG with the same class folders in both
(ImageNet: 1,000 folders named n01440764 ... n15075141, 1,281,167 and 50,000 images).
To get ImageNet: register at https://image-net.org and download ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar,
unpack train's inner archives into a folder a class, and sort val's images into class folders.
Then: python train.py experiment=table1 data.root=ROOT
Without any download: python train.py experiment=quickstart (real images, small network, minutes on a CPU)."""


@dataclass(kw_only=True, eq=False, repr=False)
class ImageNet(ImageDataModule):
    """Class folders below `root`, train/CLASS/*.JPEG and val/CLASS/*.JPEG, read as torchvision's ImageFolder does.

    Labels are positions in the sorted list of class folders. `scale` is "imagenet" only for 1,000 classes with
    1,281,167 and 50,000 images, else "imagenet-subset". Training crops have `image_size` pixels; validation
    resizes the shorter side to image_size * 256 / 224 first. pad_crop and none are meant for small images.
    Arguments are those of ImageDataModule.
    """

    num_workers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.in_channels != 3:
            raise ValueError(f"in_channels: {self.in_channels} is not 3; images of class folders are read as RGB")
        self.name = "imagenet"

    def build(self) -> tuple[FolderDataset, FolderDataset]:
        train, val = open_splits(self.root)
        return (
            self._dataset(train.first(self.limit_train), self.augmentation, training=True),
            self._dataset(val.first(self.limit_val), self.evaluation, training=False),
        )

    def _dataset(self, index: FolderIndex, plan: str, training: bool) -> FolderDataset:
        return FolderDataset(index, plan, self.image_size, self.crop_padding, self.decoder, self.seed, training)

    @property
    def class_names(self) -> list[str]:
        return self._sets[0].index.class_names

    @property
    def scale(self) -> str:
        found = self.num_classes, self.train_images, self.val_images
        return "imagenet" if found == _PUBLISHED else "imagenet-subset"

    @property
    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def open_splits(root: str | None) -> tuple[FolderIndex, FolderIndex]:
    """Indexes of train/ and val/ below `root`. Raises DataError for anything that is not the layout expected."""
    if root is None:
        raise DataError(f"root: no ImageNet folder is given.\n{_LAYOUT}")
    folder = Path(root).expanduser()
    if not folder.is_dir():
        kind = "is a file, not a folder" if folder.exists() else "does not exist"
        raise DataError(f"root: {folder.absolute()} {kind}.\n{_LAYOUT}")
    missing = [split for split in ("train", "val") if not (folder / split).is_dir()]
    if missing:
        found = name_few(sorted(os.listdir(folder))) or "nothing"
        raise DataError(
            f"root: {folder.absolute()} holds no folder {' and no folder '.join(missing)} (it holds: {found}).\n"
            f"{_LAYOUT}"
        )
    _check_classes(folder)
    return load_index(folder / "train"), load_index(folder / "val")


def _check_classes(folder: Path) -> None:
    train, val = (list_classes(folder / split) for split in ("train", "val"))
    for split, classes in (("train", train), ("val", val)):
        if not classes:
            loose = sum(entry.name.lower().endswith(EXTENSIONS) for entry in os.scandir(folder / split))
            hint = f"; its {loose} images lie loose and have to be sorted into class folders" if loose else ""
            raise DataError(f"root: {folder.absolute() / split} holds no class folders{hint}.\n{_LAYOUT}")
    if train == val:
        return
    only_train, only_val = sorted(set(train) - set(val)), sorted(set(val) - set(train))
    differences = [
        f"{len(names)} only in {split}/: {name_few(names)}"
        for split, names in (("train", only_train), ("val", only_val))
        if names
    ]
    raise DataError(
        f"root: train/ and val/ in {folder.absolute()} must hold the same class folders, because a label is a position "
        f"in their sorted list; {'; '.join(differences)}. Complete the one or remove them from the other."
    )
