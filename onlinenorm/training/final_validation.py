"""The end of a run: the last weights validated with and without clamp, predictions.npz and results.json."""

import contextlib
import hashlib
import io
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from onlinenorm.data import ImageDataModule
from onlinenorm.files import write_atomically
from onlinenorm.normalizers import (
    BatchRenorm1d,
    BatchRenorm2d,
    OnlineNorm,
    SyncBatchNorm2d,
    remove_clamping,
    update_statistics,
)
from onlinenorm.text import plural
from onlinenorm.training.accuracy import TOP1_RULE
from onlinenorm.training.clamping import ClampMeter
from onlinenorm.training.epoch_log import EpochLog
from onlinenorm.training.module import ImageClassifier
from onlinenorm.training.recipe import Recipe, clamp_factor
from onlinenorm.training.trainer import TORCHS_BATCH_NORMS

# Whose statistics update_bn makes the mean over batches; a class derived of one may have a rule of its own.
MEANS_OVER_BATCHES = (*TORCHS_BATCH_NORMS, SyncBatchNorm2d, BatchRenorm1d, BatchRenorm2d)
NONE_TO_ESTIMATE = "no layer of the network is OnlineNorm, BatchNorm or BatchRenorm"
FILES_LISTED = 1000  # unreadable images named in results.json


def parameters_sha256(network: nn.Module) -> str:
    """SHA-256 over names and bytes of all parameters and buffers, sorted by name."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def validate(trainer: pl.Trainer, module: ImageClassifier, data: ImageDataModule) -> dict[str, Any]:
    """Figures of the validation set ("val_loss", ...) and, by rising "index", each image's "label" and "prediction".

    Logits may be NaN or infinite, and so the loss then.
    """
    module.collected = []
    # hooks on single layers count only where the network is not compiled as a whole
    with torch.compiler.set_stance("force_eager"):
        trainer.validate(module, datamodule=data, verbose=False)
    table_3N = torch.cat(module.collected, dim=1).cpu()
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
    label, prediction = rows_3N[1:]
    hits = int(((label == prediction) & (label >= 0)).sum())
    assert hits == top1 or not math.isfinite(loss), "accuracy and predictions follow one rule"
    images = max(images, 1.0)
    figures = {"val_loss": loss / images, "val_top1": hits / images, "val_top5": top5 / images}
    return figures | dict(zip(("index", "label", "prediction"), rows_3N, strict=True))


def measured(validated: dict[str, Any]) -> dict[str, float | None]:
    """Loss and top-1 of `validate` as results.json holds them: None for a loss that is not finite."""
    loss = validated["val_loss"]
    return {"val_loss": loss if math.isfinite(loss) else None, "val_top1": validated["val_top1"]}


def final_validation(
    trainer: pl.Trainer, module: ImageClassifier, data: ImageDataModule, log: EpochLog
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Of results.json `clamping` and, if asked for, `reestimated`, each None where no layer has it; predictions.npz.

    The figures of the network as trained take the place of the last epoch's in `log`: the same weights on the same
    images, but kernels may round otherwise, and metrics.csv, results.json and predictions.npz tell one story. Where the
    last epochs had no clamp, `with` is what putting it back does. Removes the clamp of `module.network` on the way.

    Raises Diverged where the network as trained is not finite. What is only tried on it may be: `measured`.
    """
    clamps, recipe = module.clamps, module.recipe
    clamps.set(clamp_factor(recipe, recipe.epochs))
    with ClampMeter(module.network) as meter:
        trained = validate(trainer, module, data)
    module.assert_finite_validation(trained["val_loss"])
    log.amend(trainer, {key: trained[key] for key in ("val_loss", "val_top1", "val_top5")})
    arrays = {"index": trained["index"], "label": trained["label"]}
    sections: dict[str, Any] = {"clamping": None}
    if not clamps.layers:
        arrays["prediction"] = trained["prediction"]
    else:
        before, after = trained, trained
        if clamps.clamp_value is None:
            clamps.put_back()
            with ClampMeter(module.network) as meter:
                before = validate(trainer, module, data)
        section = {"layers": len(clamps.layers), "clamp_value": clamps.clamp_value}
        remove_clamping(module.network)
        if before is trained:
            after = validate(trainer, module, data)
        clamped, activations, largest = meter.totals(trainer.strategy)
        sections["clamping"] = section | {
            "with": measured(before),
            "without": measured(after),
            "changed_predictions": int((before["prediction"] != after["prediction"]).sum()),
            "clamped_fraction": clamped / activations,
            "max_abs_activation": largest if math.isfinite(largest) else None,
        }
        arrays |= {"with_clamp": before["prediction"], "without_clamp": after["prediction"]}
    if recipe.reestimate_images:
        sections["reestimated"] = None
        with kept_buffers(module.network):
            if images := reestimate(trainer, module, data, recipe.reestimate_images):
                again = validate(trainer, module, data)
                changed = int((trained["prediction"] != again["prediction"]).sum())
                sections["reestimated"] = {"images": images, **measured(again), "changed_predictions": changed}
    return sections, arrays


@contextlib.contextmanager
def kept_buffers(network: nn.Module) -> Iterator[None]:
    """Context after which the network's buffers are as they were."""
    kept = {name: buffer.clone() for name, buffer in network.named_buffers()}
    try:
        yield
    finally:
        for name, buffer in network.named_buffers():
            buffer.copy_(kept[name])


def can_reestimate(network: nn.Module) -> bool:
    """Whether a network has statistics that `reestimate` moves: those of OnlineNorm, BatchNorm or BatchRenorm."""
    return any(
        isinstance(layer, OnlineNorm) or (type(layer) in MEANS_OVER_BATCHES and layer.track_running_stats)
        for layer in network.modules()
    )


def reestimate(trainer: pl.Trainer, module: ImageClassifier, data: ImageDataModule, images: int) -> int:
    """Moves the statistics that `can_reestimate` tells of over training images; returns how many, 0 without any.

    The images are the first of an epoch after the last one, augmented and in batches as in training: whole batches, of
    one epoch at most. OnlineNorm goes on from where it is with its own decay (`update_statistics`), the others take
    the mean over batches (`torch.optim.swa_utils.update_bn`).
    """
    online = any(isinstance(layer, OnlineNorm) for layer in module.network.modules())
    if not can_reestimate(module.network):
        return 0
    recipe, device = module.recipe, trainer.strategy.root_device
    module.to(device)
    data.resume(recipe.epochs, 0)
    steps = min(-(-images // recipe.batch_size), data.train_images // recipe.batch_size)

    def inputs() -> Iterator[Tensor]:
        for batch in itertools.islice(data.train_dataloader(), steps * trainer.accumulate_grad_batches):
            moved = tuple(tensor.to(device) for tensor in data.on_before_batch_transfer(batch))
            yield data.on_after_batch_transfer(moved)[0]

    with trainer.precision_plugin.val_step_context(), torch.compiler.set_stance("force_eager"):
        if online:
            update_statistics(module, inputs())
        else:
            update_bn(inputs(), module)
    return steps * recipe.batch_size


def build_results(
    choices: dict[str, Any],
    seed: int,
    module: ImageClassifier,
    data: Any,
    log: EpochLog,
    resumed: int,
    sections: dict[str, Any],
    attempts: list[dict[str, Any]],
) -> dict[str, Any]:
    """The content of results.json, apart from files: accuracies are fractions, losses nats, epochs count from 1.

    `exchange` tells, of the start that trained last, how layers with global statistics came by those of other
    processes (`normalizers.exchange.Exchange`): {processes, by_kernels, gathered, reason}, null where none did.
    """
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
        **sections,
        "images_per_second": log.images_per_second,
        "wall_seconds": log.wall_seconds,
        "resumed": resumed,
        "attempts": attempts,
        "exchange": module.exchange,
        "parameters_sha256": parameters_sha256(module.network),
        "unreadable": {"count": len(data.unreadable), "files": [str(file) for file in data.unreadable[:FILES_LISTED]]},
    }


def write_results(folder: Path, results: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """predictions.npz first, then results.json, whose presence means done."""
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **arrays)
    write_atomically(folder / "predictions.npz", content.getvalue())
    write_atomically(folder / "results.json", json.dumps(results, indent=2, allow_nan=False) + "\n")


def _figures(figures: dict[str, float | None]) -> str:
    """Loss and top-1 of `measured` in words."""
    if figures["val_loss"] is None:
        return "not finite"
    return f"{figures['val_loss']:.4f} and {figures['val_top1']:.2%}"


def summary(results: dict[str, Any], recipe: Recipe, folder: Path) -> str:
    """A finished run in a few lines."""
    clamping, name, scale = results.get("clamping"), results["dataset"]["name"], results["scale"]
    told = "" if scale == name.lower() else f" ({scale})"
    lines = [
        f"{results['experiment']} {results['normalizer']} seed {results['seed']} on {name}{told}, "
        f"{plural(results['epochs'], 'epoch')}: done",
        f"  best val loss {results['best_loss']['val_loss']:.4f} (epoch {results['best_loss']['epoch']}), "
        f"best val top-1 {results['best_top1']['val_top1']:.2%} (epoch {results['best_top1']['epoch']}), "
        f"last {results['last']['val_loss']:.4f} and {results['last']['val_top1']:.2%}",
    ]
    if clamping:
        off, largest = recipe.clamp_off_epochs, clamping["max_abs_activation"]
        before, after = (_figures(clamping[side]) for side in ("with", "without"))
        both = f"with clamp {before}, removed {after}"
        if off:
            both = f"trained without the clamp in the last {plural(off, 'epoch')}: {after}; with it put back {before}"
        lines.append(
            f"  {both}: {clamping['changed_predictions']} predictions changed, {clamping['clamped_fraction']:.2e} of "
            f"activations were clamped, the largest was {'not finite' if largest is None else f'{largest:.1f}'} "
            f"against {clamping['clamp_value']:g}"
        )
        if clamping["without"]["val_loss"] is None:
            lines.append(
                "  not finite without the clamp: its removal made logits NaN or infinite. Keep it (scripts/export.py "
                "--keep-clamp), or train the last epochs without it (recipe.clamp_off_epochs) or with a wider one "
                "(recipe.clamp_raise_epochs)"
            )
    if again := results.get("reestimated"):
        lines.append(
            f"  {'clamp removed and ' if clamping else ''}statistics estimated anew on {again['images']:,} training "
            f"images: {_figures(again)}, {again['changed_predictions']} predictions changed"
        )
        if again["val_loss"] is None and not (clamping and clamping["without"]["val_loss"] is None):
            lines.append(
                "  not finite on statistics estimated anew: these made logits NaN or infinite. The network as trained "
                "has its own: leave scripts/export.py --reestimate out"
            )
    elif "reestimated" in results:
        lines.append(f"  recipe.reestimate_images: without effect, as {NONE_TO_ESTIMATE}")
    if attempts := results.get("attempts"):
        ended = "; ".join(attempt["failure"] or "stopped" for attempt in attempts)
        lines.append(f"  attempt {len(attempts) + 1}; what ended those before: {ended}")
    return "\n".join([*lines, f"  {folder}"])
