"""Files that appear whole or not at all: who reads one sees the former content or the new, never a part of it."""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import platformdirs

from onlinenorm.errors import RunError

# What lockf answers on file systems that have no locks; where one is held it is EACCES or EAGAIN.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
FULL = (errno.ENOSPC, errno.EDQUOT)  # errors that free space mends


def user_cache() -> Path:
    """Where this project may keep files that can be made again: $XDG_CACHE_HOME or ~/.cache, below onlinenorm/."""
    try:
        return platformdirs.user_cache_path("onlinenorm")
    except RuntimeError:  # a container's user without a home
        return Path(tempfile.gettempdir()) / f"onlinenorm-{os.getuid()}"


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """A file, to be read. Raises OSError for a pipe, a socket or a device, which might be waited for without end."""

    def regular(name: str, flags: int) -> int:
        descriptor = os.open(name, flags | os.O_NONBLOCK)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
        raise OSError(errno.EINVAL, "No regular file but a pipe, a device or a folder", name)

    return open(path, "rb", opener=regular)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; that file takes the place of `path` when the block ends without an error.

    By then it is on disk, so that a power cut leaves one or the other. Raises OSError where it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")  # others may write the same file
    try:
        yield partial
        _sync(partial)
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):  # missing, or beyond reach, of which the block tells
            partial.unlink()


@contextlib.contextmanager
def locked(file: Path, in_use: Exception | None = None) -> Iterator[None]:
    """Context in which `file`, made here, is locked by this process.

    Where another holds the lock `in_use` is raised or, if it is None, waited for. On a file system that has no locks
    that is told and nothing is locked. Raises OSError where the file cannot be opened.
    """
    with open(os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "a+") as stream:
        try:
            # lockf, unlike flock, is not passed on to loader workers, which may outlive a killed run by seconds
            fcntl.lockf(stream, fcntl.LOCK_EX | (fcntl.LOCK_NB if in_use else 0))
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise in_use or error from None
            print(
                f"the file system of {file.parent} has no locks ({error.strerror}); see to it yourself that nothing "
                "else writes there",
                file=sys.stderr,
            )
        yield


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces `path` by a file with `content`. Raises RunError where it cannot be written, as on a full disk."""
    try:
        with replacing(path) as partial:
            partial.write_bytes(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
    except OSError as error:
        cure = "free some space" if error.errno in FULL else "mend that"
        raise RunError(
            f"{path}: could not be written ({error.strerror or error}); {cure} and run the same command again"
        ) from error


@contextlib.contextmanager
def staging(folder: Path, error: type[Exception] = RunError) -> Iterator[Path]:
    """An empty folder; its files move to `folder` together when the block ends without an error, else are dropped.

    Files of the same names are replaced, others left. Raises `error` where `folder` cannot be written; a folder made
    here for nothing does not stay.
    """
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
    except OSError as cause:
        raise error(f"{folder}: cannot be written to ({cause.strerror}); name another folder with --output") from cause
    try:
        yield work
        files = sorted(work.iterdir())
        for file in files:
            _sync(file)
        for file in files:
            os.chmod(file, 0o644)  # some exporters write for their owner alone
            os.replace(file, folder / file.name)
    except OSError as cause:
        raise error(f"{folder}: could not be written ({cause}); free some space or name another --output") from cause
    finally:
        shutil.rmtree(work, ignore_errors=True)
        for parent in missing:
            with contextlib.suppress(OSError):
                parent.rmdir()


def write_together(folder: Path, contents: Mapping[str, bytes], error: type[Exception] = RunError) -> None:
    """Writes the files of `folder` that `contents` names, all or none; see `staging`."""
    with staging(folder, error) as work:
        for name, content in contents.items():
            (work / name).write_bytes(content)


def _sync(file: Path) -> None:
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())
