"""Image sets in Parquet files, as the Hugging Face hub holds imagenet-1k: columns image {bytes, path} and label."""

import functools
import json
import logging
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from onlinenorm.data.archives import ArchiveIndex, Progress, files_key, member_arrays, silent
from onlinenorm.data.index import name_few
from onlinenorm.data.index_cache import cached_arrays
from onlinenorm.data.missing import check_content
from onlinenorm.data.parquet_pages import NotReadInPlace, Place, locate, read_pages, snappy_stream
from onlinenorm.errors import DataError
from onlinenorm.text import first_line, plural

log = logging.getLogger(__name__)

CODECS = "", "snappy", "gzip", "brotli", "zstd", "lz4_raw"
LABELS = 1000  # where the file does not say how many

_BYTES, _PATH, _LABEL = "image.bytes", "image.path", "label"
_LARGE, _COSTLY = 1 << 19, 4  # bytes read for an image, and for a byte of it, above which another form is advised
_THREADS = 4  # each holds a row group several times
_MORE = {"stored": np.int64, "rooms": np.int64, "skips": np.int64, "codecs": np.int8}


class ParquetIndex(ArchiveIndex):
    """An ArchiveIndex of Parquet files.

    Args:
        stored: int64, bytes to read for each image. rooms: int64, bytes that they decompress to, 0: they are the image.
        skips: int64, bytes before the image in those.
        codecs: int8, position in `CODECS` of what they are compressed with. Others as ArchiveIndex.
    """

    per_image = (*ArchiveIndex.per_image, *_MORE)

    def __init__(
        self, archives: list[Path], stored: np.ndarray, rooms: np.ndarray, skips: np.ndarray, codecs: np.ndarray,
        **arrays: Any,
    ):  # fmt: skip
        super().__init__(archives, **arrays)
        self.stored, self.rooms, self.skips, self.codecs = stored, rooms, skips, codecs

    def read(self, index: int) -> bytes:
        data, room, codec = (
            self._stored(index, int(self.stored[index])),
            int(self.rooms[index]),
            CODECS[self.codecs[index]],
        )
        if room == 0:
            return data
        skip = int(self.skips[index])
        data = _decompress(codec, snappy_stream(data, room) if codec == "snappy" else data, room)
        return data[skip : skip + int(self.sizes[index])]


class _Row(NamedTuple):
    path: str | None
    label: int
    place: Place
    size: int
    codec: int


class _Table(NamedTuple):
    """What a file holds: its rows, and the names of the labels, if it has them."""

    rows: list[_Row]
    names: list[str] | None


def load_tables(train: list[Path], val: list[Path], progress: Progress = silent) -> tuple[ParquetIndex, ParquetIndex]:
    """Indexes of the training and validation images in Parquet files, read in place.

    A class is named by the WordNet id in its images' file names (n01440764_10026_n01440764.JPEG), and these then get
    their official names; else by the names that the files give labels, else by the label. Finding where the images lie
    reads all files, once.

    Raises DataError where pyarrow is not installed, or a file is damaged, of other columns, or without labels.
    """
    _pyarrow()
    splits = {"train": [path.absolute() for path in train], "val": [path.absolute() for path in val]}
    members = functools.cache(lambda: _members(splits, progress))
    key = files_key([*splits["train"], *splits["val"]])

    def load(split: str) -> ParquetIndex:
        files = splits[split]
        arrays = cached_arrays(files[0].parent, f"parquet-{split}", key, lambda: member_arrays(members()[split], _MORE))
        return ParquetIndex(files, **arrays)

    indexes = load("train"), load("val")
    read, cost = max((index.stored.mean(), index.stored.sum() / max(index.sizes.sum(), 1)) for index in indexes)
    if read > _LARGE and cost > _COSTLY:
        log.warning(
            "%s: these Parquet files are compressed so that an image reads %.0f times its bytes; faster are shards of "
            "them: python scripts/prepare_imagenet.py %s NEW_ROOT --packed",
            train[0].parent, cost, shlex.quote(str(train[0].parent)),
        )  # fmt: skip
    return indexes


def _members(splits: dict[str, list[Path]], progress: Progress) -> dict[str, list[tuple]]:
    """Split -> members of a ParquetIndex."""
    files = [(split, place, path) for split, paths in splits.items() for place, path in enumerate(paths)]
    what, tables = "finding the images in Parquet files", []
    progress(what, 0, len(files))
    with ThreadPoolExecutor(_THREADS) as pool:
        for done, table in enumerate(pool.map(_read_table, (path for *_, path in files)), 1):
            tables.append(table)
            progress(what, done, len(files))
    classes = _class_names(tables, files[0][2].parent)
    members: dict[str, list[tuple]] = {split: [] for split in splits}
    for (split, place, path), table in zip(files, tables, strict=True):
        for number, row in enumerate(table.rows):
            name = _split_name(row.path)[1] or f"{path.stem}_{number:06d}.JPEG"
            start, *rest = row.place
            members[split].append((f"{classes[row.label]}/{name}", place, start, row.size, *rest, row.codec))
    for split, listed in members.items():
        where = f"{splits[split][0].parent}: the Parquet files of {split}"
        if not listed:
            raise DataError(f"{where} hold no image; download them again", key="root")
        if twice := [path for path, count in Counter(path for path, *_ in listed).items() if count > 1]:
            raise DataError(
                f"{where} hold {plural(len(twice), 'image')} twice: {name_few(twice)}; are they of two "
                "downloads? Keep one",
                key="root",
            )
    return members


def _class_names(tables: list[_Table], folder: Path) -> dict[int, str]:
    """Label -> class, the same for all tables."""
    wnids: dict[int, str] = {}
    labels: dict[str, int] = {}
    for row in (row for table in tables for row in table.rows):
        wnid = _split_name(row.path)[0]
        if wnid is None:
            continue
        if wnids.setdefault(row.label, wnid) != wnid or labels.setdefault(wnid, row.label) != row.label:
            raise DataError(
                f"{folder}: {row.path} has the label {row.label}, and other images of {wnid} or of that label another; "
                "are these files of two sets? Keep one",
                key="root",
            )
    used = {row.label for table in tables for row in table.rows}
    if used <= wnids.keys():
        return wnids
    names = next((table.names for table in tables if table.names), None)
    width = len(str(max(used)))
    return {n: f"{n:0{width}d} {names[n]}".replace("/", "_") if names else f"{n:0{width}d}" for n in used}


def _split_name(path: str | None) -> tuple[str | None, str | None]:
    """(class, file) of the name of an image file, each None where it does not say."""
    folder, _, file = (path or "").rpartition("/")
    if found := re.fullmatch(r"(.+)_(n\d{8})(\.\w+)", file):
        return found[2], found[1] + found[3]
    wnid = re.match(r"n\d{8}(?=_)", file) or re.search(r"(?<![^/])n\d{8}$", folder)
    return wnid and wnid[0], None if file in ("", ".", "..") or "\0" in file else file


def _read_table(path: Path) -> _Table:
    """Raises DataError where a file is damaged, of other columns, or without labels."""
    pyarrow, parquet = _pyarrow()
    try:
        check_content(path)
        with open(path, "rb") as file, parquet.ParquetFile(path, page_checksum_verification=True) as table:
            columns = [table.metadata.schema.column(n).path for n in range(len(table.metadata.schema))]
            if not {_BYTES, _LABEL} <= set(columns):
                raise DataError(
                    f"{path} holds the columns {name_few(columns)}; expected are {_BYTES}, {_PATH} and {_LABEL}, as in "
                    "the hub's imagenet-1k",
                    key="root",
                )
            names, rows = _label_names(table.schema_arrow.metadata), list[_Row]()
            for group in range(table.num_row_groups):
                rows += _read_group(path, table, group, columns, file.fileno())
    except PermissionError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); correct its permissions", key="root") from error
    except NotReadInPlace as error:
        raise DataError(
            f"{path} is not read in place ({error}); write it with pyarrow's defaults", key="root"
        ) from error
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path} is damaged or cut short ({first_line(error)}); download it again", key="root"
        ) from error
    _check_labels(path, [row.label for row in rows], names)
    return _Table(rows, names)


def _read_group(source: Path, table: Any, group: int, columns: list[str], file: int) -> Iterator[_Row]:
    wanted = [name for name in (_BYTES, _PATH, _LABEL) if name in columns]
    content = table.read_row_group(group, columns=wanted, use_threads=False).flatten()
    labels = content.column(_LABEL).to_pylist()
    values = content.column(_BYTES).to_pylist()
    paths = content.column(_PATH).to_pylist() if _PATH in columns else [None] * len(labels)
    where = f"{source}, row group {group}, row"
    if None in labels:
        raise DataError(f"{where} {labels.index(None)}: holds no label; give it one, or leave it out", key="root")
    if None in values:
        row = values.index(None)
        raise DataError(
            f"{where} {row}: holds the path {paths[row]!r} and no image; write the files with the images' bytes in "
            "them, or name the folder that holds the images: data.root=FOLDER",
            key="root",
        )
    for name, column, kind in ((_BYTES, values, bytes), (_PATH, paths, str | None)):
        if odd := [value for value in column if not isinstance(value, kind)]:
            raise DataError(
                f"{source}: the column {name} holds {type(odd[0]).__name__} such as {str(odd[0])[:20]!r}; write it as "
                f"{'binary' if kind is bytes else 'string'}",
                key="root",
            )
    if wrong := [label for label in labels if not isinstance(label, int | float) or label % 1 != 0]:
        raise DataError(
            f"{source}: the label {wrong[0]!r} is no whole number; the column {_LABEL} has to count the classes from 0",
            key="root",
        )
    chunk = table.metadata.row_group(group).column(columns.index(_BYTES))
    name = {"UNCOMPRESSED": "", "LZ4": "lz4_raw"}.get(chunk.compression, chunk.compression.lower())
    if name not in CODECS:
        raise NotReadInPlace(f"it is compressed by {name}, and read is one of {', '.join(CODECS[1:])}")
    start = min(filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset)))
    raw = os.pread(file, chunk.total_compressed_size, start)
    pages = list(read_pages(raw, start, name, functools.partial(_decompress, name)))
    for path, label, place, value in zip(paths, labels, locate(values, pages), values, strict=True):
        yield _Row(path, int(label), place, len(value), CODECS.index(name))


def _check_labels(path: Path, labels: list[int], names: list[str] | None) -> None:
    count = len(names) if names else LABELS
    if not labels or (min(labels) >= 0 and max(labels) < count):
        return
    if set(labels) == {-1}:
        raise DataError(
            f"{path} holds images without labels (-1), as the hub's test set; validation needs validation-*.parquet",
            key="root",
        )
    wrong = next(label for label in labels if not 0 <= label < count)
    cure = (
        "download it again"
        if names or wrong < 0
        else "a set of more classes has to name them, as the library datasets does"
    )
    raise DataError(f"{path} holds the label {wrong}, and labels are 0 to {count - 1}; {cure}", key="root")


def _label_names(metadata: dict[bytes, bytes] | None) -> list[str] | None:
    """The names that the hub's own entry in a file gives the labels."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        names = features[_LABEL]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names] if isinstance(names, list) and names else None


def _decompress(codec: str, data: bytes, room: int) -> bytes:
    pyarrow, _ = _pyarrow()
    return pyarrow.Codec(codec).decompress(data, room, asbytes=True)


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise DataError(
            "Parquet files are read by pyarrow, which is not installed: pip install "
            "-c constraints.txt -e '.[parquet]', or pyarrow alone",
            key="root",
        ) from error
    return pyarrow, pyarrow.parquet
