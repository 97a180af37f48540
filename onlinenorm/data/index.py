"""The list of files of a class-folder dataset as flat arrays, built once and cached."""

import copy
import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import numpy as np

from onlinenorm.data.errors import DataError
from onlinenorm.data.index_cache import Arrays, cached_arrays

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

_FORMAT = "onlinenorm index 1"


class FolderIndex:
    """Files and labels of one split, in the order of torchvision's ImageFolder (class by class, names sorted).

    Held as a byte blob, offsets and labels: 1.28 million Python strings would be copied into every worker as their
    reference counts change.

    Args:
        folder: the split's folder, which holds one folder a class.
        class_names: the class folders, sorted; a label is a position in this list.
        names: uint8, the files' paths below `folder`, one after another.
        offsets: int64, where each path begins in `names`, and the end of the last.
        labels: int32, a label a file.
        sizes: int64, bytes of each file (-1 where it could not be asked).
    """

    per_image: tuple[str, ...] = ("labels", "sizes")  # arrays with an entry an image

    def __init__(
        self,
        folder: Path,
        class_names: list[str],
        names: np.ndarray,
        offsets: np.ndarray,
        labels: np.ndarray,
        sizes: np.ndarray,
    ):
        assert len(offsets) == len(labels) + 1 == len(sizes) + 1
        self.folder, self.class_names = Path(folder), class_names
        self.names, self.offsets, self.labels, self.sizes = names, offsets, labels, sizes

    def __len__(self) -> int:
        return len(self.labels)

    def relative_path(self, index: int) -> str:
        """Path below the split's folder, such as n01440764/n01440764_10026.JPEG."""
        return os.fsdecode(self.names[self.offsets[index] : self.offsets[index + 1]].tobytes())

    def path(self, index: int) -> Path:
        """Full path of a file."""
        return self.folder / self.relative_path(index)

    def read(self, index: int) -> bytes:
        """The encoded image."""
        with open(self.path(index), "rb") as file:
            return file.read()

    def newest(self, images: Iterable[int]) -> int:
        """When the last of these images changed on disk, in nanoseconds."""
        return max((changed_ns(os.stat(self.path(i))) for i in images), default=0)

    def class_range(self, label: int) -> range:
        """Indices of the images of a class, which lie together."""
        return range(*np.searchsorted(self.labels, [label, label + 1]).tolist())

    def take(self, chosen: np.ndarray) -> Self:
        """The files at these positions, which rise."""
        shorter = copy.copy(self)
        for name in self.per_image:
            setattr(shorter, name, getattr(self, name)[chosen])
        lengths = np.diff(self.offsets)[chosen]
        shorter.offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        moved = np.repeat(self.offsets[:-1][chosen] - shorter.offsets[:-1], lengths)
        shorter.names = self.names[np.arange(len(moved)) + moved]
        return shorter

    def update_digest(self, digest: Any) -> None:
        """Feeds paths, sizes and labels (not the pixels: reading 150 GB at every start would take minutes)."""
        for array in (self.names, self.offsets, self.labels, self.sizes):
            digest.update(np.ascontiguousarray(array))


def changed_ns(status: os.stat_result) -> int:
    """The later of a file's times: copying may set back that of its content, not that of its entry."""
    return max(status.st_mtime_ns, status.st_ctime_ns)


def list_classes(folder: Path) -> list[str]:
    """Sorted names of the class folders; hidden folders are no classes."""
    return sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))


def load_index(folder: Path) -> FolderIndex:
    """The index of a split, from its cache file if class folders and their modification times are unchanged."""
    folder = Path(folder).resolve()
    classes = list_classes(folder)
    key = _cache_key(folder, classes)
    return FolderIndex(
        folder, classes, **cached_arrays(folder.parent, folder.name, key, lambda: build_index(folder, classes))
    )


def build_index(folder: Path, classes: list[str]) -> Arrays:
    """Walks the class folders; names, offsets, labels and sizes as FolderIndex takes them.

    Raises DataError naming classes without a single image.
    """
    # threads hide the latency of network filesystems; the work is system calls
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda name: scan_class(folder, name), classes))
    empty = [name for name, files in zip(classes, found, strict=True) if not files]
    if empty:
        raise DataError(
            f"root: {len(empty)} class folders in {folder} hold no image: {name_few(empty)}. Finish the extraction, "
            f"or remove them from train/ and val/ alike. Known image files: {' '.join(EXTENSIONS)}"
        )
    return {
        **pack_names([path for files in found for path, _ in files]),
        "labels": np.repeat(np.arange(len(classes), dtype=np.int32), [len(files) for files in found]),
        "sizes": np.array([size for files in found for _, size in files], dtype=np.int64),
    }


def pack_names(paths: list[str]) -> Arrays:
    """Paths as `names`, their bytes one after another, and `offsets`."""
    encoded = [os.fsencode(path) for path in paths]
    return {
        "names": np.frombuffer(b"".join(encoded), dtype=np.uint8),
        "offsets": np.concatenate([[0], np.cumsum([len(path) for path in encoded])]).astype(np.int64),
    }


def name_few(names: list[str], count: int = 5) -> str:
    """The first names and how many there are, for messages."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def scan_class(folder: Path, name: str) -> list[tuple[str, int]]:
    """(path below `folder`, bytes) of the images in a class folder, in index order."""
    files = []
    for parent, _, file_names in sorted(os.walk(folder / name, followlinks=True)):
        for file_name in sorted(file_names):
            if file_name.lower().endswith(EXTENSIONS):
                path = os.path.join(parent, file_name)
                try:
                    size = os.stat(path).st_size
                except OSError:
                    size = -1  # a broken link: found, counted, and reported as unreadable when its turn comes
                files.append((os.path.relpath(path, folder), size))
    return files


def _cache_key(folder: Path, classes: list[str]) -> str:
    digest = hashlib.sha256(_FORMAT.encode())
    for name in classes:
        digest.update(b"%s %d\n" % (os.fsencode(name), os.stat(folder / name).st_mtime_ns))
    return digest.hexdigest()
