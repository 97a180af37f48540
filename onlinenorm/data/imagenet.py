"""ImageNet in each form in which people have it, or any set laid out as train/ and val/ class folders."""

import functools
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onlinenorm.data.archives import TRAIN_ARCHIVE, VAL_ARCHIVE, Progress, load_official, load_shards
from onlinenorm.data.class_folders import refuse_broken
from onlinenorm.data.datasets import FolderDataset
from onlinenorm.data.decoders import DEVICE_DECODERS
from onlinenorm.data.devkit import NAME as DEVKIT
from onlinenorm.data.imagenet_classes import WNIDS
from onlinenorm.data.index import FolderIndex, is_image, list_classes, load_index, name_few
from onlinenorm.data.kaggle import COMPETITION, LABELS, ZIP, find_images, is_kaggles, load_folders, load_zip
from onlinenorm.data.missing import absence, naming_forbidden
from onlinenorm.data.module import ImageDataModule
from onlinenorm.data.nvjpeg_dataset import NvjpegDataset
from onlinenorm.data.parquet import load_tables
from onlinenorm.data.verify import is_resized, recorded, scale_of
from onlinenorm.errors import ArgumentError, DataError
from onlinenorm.text import plural

log = logging.getLogger(__name__)

_LAYOUT = f"""\
Expected in ROOT, any one of
  folders:   ROOT/train/CLASS/*.JPEG and ROOT/val/CLASS/*.JPEG (or test/) with the same class folders in both
             (ImageNet: 1,000 folders named n01440764 ... n15075141, 1,281,167 and 50,000 images)
  Kaggle's:  {ZIP}, or what it unpacks to, ILSVRC/ and {LABELS}
             (https://www.kaggle.com/c/{COMPETITION})
  Parquet:   train-*.parquet and validation-*.parquet of https://huggingface.co/datasets/ILSVRC/imagenet-1k
  archives:  ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz as downloaded
             from https://image-net.org
  shards:    train-*.tar and val-*.tar with members CLASS/*.JPEG, as scripts/prepare_imagenet.py --packed writes them
To get ImageNet: register at one of the three addresses. All forms are read as they are.
Then: python train.py experiment=table1 data.root=ROOT
Without any download: python train.py experiment=quickstart (real images, small network, minutes on a CPU)."""

_FOLDERS = """\
Expected in ROOT: ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg (or test/), the same class folders in both.
ImageNet may have other forms, see onlinenorm/data/README.md."""

_IMAGENET = "imagenet", "imagenet-subset"  # scales of what may be named so

Splits = tuple[FolderIndex, FolderIndex]


@dataclass(kw_only=True, eq=False, repr=False)
class ImageNet(ImageDataModule):
    """Class folders train/CLASS and val/CLASS, read as torchvision's ImageFolder does, or the same set in another form.

    The forms are class folders (test/ stands in for a missing val/), Kaggle's folders and its zip file, Parquet files
    of the hub, tar shards, and the official archives; images, order and fingerprint are the same in all. Labels are
    positions in the sorted list of class folders. `scale` is "imagenet" only for ImageNet's 1,000 classes with
    1,281,167 and 50,000 images, "imagenet-resized" where their files have other sizes, "imagenet-subset" for a part of
    its classes or images in files of its sizes, else "folder"; `name` is "imagenet" for the first and the third, and
    for others that of the folder. Training crops have
    `image_size` pixels; validation resizes the shorter side to image_size * 256 / 224 first. pad_crop and none are
    meant for small images. Arguments are those of ImageDataModule.
    """

    num_workers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.in_channels != 3:
            raise ArgumentError(
                "in_channels", f"{self.in_channels} is not 3; images of class folders are read as RGB: leave it at 3"
            )
        self.name = "imagenet"

    def build(self) -> tuple[FolderDataset, FolderDataset]:
        with naming_forbidden():
            train, val = self._splits = self.open_splits()
        if len(train.class_names) < 2:
            raise DataError(
                f"{train.folder.absolute()} holds one class, {train.class_names[0]}, and a network learns to tell two "
                "or more apart; is data.root the folder that was meant, and are its classes complete?",
                key="root",
            )
        scale = scale_of(train.class_names, len(train), len(val), is_resized(self._splits))
        if self.name == "imagenet" and scale not in _IMAGENET:  # sets derived of this have names of their own
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
        assert self._sets  # opened
        return scale_of(self.class_names, self.train_images, self.val_images, is_resized(self._splits))

    @property
    def licence(self) -> str:
        own = "the terms of the images trained on"
        if self.scale == "folder" and not WNIDS.issuperset(self.class_names):
            return own
        return f"{own}; ImageNet's (image-net.org): non-commercial research and education"

    @property
    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@naming_forbidden()
def open_splits(root: str | os.PathLike[str] | None, progress: Progress | None = None) -> Splits:
    """Indexes of the training and validation images in `root`, from whichever form is there.

    Raises DataError for anything that is not a form expected. `progress` is called during long work; None logs it.
    """
    if root is None:
        raise DataError(f"no ImageNet folder is given.\n{_LAYOUT}", key="root")
    folder = Path(root).expanduser()
    forms = _forms(folder) if folder.is_dir() or _is_zip(folder) else {}
    if not forms:
        parent = folder.absolute().parent
        if folder.is_file() and _forms(parent):
            raise DataError(f"{folder} is a file; name the folder that holds it: data.root={parent}", key="root")
        missing = [split for split in ("train", "val") if not (folder / split).is_dir()]
        layout = _LAYOUT if len(missing) == 2 else _FOLDERS  # who has begun with folders needs no others
        cause = absence(folder, "folder " + " and no folder ".join(missing), missing)
        raise DataError(f"{cause}\n{layout}", key="root")
    taken, *others = forms
    if others:
        log.warning("%s holds images in several forms, %s: read are the %s", folder, ", ".join(forms), taken)
    train, val = forms[taken](progress or _log_progress)
    _check_classes(folder, train.class_names, val.class_names)
    return train, val


def _forms(folder: Path) -> dict[str, Callable[[Progress], Splits]]:
    """Form -> what opens it, of the forms that are there; the first is the one to read."""
    if folder.is_file():
        return {"a zip file": functools.partial(load_zip, folder)}
    forms: dict[str, Callable[[Progress], Splits]] = {}
    images = find_images(folder)
    val = next((name for name in ("val", "test") if (folder / name).is_dir()), "")
    labelled = val == "val" or (val and list_classes(folder / val))  # a test set may be one without classes
    if (folder / "train").is_dir() and labelled and images != folder:
        forms["class folders"] = lambda _: _load_folders(folder, val)
    if images is not None:
        forms["Kaggle's folders"] = lambda _: load_folders(images)
    shards = [_split_files(folder, names, "tar") for names in (("train",), ("val", "test"))]
    if all(shards):
        forms["tar shards"] = lambda _: _load_shards(shards)
    for place in (folder, folder / "data"):
        tables = [_split_files(place, names, "parquet") for names in (("train",), ("val", "test"))]
        if all(tables):
            forms["Parquet files"] = functools.partial(_load_tables, tables)
            break
    if (folder / TRAIN_ARCHIVE).exists() or (folder / VAL_ARCHIVE).exists():
        forms["official archives"] = functools.partial(load_official, folder)
    if _is_zip(folder / ZIP):
        forms["Kaggle's zip file"] = functools.partial(load_zip, folder / ZIP)
    if forms or (folder / "train").is_dir():
        return forms
    zips = list(filter(_is_zip, folder.iterdir()))
    if len(zips) == 1 and is_kaggles(zips[0]):
        return {"Kaggle's zip file": functools.partial(load_zip, zips[0])}
    if (folder / f"{DEVKIT}.tar.gz").exists():  # which raises for the archives that are missing
        return {"official archives": functools.partial(load_official, folder)}
    return forms


def _is_zip(path: Path) -> bool:
    return path.suffix.lower() == ".zip" and path.is_file()


def _load_folders(folder: Path, val: str) -> Splits:
    refuse_broken(folder / "val")  # for which test/ would stand in
    classes = list_classes(folder / "train")
    _check_classes(folder, classes, list_classes(folder / val), val)
    return load_index(folder / "train", classes), load_index(folder / val, classes)


def _load_shards(shards: list[list[Path]]) -> Splits:
    train, val = (load_shards(_complete(files), split) for files, split in zip(shards, ("train", "val"), strict=True))
    return train, val


def _load_tables(tables: list[list[Path]], progress: Progress) -> Splits:
    return load_tables(_complete(tables[0]), _complete(tables[1]), progress)


def _log_progress(what: str, done: int, total: int | None) -> None:
    if done % 100 == 0 or done == total:
        log.warning("%s: %s of %s, once for this folder", what, done, total)


def _split_files(folder: Path, names: Sequence[str], suffix: str) -> list[Path]:
    """The files of a split, sorted; of the first of its names that has any. Broken links are among them."""
    ends = lambda path: path.suffix.lower() == f".{suffix}" and not path.is_dir()  # noqa: E731
    return next(filter(None, (sorted(filter(ends, folder.glob(f"{name}*"))) for name in names)), [])


def _complete(files: list[Path]) -> list[Path]:
    """The files; DataError where their names say that some are missing, or one is a broken link or no file."""
    for path in files:
        refuse_broken(path)
        if not path.is_file():
            raise DataError(f"{path} is no regular file but a pipe or a device; remove it", key="root")
    announced = {int(found[1]) for path in files if (found := re.search(r"-of-(\d+)[-.]", path.name))}
    if announced and announced != {len(files)}:
        kind, split = files[0].suffix[1:].lower(), re.split(r"\W", files[0].name)[0]
        again = "run scripts/prepare_imagenet.py --packed again" if kind == "tar" else "download again"
        raise DataError(
            f"{files[0].parent.absolute()} holds {plural(len(files), f'{kind} file')} of {split}, and their names "
            f"announce {' or '.join(map(str, sorted(announced)))}; {again} to complete them, or remove those of "
            "another division",
            key="root",
        )
    return files


def _check_classes(folder: Path, train: list[str], val: list[str], val_folder: str = "val") -> None:
    for split, classes in (("train", train), (val_folder, val)):
        if not classes:
            loose = sum(is_image(entry.name) for entry in os.scandir(folder / split))
            hint = f"; its {loose} images lie loose and have to be sorted into class folders" if loose else ""
            raise DataError(f"{folder.absolute() / split} holds no class folders{hint}.\n{_FOLDERS}", key="root")
    if train == val:
        return
    only_train, only_val = sorted(set(train) - set(val)), sorted(set(val) - set(train))
    differences = [
        f"{len(names)} only in {split}/: {name_few(names)}"
        for split, names in (("train", only_train), (val_folder, only_val))
        if names
    ]
    raise DataError(
        f"train/ and {val_folder}/ in {folder.absolute()} must hold the same class folders, because a label is a "
        f"position in their sorted list; {'; '.join(differences)}. Complete the one or remove them from the other.",
        key="root",
    )
