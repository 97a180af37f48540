"""metrics.csv and clamping.csv: one row an epoch, kept in the checkpoint, mirrored to the loggers."""

import csv
import io
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from onlinenorm.files import write_atomically
from onlinenorm.training.host_copy import host_copy

COLUMNS = (
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
)
CLAMPING_COLUMNS = ("epoch", "step", "clamped_fraction", "max_abs_activation")
REMOVAL_COLUMNS = ("without_val_loss", "without_val_top1", "changed_predictions")


def to_csv(rows: list[dict[str, float]], columns: tuple[str, ...] = COLUMNS) -> str:
    """These columns of rows as the text of metrics.csv or clamping.csv, at full precision."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


class EpochLog(pl.Callback):
    """Makes the rows. They live in the checkpoint and the file is written anew from it: none is doubled or lost.

    clamping.csv holds, of about ten batches of each validation, the fraction of activations beyond the clamp and
    the largest one, before clamp, residual and ReLU; and with `recipe.removal_every_epoch` what the whole set gives
    without the clamp.

    images_per_second counts training alone; seconds are those of the epoch with its validation, over all interruptions.
    """

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[dict[str, float]] = []
        self._began = time.perf_counter()
        self._wall_before = 0.0
        self._training = self._epoch = 0.0  # seconds of this epoch before `_mark`
        self._mark = self._began
        # at a step, not yet logged: its number, learning rate, and (loss, first bad step)
        self._look: tuple[int, float, torch.Tensor, torch.cuda.Event | None] | None = None

    @property
    def wall_seconds(self) -> float:
        """Seconds spent on this run, over all interruptions."""
        return self._wall_before + time.perf_counter() - self._began

    @property
    def images_per_second(self) -> float:
        """Mean of training over epochs, without the first (which warms up) where there are others."""
        rates = [row["images_per_second"] for row in self.rows]
        rates = rates[1:] or rates
        return len(rates) / sum(1 / rate for rate in rates) if rates else 0.0

    def state_dict(self) -> dict[str, Any]:
        elapsed = time.perf_counter() - self._mark
        return {
            "rows": [dict(row) for row in self.rows],
            "wall_seconds": self.wall_seconds,
            "training_seconds": self._training if self._trained else self._training + elapsed,
            "epoch_seconds": self._epoch + elapsed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = [dict(row) for row in state["rows"]]
        self._wall_before = state["wall_seconds"]
        self._training, self._epoch = state["training_seconds"], state["epoch_seconds"]

    def on_train_start(self, trainer, module) -> None:
        self._mark = time.perf_counter()
        self._trained = False
        self._write(trainer)

    def on_train_epoch_start(self, trainer, module) -> None:
        self._mark = time.perf_counter()
        self._training = self._epoch = 0.0
        self._trained = False

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if self._look is not None and (bad_step := self._log_look(trainer)) >= 0:
            module.refuse("the loss", bad_step)
        if batch_idx + 1 == trainer.num_training_batches:
            module.train_sums.sum().item()  # waits for the device, so that the time is that of the work
            self._training += time.perf_counter() - self._mark
            self._trained = True
        elif (batch_idx + 1) % (trainer.log_every_n_steps * trainer.accumulate_grad_batches) == 0:
            loss = outputs["loss"] * trainer.accumulate_grad_batches  # as Lightning divides it
            figures = torch.stack([loss.double(), module.bad_step().double()])
            self._look = trainer.global_step, module.optimizers().param_groups[0]["lr"], *host_copy(figures)

    def on_exception(self, trainer, module, exception) -> None:
        if self._look is not None:
            self._log_look(trainer)

    def _log_look(self, trainer) -> int:
        """Logs a look; returns the first bad step, or -1. A step later the device has work while the host waits."""
        assert self._look is not None
        (step, lr, figures, ready), self._look = self._look, None
        if ready is not None:
            ready.synchronize()
        loss, bad_step = figures.tolist()
        if bad_step < 0:
            for logger in trainer.loggers:
                logger.log_metrics({"step_loss": loss, "step_lr": lr}, step=step)
        return int(bad_step)

    def on_train_epoch_end(self, trainer, module) -> None:
        loss, top1, _, images = module.reduced(module.train_sums)
        val_loss, val_top1, val_top5, val_images = module.reduced(module.val_sums)
        row = {
            "epoch": trainer.current_epoch + 1,
            "step": trainer.global_step,
            "lr": module.optimizers().param_groups[0]["lr"],
            "train_loss": loss / max(images, 1),
            "train_top1": top1 / max(images, 1),
            "val_loss": val_loss / max(val_images, 1),
            "val_top1": val_top1 / max(val_images, 1),
            "val_top5": val_top5 / max(val_images, 1),
            "images_per_second": images / self._training,
            "seconds": self._epoch + time.perf_counter() - self._mark,
            **module.clamping(),
        }
        self.rows.append(row)
        self._write(trainer)
        for logger in trainer.loggers:
            logger.log_metrics(row, step=trainer.global_step)

    def amend(self, trainer, figures: dict[str, float]) -> None:
        """Replaces figures of the last row."""
        self.rows[-1].update(figures)
        self._write(trainer)

    def _write(self, trainer) -> None:
        if trainer.is_global_zero:
            write_atomically(self.path, to_csv(self.rows))
            if clamped := [row for row in self.rows if "clamped_fraction" in row]:
                removal = REMOVAL_COLUMNS if any("without_val_top1" in row for row in clamped) else ()
                columns = CLAMPING_COLUMNS + removal
                write_atomically(self.path.with_name("clamping.csv"), to_csv(clamped, columns))
