"""Tiny ImageNet (Stanford CS231n): 200 classes of ImageNet at 64 x 64 pixels, as downloaded or in class folders."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from onlinenorm.data.class_folders import MovedIndex, check_classes, sorted_by_list, validation_folder
from onlinenorm.data.imagenet import ImageNet
from onlinenorm.data.index import FolderIndex, list_classes, load_index, pack_names
from onlinenorm.data.missing import absence
from onlinenorm.errors import DataError
from onlinenorm.files import open_regular
from onlinenorm.text import plural

FOLDER, ANNOTATIONS = "tiny-imagenet-200", "val_annotations.txt"
PUBLISHED = 200, 100_000, 10_000  # classes, training and validation images
_LAYOUT = """\
Expected in ROOT: tiny-imagenet-200.zip, unpacked, or the folder that it unpacks to:
  wnids.txt (the classes) and words.txt (their names)
  train/CLASS/images/*.JPEG, or train/CLASS/*.JPEG
  val/images/*.JPEG and val/val_annotations.txt, or val/CLASS/*.JPEG (or test/CLASS/*.JPEG)
To get it: http://cs231n.stanford.edu/tiny-imagenet-200.zip
Then: python train.py experiment=tiny_imagenet data.root=ROOT
Without any download: python train.py experiment=quickstart"""


@dataclass(kw_only=True, eq=False, repr=False)
class TinyImageNet(ImageNet):
    """Photographs of 64 x 64 pixels in 200 classes of ImageNet, 100,000 for training and 10,000 for validation.

    They are read as ImageNet is, whose validation crop they get too; images, order and fingerprint are those of class
    folders train/CLASS/* and val/CLASS/*. Class names are those of words.txt, where it is there. Arguments are those of
    ImageDataModule; `root` is the folder tiny-imagenet-200, or holds it. Where there is no val/, test/ stands in for
    it, in class folders (the published test images have no labels).
    """

    image_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self.name = "tiny_imagenet"

    def open_splits(self) -> tuple[FolderIndex, FolderIndex]:
        folder = self._folder()
        train, val = folder / "train", validation_folder(folder)
        classes = read_classes(folder)
        check_classes(train, list_classes(train), classes, "Tiny ImageNet")
        if (val / ANNOTATIONS).is_file() and (val / "images").is_dir():
            return without_images_folder(load_index(train, classes)), annotated(val, classes)
        if (val / "images").is_dir():
            missing = f"{val / ANNOTATIONS} is missing, which says the classes of images/*"
            if val.name == "test":
                missing = f"{folder} holds no val/, and the published test images have no labels"
            raise DataError(f"{missing}; unpack {FOLDER}.zip again", key="root")
        check_classes(val, list_classes(val), classes, "Tiny ImageNet")
        return without_images_folder(load_index(train, classes)), without_images_folder(load_index(val, classes))

    def _folder(self) -> Path:
        if self.root is None:
            raise DataError(f"no folder of Tiny ImageNet is given.\n{_LAYOUT}", key="root")
        root = Path(self.root).expanduser().absolute()
        for folder in (root, root / FOLDER):
            if (folder / "train").is_dir():
                return folder
        raise DataError(f"{absence(root, 'Tiny ImageNet', [FOLDER])}\n{_LAYOUT}", key="root")

    @property
    def class_names(self) -> list[str]:
        wnids = super().class_names
        names: dict[str, str] = {}
        with contextlib.suppress(OSError, UnicodeDecodeError):  # decoration: without it the ids stand
            with open_regular(self._folder() / "words.txt") as file:
                lines = file.read().decode("utf-8-sig").splitlines()
            names = dict(line.split("\t", 1) for line in lines if "\t" in line)
        return [names.get(wnid, wnid) for wnid in wnids]

    @property
    def scale(self) -> str:
        """The set's label where the published number of classes and images is used, else that of a part of it."""
        used = self.num_classes, self.train_images, self.val_images
        return "tiny_imagenet" if used == PUBLISHED else "tiny_imagenet-subset"

    @property
    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)


def read_classes(folder: Path) -> list[str]:
    """The classes of wnids.txt, sorted, which is not their order there; DataError where it is missing or empty."""
    try:
        with open_regular(folder / "wnids.txt") as file:
            classes = sorted(set(file.read().decode("utf-8-sig").split()))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{folder / 'wnids.txt'} cannot be read ({error}); unpack tiny-imagenet-200.zip again", key="root"
        ) from None
    if not classes:
        raise DataError(f"{folder / 'wnids.txt'} names no class; unpack tiny-imagenet-200.zip again", key="root")
    return classes


def without_images_folder(index: FolderIndex) -> FolderIndex:
    """An index of CLASS/images/FILE as one of CLASS/FILE; any other as it is."""
    paths = [index.relative_path(i) for i in range(len(index))]
    if any(path.split("/")[1:-1] != ["images"] for path in paths):
        return index
    arrays = {**pack_names([path.replace("/images/", "/", 1) for path in paths]), "labels": index.labels}
    return MovedIndex(index.folder, "{wnid}/images/{file}", index.class_names, sizes=index.sizes, **arrays)


def annotated(val: Path, classes: list[str]) -> FolderIndex:
    """The index of val/images/* by their classes in val_annotations.txt.

    Raises DataError for a line that is no annotation, for files without one or the reverse, and for other classes.
    """
    file = val / ANNOTATIONS
    try:
        lines = [line.split("\t")[:2] for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        wnids = dict(lines)
    except (ValueError, UnicodeDecodeError):
        raise DataError(f"{file} has a line that is no FILE, tab, CLASS; unpack the set again", key="root") from None
    if len(wnids) < len(lines):
        raise DataError(
            f"{file} names {plural(len(lines) - len(wnids), 'file')} twice; unpack the set again", key="root"
        )
    index = sorted_by_list(load_index(val, ["images"]), wnids, file)
    check_classes(file, index.class_names, classes, "Tiny ImageNet")
    return index
