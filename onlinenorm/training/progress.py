"""Progress of the whole run: a bar on a terminal, else a line an epoch and up to ten in between."""

import sys
import time

import pytorch_lightning as pl
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from onlinenorm.text import duration
from onlinenorm.training.epoch_log import EpochLog

FIRST_LINE_SECONDS = 10.0  # after the first step, which also compiles
LINE_EVERY_SECONDS = 30.0
LINES_AN_EPOCH = 10  # at most, where epochs are long


def epoch_line(row: dict[str, float], epochs: int, left: float) -> str:
    """A row of metrics.csv for people; `left` in seconds."""
    return (
        f"epoch {row['epoch']:.0f}/{epochs}  train loss {row['train_loss']:.3f}  top-1 {row['train_top1']:.1%}  "
        f"val loss {row['val_loss']:.3f}  top-1 {row['val_top1']:.1%}  "
        f"{row['images_per_second']:,.0f} images/s  {duration(left)} left"
    )


class RunProgress(pl.Callback):
    """Shows where the run is, the epoch's mean loss, images/s, and the time left for the epoch and for the run.

    The device is asked for the loss, and waited for, where a line is printed, and for the bar every `log_every_n_steps`
    steps. The rate is that since the device was asked before. The time left comes from what this process has done so
    far: steps times the mean of a step, the first left out, validations included.
    """

    def __init__(self, log: EpochLog):
        self.epoch_log = log
        self._bar: Progress | None = None
        self._done = 0  # batches of this process
        self._began = self._due = 0.0  # of the second batch; of the next line
        self._looked = (0, 0.0)  # batches and time when the device was asked
        self._seen = ""

    def on_train_start(self, trainer, module) -> None:
        if not trainer.is_global_zero:
            return
        self._done, self._began = 0, time.perf_counter()
        if sys.stdout.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[seen]}"),
            )
            self._bar = Progress(*columns)
            self._bar.start()
            total = trainer.max_epochs * trainer.num_training_batches
            self._task = self._bar.add_task("", total=total, seen="")

    def on_train_epoch_start(self, trainer, module) -> None:
        self._looked = self._done, time.perf_counter()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if not trainer.is_global_zero:
            return
        now = time.perf_counter()
        self._done += 1
        if self._done == 1:
            self._began, self._looked = now, (1, now)
            self._due = now + FIRST_LINE_SECONDS
            return
        if batch_idx + 1 == trainer.num_training_batches and self._bar is None:
            return  # the epoch's line follows
        if self._bar is not None:
            if self._done % trainer.log_every_n_steps == 0:
                self._look(trainer, module, batch_idx)
            where = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
            position = trainer.current_epoch * trainer.num_training_batches + batch_idx + 1
            self._bar.update(self._task, completed=position, description=where, seen=self._seen)
        elif now >= self._due:
            self._put_off(trainer, now)
            self._look(trainer, module, batch_idx)
            where = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs} step {batch_idx + 1:,}"
            print(f"{where}/{trainer.num_training_batches:,}  {self._seen}", flush=True)

    def on_train_epoch_end(self, trainer, module) -> None:
        if not trainer.is_global_zero:
            return
        self._put_off(trainer, time.perf_counter())
        left = self._a_batch() * (trainer.max_epochs - trainer.current_epoch - 1) * trainer.num_training_batches
        line = epoch_line(self.epoch_log.rows[-1], trainer.max_epochs, left)
        self._bar.console.print(line, highlight=False) if self._bar is not None else print(line, flush=True)

    def on_train_end(self, trainer, module) -> None:
        self._close()

    def on_exception(self, trainer, module, exception) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _put_off(self, trainer, now: float) -> None:
        self._due = now + max(LINE_EVERY_SECONDS, self._a_batch() * trainer.num_training_batches / LINES_AN_EPOCH)

    def _a_batch(self) -> float:
        """Mean seconds of a batch, with its share of validations."""
        return (time.perf_counter() - self._began) / max(self._done - 1, 1)

    def _look(self, trainer, module, batch_idx: int) -> None:
        loss, _, _, images = module.train_sums.tolist()  # waits for the device
        now = time.perf_counter()
        batches, since = self._looked
        self._looked = self._done, now
        rate = (self._done - batches) * module.recipe.batch_size / trainer.accumulate_grad_batches / (now - since)
        in_epoch = self._a_batch() * (trainer.num_training_batches - batch_idx - 1)
        later = self._a_batch() * (trainer.max_epochs - trainer.current_epoch - 1) * trainer.num_training_batches
        self._seen = (
            f"loss {loss / max(images, 1):.3f}  {rate:,.0f} images/s  "
            f"{duration(in_epoch)} left in the epoch, {duration(in_epoch + later)} in all"
        )
