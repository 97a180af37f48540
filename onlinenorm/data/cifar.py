"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), from their binary files or from class folders of PNG or JPEG files."""

import hashlib
import tarfile
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from onlinenorm.data.class_folders import check_classes, validation_folder
from onlinenorm.data.datasets import ArraySource, InMemoryDataset
from onlinenorm.data.decoders import open_rgb
from onlinenorm.data.index import FolderIndex, list_classes, load_index
from onlinenorm.data.missing import absence, check_content, naming_forbidden, no_content
from onlinenorm.data.module import ImageDataModule
from onlinenorm.errors import ArgumentError, DataError

SIZE = 32
TRAIN_IMAGES, TEST_IMAGES = 50_000, 10_000
SOURCE = "https://www.cs.toronto.edu/~kriz/cifar.html"
CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
CIFAR100_CLASSES = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
    "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee",
    "clock", "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant",
    "flatfish", "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower",
    "leopard", "lion", "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom",
    "oak_tree", "orange", "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate",
    "poppy", "porcupine", "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark",
    "shrew", "skunk", "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar", "sunflower",
    "sweet_pepper", "table", "tank", "telephone", "television", "tiger", "tractor", "train", "trout", "tulip",
    "turtle", "wardrobe", "whale", "willow_tree", "wolf", "woman", "worm",
)  # fmt: skip

_THREADS = 8  # that decode image files


class BinaryFiles(NamedTuple):
    """The binary form of a set.

    archive, md5: as published. folder: what it unpacks to. train, test: file -> images. label_bytes: before the pixels
    of each image; the last of them is the label.
    """

    archive: str
    md5: str
    folder: str
    train: Mapping[str, int]
    test: Mapping[str, int]
    label_bytes: int


@dataclass(kw_only=True, eq=False, repr=False)
class CIFAR10(ImageDataModule):
    """32 x 32 colour photographs in 10 classes, 50,000 for training and 10,000 for validation (CIFAR's test images).

    They are held in memory, class by class, in the order of their files; of class folders in that of the names. The
    images of both forms are the same set where their pixels are.

    Args:
        root: holds the binary archive, or the files that it unpacks to, or class folders train/CLASS and test/CLASS (or
            val/CLASS) of images of 32 x 32 pixels.
        image_size: 32 or larger; images are upscaled bilinearly on the device, after augmentation.
        Others as ImageDataModule.
    """

    image_size: int = SIZE

    binary: ClassVar[BinaryFiles] = BinaryFiles(
        "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", "cifar-10-batches-bin",
        {f"data_batch_{k}.bin": TRAIN_IMAGES // 5 for k in range(1, 6)}, {"test_batch.bin": TEST_IMAGES}, 1,
    )  # fmt: skip
    pickled: ClassVar[tuple[str, ...]] = ("cifar-10-python.tar.gz", "cifar-10-batches-py", "data_batch_1")
    label: ClassVar[str] = "cifar10"
    title: ClassVar[str] = "CIFAR-10"
    classes: ClassVar[tuple[str, ...]] = CIFAR10_CLASSES

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size < SIZE:
            raise ArgumentError(
                "image_size", f"{self.image_size} is below {SIZE}, the size of the images; use that or more"
            )
        if self.in_channels != 3:
            raise ArgumentError("in_channels", f"{self.in_channels} is not 3; the images are in colour: leave it at 3")
        self.name = self.label

    def build(self) -> tuple[InMemoryDataset, InMemoryDataset]:
        with naming_forbidden():
            splits = self._read_folder()
        train, val = (
            InMemoryDataset(ArraySource(*arrays), plan, self.crop_padding, self.seed)
            for arrays, plan in zip(splits, (self.augmentation, self.evaluation), strict=True)
        )
        return train, val

    @property
    def native_size(self) -> int:
        return SIZE

    @property
    def class_names(self) -> list[str]:
        return list(self.classes)

    @property
    def scale(self) -> str:
        """The set's label where all 50,000 and 10,000 images are used, else that of a part of it."""
        whole = (self.train_images, self.val_images) == (TRAIN_IMAGES, TEST_IMAGES)
        return self.label if whole else f"{self.label}-subset"

    @property
    def licence(self) -> str:
        return f"none stated; its authors ask to cite Krizhevsky 2009, Learning Multiple Layers of Features ({SOURCE})"

    @property
    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

    def _read_folder(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(images N x 3 x 32 x 32, labels N) of the training and the test images, from whichever form `root` holds."""
        if self.root is None:
            raise self._missing("no folder is given")
        folder, binary = Path(self.root).expanduser().absolute(), self.binary
        if not folder.is_dir():
            its = f"{folder} is a file; name the folder that holds it: data.root={folder.parent}"
            raise self._missing(its if folder.is_file() else absence(folder, self.title))
        if (folder / "train").is_dir():
            return self._read_class_folders(folder)
        names = [*binary.train, *binary.test]
        for place in (folder, folder / binary.folder):
            missing = [name for name in names if not (place / name).is_file()]
            if not missing:
                return self._parse({name: (place / name).read_bytes() for name in names}, str(place))
            if len(missing) < len(names):
                raise DataError(
                    f"{place} holds a part of {self.title} only; missing: {', '.join(missing)}. Unpack "
                    f"{binary.archive} again.",
                    key="root",
                )
        if (folder / binary.archive).is_file():
            return self._parse(read_archive(folder / binary.archive, binary, names), str(folder / binary.archive))
        if pickled := next((name for name in self.pickled if (folder / name).exists()), None):
            raise DataError(
                f"{folder / pickled} is the version of {self.title} for Python, pickles, which can run code when they "
                f"are read; download the binary version, {binary.archive}, from {SOURCE} instead",
                key="root",
            )
        raise self._missing(absence(folder, self.title))

    def _missing(self, what: str) -> DataError:
        binary = self.binary
        first, last = self.classes[0], self.classes[-1]
        return DataError(
            f"{self.title}: {what}\nExpected in ROOT, any one of\n"
            f"  archive:  {binary.archive} as downloaded, the binary version, from {SOURCE}\n"
            f"            (MD5 {binary.md5})\n"
            f"  files:    {binary.folder}/ with {', '.join([*binary.train, *binary.test])}, which it unpacks to\n"
            f"  folders:  train/CLASS/*.png and test/CLASS/*.png (or val/, or JPEG), CLASS from {first} to {last}\n"
            f"Then: python train.py experiment={self.label} data.root=ROOT\n"
            "Without any download: python train.py experiment=quickstart",
            key="root",
        )

    def _parse(self, contents: Mapping[str, bytes], origin: str) -> list[tuple[np.ndarray, np.ndarray]]:
        record = self.binary.label_bytes + 3 * SIZE * SIZE
        for name, count in {**self.binary.train, **self.binary.test}.items():
            if cause := no_content(contents[name]):
                raise DataError(f"{origin}: {name} {cause}", key="root")
            if len(contents[name]) != count * record:
                raise DataError(
                    f"{origin}: {name} has {len(contents[name]):,} bytes and not {count * record:,}; it is cut short "
                    f"or of another set: fetch {self.binary.archive} again",
                    key="root",
                )
        splits = []
        for names in (self.binary.train, self.binary.test):
            records = [np.frombuffer(contents[name], np.uint8).reshape(-1, record) for name in names]
            records_NB = np.concatenate(records)
            labels_N = records_NB[:, self.binary.label_bytes - 1]
            if labels_N.max() >= len(self.classes):
                raise DataError(
                    f"{origin}: {', '.join(names)}: label {labels_N.max()} is none of 0 to {len(self.classes) - 1}",
                    key="root",
                )
            order_N = np.argsort(labels_N, kind="stable")  # as class folders are read
            images_NB = records_NB[order_N, self.binary.label_bytes :]
            splits.append((images_NB.reshape(-1, 3, SIZE, SIZE), labels_N[order_N]))
        return splits

    def _read_class_folders(self, folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
        splits = folder / "train", validation_folder(folder, ("test", "val"))
        for split in splits:
            check_classes(split, list_classes(split), self.classes, self.title)
        indexes = [load_index(split, sorted(self.classes)) for split in splits]
        if any(not index.relative_path(i).lower().endswith(".png") for index in indexes for i in range(len(index))):
            self.name = f"{self.label} (JPEG)"  # other pixels than the published ones
        return [(read_images(index), index.labels) for index in indexes]


@dataclass(kw_only=True, eq=False, repr=False)
class CIFAR100(CIFAR10):
    """32 x 32 colour photographs in 100 classes, 500 of each for training and 100 for validation; as CIFAR10."""

    binary: ClassVar[BinaryFiles] = BinaryFiles(
        "cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8", "cifar-100-binary",
        {"train.bin": TRAIN_IMAGES}, {"test.bin": TEST_IMAGES}, 2,
    )  # fmt: skip
    pickled: ClassVar[tuple[str, ...]] = ("cifar-100-python.tar.gz", "cifar-100-python", "meta")
    label: ClassVar[str] = "cifar100"
    title: ClassVar[str] = "CIFAR-100"
    classes: ClassVar[tuple[str, ...]] = CIFAR100_CLASSES

    @property
    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


def read_archive(archive: Path, binary: BinaryFiles, names: list[str]) -> dict[str, bytes]:
    """The contents of the files `names` of a binary archive; DataError where it is not the published one."""
    check_content(archive)
    with open(archive, "rb") as file:
        md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if md5 != binary.md5:
        raise DataError(
            f"{archive} is damaged, cut short or not the published one (MD5 {md5}, published {binary.md5}); fetch it "
            f"again from {SOURCE}",
            key="root",
        )
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                name = Path(member.name).name
                if member.isfile() and name in names and (data := tar.extractfile(member)) is not None:
                    contents[name] = data.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{archive} is damaged ({error}); fetch it again", key="root") from error
    if missing := [name for name in names if name not in contents]:
        raise DataError(f"{archive} does not hold {', '.join(missing)}; fetch it again", key="root")
    return contents


def read_images(index: FolderIndex) -> np.ndarray:
    """All images of an index, N x 3 x 32 x 32 uint8; DataError for one that cannot be read or has another size."""
    images_NHWC = np.empty((len(index), SIZE, SIZE, 3), dtype=np.uint8)

    def read(i: int) -> None:
        try:
            image = open_rgb(index.read(i))
        except Exception as error:  # a damaged file makes decoders raise almost anything
            raise DataError(
                f"{index.path(i)} cannot be decoded ({error}); replace the file: all images of CIFAR are read at the "
                "start, and data.on_unreadable leaves none of them out",
                key="root",
            ) from error
        if image.size != (SIZE, SIZE):
            width, height = image.size
            raise DataError(f"{index.path(i)} has {width} x {height} pixels and not {SIZE} x {SIZE}", key="root")
        images_NHWC[i] = np.asarray(image)

    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(read, range(len(index))):
            pass
    return images_NHWC.transpose(0, 3, 1, 2)
