"""Imagenette (Howard 2019): ten classes of ImageNet in class folders, in each of its three sizes."""

from dataclasses import dataclass
from pathlib import Path

from onlinenorm.data.class_folders import check_classes, validation_folder
from onlinenorm.data.imagenet import ImageNet
from onlinenorm.data.index import FolderIndex, list_classes, load_index, name_few
from onlinenorm.data.missing import absence
from onlinenorm.errors import DataError

FOLDERS = ("imagenette2", "imagenette2-320", "imagenette2-160")
PUBLISHED = 9_469, 3_925  # training and validation images, in all three
CLASSES = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
_LAYOUT = """\
Expected in ROOT: imagenette2-160.tgz, imagenette2-320.tgz or imagenette2.tgz, unpacked, or what it unpacks to:
train/CLASS/*.JPEG and val/CLASS/*.JPEG (or test/), CLASS from n01440764 to n03888257
To get it: https://github.com/fastai/imagenette
Then: python train.py experiment=imagenette data.root=ROOT
Without any download: python train.py experiment=quickstart"""


@dataclass(kw_only=True, eq=False, repr=False)
class Imagenette(ImageNet):
    """Photographs of ten classes of ImageNet, 9,469 for training and 3,925 for validation; read as ImageNet is.

    Arguments are those of ImageDataModule; `root` is the folder imagenette2, imagenette2-320 or imagenette2-160, or
    holds one of them. Where there is no val/, test/ stands in for it.
    """

    image_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        self.name = "imagenette"

    def open_splits(self) -> tuple[FolderIndex, FolderIndex]:
        folder = self._folder()
        val = validation_folder(folder)
        for split in (folder / "train", val):
            check_classes(split, list_classes(split), CLASSES, "Imagenette")
        self.name = folder.name if folder.name in FOLDERS else "imagenette"
        return load_index(folder / "train", sorted(CLASSES)), load_index(val, sorted(CLASSES))

    def _folder(self) -> Path:
        if self.root is None:
            raise DataError(f"no folder of Imagenette is given.\n{_LAYOUT}", key="root")
        root = Path(self.root).expanduser().absolute()
        found = [folder for folder in (root, *(root / name for name in FOLDERS)) if (folder / "train").is_dir()]
        if len(found) > 1:
            raise DataError(
                f"{root} holds several sets: {name_few([str(f) for f in found])}; name one as data.root", key="root"
            )
        if not found:
            raise DataError(f"{absence(root, 'Imagenette', FOLDERS)}\n{_LAYOUT}", key="root")
        return found[0]

    @property
    def class_names(self) -> list[str]:
        return list(CLASSES.values())

    @property
    def scale(self) -> str:
        """The set's label where the published number of images is used, else that of a part of it."""
        return "imagenette" if (self.train_images, self.val_images) == PUBLISHED else "imagenette-subset"
