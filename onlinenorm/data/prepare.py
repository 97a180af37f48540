"""From the official archives, or any index, to class folders or tar shards; what is done already is left alone."""

import hashlib
import json
import os
import shutil
import tarfile
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

from onlinenorm.data.archives import TRAIN_ARCHIVE, VAL_ARCHIVE, Progress, silent
from onlinenorm.data.devkit import NAME as DEVKIT
from onlinenorm.data.index import FolderIndex, name_few, scan_class
from onlinenorm.data.missing import check_content
from onlinenorm.errors import DataError
from onlinenorm.files import open_regular
from onlinenorm.records import read_record

# As torchvision.datasets.imagenet knows them, of the files that image-net.org hands out
PUBLISHED_MD5 = {
    TRAIN_ARCHIVE: "1d675b47d978889d74fa0da5fadfb00e",
    VAL_ARCHIVE: "29b22e2961454d5413ddabcf34fc5622",
    f"{DEVKIT}.tar.gz": "fa75699e90414af021442c21a62c3abf",
}
SHARD_BYTES = 8 << 30

_BLOCK = 4096  # of a filesystem: what a small file takes at least


def check_archives(folder: Path, record: Path, progress: Progress = silent) -> None:
    """Compares MD5 sums with the published ones; a sum taken before, of an unchanged file, is read from `record`.

    Raises DataError naming the first archive that differs.
    """
    shape = {str: {"state": [int], "md5": str}}
    known = read_record(record, DataError, shape, "delete it, and sums are taken anew") if record.exists() else {}
    for name, published in PUBLISHED_MD5.items():
        path = folder / name
        if not path.is_file():
            continue
        check_content(path)
        state = [path.stat().st_size, path.stat().st_mtime_ns]
        entry = known.get(name, {})
        md5 = entry.get("md5") if entry.get("state") == state else _md5(path, progress)
        if md5 != published:
            raise DataError(
                f"{path}: its MD5 is {md5}, the published one {published}; fetch it again, or use --no-checksum "
                "if it is meant to be another file (a subset)"
            )
        known[name] = {"state": state, "md5": md5}
        record.parent.mkdir(parents=True, exist_ok=True)
        _refuse_link(record)
        record.write_text(json.dumps(known, indent=1) + "\n")


def chosen_classes(indexes: Iterable[FolderIndex], wanted: list[str] | None) -> list[str]:
    """The classes to prepare, sorted: `wanted`, or all. Raises DataError for one that a split does not hold."""
    splits = [set(index.class_names) for index in indexes]
    classes = sorted(set(wanted) if wanted else set.union(*splits))
    missing = [name for name in classes if not all(name in split for split in splits)]
    if missing:
        raise DataError(f"these classes are not in both training and validation archive: {name_few(missing)}")
    return classes


def extract(index: FolderIndex, folder: Path, classes: list[str], progress: Progress = silent) -> int:
    """Writes `folder`/CLASS/FILE for the chosen classes; returns how many classes had to be written.

    A class appears under its name when it is complete; one that is there with the right names and sizes, and not older
    than the images or of the same bytes, is kept. Raises DataError, before anything is written, where one holds
    anything else than these images or beginnings of them, as a crash leaves.
    """
    _refuse_link(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plan = [(name, index.class_range(index.class_names.index(name))) for name in classes]
    for name in classes:
        _refuse_link(folder / name)
    open_classes = [(name, images) for name, images in plan if not _is_written(index, images, folder, name)]
    total = sum(len(images) for _, images in plan)
    done = total - sum(len(images) for _, images in open_classes)
    needed = sum(int(index.sizes[i]) // _BLOCK + 1 for _, images in open_classes for i in images) * _BLOCK
    _check_space(folder, needed)
    for name, images in open_classes:
        partial = folder / f".{name}.partial"
        _refuse_link(partial)
        shutil.rmtree(partial, ignore_errors=True)
        for i in images:
            path = partial / Path(index.relative_path(i)).relative_to(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_read(index, i))
            done += 1
            if done % 256 == 0:
                progress(f"writing {folder.name}/", done, total)
        if (folder / name).exists():
            shutil.rmtree(folder / name)
        partial.rename(folder / name)
    progress(f"writing {folder.name}/", total, total)
    return len(open_classes)


def pack(
    index: FolderIndex, folder: Path, split: str, classes: list[str], shard_bytes: int = SHARD_BYTES,
    progress: Progress = silent,
) -> list[Path]:  # fmt: skip
    """Writes tar shards SPLIT-00000-of-00020.tar with members CLASS/FILE; a shard appears when it is complete.

    A shard holds whole classes, about `shard_bytes` of them. The same images give the same bytes. Returns the shards.
    Raises DataError, before anything is written, where a shard that is there holds other images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    groups: list[list[int]] = [[]]
    size = 0
    for name in classes:
        images = index.class_range(index.class_names.index(name))
        class_bytes = int(index.sizes[images.start : images.stop].sum()) + 1024 * len(images)
        if groups[-1] and size + class_bytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].extend(images)
        size += class_bytes
    shards = [folder / f"{split}-{n:05d}-of-{len(groups):05d}.tar" for n in range(len(groups))]
    foreign = sorted(path.name for path in folder.glob(f"{split}*.tar") if path not in shards)
    if foreign:
        raise DataError(f"{folder}: holds shards of another division: {name_few(foreign)}; remove them first")
    for shard, group in zip(shards, groups, strict=True):
        _refuse_link(shard)
        if shard.exists() and not _is_packed(index, group, shard):
            raise DataError(
                f"{shard}: holds other images than those to be packed now (other classes, or changed files); remove it "
                "first, or choose another ROOT"
            )
    todo = [(shard, group) for shard, group in zip(shards, groups, strict=True) if not shard.exists()]
    total, done = sum(map(len, groups)), sum(map(len, groups)) - sum(len(group) for _, group in todo)
    _check_space(folder, sum(int(index.sizes[i]) + 1024 for _, group in todo for i in group))
    for shard, group in todo:
        partial = shard.with_suffix(".partial")
        _refuse_link(partial)
        partial.unlink(missing_ok=True)  # of a killed run; its bytes may have another name too
        with open(partial, "wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
            for i in group:
                data = _read(index, i)
                member = tarfile.TarInfo(index.relative_path(i))  # time 0, no owner
                member.size = len(data)
                tar.addfile(member, BytesIO(data))
                done += 1
                if done % 256 == 0:
                    progress(f"writing {split} shards", done, total)
            tar.close()
            file.flush()
            os.fsync(file.fileno())
        partial.rename(shard)
    progress(f"writing {split} shards", total, total)
    return shards


def _read(index: FolderIndex, image: int) -> bytes:
    """The encoded image; DataError, which says what to do, where it cannot be read."""
    try:
        return index.read(image)
    except (OSError, ValueError, RuntimeError) as error:  # also pyarrow's
        path, holder = index.path(image), index.holder(image)
        reason = getattr(error, "strerror", None) or error
        cure = "replace or remove it" if holder == path else f"fetch {holder} again"
        raise DataError(
            f"{path} cannot be read ({reason}); {cure}, and the same command continues. Training goes on without such "
            "images from ARCHIVES as they are: data.root=ARCHIVES data.on_unreadable=skip"
        ) from error


def _listed(index: FolderIndex, images: Iterable[int]) -> list[tuple[str, int]]:
    return [(index.relative_path(i), int(index.sizes[i])) for i in images]


def _is_written(index: FolderIndex, images: range, folder: Path, name: str) -> bool:
    """Whether the class folder holds these names and sizes and, where any of the images is newer, the same bytes.

    Raises DataError where it holds what is not to be found in the images, and would be lost.
    """
    listed = scan_class(folder, name) == _listed(index, images)
    if listed and index.newest(images) <= os.stat(folder / name).st_mtime_ns:
        return True
    numbers = {index.relative_path(i): i for i in images}
    found = [Path(parent) / file for parent, _, files in os.walk(folder / name) for file in files]
    paths = {str(path.relative_to(folder)): path for path in sorted(found)}
    foreign = [
        path for short, path in paths.items()
        if path.is_symlink() or not path.is_file() or short not in numbers
        or not _read(index, numbers[short]).startswith(path.read_bytes())
    ]  # fmt: skip
    if foreign:
        raise DataError(
            f"{folder / name}: holds what does not come from the archives, or was changed since: "
            f"{name_few([str(path) for path in foreign])}; move it elsewhere, or choose another ROOT"
        )
    if listed:
        os.utime(folder / name)  # not compared again
    return listed


def _is_packed(index: FolderIndex, images: list[int], shard: Path) -> bool:
    """Whether a shard holds these names and sizes and, where any of the images is newer, the same bytes.

    Raises DataError where it is damaged.
    """
    try:
        with open_regular(shard) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            members = tar.getmembers()
            if [(member.name, member.size) for member in members] != _listed(index, images):
                return False
            if index.newest(images) <= os.stat(shard).st_mtime_ns:
                return True
            files = (tar.extractfile(member) for member in members)
            return all(file and file.read() == _read(index, i) for file, i in zip(files, images, strict=True))
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{shard}: is damaged ({error}); remove it, and the same command writes it again") from error


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise DataError(
            f"{path}: is a symbolic link, and nothing is written outside the folder that was named; remove it, or name "
            "the folder that it leads to"
        )


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{folder}: {needed / 1e9:,.1f} GB are still to be written and {free / 1e9:,.1f} GB are free; free some "
            "space, choose another folder, or train from the archives as they are: data.root=ARCHIVES"
        )


def _md5(path: Path, progress: Progress) -> str:
    digest, done, total = hashlib.md5(usedforsecurity=False), 0, path.stat().st_size
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            done += len(chunk)
            progress(f"MD5 of {path.name} (MB)", done >> 20, total >> 20)
    return digest.hexdigest()
