"""The records of a run folder: where it lies, what they are called and what each of them holds."""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from onlinenorm.errors import Diverged, ReportError
from onlinenorm.scales import LABEL, is_label
from onlinenorm.text import first_line

CONFIG, ENVIRONMENT = "config.yaml", "environment.json"
METRICS, CLAMPING = "metrics.csv", "clamping.csv"
FAILURE, FAILURE_TEXT = "failed.json", "failed.txt"  # for programs, and for people
ATTEMPTS = "attempts"

_DIVERGED = re.compile(r"became NaN or infinite at step (\d+)(?: \(epoch (\d+))?")


def run_path(config: dict[str, Any], runs: str | Path = "runs", between: Iterable[str] = ()) -> Path:
    """The folder of the run of a configuration: its `run_dir`, else RUNS/EXPERIMENT/[BETWEEN/]NORMALIZER/seedK."""
    names = config["choices"]
    if config["run_dir"]:
        return Path(str(config["run_dir"])).expanduser()  # 2026 is a number to YAML
    return Path(runs, names["experiment"], *between, names["normalizer"], f"seed{config['seed']}")


@dataclass(frozen=True)
class Failure:
    """What ended a run: that a loss or the network stopped being finite, or any other error.

    Args:
        kind: "diverged" or "failed".
        step, epoch: where it was seen, from 1; None where that is not known.
        message: for people.
    """

    kind: Literal["diverged", "failed"]
    step: int | None = None
    epoch: int | None = None
    message: str = ""

    @classmethod
    def of(cls, error: Exception) -> Self:
        """The record of an error that ended a run."""
        if isinstance(error, Diverged):
            return cls("diverged", error.step, error.epoch, first_line(error))
        return cls("failed", message=first_line(error))

    @classmethod
    def from_text(cls, text: str) -> Self:
        """That of a failed.txt: what runs left from before failed.json, and the last output of one that was killed."""
        message = (text.splitlines() or [""])[-1]
        if found := _DIVERGED.search(text):
            return cls("diverged", int(found[1]), int(found[2]) if found[2] else None, message)
        return cls("failed", message=message)


def read_failure(folder: Path) -> Failure | None:
    """What ended the run of a folder, or None where nothing has. Raises OSError or ValueError where it is damaged."""
    if (folder / FAILURE).exists():
        record = json.loads((folder / FAILURE).read_text(encoding="utf-8"))
        if not isinstance(record, dict) or record.get("kind") not in ("diverged", "failed"):
            raise ValueError("it holds no failure")
        return Failure(record["kind"], record.get("step"), record.get("epoch"), str(record.get("message", "")))
    if (folder / FAILURE_TEXT).exists():
        return Failure.from_text((folder / FAILURE_TEXT).read_text(encoding="utf-8", errors="replace"))
    return None


def lookup(tree: dict[str, Any], dotted: str, default: Any = None) -> Any:
    """tree["a"]["b"] for "a.b", or `default` where a part is missing."""
    for part in dotted.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return default
        tree = tree[part]
    return tree


def check_results(results: dict[str, Any], path: Path) -> None:
    """Types and ranges of every figure that the report prints."""

    def fail(key: str, problem: str) -> None:
        raise ReportError(f"{path}: {key} {problem}")

    def number(key: str, low: float, high: float, kind: type | tuple = (int, float)) -> None:
        value = lookup(results, key)
        if value is None:
            fail(key, "is missing")
        if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value):
            fail(key, f"is {value!r}, not a finite {'whole ' if kind is int else ''}number")
        if not low <= value <= high:
            fail(
                key, f"is {value!r}, outside [{low}, {high}]" + (" (accuracies are fractions)" if "top" in key else "")
            )

    if results.get("schema") != 1:
        fail("schema", f"is {results.get('schema')!r}; this report reads schema 1")
    for key in ("experiment", "normalizer", "dataset.name"):
        if not isinstance(lookup(results, key), str):
            fail(key, "is missing or not a text")
    if not is_label(results.get("scale")):
        fail("scale", f"is {results.get('scale')!r}; it must be {LABEL}")
    for key in ("seed", "dataset.train_images", "dataset.val_images"):
        number(key, 0, math.inf, int)
    for key in ("epochs", "last.epoch", "best_loss.epoch", "best_top1.epoch"):
        number(key, 1, math.inf, int)
    for key in ("last.val_loss", "best_loss.val_loss"):
        number(key, 0, math.inf)
    for key in ("last.val_top1", "best_top1.val_top1"):
        number(key, 0, 1)
    attempts = results.get("attempts", [])
    if not isinstance(attempts, list) or not all(isinstance(attempt, dict) for attempt in attempts):
        fail("attempts", "is not a list of objects")
    if results.get("clamping") is not None:
        for side in ("with", "without"):
            number(f"clamping.{side}.val_loss", 0, math.inf)
            number(f"clamping.{side}.val_top1", 0, 1)
        number("clamping.layers", 0, math.inf, int)
        number("clamping.changed_predictions", 0, results["dataset"]["val_images"], int)
        number("clamping.clamp_value", 0, math.inf)
        number("clamping.clamped_fraction", 0, 1)
        number("clamping.max_abs_activation", 0, math.inf)
