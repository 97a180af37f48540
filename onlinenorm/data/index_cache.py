"""Index arrays kept in a file between runs."""

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from onlinenorm.files import open_regular, replacing, user_cache

Arrays = dict[str, np.ndarray]


def cached_arrays(
    folder: Path,
    name: str,
    key: str,
    build: Callable[[], Arrays],
    holds: Callable[[Arrays], bool] = lambda arrays: True,
) -> Arrays:
    """The arrays that `build` makes, from the cache file if it was written under the same `key` and `holds` agrees.

    The file lies in the user's cache folder under a name made of `folder` and `name`; nothing is written to the
    dataset. Arrays that cannot be stored are built every time.
    """
    place = hashlib.sha256(os.fsencode(folder / name)).hexdigest()[:16]
    file = user_cache() / f"index-{place}-{name}.npz"
    cached = _load(file, key)
    if cached is not None and holds(cached):
        return cached
    arrays = build()
    with contextlib.suppress(OSError):
        _store(file, key, arrays)
    return arrays


def _load(file: Path, key: str) -> Arrays | None:
    try:
        with open_regular(file) as stream, np.load(stream, allow_pickle=False) as stored:
            if str(stored["key"]) != key:
                return None
            return {name: stored[name] for name in stored.files if name != "key"}
    # missing, truncated or foreign: numpy and zipfile raise many kinds, and building anew is the cure
    except Exception:
        return None


def _store(file: Path, key: str, arrays: Arrays) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as partial, open(partial, "wb") as stream:
        np.savez(stream, allow_pickle=False, key=np.array(key), **arrays)
