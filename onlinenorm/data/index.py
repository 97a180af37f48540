"""The list of files of a class-folder dataset as flat arrays, built once and cached."""

import contextlib
import copy
import errno
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import numpy as np

from onlinenorm.data.index_cache import Arrays, cached_arrays
from onlinenorm.errors import DataError
from onlinenorm.files import open_regular
from onlinenorm.text import plural

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

SIZES_ASKED = 100_000  # files of a split whose sizes are compared at each start

_FORMAT = "onlinenorm index 3"
_THREADS = 16

_NOWHERE = errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG  # where a broken link leads

log = logging.getLogger(__name__)


def is_image(path: str) -> bool:
    """Whether a file is taken for an image by its path below a class folder: `EXTENSIONS`, and nothing hidden in it.

    macOS puts ._x.JPEG, which is no JPEG, beside x.JPEG.
    """
    return path.lower().endswith(EXTENSIONS) and not is_hidden(path)


def is_hidden(path: str) -> bool:
    """Whether a file or one of the folders that it lies in has a name that begins with a point, or is __MACOSX.

    That is the folder of ._ files in zip files made on macOS.
    """
    return any(name.startswith(".") or name == "__MACOSX" for name in path.split("/"))


def tell_hidden(place: Path, paths: Iterable[str]) -> None:
    """Logs how many of the files `paths` would be images if they were not hidden."""
    if hidden := [path for path in paths if is_hidden(path) and path.lower().endswith(EXTENSIONS)]:
        log.warning("%s: %s left out as no images: %s", place, plural(len(hidden), "hidden file"), name_few(hidden))


def _tell_broken(place: Path, paths: Iterable[str]) -> None:
    """Logs the broken links among `paths` that are not taken for images, which are unreadable when their turn comes."""
    if left_out := sorted(path for path in paths if not is_image(path)):
        log.warning("%s: %s left out: %s", place, plural(len(left_out), "broken link"), name_few(left_out))


def changed_ns(status: os.stat_result) -> int:
    """The later of a file's times: copying may set back that of its content, not that of its entry."""
    return max(status.st_mtime_ns, status.st_ctime_ns)


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

    def holder(self, index: int) -> Path:
        """The file that holds the image: itself, or an archive."""
        return self.path(index)

    def read(self, index: int) -> bytes:
        """The encoded image."""
        with open_regular(self.path(index)) as file:
            return file.read()

    def newest(self, images: Iterable[int]) -> int:
        """When the last of these images changed on disk, in nanoseconds."""
        return max((changed_ns(status) for status in self._statuses(images)), default=0)

    @property
    def times_digest(self) -> str:
        """sha256 of the files' modification times, of at most `SIZES_ASKED` evenly spaced ones."""
        times = [status.st_mtime_ns for status in self._statuses(range(0, len(self), -(-len(self) // SIZES_ASKED)))]
        return hashlib.sha256(np.array(times, dtype=np.int64).data).hexdigest()

    def _statuses(self, images: Iterable[int]) -> Iterator[os.stat_result]:
        for i in images:
            with contextlib.suppress(OSError):  # a broken link, reported when it is read
                yield os.stat(self.path(i))

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

    @property
    def names_digest(self) -> str:
        """sha256 of paths and labels, without sizes."""
        digest = hashlib.sha256()
        for array in (self.names, self.offsets, self.labels):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def update_digest(self, digest: Any) -> None:
        """Feeds paths, sizes and labels (not the pixels: reading 150 GB at every start would take minutes)."""
        for array in (self.names, self.offsets, self.labels, self.sizes):
            digest.update(np.ascontiguousarray(array).data)


def list_classes(folder: Path) -> list[str]:
    """Sorted names of the class folders; hidden folders are no classes, and broken links, which are told, neither."""
    with os.scandir(folder) as entries:
        are_folders = {entry.name: _is_folder(entry) for entry in entries if not is_hidden(entry.name)}
    _tell_broken(folder, [name for name, is_folder in are_folders.items() if is_folder is None])
    return sorted(name for name, is_folder in are_folders.items() if is_folder)


def load_index(folder: Path, classes: list[str] | None = None) -> FolderIndex:
    """The index of a split, from its cache file while that holds (`unchanged`); `classes` names some of its folders."""
    folder = Path(folder).resolve()
    classes = list_classes(folder) if classes is None else classes
    names = [_FORMAT.encode(), os.fsencode(folder), *(os.fsencode(name) for name in classes)]
    key = hashlib.sha256(b"\0".join(names)).hexdigest()
    arrays = cached_arrays(
        folder.parent, folder.name, key, lambda: build_index(folder, classes), lambda found: unchanged(folder, found)
    )
    return FolderIndex(folder, classes, **{name: arrays[name] for name in ("names", "offsets", "labels", "sizes")})


def unchanged(folder: Path, arrays: Arrays) -> bool:
    """Whether the arrays of `build_index` still hold.

    Asked are the modification times of all folders, those within class folders too, which tell of files added, removed
    and renamed; and the sizes of files, which may be overwritten in place: of all where they are at most
    `SIZES_ASKED`, else of so many, evenly spaced (on a network file system a million take minutes).
    """
    step = -(-len(arrays["sizes"]) // SIZES_ASKED)
    files, sizes = np.arange(0, len(arrays["sizes"]), step), arrays["sizes"][::step]
    folders = np.arange(len(arrays["times"]))

    def same(what: str, chosen: np.ndarray, expected: np.ndarray, ask: Callable[[str], int]) -> bool:
        names, offsets = (arrays[f"{what}names"], arrays[f"{what}offsets"])
        paths = (os.fsdecode(names[offsets[i] : offsets[i + 1]].tobytes()) for i in chosen)
        return all(ask(os.path.join(folder, path)) == int(value) for path, value in zip(paths, expected, strict=True))

    with ThreadPoolExecutor(_THREADS) as pool:
        parts: list[tuple[str, np.ndarray, np.ndarray, Callable[[str], int]]]
        parts = [("folder_", i, arrays["times"][i], _modified) for i in np.array_split(folders, _THREADS)]
        order = np.array_split(np.arange(len(files)), _THREADS)
        parts += [("", files[i], sizes[i], _size) for i in order]
        return all(pool.map(lambda part: same(*part), parts))


def build_index(folder: Path, classes: list[str]) -> Arrays:
    """Walks the class folders; names, offsets, labels and sizes as FolderIndex takes them, and what `unchanged` asks.

    Raises DataError naming classes without a single image.
    """
    modified = _modified(folder)  # before it is read: what changes meanwhile is seen at the next start
    # threads hide the latency of network filesystems; the work is system calls
    with ThreadPoolExecutor(_THREADS) as pool:
        walked = list(pool.map(lambda name: _walk(folder, name), classes))
    files_of_classes = [files for files, *_ in walked]
    folders = [(".", modified), *(entry for _, entries, *_ in walked for entry in entries)]
    tell_hidden(folder, [path for *_, hidden, _ in walked for path in hidden])
    _tell_broken(folder, [path for *_, broken in walked for path in broken])
    empty = [name for name, files in zip(classes, files_of_classes, strict=True) if not files]
    if empty:
        raise DataError(
            f"{plural(len(empty), 'class folder')} without an image in {folder}: {name_few(empty)}. Finish the "
            f"extraction, or remove them from train/ and val/ alike. Known image files: {' '.join(EXTENSIONS)}",
            key="root",
        )
    return {
        **pack_names([path for files in files_of_classes for path, _ in files]),
        "labels": np.repeat(np.arange(len(classes), dtype=np.int32), [len(files) for files in files_of_classes]),
        "sizes": np.array([size for files in files_of_classes for _, size in files], dtype=np.int64),
        **{f"folder_{key}": array for key, array in pack_names([path for path, _ in folders]).items()},
        "times": np.array([time for _, time in folders], dtype=np.int64),
    }


def pack_names(paths: Sequence[str]) -> Arrays:
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
    return _walk(folder, name)[0]


def _walk(folder: Path, name: str) -> tuple[list[tuple[str, int]], list[tuple[str, int]], list[str], list[str]]:
    """What a class folder holds; paths are below `folder`.

    Returns (path, bytes) of its images, in index order; (path, modified) of the folders read, which hidden ones are
    not; the paths of what is hidden; those of broken links.
    """
    files_of_folders: dict[str, list[str]] = {}
    folders, todo, hidden, broken = [], [os.path.join(folder, name)], [], []
    while todo:
        parent = todo.pop()
        try:
            folders.append((os.path.relpath(parent, folder), _modified(parent)))
            files_of_folders[parent] = []
            with os.scandir(parent) as entries:
                for entry in entries:
                    if is_hidden(entry.name):
                        hidden.append(os.path.relpath(entry.path, folder))
                        continue
                    is_folder = _is_folder(entry)
                    if is_folder:
                        todo.append(entry.path)
                    elif is_image(entry.name):
                        files_of_folders[parent].append(entry.name)
                    if is_folder is None:
                        broken.append(os.path.relpath(entry.path, folder))
        except FileNotFoundError:  # there is none of this class
            continue
        except OSError as error:
            raise DataError(
                f"{error.filename or parent} cannot be read ({error.strerror}); correct its permissions", key="root"
            ) from None
    paths = [
        os.path.join(parent, file) for parent in sorted(files_of_folders) for file in sorted(files_of_folders[parent])
    ]
    return [(os.path.relpath(path, folder), _size(path)) for path in paths], folders, hidden, broken


def _is_folder(entry: os.DirEntry[str]) -> bool | None:
    """Whether an entry is a folder or a link to one; None for a broken link, to nothing or to itself.

    Raises DataError where links on the way to it lead round in a circle.
    """
    try:
        if entry.is_symlink():
            entry.stat()  # raises for a broken one, of which is_dir() may say no
        return entry.is_dir()
    except OSError as error:
        # round and round until there are too many links on the way, or it is too long a name
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG) and (link := _leads_back(Path(entry.path))):
            raise DataError(f"{link} is a link that leads back to a folder above it; remove it", key="root") from None
        if error.errno in _NOWHERE:
            return None
        raise


def _leads_back(path: Path) -> Path | None:
    """The first link on the way to `path` that is to a folder above it."""
    way = [*reversed(path.parents), path]
    return next((p for p in way if os.path.islink(p) and os.path.realpath(p) in map(os.path.realpath, p.parents)), None)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1  # a broken link: found, counted, and reported as unreadable when its turn comes


def _modified(path: str | Path) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return -1
