"""The list of files of a class-folder dataset as flat arrays, built once and cached."""

import hashlib
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from onlinenorm.data.errors import DataError

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

    def first(self, count: int | None) -> "FolderIndex":
        """The first `count` files in index order: sorted by class, so of the first classes only."""
        if count is None or count >= len(self):
            return self
        end = self.offsets[count]
        return FolderIndex(
            self.folder,
            self.class_names,
            self.names[:end],
            self.offsets[: count + 1],
            self.labels[:count],
            self.sizes[:count],
        )

    def update_digest(self, digest: Any) -> None:
        """Feeds paths, sizes and labels (not the pixels: reading 150 GB at every start would take minutes)."""
        for array in (self.names, self.offsets, self.labels, self.sizes):
            digest.update(np.ascontiguousarray(array))


def list_classes(folder: Path) -> list[str]:
    """Sorted names of the class folders; hidden folders are no classes."""
    return sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))


def load_index(folder: Path) -> FolderIndex:
    """The index of a split, from its cache file if class folders and their modification times are unchanged.

    The cache lies beside `folder` (`.onlinenorm-index-train.npz`), or where that is read-only in the user's cache
    folder ($XDG_CACHE_HOME or ~/.cache, below onlinenorm/). An index that cannot be stored is built every time.
    """
    folder = Path(folder).resolve()
    classes = list_classes(folder)
    key = _cache_key(folder, classes)
    files = _cache_files(folder)
    for file in files:
        cached = _load_cached(file, key)
        if cached is not None:
            return FolderIndex(folder, classes, *cached)
    index = build_index(folder, classes)
    for file in files:
        try:
            _store(file, key, index)
            break
        except OSError:
            continue
    return index


def build_index(folder: Path, classes: list[str]) -> FolderIndex:
    """Walks the class folders. Raises DataError naming classes without a single image."""
    # threads hide the latency of network filesystems; the work is system calls
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda name: _scan_class(folder, name), classes))
    empty = [name for name, files in zip(classes, found, strict=True) if not files]
    if empty:
        raise DataError(
            f"root: {len(empty)} class folders in {folder} hold no image: {name_few(empty)}. Finish the extraction, "
            f"or remove them from train/ and val/ alike. Known image files: {' '.join(EXTENSIONS)}"
        )
    encoded = [os.fsencode(path) for files in found for path, _ in files]
    return FolderIndex(
        folder,
        classes,
        np.frombuffer(b"".join(encoded), dtype=np.uint8),
        np.concatenate([[0], np.cumsum([len(path) for path in encoded])]).astype(np.int64),
        np.repeat(np.arange(len(classes), dtype=np.int32), [len(files) for files in found]),
        np.array([size for files in found for _, size in files], dtype=np.int64),
    )


def name_few(names: list[str], count: int = 5) -> str:
    """The first names and how many there are, for messages."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def user_cache() -> Path:
    """Where this project may keep files that can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onlinenorm"


def _scan_class(folder: Path, name: str) -> list[tuple[str, int]]:
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


def _cache_files(folder: Path) -> list[Path]:
    place = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    return [
        folder.parent / f".onlinenorm-index-{folder.name}.npz",
        user_cache() / f"index-{place}-{folder.name}.npz",
    ]


def _load_cached(file: Path, key: str) -> tuple[np.ndarray, ...] | None:
    try:
        with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as stored:
            if str(stored["key"]) != key:
                return None
            return tuple(stored[name] for name in ("names", "offsets", "labels", "sizes"))
    except (
        Exception
    ):  # missing, truncated or foreign: numpy and zipfile raise many kinds, and building anew is the cure
        return None


def _store(file: Path, key: str, index: FolderIndex) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.name, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            np.savez(stream, key=key, names=index.names, offsets=index.offsets, labels=index.labels, sizes=index.sizes)
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    except OSError:
        os.unlink(temporary)
        raise
