"""Whether the files of a finished run are possible, and tell one story."""

from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from onlinenorm.errors import ReportError
from onlinenorm.report.predictions import Predictions, load_predictions


def check_agreement(results: dict[str, Any], metrics: dict[str, np.ndarray], folder: Path) -> None:
    """The last epoch of results.json must be that of metrics.csv, and its best epochs the best there."""
    if not metrics or not metrics["epoch"].size:
        raise ReportError(f"{folder / 'metrics.csv'}: holds no epoch, although the run is marked as done")
    epochs = metrics["epoch"]
    best = {"last": lambda values: values[-1], "best_loss": np.nanmin, "best_top1": np.nanmax}
    entries = (("last", "val_loss"), ("last", "val_top1"), ("best_loss", "val_loss"), ("best_top1", "val_top1"))
    for entry, column in entries:
        values, said = metrics[column], results[entry]
        if np.isnan(values).all():
            raise ReportError(f"{folder / 'metrics.csv'}: column {column} is empty")
        seen = float(best[entry](values))
        named = values[epochs == said["epoch"]]  # of equally good epochs any
        if not _same(said[column], seen):
            _contradiction(folder, f"{entry}.{column}", said[column], seen)
        if not named.size or not _same(named[0], seen) or (entry == "last" and said["epoch"] != epochs[-1]):
            _contradiction(folder, f"{entry}.epoch", said["epoch"], int(epochs[np.flatnonzero(values == seen)[-1]]))


def _same(first: float, second: float) -> bool:
    return abs(first - second) <= 1e-9 * max(1.0, abs(second))  # figures are written with all their digits


def _contradiction(folder: Path, key: str, said: float, seen: float, file: str = "metrics.csv") -> NoReturn:
    raise ReportError(
        f"{folder / 'results.json'}: {key} is {said}, but {file} shows {seen}; "
        "one of the two files belongs to another run"
    )


def counted(results: dict[str, Any], folder: Path) -> dict[str, tuple[int, int]]:
    """Figures of results.json that predictions.npz tells too: name -> (images by results.json, images counted there).

    {} where there is no such file, or one of other images. Raises ReportError where it is damaged.
    """
    if not (folder / "predictions.npz").is_file():
        return {}
    before = load_predictions(folder / "predictions.npz", "with")
    known = int((before.label >= 0).sum())
    if len(before.index) != results["dataset"]["val_images"] or not known:
        return {}

    def pair(top1: float, predictions: Predictions) -> tuple[int, int]:
        return round(top1 * known), int((predictions.prediction == predictions.label)[predictions.label >= 0].sum())

    found = {"last.val_top1": pair(results["last"]["val_top1"], before)}
    if clamping := results.get("clamping"):
        after = load_predictions(folder / "predictions.npz", "without")
        found["clamping.with.val_top1"] = pair(clamping["with"]["val_top1"], before)
        found["clamping.without.val_top1"] = pair(clamping["without"]["val_top1"], after)
        changed = int((before.prediction != after.prediction).sum())
        found["clamping.changed_predictions"] = (clamping["changed_predictions"], changed)
    return found


def check_predictions(results: dict[str, Any], folder: Path) -> None:
    """predictions.npz must give the accuracies of results.json, if that names the rule by which both were counted.

    Runs from before that counted ties in two ways; what differs there is told in their table.
    """
    if not results.get("top1_rule"):
        return
    for name, (said, seen) in counted(results, folder).items():
        if said != seen:
            _contradiction(folder, name, said, seen, "predictions.npz")  # in images
