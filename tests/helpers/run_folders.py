"""Writes run folders as training would leave them, without training."""

import csv
import hashlib
import json
import math
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf

COLUMNS = [
    "epoch",
    "step",
    "lr",
    "train_loss",
    "train_top1",
    "val_loss",
    "val_top1",
    "val_top5",
    "images_per_second",
    "seconds",
]
LEVELS = {"online_clamp": 0.880, "online_layer_scaling": 0.878, "batch": 0.882}
NORMALIZERS = {
    "online_clamp": {
        "_target_": "onlinenorm.normalizers.OnlineNorm2d",
        "alpha_fwd": 0.999,
        "alpha_bkw": 0.99,
        "clamp_value": 5.0,
    },
    "online_layer_scaling": {"_target_": "onlinenorm.normalizers.OnlineNorm2d", "alpha_fwd": 0.999, "alpha_bkw": 0.99},
    "batch": {"_target_": "torch.nn.BatchNorm2d", "eps": 1e-5, "momentum": 0.1},
}
PUBLISHED_RECIPE = {
    "epochs": 100, "batch_size": 32, "base_batch_size": 256, "lr": 0.1, "momentum": 0.9,
    "scaling": "horizon", "schedule": "step",
    "milestones": [30, 60, 80, 90], "lr_factor": 0.1, "weight_decay": 1e-4, "decay_norm_weight": True,
    "decay_norm_bias": False, "decay_bias": True, "augmentation": "random_resized_crop", "evaluation": "center_crop",
}  # fmt: skip
DATASETS = {
    "embedded": {"name": "embedded", "train_images": 10_000, "val_images": 2_000, "fingerprint": "e1"},
    "imagenet": {"name": "imagenet", "train_images": 1_281_167, "val_images": 50_000, "fingerprint": "i1"},
    "fashion_mnist": {"name": "fashion_mnist", "train_images": 60_000, "val_images": 10_000, "fingerprint": "f1"},
    "imagenette": {"name": "imagenette", "train_images": 9_469, "val_images": 3_925, "fingerprint": "n1"},
    "cifar10": {"name": "cifar10", "train_images": 50_000, "val_images": 10_000, "fingerprint": "c1"},
}


def read_yaml(path: Path):
    return OmegaConf.to_container(OmegaConf.load(path), resolve=True)


def write_run(
    root: Path,
    normalizer: str,
    seed: int = 0,
    *,
    scale: str = "embedded",
    epochs: int = 5,
    done: int | None = None,
    finish: bool = True,
    top1: float | None = None,
    loss: float | None = None,
    recipe: dict | None = None,
    model: str = "cifar_resnet8",
    clamping: dict | None = None,
    normalizer_config: dict | None = None,
    environment: dict | None = None,
    clamped: list[tuple[float, float]] | None = None,
    wrong: list[int] | None = None,
    failure: str | None = None,
    data: dict | None = None,
    removals: list[tuple[float, float, int]] | None = None,
    reestimated: dict | None = None,
    dataset: dict | None = None,
) -> Path:
    """A run folder root/normalizer/seed<k>; `top1` and `loss` set the best figures exactly, `done` cuts it short.

    `clamped` has (clamped fraction, largest activation) of each epoch for clamping.csv, `removals` beside these (loss,
    accuracy, changed predictions) without the clamp, `wrong` the indices of 100 images that predictions.npz gets
    wrong, `failure` the text of failed.txt.
    """
    folder = root / normalizer / f"seed{seed}"
    folder.mkdir(parents=True)
    top1 = LEVELS.get(normalizer, 0.86) + 0.002 * math.sin(7 * seed + len(normalizer)) if top1 is None else top1
    loss = 0.33 + 0.01 * math.cos(5 * seed + len(normalizer)) if loss is None else loss
    recipe = {
        **PUBLISHED_RECIPE,
        "epochs": epochs,
        "milestones": [round(epochs * f) for f in (0.3, 0.6, 0.8)],
        **(recipe or {}),
    }
    config = {
        "choices": {"experiment": "study", "normalizer": normalizer},
        "seed": seed,
        "run_dir": str(folder),
        "normalizer": normalizer_config or NORMALIZERS.get(normalizer, {"_target_": "x"}),
        "model": {"_target_": f"onlinenorm.models.{model}", "zero_init_last_gamma": False, "compile": False},
        "data": {
            "_target_": f"onlinenorm.data.{scale}",
            "root": f"/data/{seed}",
            "image_size": 224 if scale == "imagenet" else 28,
            **(data or {}),
        },
        "recipe": recipe,
        "trainer": {"precision": "32-true", "devices": 1},
    }
    if model.startswith("resnet"):
        config["model"]["bottleneck_stride"] = "3x3"
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    if environment is None:
        environment = {
            "command": f"python train.py experiment=study normalizer={normalizer} seed={seed}",
            "git": {"commit": "0123456789abcdef", "dirty": False},
            "versions": {"torch": "2.14.1", "python": "3.11.2"},
            "hardware": "1 x NVIDIA H100 80GB HBM3",
            "world_size": 1,
        }
    (folder / "environment.json").write_text(json.dumps(environment))
    rows = curve(epochs, top1, loss, recipe["milestones"], seed)[:done]
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    if clamped is not None:
        lines = [f"{i + 1},{100 * (i + 1)},{part!r},{largest!r}\n" for i, (part, largest) in enumerate(clamped)]
        columns = "epoch,step,clamped_fraction,max_abs_activation"
        if removals is not None:
            columns += ",without_val_loss,without_val_top1,changed_predictions"
            lines = [line[:-1] + ",".join(["", *map(repr, r)]) + "\n" for line, r in zip(lines, removals, strict=True)]
        (folder / "clamping.csv").write_text(columns + "\n" + "".join(lines))
    if failure is not None:
        (folder / "failed.txt").write_text(failure)
    if wrong is not None:
        label = np.arange(100) % 10
        prediction = np.where(np.isin(np.arange(100), wrong), (label + 1) % 10, label)
        np.savez(folder / "predictions.npz", index=np.arange(100), label=label, prediction=prediction)
    if finish and done is None:
        best_loss, best_top1 = min(rows, key=lambda r: r["val_loss"]), max(rows, key=lambda r: r["val_top1"])
        last = rows[-1]
        if normalizer == "online_clamp" and clamping is None:
            side = {"val_loss": last["val_loss"], "val_top1": last["val_top1"]}
            clamping = {
                "layers": 9, "clamp_value": 5.0, "with": side, "without": side, "changed_predictions": 0,
                "clamped_fraction": 0.0, "max_abs_activation": 4.61,
            }  # fmt: skip
        results = {
            "schema": 1, "experiment": "study", "normalizer": normalizer, "seed": seed, "scale": scale,
            "dataset": dataset or DATASETS.get(scale, DATASETS["embedded"]), "epochs": epochs,
            "last": {k: last[k] for k in ("epoch", "val_loss", "val_top1", "val_top5")},
            "best_loss": {k: best_loss[k] for k in ("epoch", "val_loss")},
            "best_top1": {k: best_top1[k] for k in ("epoch", "val_top1")},
            "clamping": clamping or None, "reestimated": reestimated,
            "images_per_second": 812.5, "wall_seconds": 95.2, "resumed": 0,
            "parameters_sha256": hashlib.sha256(f"{folder} {seed}".encode()).hexdigest(),
        }  # fmt: skip
        (folder / "results.json").write_text(json.dumps(results))
    return folder


def curve(epochs: int, top1: float, loss: float, milestones: list[int], seed: int) -> list[dict]:
    """Plausible curves that jump at the milestones; the last-but-one epoch holds the best figures."""
    random = np.random.default_rng(seed)
    rows = []
    for epoch in range(1, epochs + 1):
        steps = sum(epoch > m for m in milestones)
        progress = 1 - math.exp(-4 * epoch / epochs) * 0.6 - 0.02 * max(0, 3 - steps)
        noise = 0.004 * abs(random.standard_normal())
        value = dict(zip(COLUMNS, [0.0] * len(COLUMNS), strict=True))
        value |= {
            "epoch": epoch, "step": 100 * epoch, "lr": 0.1 * 0.1**steps,
            "train_loss": loss * (0.85 + 2.5 * (1 - progress)) + noise,
            "train_top1": min(1.0, top1 * (progress + 0.03)),
            "val_loss": loss * (1.001 + 2.0 * (1 - progress)) + noise, "val_top1": top1 * 0.999 * progress - noise,
            "val_top5": min(1.0, top1 * progress + 0.1), "images_per_second": 812.5, "seconds": 19.0,
        }  # fmt: skip
        rows.append(value)
    rows[max(0, epochs - 2)]["val_top1"] = top1
    rows[max(0, epochs - 2)]["val_loss"] = loss
    return rows
