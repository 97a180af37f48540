"""Images read in place from uncompressed tar files: shards of class folders, or ImageNet's official archives.

A plain tar is the packed form here: any tool reads it, the JPEG bytes lie in it unchanged at an offset of their own,
and once the offsets are known an image costs one read of one open file, which suits network filesystems. (HDF5 and
Arrow would give the same through a library in every worker; a tar needs Python's own tarfile, and only for the index.)
"""

import contextlib
import functools
import hashlib
import os
import posixpath
import shlex
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from onlinenorm.data.devkit import GROUND_TRUTH, META, Devkit, find_devkit, read_devkit
from onlinenorm.data.index import FolderIndex, changed_ns, is_hidden, is_image, name_few, pack_names, tell_hidden
from onlinenorm.data.index_cache import Arrays, cached_arrays
from onlinenorm.data.missing import no_content
from onlinenorm.errors import DataError

TRAIN_ARCHIVE, VAL_ARCHIVE = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"

_FORMAT = "onlinenorm archives 4"
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK": "zip"}
_LINKS = 40  # followed one after another, as the kernel does

Member = tuple[str, int, int, int]  # path, archive's position in the list, offset of the bytes, their number
Progress = Callable[[str, int, int | None], None]  # what is being done, how much is done, of how much (None: unknown)


def silent(what: str, done: int, total: int | None) -> None:
    """A `Progress` that prints nothing."""


class ArchiveIndex(FolderIndex):
    """A FolderIndex whose images lie in tar files; paths, order and fingerprint are those of the unpacked folders.

    Args:
        archives: the tar files.
        places: int32, for each image the position of its archive in `archives`.
        starts: int64, where its bytes begin there.
        class_names: array of text. Others as FolderIndex.
    """

    per_image = (*FolderIndex.per_image, "places", "starts")

    def __init__(self, archives: list[Path], places: np.ndarray, starts: np.ndarray, class_names: np.ndarray, **arrays):
        super().__init__(archives[0].parent, class_names.tolist(), **arrays)
        self.archives, self.places, self.starts = archives, places, starts
        self._open: dict[int, int] = {}

    def path(self, index: int) -> Path:
        """The archive followed by the path in it, for messages."""
        return self.archives[self.places[index]] / self.relative_path(index)

    def holder(self, index: int) -> Path:
        return self.archives[self.places[index]]

    def read(self, index: int) -> bytes:
        return self._stored(index, int(self.sizes[index]))

    def _stored(self, index: int, count: int, skip: int = 0, more: int = 0) -> bytes:
        """`count` bytes from `skip` bytes behind where the image begins, and up to `more`; OSError where it ends."""
        place = int(self.places[index])
        if place not in self._open:
            self._open[place] = os.open(self.archives[place], os.O_RDONLY | os.O_CLOEXEC)
        # pread leaves the file's position alone: workers forked from one process share it
        data = os.pread(self._open[place], count + more, int(self.starts[index]) + skip)
        if len(data) < count:
            raise OSError(f"{self.archives[place]} ends within {self.relative_path(index)}")
        return data

    def _statuses(self, images: Iterable[int]) -> Iterator[os.stat_result]:
        return (os.stat(self.archives[place]) for place in np.unique(self.places[list(images)]).tolist())

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}

    def __copy__(self) -> "ArchiveIndex":
        twin = object.__new__(type(self))
        twin.__dict__ = self.__getstate__()
        return twin

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)


def load_shards(archives: list[Path], name: str) -> ArchiveIndex:
    """The index of a split whose class folders lie in tar shards (members CLASS/FILE)."""
    archives = [path.resolve() for path in archives]
    members = lambda: (m for place, path in enumerate(archives) for m in _scan(path, place))  # noqa: E731
    key = files_key(archives)
    arrays = cached_arrays(archives[0].parent, name, key, lambda: _arrays(members(), archives))
    return ArchiveIndex(archives, **arrays)


def load_official(folder: Path, progress: Progress = silent) -> tuple[ArchiveIndex, ArchiveIndex]:
    """Indexes of the official training and validation archives, read in place.

    Reading 1.28 million headers takes minutes, once. Raises DataError where an archive is missing, damaged or does not
    hold what the devkit says.
    """
    folder = folder.resolve()
    train, val, devkit_path = folder / TRAIN_ARCHIVE, folder / VAL_ARCHIVE, find_devkit(folder)
    if missing := [str(archive) for archive in (train, val) if not archive.is_file()]:
        are, them = ("is", "it") if len(missing) == 1 else ("are", "them")
        raise DataError(
            f"{' and '.join(missing)} {are} missing; download {them} from https://image-net.org, or link {them} there",
            key="root",
        )
    devkit = read_devkit(devkit_path)
    devkit_files = [devkit_path / META, devkit_path / GROUND_TRUTH] if devkit_path.is_dir() else [devkit_path]
    indexes = []
    for name, archive, members in (
        ("official-train", train, lambda: _check_train(_scan_nested(train, devkit, progress), devkit, train)),
        ("official-val", val, lambda: _label_val(_scan(val, 0), devkit, val)),
    ):
        key = files_key([archive, *devkit_files])
        arrays = cached_arrays(folder, name, key, functools.partial(_build, members, archive))
        indexes.append(ArchiveIndex([archive], **arrays))
    return indexes[0], indexes[1]


def _build(members: Callable[[], Iterable[Member]], archive: Path) -> Arrays:
    return _arrays(members(), [archive])


def _scan(archive: Path, place: int) -> Iterator[Member]:
    """The files of a tar."""
    with _opened(archive) as tar:
        for name, member in _files(tar, archive).items():
            yield name, place, member.offset_data, member.size


def _files(members: Iterable[tarfile.TarInfo], archive: Path) -> dict[str, tarfile.TarInfo]:
    """Path -> the member that holds its bytes: the last one of a name counts, links are followed within the archive.

    Hidden files are left out, which is told. A hard link is to the member of that name before it, as in unpacking: tar
    stores a file that it is given twice so.

    Raises DataError for what could reach beyond the folder it is unpacked to, and for files not stored as they are.
    """
    last: dict[str, tarfile.TarInfo] = {}
    for member in members:
        name = posixpath.normpath(member.name)
        if name.startswith(("/", "../")) or ".." in member.name.split("/"):
            raise _refused(archive, f"its member {member.name} points out of the folder; pack it again without it")
        if member.size < 0:
            raise tarfile.ReadError(f"its member {member.name} has {member.size} bytes")
        if member.isdev():
            raise _refused(archive, f"its member {member.name} is a device, no file; pack it again without it")
        if member.islnk():
            target = last.get(posixpath.normpath(member.linkname))
            if target is None or target.isdir():
                raise _dangling(archive, member)
            member = target
        last[name] = member
    tell_hidden(archive, last)
    files = [name for name, member in last.items() if not member.isdir() and not is_hidden(name)]
    return {name: _followed(name, last, archive) for name in files}


def _followed(name: str, members: dict[str, tarfile.TarInfo], archive: Path) -> tarfile.TarInfo:
    path = name
    for _ in range(_LINKS):
        member = members.get(path)
        if member is None or member.isdir():
            break
        if member.issym():
            path = posixpath.normpath(posixpath.join(posixpath.dirname(path), member.linkname))
        elif member.issparse():
            raise _refused(archive, f"{path} is stored with holes; pack it again without --sparse")
        else:
            return member
    raise _dangling(archive, members[name])


def _dangling(archive: Path, link: tarfile.TarInfo) -> DataError:
    return _refused(
        archive,
        f"its member {link.name} is a link to {link.linkname}, which is no file of this archive; pack it again with "
        "the files themselves (tar --dereference --hard-dereference)",
    )


def _refused(archive: Path, why: str) -> DataError:
    return DataError(f"{archive}: {why}", key="root")


def _scan_nested(archive: Path, devkit: Devkit, progress: Progress) -> Iterator[Member]:
    """The images of the official training archive, a tar of one tar a class."""
    with _opened(archive) as tar:
        outer = {path: member for path, member in _files(tar, archive).items() if path.endswith(".tar")}
        if not outer:
            raise _refused(archive, "holds no class archives (n01440764.tar, ...); is it the training archive?")
        for done, (path, member) in enumerate(outer.items()):
            name = Path(path).stem
            if name not in devkit.train_images:
                raise _refused(archive, f"holds {path}, which the devkit does not know as a class")
            progress(f"reading headers of {archive.name}", done, len(outer))
            with _opened(archive, tar.extractfile(member), member.name) as inner:
                for image, place in _files(inner, archive / path).items():
                    yield f"{name}/{image}", 0, member.offset_data + place.offset_data, place.size
        progress(f"reading headers of {archive.name}", len(outer), len(outer))


@contextlib.contextmanager
def _opened(archive: Path, stream: IO[bytes] | None = None, member: str = "") -> Iterator[tarfile.TarFile]:
    """The members of a tar, or of a tar within one; damage raises DataError, which names the archive."""
    name = f"{archive}: its member {member}" if member else str(archive)
    try:
        with stream or open(archive, "rb") as file:
            start = file.read(512)
            plain = start[257:262] == b"ustar"  # else a header's first bytes, a name, could be taken for those
            if not plain and (found := [kind for magic, kind in _COMPRESSED.items() if start.startswith(magic)]):
                raise _compressed(archive, name, found[0], whole=not member)
            if cause := no_content(start):
                raise DataError(f"{name} {cause}", key="root")
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                yield tar
                end = tar.offset
            # tarfile takes a damaged header, or the end of the file between two members, for the end of the list
            file.seek(end)
            if file.read(512) != bytes(512):
                raise tarfile.ReadError("no tar header and no end mark where one must be")
            while rest := file.read(1 << 20):
                if rest.strip(b"\0"):
                    raise DataError(
                        f"{name} goes on behind its end mark, as tar files joined by cat do; keep them as files of "
                        "their own, join them by tar --concatenate, or unpack all of it with tar --ignore-zeros",
                        key="root",
                    )
    except PermissionError as error:
        raise DataError(f"{archive} cannot be read ({error.strerror}); correct its permissions", key="root") from error
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(
            f"{name} is damaged or cut short ({error}); compare its checksum and fetch it again", key="root"
        ) from error


def _compressed(archive: Path, name: str, kind: str, whole: bool) -> DataError:
    """What to run: one that needs no suffix of its own, as a compressed tar may be called X.tar."""
    file = shlex.quote(str(archive))
    plain = shlex.quote(f"{archive.with_suffix('')}.plain")
    cure = f"run {kind} -dc {file} > {plain} && mv {plain} {file}"
    if not whole or kind == "zip":
        cure = "unpack it, and pack its files again without compression"
    return DataError(f"{name} is compressed ({kind}), and images are read in place from plain tar; {cure}", key="root")


def _check_train(members: Iterator[Member], devkit: Devkit, archive: Path) -> Iterator[Member]:
    counts = dict.fromkeys(devkit.train_images, 0)
    for member in members:
        counts[member[0].partition("/")[0]] += 1
        yield member
    wrong = [
        f"{name} {counts[name]} of {expected}" for name, expected in devkit.train_images.items()
        if expected and counts[name] != expected
    ]  # fmt: skip
    if wrong:
        raise _refused(
            archive, f"{len(wrong)} classes do not hold the images that the devkit counts: {name_few(wrong)}"
        )


def _label_val(members: Iterator[Member], devkit: Devkit, archive: Path) -> Iterator[Member]:
    images = sorted(members)
    if len(images) != len(devkit.val_classes):
        raise _refused(
            archive,
            f"holds {len(images)} images and the devkit labels {len(devkit.val_classes)}; they do not belong together, "
            "or the archive is cut short",
        )
    for (name, place, start, size), wnid in zip(images, devkit.val_classes, strict=True):
        yield f"{wnid}/{Path(name).name}", place, start, size


def _arrays(members: Iterable[Member], archives: list[Path]) -> Arrays:
    """The arrays of ArchiveIndex; a path in several archives counts once, in the last.

    Folders above all class folders are no classes.

    Raises DataError where no class folders are left.
    """
    last = {member[0]: member for member in members if is_image(member[0])}
    folders = {posixpath.dirname(path) for path in last}
    common = posixpath.commonpath(folders) if folders else ""
    if common and len(folders) > 1 and common not in folders:
        last = {
            (short := path.removeprefix(f"{common}/")): (short, place, start, size)
            for path, place, start, size in last.values()
        }
    images = list(last.values())
    loose = sorted(path for path, *_ in images if "/" not in path)
    if loose or not images:
        what = f"images outside class folders: {name_few(loose)}" if loose else "no image"
        raise DataError(
            f"{name_few([str(a) for a in archives])} hold {what}; expected are members CLASS/FILE", key="root"
        )
    return member_arrays(images)


def member_arrays(members: Iterable[Sequence], more: Mapping[str, type] | None = None) -> Arrays:
    """The arrays of an ArchiveIndex of `Member`s CLASS/FILE, in the order in which class folders are read.

    Args:
        more: names and types of what follows in each after the four of a `Member`.
    """

    def order(member: Sequence) -> tuple[str, str, str]:
        parent, _, file = member[0].rpartition("/")
        return member[0].partition("/")[0], parent, file

    paths, *columns = zip(*sorted(members, key=order), strict=True)
    classes, labels = np.unique([path.partition("/")[0] for path in paths], return_inverse=True)
    types = {"places": np.int32, "starts": np.int64, "sizes": np.int64, **(more or {})}
    return {
        **pack_names(paths),
        "labels": labels.astype(np.int32),
        "class_names": classes,
        **{name: np.array(column, dtype) for (name, dtype), column in zip(types.items(), columns, strict=True)},
    }


def files_key(files: Iterable[Path]) -> str:
    """Another one where any of the files has changed."""
    digest = hashlib.sha256(_FORMAT.encode())
    for path in files:
        status = os.stat(path)
        digest.update(b"%s %d %d\n" % (os.fsencode(path), status.st_size, changed_ns(status)))
    return digest.hexdigest()
