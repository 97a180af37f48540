"""predictions.npz: what a run's last weights say of each validation image."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onlinenorm.errors import ReportError
from onlinenorm.records import damaged

COLUMNS = {"with": ("prediction", "with_clamp"), "without": ("prediction", "without_clamp")}


@dataclass(frozen=True)
class Predictions:
    """The final validation of a run: for each image its index, label and predicted class, by rising index."""

    index: np.ndarray
    label: np.ndarray
    prediction: np.ndarray


def load_predictions(path: Path, clamp: str = "with") -> Predictions:
    """The file's predictions "with" or "without" the clamp; ReportError where it is missing, damaged or incomplete."""
    if not path.is_file():
        raise ReportError(f"{path}: missing; it is written at the end of a run")
    try:
        with open(path, "rb") as handle, np.load(handle, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except Exception as error:  # what a damaged file makes numpy, zipfile and zlib raise
        raise damaged(path, error, ReportError) from error
    column = next((name for name in COLUMNS[clamp] if name in arrays), None)
    if column is None or not {"index", "label"} <= arrays.keys():
        raise ReportError(f"{path}: holds {', '.join(sorted(arrays))}; index, label and a prediction are needed")
    parts = arrays["index"], arrays["label"], arrays[column]
    if any(part.ndim != 1 or part.dtype.kind not in "iu" or len(part) != len(parts[0]) for part in parts):
        raise ReportError(f"{path}: index, label and {column} must be whole numbers, one an image")
    if not len(parts[0]):
        raise ReportError(f"{path}: holds no images")
    return Predictions(*parts)
