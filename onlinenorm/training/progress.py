"""Progress of the whole run: a bar on a terminal, else a line an epoch and one every half minute in between."""

import sys
import time

import pytorch_lightning as pl
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from onlinenorm.text import duration
from onlinenorm.training.epoch_log import EpochLog

LINE_EVERY_SECONDS = 30.0


def epoch_line(row: dict[str, float], epochs: int, left: float) -> str:
    """A row of metrics.csv for people; `left` in seconds."""
    return (
        f"epoch {row['epoch']:.0f}/{epochs}  train loss {row['train_loss']:.3f}  top-1 {row['train_top1']:.1%}  "
        f"val loss {row['val_loss']:.3f}  top-1 {row['val_top1']:.1%}  "
        f"{row['images_per_second']:,.0f} images/s  {duration(left)} left"
    )


class RunProgress(pl.Callback):
    """Shows where the run is, its rate in images/s and the time left for all epochs with their validations.

    The time left comes from what this process has done so far: steps times the mean of a step, validations included.
    """

    def __init__(self, log: EpochLog):
        self.epoch_log = log
        self._bar: Progress | None = None
        self._done = 0
        self._began = self._spoke = 0.0

    def on_train_start(self, trainer, module) -> None:
        if not trainer.is_global_zero:
            return
        self._began = self._spoke = time.perf_counter()
        self._done = 0
        if sys.stdout.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[rate]}"),
            )
            self._bar = Progress(*columns)
            self._bar.start()
            total = trainer.max_epochs * trainer.num_training_batches
            self._task = self._bar.add_task("", total=total, rate="")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if not trainer.is_global_zero:
            return
        self._done += 1
        now = time.perf_counter()
        if self._bar is not None:
            position = trainer.current_epoch * trainer.num_training_batches + batch_idx + 1
            where = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
            self._bar.update(self._task, completed=position, description=where, rate=self._rate(trainer, batch_idx))
        elif now - self._spoke >= LINE_EVERY_SECONDS:
            self._spoke = now
            where = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs} step {batch_idx + 1}"
            print(f"{where}/{trainer.num_training_batches}  {self._rate(trainer, batch_idx)}", flush=True)

    def on_train_epoch_end(self, trainer, module) -> None:
        if not trainer.is_global_zero:
            return
        self._spoke = time.perf_counter()
        line = epoch_line(
            self.epoch_log.rows[-1], trainer.max_epochs, self._left(trainer, trainer.num_training_batches - 1)
        )
        self._bar.console.print(line, highlight=False) if self._bar is not None else print(line, flush=True)

    def on_train_end(self, trainer, module) -> None:
        self._close()

    def on_exception(self, trainer, module, exception) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _left(self, trainer, batch_idx: int) -> float:
        position = trainer.current_epoch * trainer.num_training_batches + batch_idx + 1
        remaining = trainer.max_epochs * trainer.num_training_batches - position
        return (time.perf_counter() - self._began) / max(self._done, 1) * remaining

    def _rate(self, trainer, batch_idx: int) -> str:
        batch_images = trainer.lightning_module.recipe.batch_size / trainer.accumulate_grad_batches
        rate = self._done * batch_images / (time.perf_counter() - self._began)
        return f"{rate:,.0f} images/s  {duration(self._left(trainer, batch_idx))} left"
