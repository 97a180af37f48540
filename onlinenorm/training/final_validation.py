"""The end of a run: the last weights validated with and without clamp, predictions.npz and results.json."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import nn

from onlinenorm.data import ImageDataModule
from onlinenorm.files import write_atomically
from onlinenorm.normalizers import remove_clamping
from onlinenorm.training.accuracy import TOP1_RULE
from onlinenorm.training.clamping import ClampMeter
from onlinenorm.training.epoch_log import EpochLog
from onlinenorm.training.module import ImageClassifier

FILES_LISTED = 1000  # unreadable images named in results.json


def parameters_sha256(network: nn.Module) -> str:
    """SHA-256 over names and bytes of all parameters and buffers, sorted by name."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def validate(trainer: pl.Trainer, module: ImageClassifier, data: ImageDataModule) -> dict[str, Any]:
    """Figures of the validation set ("val_loss", ...) and, by rising "index", each image's "label" and "prediction"."""
    module.collected = []
    # hooks on single layers count only where the network is not compiled as a whole
    with torch.compiler.set_stance("force_eager"):
        trainer.validate(module, datamodule=data, verbose=False)
    table_3N = torch.cat(module.collected, dim=1)
    module.collected = None
    if trainer.world_size > 1:
        data.agree_on_unreadable()
        tables: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(tables, table_3N)
        table_3N = torch.cat(tables, dim=1)
    rows_3N = table_3N[:, table_3N[0].argsort()].numpy()
    distinct = len(np.unique(rows_3N[0]))
    assert distinct == rows_3N.shape[1] == data.val_images, "every validation image once"
    loss, top1, top5, images = module.reduced(module.val_sums)
    module.assert_finite_validation(loss)
    label, prediction = rows_3N[1:]
    assert ((label == prediction) & (label >= 0)).sum() == top1, "accuracy and predictions follow one rule"
    images = max(images, 1.0)
    figures = {"val_loss": loss / images, "val_top1": top1 / images, "val_top5": top5 / images}
    return figures | dict(zip(("index", "label", "prediction"), rows_3N, strict=True))


def final_validation(
    trainer: pl.Trainer, module: ImageClassifier, data: ImageDataModule, log: EpochLog
) -> tuple[dict[str, Any] | None, dict[str, np.ndarray]]:
    """(the `clamping` section of results.json, or None where nothing clamps; the arrays of predictions.npz).

    Its figures take the place of the last epoch's in `log`: the same weights on the same images, but kernels may round
    otherwise, and metrics.csv, results.json and predictions.npz tell one story. Removes the clamp of `module.network`
    on the way.
    """
    with ClampMeter(module.network) as meter:
        before = validate(trainer, module, data)
    log.amend(trainer, {key: before[key] for key in ("val_loss", "val_top1", "val_top5")})
    arrays = {"index": before["index"], "label": before["label"]}
    if not meter.layers:
        return None, arrays | {"prediction": before["prediction"]}
    clamped, activations, largest = meter.totals(trainer.strategy)
    clamp_value = meter.layers[0].clamp_value
    layers = remove_clamping(module.network)
    after = validate(trainer, module, data)
    section = {
        "layers": layers,
        "clamp_value": clamp_value,
        "with": {key: before[key] for key in ("val_loss", "val_top1")},
        "without": {key: after[key] for key in ("val_loss", "val_top1")},
        "changed_predictions": int((before["prediction"] != after["prediction"]).sum()),
        "clamped_fraction": clamped / activations,
        "max_abs_activation": largest,
    }
    return section, arrays | {"with_clamp": before["prediction"], "without_clamp": after["prediction"]}


def build_results(
    choices: dict[str, Any],
    seed: int,
    module: ImageClassifier,
    data: Any,
    log: EpochLog,
    resumed: int,
    clamping: Any,
    attempts: list[dict[str, Any]],
) -> dict[str, Any]:
    """The content of results.json, apart from files: accuracies are fractions, losses nats, epochs count from 1."""
    rows = log.rows
    last = rows[-1]
    by_loss = min(rows, key=lambda row: row["val_loss"])
    by_top1 = max(rows, key=lambda row: row["val_top1"])
    return {
        "schema": 1,
        "experiment": choices["experiment"],
        "normalizer": choices["normalizer"],
        "seed": seed,
        "scale": data.scale,
        "dataset": data.describe(),
        "epochs": module.recipe.epochs,
        "top1_rule": TOP1_RULE,
        "last": {key: last[key] for key in ("epoch", "val_loss", "val_top1", "val_top5")},
        "best_loss": {key: by_loss[key] for key in ("epoch", "val_loss")},
        "best_top1": {key: by_top1[key] for key in ("epoch", "val_top1")},
        "clamping": clamping,
        "images_per_second": log.images_per_second,
        "wall_seconds": log.wall_seconds,
        "resumed": resumed,
        "attempts": attempts,
        "parameters_sha256": parameters_sha256(module.network),
        "unreadable": {"count": len(data.unreadable), "files": [str(file) for file in data.unreadable[:FILES_LISTED]]},
    }


def write_results(folder: Path, results: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """predictions.npz first, then results.json, whose presence means done."""
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **arrays)
    write_atomically(folder / "predictions.npz", content.getvalue())
    write_atomically(folder / "results.json", json.dumps(results, indent=2, allow_nan=False) + "\n")


def summary(results: dict[str, Any], folder: Path) -> str:
    """A finished run in a few lines."""
    clamping = results.get("clamping")
    lines = [
        f"{results['experiment']} {results['normalizer']} seed {results['seed']} on {results['dataset']['name']} "
        f"({results['scale']}), {results['epochs']} epochs: done",
        f"  best val loss {results['best_loss']['val_loss']:.4f} (epoch {results['best_loss']['epoch']}), "
        f"best val top-1 {results['best_top1']['val_top1']:.2%} (epoch {results['best_top1']['epoch']}), "
        f"last {results['last']['val_loss']:.4f} and {results['last']['val_top1']:.2%}",
    ]
    if clamping:
        lines.append(
            f"  with clamp {clamping['with']['val_loss']:.4f} and {clamping['with']['val_top1']:.2%}, removed "
            f"{clamping['without']['val_loss']:.4f} and {clamping['without']['val_top1']:.2%}: "
            f"{clamping['changed_predictions']} predictions changed, {clamping['clamped_fraction']:.2e} of activations "
            f"were clamped, the largest was {clamping['max_abs_activation']:.1f} against {clamping['clamp_value']:g}"
        )
    if attempts := results.get("attempts"):
        ended = "; ".join(attempt["failure"] or "stopped" for attempt in attempts)
        lines.append(f"  attempt {len(attempts) + 1}; what ended those before: {ended}")
    return "\n".join([*lines, f"  {folder}"])
