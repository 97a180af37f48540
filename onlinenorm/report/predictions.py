"""predictions.npz of a run, image by image, and which of its two networks is the one that was trained."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from onlinenorm.errors import ReportError
from onlinenorm.records import damaged, lookup

OFF_KEY, RAISE_KEY = "recipe.clamp_off_epochs", "recipe.clamp_raise_epochs"
PREDICTIONS = {"with": ("prediction", "with_clamp"), "without": ("prediction", "without_clamp")}


def epochs_without_clamp(config: dict[str, Any]) -> int:
    """How many of its last epochs a network that has clamps was trained without them."""
    epochs = lookup(config, OFF_KEY)
    return epochs if isinstance(epochs, int) else 0


def as_trained(config: dict[str, Any]) -> str:
    """The key of PREDICTIONS of the network as trained, whose figures are `last` of results.json.

    "without" where the last epochs had no clamp: what is said "with" it there is of the clamp put back.
    """
    return "without" if epochs_without_clamp(config) else "with"


def load_predictions(path: Path, clamp: str = "with") -> pd.DataFrame:
    """The final validation: `index`, `label` and `prediction`, "with" or "without" the clamp, of each image.

    Raises ReportError where the file is missing, damaged or incomplete.
    """
    if not path.is_file():
        raise ReportError(f"{path}: missing; it is written at the end of a run")
    try:
        with open(path, "rb") as handle, np.load(handle, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except Exception as error:  # what a damaged file makes numpy, zipfile and zlib raise
        raise damaged(path, error, ReportError) from error
    column = next((name for name in PREDICTIONS[clamp] if name in arrays), None)
    if column is None or not {"index", "label"} <= arrays.keys():
        raise ReportError(f"{path}: holds {', '.join(sorted(arrays))}; index, label and a prediction are needed")
    parts = {"index": arrays["index"], "label": arrays["label"], "prediction": arrays[column]}
    images = arrays["index"].shape
    if any(part.ndim != 1 or part.dtype.kind not in "iu" or part.shape != images for part in parts.values()):
        raise ReportError(f"{path}: index, label and {column} must be whole numbers, one an image")
    if not len(parts["index"]):
        raise ReportError(f"{path}: holds no images")
    return pd.DataFrame(parts)


def counted(results: dict[str, Any], config: dict[str, Any], folder: Path) -> pd.DataFrame:
    """Figures of results.json that predictions.npz tells too, in images: `figure`, `recorded`, `counted` there.

    No rows where there is no such file, or one of other images. Raises ReportError where it is damaged.
    """
    columns = ["figure", "recorded", "counted"]
    if not (folder / "predictions.npz").is_file():
        return pd.DataFrame(columns=columns)
    sides = {clamp: load_predictions(folder / "predictions.npz", clamp) for clamp in PREDICTIONS}
    known = sides["with"]["label"] >= 0
    if len(known) != results["dataset"]["val_images"] or not known.any():
        return pd.DataFrame(columns=columns)

    def right(key: str, clamp: str) -> tuple[str, int, int]:
        predictions = sides[clamp]
        found = (predictions["prediction"] == predictions["label"])[known]
        return key, round(lookup(results, key) * int(known.sum())), int(found.sum())

    rows = [right("last.val_top1", as_trained(config))]
    if clamping := results.get("clamping"):
        rows += [right(f"clamping.{clamp}.val_top1", clamp) for clamp in sides]
        changed = int((sides["with"]["prediction"] != sides["without"]["prediction"]).sum())
        rows.append(("clamping.changed_predictions", clamping["changed_predictions"], changed))
    return pd.DataFrame(rows, columns=columns, dtype=object)
