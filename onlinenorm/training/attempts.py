"""Former attempts at a run: none vanishes when it is started again, so that tables can count all of them."""

import filecmp
import re
import shutil
from pathlib import Path
from typing import Any

from onlinenorm.errors import RunError
from onlinenorm.records import (
    ATTEMPTS,
    CLAMPING,
    CONFIG,
    ENVIRONMENT,
    FAILURE,
    FAILURE_TEXT,
    METRICS,
    Failure,
    read_failure,
    read_record,
)

_ENDED = (FAILURE, FAILURE_TEXT, METRICS, CLAMPING)


def former_attempts(folder: Path) -> list[dict[str, Any]]:
    """The kept attempts that count, as results.json lists them: folder, epochs done, what ended them (`Failure`).

    `kind` is "stopped" where nothing did. One that failed for want of disk, say, and was continued from its checkpoint
    is no other attempt: only its record is kept. One that diverged counts in any case.
    """
    attempts, starts = [], _starts(folder)
    for kept in _kept(folder):
        failure, begun = _failure(kept), _starts(kept)
        continued = begun and len(begun) < len(starts) and starts[: len(begun)] == begun
        if (failure is not None and failure.kind == "diverged") or not continued:
            attempts.append(
                {
                    "folder": f"{ATTEMPTS}/{kept.name}",
                    "epochs": max(len(_lines(kept / METRICS)) - 1, 0),
                    "kind": failure.kind if failure else "stopped",
                    "step": failure.step if failure else None,
                    "epoch": failure.epoch if failure else None,
                    "failure": failure.message if failure else None,
                }
            )
    return attempts


def keep_attempt(folder: Path) -> None:
    """Moves what a failed attempt has left in a run folder to attempts/<k>, k from 1; nothing where none has failed."""
    if (folder / FAILURE).exists() or (folder / FAILURE_TEXT).exists():
        _move(folder)


def keep_epochs(folder: Path) -> None:
    """The same for an attempt that did not fail but has recorded epochs, where a run starts over."""
    if len(_lines(folder / METRICS)) > 1:
        _move(folder)


def _move(folder: Path) -> None:
    # config.yaml and environment.json stay as well: the next attempt may continue from a checkpoint of this one
    attempts, number = folder / ATTEMPTS, max((int(path.name) for path in _kept(folder)), default=0)
    partial = attempts / ".partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name in (CONFIG, ENVIRONMENT, *_ENDED):
            if (folder / name).exists():
                shutil.copy2(folder / name, partial / name)
        if not _same_files(attempts / str(number), partial):  # else a start that was killed below has kept it
            partial.rename(attempts / str(number + 1))
        for name in _ENDED:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise RunError(
            f"{attempts}: the former attempt could not be kept ({error}); free some space, or remove what is in its "
            "way, and start again"
        ) from error
    shutil.rmtree(partial, ignore_errors=True)


def _kept(folder: Path) -> list[Path]:
    numbered = (path for path in (folder / ATTEMPTS).glob("*") if re.fullmatch(r"[0-9]+", path.name, re.ASCII))
    return sorted(numbered, key=lambda path: int(path.name))


def _failure(folder: Path) -> Failure | None:
    try:
        return read_failure(folder)
    except RunError:  # a damaged record is one of a failure
        return Failure("failed", message=f"{FAILURE} is damaged")


def _starts(folder: Path) -> list[Any]:
    """The starts of an attempt; a run that continues lists those before its own."""
    path = folder / ENVIRONMENT
    return read_record(path).get("starts", []) if path.exists() else []


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []


def _same_files(first: Path, second: Path) -> bool:
    if not first.is_dir():
        return False
    names = [sorted(path.name for path in folder.iterdir()) for folder in (first, second)]
    return names[0] == names[1] and len(filecmp.cmpfiles(first, second, names[0], shallow=False)[0]) == len(names[0])
