"""Checks a prepared dataset, and keeps what was found where ImageNet's data module looks for it."""

import contextlib
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from onlinenorm.data.archives import Progress, silent
from onlinenorm.data.datasets import fingerprint
from onlinenorm.data.decoders import named_warnings, open_rgb
from onlinenorm.data.imagenet_classes import WNIDS
from onlinenorm.data.index import FolderIndex
from onlinenorm.data.randomness import CONTENT, hash64
from onlinenorm.errors import DataError
from onlinenorm.files import replacing, user_cache
from onlinenorm.records import read_record

log = logging.getLogger(__name__)

PUBLISHED = 1000, 1_281_167, 50_000  # classes, training and validation images of ILSVRC 2012
VAL_IMAGES_A_CLASS = 50
FILE_BYTES = 115_000, 134_000  # mean of the training and of the validation images; other forms differ by a few
_WHAT = "classes", "training images", "validation images"

_FILE = ".onlinenorm-verified.json"
_VERIFIED = {"fingerprint": str, "times?": [str], "date": str, "decoded": int, "problems": [str]}
_TOGETHER = 512  # images handed to the threads at a time


def scale_of(class_names: list[str], train_images: int, val_images: int, resized: bool) -> str:
    """ "imagenet", "imagenet-resized", "imagenet-subset" or, for other classes and for a resized part, "folder"."""
    whole = (len(class_names), train_images, val_images) == PUBLISHED
    if not WNIDS.issuperset(class_names) or (resized and not whole):
        return "folder"
    return "imagenet-resized" if resized else "imagenet" if whole else "imagenet-subset"


def is_resized(splits: Sequence[FolderIndex]) -> bool:
    """Whether files are not of the sizes of ImageNet's: a copy that was resized or compressed anew.

    Those of the whole set may differ by 15 % on average, those of a part, of some classes, be half or twice.
    """
    whole = tuple(map(len, splits)) == PUBLISHED[1:]
    bounds = (0.85, 1.15) if whole else (0.5, 2.0)
    return any(not bounds[0] < split.sizes.mean() / size < bounds[1]
               for split, size in zip(splits, FILE_BYTES, strict=True))  # fmt: skip


def verify(splits: tuple[FolderIndex, FolderIndex], decode: int | None, progress: Progress = silent) -> dict[str, Any]:
    """Counts, decodability and fingerprint of a dataset, as plain values; `problems` is empty where all is well.

    Args:
        splits: training and validation index, whose classes have been found equal.
        decode: images of each split to decode, chosen evenly at random; None for all.
    """
    train, val = splits
    times = [train.times_digest, val.times_digest]  # first: what changes meanwhile is not verified
    counts = len(train.class_names), len(train), len(val)
    problems = []
    resized = is_resized(splits)
    scale = scale_of(train.class_names, *counts[1:], resized)
    if counts[0] == PUBLISHED[0] and WNIDS.issuperset(train.class_names):
        problems += [
            f"{found:,} {what}, not {published:,}"
            for found, published, what in zip(counts, PUBLISHED, _WHAT, strict=True)
            if found != published
        ]
        a_class = Counter(val.labels.tolist())
        if resized:
            means = " and ".join(f"{split.sizes.mean() / 1e3:.0f}" for split in splits)
            usual = " and ".join(f"{size / 1e3:.0f}" for size in FILE_BYTES)
            problems.append(
                f"{' and '.join(_WHAT[1:])} of {means} KB on average, not {usual}: resized or compressed anew"
            )
        wrong = [f"{val.class_names[c]} {n}" for c, n in sorted(a_class.items()) if n != VAL_IMAGES_A_CLASS]
        if wrong:
            problems.append(
                f"{len(wrong)} classes without {VAL_IMAGES_A_CLASS} validation images, the first {wrong[0]}"
            )
    decoded, unreadable = 0, []
    for split, index in (("train", train), ("val", val)):
        chosen = _sample(len(index), decode)
        decoded += len(chosen)
        unreadable += _undecodable(index, chosen, split, progress)
    if unreadable:
        problems.append(f"{len(unreadable)} of {decoded:,} images decoded are unreadable, the first {unreadable[0]}")
    return {
        "scale": "imagenet-subset" if problems and scale == "imagenet" else scale,
        "classes": counts[0],
        "train_images": counts[1],
        "val_images": counts[2],
        "decoded": decoded,
        "unreadable": unreadable,
        "problems": problems,
        "fingerprint": fingerprint(list(splits)),
        "times": times,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def record(root: Path, found: dict[str, Any]) -> Path:
    """Keeps a verification beside the data, or where they are read-only in the user's cache; returns the file."""
    text = json.dumps(found, indent=1) + "\n"
    for file in _files(root):
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as partial:  # a link there, which may lead out of the folder, is replaced
                partial.write_text(text, encoding="utf-8")
            return file
    raise DataError(f"{root}: what was found can be kept neither there nor in {user_cache()}; make one writable")


def recorded(root: Path, splits: tuple[FolderIndex, FolderIndex]) -> dict[str, Any] | None:
    """The verification of the dataset at `root`, if fingerprint and times of the files are those verified."""
    state = {"fingerprint": fingerprint(list(splits)), "times": [index.times_digest for index in splits]}
    for file in _files(root):
        if not file.exists():
            continue
        try:
            verification = read_record(file, DataError, _VERIFIED, "run scripts/prepare_imagenet.py --verify again")
        except DataError as error:
            log.warning("%s", error)
            continue
        if {key: verification.get(key) for key in state} == state:
            return verification
        log.warning(
            "%s has changed since it was verified (%s): run scripts/prepare_imagenet.py --verify again",
            root, verification.get("date"),
        )  # fmt: skip
    return None


def _files(root: Path) -> tuple[Path, Path]:
    place = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
    return root / _FILE, user_cache() / f"verified-{place}.json"


def _sample(length: int, count: int | None) -> np.ndarray:
    if count is None or count >= length:
        return np.arange(length)
    return np.sort(np.argsort(hash64(0, CONTENT, np.arange(length)))[:count])


def _undecodable(index: FolderIndex, chosen: np.ndarray, split: str, progress: Progress) -> list[str]:
    def problem(i: int) -> str | None:
        reading.file = f"{split}/{index.relative_path(i)}"
        try:
            open_rgb(index.read(i))
        except MemoryError:
            raise
        except Exception as error:  # a damaged file makes decoders raise almost anything
            return f"{split}/{index.relative_path(i)} ({type(error).__name__}: {error})"
        return None

    problems: list[str] = []
    with named_warnings() as reading, ThreadPoolExecutor() as pool:  # decoding leaves the interpreter's lock
        for begin in range(0, len(chosen), _TOGETHER):
            problems += filter(None, pool.map(problem, chosen[begin : begin + _TOGETHER].tolist()))
            progress(f"decoding {split}", min(begin + _TOGETHER, len(chosen)), len(chosen))
    return problems
