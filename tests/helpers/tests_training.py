"""The real configuration shrunk to seconds, and train.py as a module."""

import csv
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import torch
from pytorch_lightning.plugins.precision import MixedPrecision

ROOT = Path(__file__).resolve().parents[2]
# 3 epochs of 4 steps on 64 images of 8 x 8
TINY = (
    "model=cifar_resnet8",
    "data=synthetic",
    "data.image_size=8",
    "data.num_train=70",
    "data.num_val=21",
    "recipe=cifar",
    "recipe.epochs=3",
    "recipe.milestones=[2]",
    "recipe.batch_size=16",
    "trainer=cpu",
)
# a results.json that could be
RESULTS = {
    "schema": 1, "experiment": "e", "normalizer": "batch", "seed": 0, "scale": "synthetic", "epochs": 1,
    "dataset": {"name": "d", "train_images": 4, "val_images": 2, "fingerprint": "x"},
    "last": {"epoch": 1, "val_loss": 0.5, "val_top1": 0.5}, "best_loss": {"epoch": 1, "val_loss": 0.5},
    "best_top1": {"epoch": 1, "val_top1": 0.5}, "clamping": None,
}  # fmt: skip


def load_train_module():
    """train.py of the repository's root."""
    if "train" not in sys.modules:
        spec = importlib.util.spec_from_file_location("train", ROOT / "train.py")
        sys.modules["train"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["train"])
    return sys.modules["train"]


def rows(folder):
    """metrics.csv without its timings, as text: equal means equal to the last bit."""
    with open(Path(folder) / "metrics.csv", newline="") as file:
        return [
            {key: value for key, value in row.items() if key not in ("images_per_second", "seconds")}
            for row in csv.DictReader(file)
        ]


def outcome(folder):
    """What must not depend on interruptions: weights, rows, figures, predictions."""
    results = json.loads((Path(folder) / "results.json").read_text())
    for key in ("images_per_second", "wall_seconds", "resumed"):
        del results[key]
    with np.load(Path(folder) / "predictions.npz") as arrays:
        predictions = {key: value.tolist() for key, value in arrays.items()}
    return results, rows(folder), predictions


def scaled_by(init_scale, growth_interval):
    """`__init__` of a ScaledHalf whose scale starts there and doubles after so many steps."""

    def initialise(self, device):
        scaler = torch.amp.GradScaler(device, init_scale=init_scale, growth_interval=growth_interval)
        MixedPrecision.__init__(self, "16-mixed", device, scaler)

    return initialise
