"""What is said where images are missing: no folder, none of the set in it, an archive alone, an empty file."""

import contextlib
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from onlinenorm.data.index import name_few
from onlinenorm.errors import ArgumentError, DataError
from onlinenorm.files import open_regular

_ARCHIVE = re.compile(r"(.+)\.(?:tar|tgz|tar\.(?:gz|bz2|xz)|zip)", re.IGNORECASE)
_LFS_POINTER = b"version https://git-lfs"
_START = 64  # bytes that tell


def checked_root(root: str | os.PathLike[str] | None, read: bool) -> str | None:
    """`root` as text; raises ArgumentError where it is empty or no path, or given where it is not `read`."""
    if not isinstance(root, str | os.PathLike | None):
        raise ArgumentError("root", f"{root!r} is neither text nor a path; name a folder")
    root = None if root is None else os.fspath(root)
    if root is not None and not root.strip():
        raise ArgumentError("root", "is empty, as of a shell variable that is not set; name a folder, or leave it out")
    if root is not None and not read:
        raise ArgumentError(
            "root",
            f"{root} would not be read: these images are there without it. For class folders of your own choose "
            "data=imagenet; else leave it out",
        )
    return root


def absence(root: Path, title: str, packed: Sequence[str] = ()) -> str:
    """Why the set `title` is not found at `root`; where its archive lies there, or is it, what unpacks that.

    packed: names of the set's archives without their endings; others in a folder are listed alone.
    """
    root = root.absolute()
    if not root.exists():
        return f"{root} is a link that leads nowhere" if root.is_symlink() else f"{root} does not exist"
    names = sorted(os.listdir(root)) if root.is_dir() else [root.name]
    folder = root if root.is_dir() else root.parent
    stems = {name: found[1] for name in names if (found := _ARCHIVE.fullmatch(name)) and (folder / name).is_file()}
    archives = sorted(stems, key=lambda name: stems[name] not in packed)
    if not archives:
        if not root.is_dir():
            return f"{root} is a file, not a folder"
        told = [name if (root / name).exists() else f"the broken link {name}" for name in names]
        return f"{root} holds no {title} (it holds: {name_few(told) or 'nothing'})"
    first = archives[0]
    file, place = shlex.quote(str(folder / first)), shlex.quote(str(folder))
    command = f"unzip {file} -d {place}" if first.lower().endswith(".zip") else f"tar xf {file} -C {place}"
    if root.is_file():
        return f"{root} is an archive; unpack it: {command}, and name the folder: data.root={place}"
    how = f"; unpack {'it' if len(archives) == 1 else first}: {command}" if stems[first] in packed else ""
    return f"{root} holds no {title} but {name_few(archives)}{how}"


@contextlib.contextmanager
def naming_forbidden() -> Iterator[None]:
    """Context in which a PermissionError becomes a DataError that names the file or folder."""
    try:
        yield
    except PermissionError as error:
        raise DataError(
            f"{error.filename} cannot be read ({error.strerror}); correct its permissions", key="root"
        ) from error


def no_content(start: bytes) -> str | None:
    """Of a file by its first bytes: that it is empty or stands for another, with what to do; None for any other."""
    if not start:
        return "is empty; fetch it again"
    if start.startswith(_LFS_POINTER):
        return "is a pointer of Git LFS in place of the file; run git lfs pull where it was cloned"
    return None


def check_content(path: Path) -> None:
    """Raises DataError where a file is empty or stands for another, OSError where it cannot be read."""
    with open_regular(path) as file:
        if cause := no_content(file.read(_START)):
            raise DataError(f"{path} {cause}", key="root")
