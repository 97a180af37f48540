"""ImageNet as Kaggle hands it out: the folders of imagenet-object-localization-challenge, or its zip file in place."""

import csv
import functools
import io
import posixpath
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from onlinenorm.data.archives import ArchiveIndex, Progress, files_key, member_arrays, silent
from onlinenorm.data.class_folders import check_listed, sorted_by_list, validation_folder
from onlinenorm.data.index import FolderIndex, is_hidden, is_image, list_classes, load_index, name_few, tell_hidden
from onlinenorm.data.index_cache import Arrays, cached_arrays
from onlinenorm.data.missing import check_content, no_content
from onlinenorm.errors import DataError

COMPETITION = "imagenet-object-localization-challenge"
ZIP, LABELS, IMAGES = f"{COMPETITION}.zip", "LOC_val_solution.csv", "ILSVRC/Data/CLS-LOC"

_HEAD = ["ImageId", "PredictionString"]  # of the list of labels
_MEMBER = re.compile(rf"((?:.*/)?{IMAGES})/(?:(train)/([^/]+/.+)|(val)/(.+))")
_LOCAL_START = b"PK\3\4"
_LOCAL_HEADER = 30  # bytes before a member's name and extra fields, whose lengths it ends with
_ROOM = 256  # for those two: they are read together with the image
_ENCRYPTED = 1
_MORE = {"stored": np.int64, "checksums": np.uint32, "deflated": np.bool_}


class ZipIndex(ArchiveIndex):
    """An ArchiveIndex of one zip file.

    Args:
        stored: int64, bytes of each image as it lies there; `starts` is where the header before it begins.
        checksums: uint32, CRC-32 of each image.
        deflated: bool, whether it is compressed. Others as ArchiveIndex.
    """

    per_image = (*ArchiveIndex.per_image, *_MORE)

    def __init__(
        self, archives: list[Path], stored: np.ndarray, checksums: np.ndarray, deflated: np.ndarray, **arrays: Any
    ):
        super().__init__(archives, **arrays)
        self.stored, self.checksums, self.deflated = stored, checksums, deflated

    def read(self, index: int) -> bytes:
        count = int(self.stored[index])
        raw = self._stored(index, _LOCAL_HEADER, more=_ROOM + count)
        skip = _LOCAL_HEADER + int.from_bytes(raw[26:28], "little") + int.from_bytes(raw[28:30], "little")
        data = raw[skip : skip + count]
        if len(data) < count:
            data = self._stored(index, count, skip)
        try:
            if self.deflated[index]:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, int(self.sizes[index]))
        except zlib.error as error:
            raise OSError(f"{self.relative_path(index)} is damaged in {self.archives[0].name}: {error}") from error
        if zlib.crc32(data) != self.checksums[index]:
            raise OSError(
                f"{self.relative_path(index)} is damaged in {self.archives[0].name}: its bytes are not those of its "
                "checksum"
            )
        return data


def find_images(folder: Path) -> Path | None:
    """CLS-LOC, the folder of the images, below `folder` or `folder` itself; None where it is not there."""
    parts = IMAGES.split("/")
    inside = (folder.joinpath(*parts[above:]) for above in range(len(parts)))
    if found := next((place for place in inside if (place / "train").is_dir()), None):
        return found
    return folder if (folder / "train").is_dir() and (folder / "val").is_dir() and _labels_of(folder) else None


def load_folders(images: Path) -> tuple[FolderIndex, FolderIndex]:
    """Indexes of training and validation images in the folder CLS-LOC.

    Validation images lie in one folder and get their classes from LOC_val_solution.csv, in or above CLS-LOC; where
    they were sorted into class folders since, those count. Raises DataError where anything is missing.
    """
    train, val = images / "train", validation_folder(images, ("val",))
    classes = list_classes(train)
    if not classes:
        raise DataError(f"{train} holds no class folders; unpack {ZIP} again", key="root")
    if val_classes := list_classes(val):
        return load_index(train, classes), load_index(val, val_classes)
    labels = _labels_of(images)
    if labels is None:
        raise DataError(
            f"{LABELS} is missing, which says the classes of {val}/*.JPEG; put it beside ILSVRC/, as it lies in {ZIP}",
            key="root",
        )
    wnids = read_labels(labels.read_bytes(), labels)
    return load_index(train, classes), sorted_by_list(load_index(images, ["val"]), wnids, labels)


def load_zip(archive: Path, progress: Progress = silent) -> tuple[ZipIndex, ZipIndex]:
    """Indexes of training and validation images in Kaggle's zip file, read in place.

    Reading its directory of two million files takes a minute, once. Raises DataError where it is damaged or another.
    """
    archive = archive.absolute()
    splits = functools.cache(lambda: _read_zip(archive, progress))
    key = files_key([archive])

    def load(split: str) -> ZipIndex:
        arrays = cached_arrays(archive.parent, f"{archive.stem}-{split}", key, lambda: splits()[split])
        return ZipIndex([archive], **arrays)

    return load("train"), load("val")


def is_kaggles(archive: Path) -> bool:
    """Whether a zip file's directory lists Kaggle's images, read once for each file; False for a damaged one."""
    archive = archive.absolute()

    def build() -> Arrays:
        with zipfile.ZipFile(archive) as file:
            return {"listed": np.array(any(f"/{IMAGES}/" in f"/{name}" for name in file.namelist()))}

    try:
        return bool(cached_arrays(archive.parent, f"{archive.stem}-names", files_key([archive]), build)["listed"])
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError):
        return False


def read_labels(content: bytes, source: Path) -> dict[str, str]:
    """File -> class of the validation images by LOC_val_solution.csv; DataError, with the line, where it is none."""
    wnids: dict[str, str] = {}
    if cause := no_content(content):
        raise DataError(f"{source} {cause}", key="root")
    try:
        rows = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""))
        if next(rows, None) != _HEAD:
            raise DataError(f"{source} does not begin with {','.join(_HEAD)}; fetch it again", key="root")
        for row in filter(None, rows):
            image, wnid = row[0], row[1].partition(" ")[0] if len(row) > 1 else ""
            if not re.fullmatch(r"n\d{8}", wnid):
                raise DataError(
                    f"{source}, line {rows.line_num}: {','.join(row)[:80]!r} names no class such as n01440764; fetch "
                    "it again",
                    key="root",
                )
            if f"{image}.JPEG" in wnids:
                raise DataError(f"{source}, line {rows.line_num}: names {image} twice; fetch it again", key="root")
            wnids[f"{image}.JPEG"] = wnid
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{source} is damaged ({error}); fetch it again", key="root") from error
    return wnids


def _labels_of(images: Path) -> Path | None:
    return next((folder / LABELS for folder in (images, *images.parents[:3]) if (folder / LABELS).is_file()), None)


def _read_zip(archive: Path, progress: Progress) -> dict[str, Arrays]:
    """The arrays of both splits."""
    progress(f"reading the directory of {archive.name}", 0, 1)
    try:
        check_content(archive)
        with open(archive, "rb") as stream, zipfile.ZipFile(stream) as file:
            begins = min((member.header_offset for member in file.infolist()), default=0)
            stream.seek(0)
            if begins and stream.read(len(_LOCAL_START)) == _LOCAL_START:
                raise DataError(
                    f"{archive} begins with files that its directory does not list, as zip files joined by cat do; "
                    "keep the one that was downloaded, or unpack them and pack the files again",
                    key="root",
                )
            listed = _listed(file, archive)
            found = _members(listed, archive)
            labels = _only(archive, LABELS, {name for name in listed if posixpath.basename(name) == LABELS})
            if not found["train"] or labels is None:
                missing = LABELS if found["train"] else f"{IMAGES}/train"
                others = name_few(sorted({m.filename.partition("/")[0] for m in file.infolist()})) or "nothing"
                raise DataError(
                    f"{archive} holds no {missing} (it holds: {others}); read in place is Kaggle's {ZIP}, others have "
                    "to be unpacked",
                    key="root",
                )
            content = file.read(listed[labels])
    except OSError as error:
        raise DataError(f"{archive} cannot be read ({error.strerror}); correct its permissions", key="root") from error
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{archive} is damaged or cut short ({error}); fetch it again", key="root") from error
    source = archive / labels
    wnids = read_labels(content, source)
    check_listed(source, wnids, found["val"], f"{IMAGES}/val/")
    members = {
        "train": [(path, *place) for path, place in found["train"].items()],
        "val": [(f"{wnids[name]}/{name}", *place) for name, place in found["val"].items()],
    }
    progress(f"reading the directory of {archive.name}", 1, 1)
    return {split: member_arrays(listed, _MORE) for split, listed in members.items()}


def _listed(file: zipfile.ZipFile, archive: Path) -> dict[str, zipfile.ZipInfo]:
    """Path -> file, of those that are not hidden, which are told; the last of a path counts, as in unpacking."""
    last = {}
    for member in file.infolist():
        if member.is_dir():
            continue
        if ".." in member.filename.split("/"):
            raise DataError(f"{archive}: its member {member.filename} points out of the folder", key="root")
        last[posixpath.normpath(member.filename)] = member
    tell_hidden(archive, last)
    return {path: member for path, member in last.items() if not is_hidden(path)}


def _only(archive: Path, what: str, places: set[str]) -> str | None:
    """The one of the places of `what`, None where there is none; DataError for several."""
    if len(places) > 1:
        raise DataError(
            f"{archive} holds several {what}: {name_few(sorted(places))}; pack it again with the one that is meant",
            key="root",
        )
    return next(iter(places), None)


def _members(listed: dict[str, zipfile.ZipInfo], archive: Path) -> dict[str, dict[str, tuple]]:
    """Split -> path in its folder -> place, start, size, and `_MORE`."""
    found: dict[str, dict[str, tuple]] = {"train": {}, "val": {}}
    folders = set()
    for name, member in listed.items():
        match = _MEMBER.fullmatch(name)
        if match is None or not is_image(name):
            continue
        folder, split, path = match.group(1, 2, 3) if match[2] else match.group(1, 4, 5)
        folders.add(folder)
        if member.flag_bits & _ENCRYPTED or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            kind = "encrypted" if member.flag_bits & _ENCRYPTED else f"compressed by method {member.compress_type}"
            raise DataError(
                f"{archive}: {member.filename} is {kind}, and read in place is what is stored or deflated: unpack it",
                key="root",
            )
        deflated = member.compress_type == zipfile.ZIP_DEFLATED
        found[split][path] = (
            0, member.header_offset, member.file_size, member.compress_size, member.CRC, deflated
        )  # fmt: skip
    _only(archive, IMAGES, folders)
    return found
