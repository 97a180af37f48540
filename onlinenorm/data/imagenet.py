"""ImageNet, or any set laid out as train/ and val/ class folders, loose or in tar files."""

import functools
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onlinenorm.data.archives import TRAIN_ARCHIVE, VAL_ARCHIVE, Progress, load_official, load_shards
from onlinenorm.data.datasets import FolderDataset
from onlinenorm.data.decoders import DEVICE_DECODERS
from onlinenorm.data.index import EXTENSIONS, FolderIndex, list_classes, load_index, name_few
from onlinenorm.data.module import ImageDataModule
from onlinenorm.data.nvjpeg_dataset import NvjpegDataset
from onlinenorm.data.verify import recorded, scale_of
from onlinenorm.errors import ArgumentError, DataError

log = logging.getLogger(__name__)

_LAYOUT = """\
Expected in ROOT, any one of
  folders:   ROOT/train/CLASS/*.JPEG and ROOT/val/CLASS/*.JPEG with the same class folders in both
             (ImageNet: 1,000 folders named n01440764 ... n15075141, 1,281,167 and 50,000 images)
  shards:    train-*.tar and val-*.tar with members CLASS/*.JPEG, as scripts/prepare_imagenet.py --packed writes them
  archives:  ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz as downloaded
To get ImageNet: register at https://image-net.org, download the three archives; they can be read as they are, or
unpacked with: python scripts/prepare_imagenet.py ARCHIVES ROOT
Then: python train.py experiment=table1 data.root=ROOT
Without any download: python train.py experiment=quickstart (real images, small network, minutes on a CPU)."""


@dataclass(kw_only=True, eq=False, repr=False)
class ImageNet(ImageDataModule):
    """Class folders train/CLASS and val/CLASS, loose or in tar files, read as torchvision's ImageFolder does.

    Labels are positions in the sorted list of class folders. `scale` is "imagenet" only for 1,000 classes with
    1,281,167 and 50,000 images, "imagenet-subset" for other sets of classes named by WordNet's ids (n01440764), else
    "folder", and `name` then that of the folder. Training crops have `image_size` pixels; validation
    resizes the shorter side to image_size * 256 / 224 first. pad_crop and none are meant for small images.
    Arguments are those of ImageDataModule.
    """

    num_workers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.in_channels != 3:
            raise ArgumentError("in_channels", f"{self.in_channels} is not 3; images of class folders are read as RGB")
        self.name = "imagenet"

    def build(self) -> tuple[FolderDataset, FolderDataset]:
        train, val = self._splits = self.open_splits()
        if scale_of(train.class_names, len(train), len(val)) == "folder":
            name = Path(self.root or "").expanduser().resolve().name
            self.name = name if name and not name.lower().startswith("imagenet") else f"folder {name}".rstrip()
        ours: FolderDataset
        size, padding, seed = self.image_size, self.crop_padding, self.seed
        if self.decoder in DEVICE_DECODERS:
            ours = NvjpegDataset(train, self.augmentation, size, padding, seed, True, self.device_fraction)
        else:
            ours = FolderDataset(train, self.augmentation, size, padding, self.decoder, seed, training=True)
        return ours, FolderDataset(val, self.evaluation, size, padding, self.val_decoder, seed, training=False)

    def open_splits(self) -> tuple[FolderIndex, FolderIndex]:
        """Indexes of the training and validation images; see `open_splits`."""
        return open_splits(self.root)

    @functools.cached_property
    def verified(self) -> dict[str, Any] | None:
        """When and how scripts/prepare_imagenet.py --verify found these files, or None."""
        assert self._sets  # opened
        verification = recorded(Path(self.root or "").expanduser(), self._splits)
        return None if verification is None else {key: verification[key] for key in ("date", "decoded", "problems")}

    def describe(self) -> dict[str, Any]:
        """The `dataset` entry of results.json, with what decoded the images and what a verification found."""
        return {
            **super().describe(),
            "decoder": self.decoder,
            "val_decoder": self.val_decoder,
            "verified": self.verified,
        }

    @property
    def class_names(self) -> list[str]:
        train, _ = self._sets
        assert isinstance(train, FolderDataset)
        return train.index.class_names

    @property
    def scale(self) -> str:
        return scale_of(self.class_names, self.train_images, self.val_images)

    @property
    def licence(self) -> str:
        return "the terms of the images trained on; ImageNet's (image-net.org): non-commercial research and education"

    @property
    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def open_splits(root: str | None, progress: Progress | None = None) -> tuple[FolderIndex, FolderIndex]:
    """Indexes of the training and validation images below `root`, from whichever layout is there.

    Raises DataError for anything that is not a layout expected. `progress` is called during long work; None logs it.
    """
    if root is None:
        raise DataError(f"no ImageNet folder is given.\n{_LAYOUT}", key="root")
    folder = Path(root).expanduser()
    if not folder.is_dir():
        kind = "is a file, not a folder" if folder.exists() else "does not exist"
        raise DataError(f"{folder.absolute()} {kind}.\n{_LAYOUT}", key="root")
    missing = [split for split in ("train", "val") if not (folder / split).is_dir()]
    if not missing:
        _check_classes(folder, *(list_classes(folder / split) for split in ("train", "val")))
        return load_index(folder / "train"), load_index(folder / "val")
    shards = [_find_shards(folder, split) for split in ("train", "val")]
    if all(shards):
        train, val = (load_shards(found, split) for found, split in zip(shards, ("train", "val"), strict=True))
        _check_classes(folder, train.class_names, val.class_names)
        return train, val
    if (folder / TRAIN_ARCHIVE).exists() or (folder / VAL_ARCHIVE).exists():
        train, val = load_official(folder, progress or _log_progress)
        _check_classes(folder, train.class_names, val.class_names)
        return train, val
    found = name_few(sorted(os.listdir(folder))) or "nothing"
    raise DataError(
        f"{folder.absolute()} holds no folder {' and no folder '.join(missing)} (it holds: {found}), nor tar "
        f"files of them.\n{_LAYOUT}",
        key="root",
    )


def _log_progress(what: str, done: int, total: int | None) -> None:
    if done % 100 == 0 or done == total:
        log.warning("%s: %s of %s, once for this folder", what, done, total)


def _find_shards(folder: Path, split: str) -> list[Path]:
    """The tar files of a split, sorted; DataError where their names say that some are missing."""
    shards = sorted(path for path in folder.glob(f"{split}*.tar") if path.is_file())
    announced = {int(found[1]) for path in shards if (found := re.search(r"-of-(\d+)\.tar$", path.name))}
    if announced and announced != {len(shards)}:
        raise DataError(
            f"{folder.absolute()} holds {len(shards)} tar files of {split}, and their names announce "
            f"{' or '.join(map(str, sorted(announced)))}; run scripts/prepare_imagenet.py --packed again to complete "
            "them, or remove those of another division",
            key="root",
        )
    return shards


def _check_classes(folder: Path, train: list[str], val: list[str]) -> None:
    for split, classes in (("train", train), ("val", val)):
        if not classes:
            loose = sum(entry.name.lower().endswith(EXTENSIONS) for entry in os.scandir(folder / split))
            hint = f"; its {loose} images lie loose and have to be sorted into class folders" if loose else ""
            raise DataError(f"{folder.absolute() / split} holds no class folders{hint}.\n{_LAYOUT}", key="root")
    if train == val:
        return
    only_train, only_val = sorted(set(train) - set(val)), sorted(set(val) - set(train))
    differences = [
        f"{len(names)} only in {split}/: {name_few(names)}"
        for split, names in (("train", only_train), ("val", only_val))
        if names
    ]
    raise DataError(
        f"train/ and val/ in {folder.absolute()} must hold the same class folders, because a label is a position "
        f"in their sorted list; {'; '.join(differences)}. Complete the one or remove them from the other.",
        key="root",
    )
