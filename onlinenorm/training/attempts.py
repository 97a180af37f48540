"""Former attempts at a run: none vanishes when it is started again, so that tables can count all of them."""

import filecmp
import json
import shutil
from pathlib import Path
from typing import Any

from onlinenorm.errors import RunError

CONFIG, ENVIRONMENT, FAILED = "config.yaml", "environment.json", "failed.txt"
METRICS, CLAMPING = "metrics.csv", "clamping.csv"
ATTEMPTS = "attempts"
DIVERGED = "became NaN or infinite"  # in the error that ends such a run


def former_attempts(folder: Path) -> list[dict[str, Any]]:
    """The kept attempts that count, as results.json lists them: folder, epochs done, last line of failed.txt.

    One that failed for want of disk, say, and was continued from its checkpoint is no other attempt: only its record is
    kept. One that diverged counts in any case.
    """
    found, starts = [], _starts(folder)
    for kept in _kept(folder):
        failed, lines = _lines(kept / FAILED), _lines(kept / METRICS)
        failure, begun = failed[-1] if failed else None, _starts(kept)
        diverged = any(DIVERGED in line for line in failed)
        continued = begun and len(begun) < len(starts) and starts[: len(begun)] == begun
        if diverged or not continued:
            found.append({"folder": f"{ATTEMPTS}/{kept.name}", "epochs": max(len(lines) - 1, 0), "failure": failure})
    return found


def keep_attempt(folder: Path) -> None:
    """Moves what a failed attempt has left in a run folder to attempts/<k>, k from 1; nothing where none has failed."""
    if (folder / FAILED).exists():
        _move(folder)


def keep_epochs(folder: Path) -> None:
    """The same for an attempt that did not fail but has recorded epochs, where a run starts over."""
    if len(_lines(folder / METRICS)) > 1:
        _move(folder)


def _move(folder: Path) -> None:
    # config.yaml and environment.json stay as well: the next attempt may continue from a checkpoint of this one
    attempts, number = folder / ATTEMPTS, len(_kept(folder))
    partial, ended = attempts / ".partial", (FAILED, METRICS, CLAMPING)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name in (CONFIG, ENVIRONMENT, *ended):
            if (folder / name).exists():
                shutil.copy2(folder / name, partial / name)
        if not _same_files(attempts / str(number), partial):  # else a start that was killed below has kept it
            partial.rename(attempts / str(number + 1))
        for name in ended:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise RunError(
            f"{attempts}: the former attempt could not be kept ({error}); free some space and start again"
        ) from error
    shutil.rmtree(partial, ignore_errors=True)


def _kept(folder: Path) -> list[Path]:
    numbered = (path for path in (folder / ATTEMPTS).glob("*") if path.name.isdigit())
    return sorted(numbered, key=lambda path: int(path.name))


def _starts(folder: Path) -> list[Any]:
    """The starts of an attempt; a run that continues lists those before its own."""
    path = folder / ENVIRONMENT
    return json.loads(path.read_text(encoding="utf-8")).get("starts", []) if path.exists() else []


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []


def _same_files(first: Path, second: Path) -> bool:
    if not first.is_dir():
        return False
    names = [sorted(path.name for path in folder.iterdir()) for folder in (first, second)]
    return names[0] == names[1] and len(filecmp.cmpfiles(first, second, names[0], shallow=False)[0]) == len(names[0])
