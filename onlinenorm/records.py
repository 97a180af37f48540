"""The records at the top of a run folder: what each of them holds."""

import math
from pathlib import Path
from typing import Any

from onlinenorm.errors import ReportError
from onlinenorm.scales import LABEL, is_label


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
