"""Fashion-MNIST (Xiao, Rasul, Vollgraf 2017), in full or as the subset that comes with this package."""

import gzip
import logging
import os
import urllib.error
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onlinenorm.data.datasets import ArraySource, InMemoryDataset
from onlinenorm.data.missing import absence, no_content
from onlinenorm.data.module import ImageDataModule
from onlinenorm.errors import ArgumentError, DataError
from onlinenorm.files import user_cache

log = logging.getLogger(__name__)

SIZE = 28
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "val": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
FULL = {"train": 60_000, "val": 10_000}
EMBEDDED = {"train": 10_000, "val": 2_000}
EMBEDDED_FOLDER = Path(__file__).parent / "embedded"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")

_TO_GET_IT = """\
Expected in ROOT: train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz and
t10k-labels-idx1-ubyte.gz, or what they unpack to
To get it: https://github.com/zalandoresearch/fashion-mnist, or apt install dataset-fashion-mnist
Then: python train.py data=fashion_mnist data.root=ROOT
Without any download: data=embedded, a part of it"""


@dataclass(kw_only=True, eq=False, repr=False)
class FashionMNIST(ImageDataModule):
    """28 x 28 grayscale photographs of clothing in 10 classes.

    Args:
        embedded: True takes the first 10,000 training and 2,000 test images, which come with the package. False takes
            all 60,000 and 10,000 from `root`; without one from Debian's package dataset-fashion-mnist, else downloads
            them into the user's cache folder with torchvision's class.
        image_size: 28 or larger; images are upscaled bilinearly on the device, after augmentation.
        in_channels: 1, or 3 to repeat the gray channel for networks made for colour.
        Others as ImageDataModule.
    """

    embedded: bool = False
    image_size: int = SIZE
    in_channels: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size < SIZE:
            raise ArgumentError(
                "image_size", f"{self.image_size} is below {SIZE}, the size of the images; use that or more"
            )
        if self.in_channels not in (1, 3):
            raise ArgumentError("in_channels", f"{self.in_channels} is not 1 or 3")
        if self.augmentation == "scale_jitter":
            raise ArgumentError("augmentation", "scale_jitter adds RGB noise and these images are gray; use pad_crop")
        self.name = "embedded" if self.embedded else "fashion_mnist"

    def build(self) -> tuple[InMemoryDataset, InMemoryDataset]:
        folder = EMBEDDED_FOLDER if self.embedded else find_full_set(self.root)
        counts = EMBEDDED if self.embedded else FULL
        return (
            self._dataset(folder, "train", counts, self.augmentation),
            self._dataset(folder, "val", counts, self.evaluation),
        )

    def _dataset(self, folder: Path, split: str, counts: dict[str, int], plan: str):
        images_NHW, labels_N = read_split(folder, split, counts[split])
        source = ArraySource(images_NHW[:, None], labels_N)
        return InMemoryDataset(source, plan, self.crop_padding, self.seed)

    @property
    def native_size(self) -> int:
        return SIZE

    @property
    def class_names(self) -> list[str]:
        return list(CLASSES)

    @property
    def scale(self) -> str:
        return "embedded" if self.embedded else "fashion_mnist"

    @property
    def reads_root(self) -> bool:
        return not self.embedded

    @property
    def licence(self) -> str:
        return "MIT (Zalando SE, 2017)"

    @property
    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return (0.2860,), (0.3530,)


def find_full_set(root: str | os.PathLike[str] | None) -> Path:
    """The folder that holds the four IDX files: below `root`, without one found or downloaded. Raises DataError."""
    searched = []
    cache = user_cache() / "fashion_mnist"
    places = [DEBIAN_FOLDER, cache] if root is None else [Path(root).expanduser()]
    for folder in [f / sub for f in places for sub in ("", "raw", "FashionMNIST/raw")]:
        missing = [name for names in FILES.values() for name in names if _file(folder, name) is None]
        if not missing:
            log.info("Fashion-MNIST is read from %s", folder)
            return folder
        if len(missing) < 4 and cache not in folder.parents:  # the downloader completes its own folder
            raise DataError(
                f"{folder} holds a part of Fashion-MNIST only; missing: {', '.join(n + '.gz' for n in missing)}. "
                "Complete the four files" + ", or remove them to have the set searched elsewhere" * (root is None),
                key="root",
            )
        searched.append(str(folder))
    if root is not None:
        folders = "\n  ".join(searched)
        what = (
            f"Fashion-MNIST is in none of\n  {folders}" if places[0].is_dir() else absence(places[0], "Fashion-MNIST")
        )
        raise DataError(f"{what}\n{_TO_GET_IT}", key="root")
    return _download(cache, searched)


def _download(cache: Path, searched: list[str]) -> Path:
    from torchvision.datasets import FashionMNIST as Downloader  # here: the import is slow and rarely needed

    try:
        Downloader(str(cache), download=True)
    except (RuntimeError, OSError, urllib.error.URLError, EOFError, zlib.error) as error:
        folders = "\n  ".join(searched)
        cause = " ".join(str(error).split())
        raise DataError(
            f"Fashion-MNIST is in none of\n  {folders}\nand its download into {cache} failed ({cause}).\n{_TO_GET_IT}",
            key="root",
        ) from error
    return cache / "FashionMNIST" / "raw"


def read_split(folder: Path, split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (count x 28 x 28) and labels (count) of a split, both uint8. Raises DataError if they are not that."""
    images_name, labels_name = FILES[split]
    images_NHW, labels_N = read_idx(folder, images_name), read_idx(folder, labels_name)
    if images_NHW.shape != (count, SIZE, SIZE) or labels_N.shape != (count,):
        raise DataError(
            f"{folder / images_name} and {labels_name} hold arrays of shape {images_NHW.shape} "
            f"and {labels_N.shape}, and Fashion-MNIST has ({count}, {SIZE}, {SIZE}) and ({count},); "
            "they belong to another dataset",
            key="root",
        )
    if labels_N.max() >= len(CLASSES):
        raise DataError(f"{folder / labels_name} holds the label {labels_N.max()}; labels are 0 to 9", key="root")
    return images_NHW, labels_N


def read_idx(folder: Path, name: str) -> np.ndarray:
    """The uint8 array of an IDX file, `name` or `name`.gz. Raises DataError if missing, damaged or no IDX file."""
    path = _file(folder, name)
    if path is None:
        raise DataError(f"{folder / name}.gz is missing", key="root")
    try:
        data = path.read_bytes()
        if cause := no_content(data):
            raise DataError(f"{path} {cause}", key="root")
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged or cut short ({error}); fetch it again", key="root") from error
    return parse_idx(data, str(path))


def parse_idx(data: bytes, origin: str) -> np.ndarray:
    """Parses an IDX file of unsigned bytes: 0, 0, 8, number of dimensions, big-endian 32-bit lengths, values."""
    if len(data) < 4 or data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise DataError(
            f"{origin} is no IDX file of unsigned bytes (it begins with {data[:4].hex(' ') or 'nothing'})", key="root"
        )
    shape = tuple(np.frombuffer(data, dtype=">u4", count=data[3], offset=4).tolist())
    values = np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * data[3])
    if values.size != np.prod(shape, dtype=np.int64):
        raise DataError(f"{origin} announces {shape} values and holds {values.size}; fetch it again", key="root")
    return values.reshape(shape)


def _file(folder: Path, name: str) -> Path | None:
    return next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
