"""When a run saves a checkpoint, what stands in it, and how training goes on from there."""

import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from pytorch_lightning.callbacks import Checkpoint

from onlinenorm.errors import ArgumentError, RunError, UnreadableImageError
from onlinenorm.records import CONFIG
from onlinenorm.training.checkpoint import BEST, LAST, PREVIOUS
from onlinenorm.training.cuda_graph import copy_together


class Checkpoints(Checkpoint):
    """Saves last.ckpt after each epoch, every so many steps and when asked to stop; best.ckpt at the best accuracy.

    A checkpoint holds where it was taken as (epoch, step): optimizer steps of epoch `epoch`, counted from 0.
    Lightning's own loop counters are derived from that on loading, so that accumulation and the number of processes
    may change.

    Where an error ends a run between two steps, or in a validation, as one of an image that cannot be read does, the
    last step is saved too; of several processes only where all have the error, as the others are elsewhere by then.

    Args:
        folder: of the checkpoint files.
        every_n_steps: optimizer steps between saves within an epoch, with one before its validation; None for none.
        stop: the signals that ask to save and end (`interruption.StopSignals`).
    """

    def __init__(self, folder: Path, every_n_steps: int | None, stop):
        if every_n_steps is not None and every_n_steps < 1:
            raise ArgumentError("checkpoint_every_n_steps", f"{every_n_steps!r} must be at least 1, or null for none")
        self.folder, self.every_n_steps, self.stop = folder, every_n_steps, stop
        self.best_top1 = -1.0
        self._position: tuple[int, int] | None = None  # of the last save
        self._reached: tuple[int, int] | None = None  # by the last step
        self._within = False  # a batch, or what follows a validation: the network is not as a step has left it
        self._parts = False  # some parts of a step are done
        self._before: list[torch.Tensor] = []  # what they have changed, as it was
        self._resumed_step = 0
        self._config: dict[str, Any] = {}

    def setup(self, trainer, module, stage) -> None:
        if stage == "fit":
            # Lightning asks rank 0 for its SIGTERM before each step and waits for the device; ours is agreed on below.
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def on_fit_start(self, trainer, module) -> None:
        step = torch.tensor(self._resumed_step, device=trainer.strategy.root_device)
        low, high = (int(trainer.strategy.reduce(step.clone(), reduce_op=op)) for op in ("min", "max"))
        if low != high:
            raise RunError(
                f"{self.folder}: the processes have found different checkpoints there (steps {low} to {high}); "
                "the run folder must lie on a file system that all machines share"
            )
        if trainer.is_global_zero:  # which writes it
            self._config = yaml.safe_load((self.folder.parent / CONFIG).read_text(encoding="utf-8"))

    def on_train_start(self, trainer, module) -> None:
        self.stop.defer()

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self._within = True
        parts = trainer.accumulate_grad_batches
        if parts > 1 and batch_idx % parts == 0 and trainer.world_size == 1:
            self._before = self._before or [torch.empty_like(tensor) for tensor in _changed_by_parts(module)]
            copy_together(self._before, _changed_by_parts(module))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        trainer.strategy.checkpoint_io.check()
        self._parts = (batch_idx + 1) % trainer.accumulate_grad_batches > 0
        self._within = False
        if self._parts:
            return
        step = (batch_idx + 1) // trainer.accumulate_grad_batches
        self._reached = trainer.current_epoch, step
        epoch_done = batch_idx + 1 == trainer.num_training_batches
        stopping = self.stop.stop_requested(trainer)
        due = self.every_n_steps is not None and (trainer.global_step % self.every_n_steps == 0 or epoch_done)
        if stopping or due:
            self.save(trainer, trainer.current_epoch, step)
        if stopping:
            self._leave(trainer, trainer.current_epoch, step)

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        # A validation need not be finished before leaving: it is done again. All processes have as many batches.
        if self.stop.stop_requested(trainer):
            epoch, step = trainer.current_epoch, 0
            if trainer.state.fn == "fit":
                step = trainer.num_training_batches // trainer.accumulate_grad_batches
                self.save(trainer, epoch, step)
            self._leave(trainer, epoch, step)

    def on_validation_end(self, trainer, module) -> None:
        self._within = True

    def on_train_epoch_end(self, trainer, module) -> None:
        loss, top1, _, images = module.reduced(module.val_sums)
        top1 = top1 / max(images, 1.0)
        module.assert_finite()
        module.assert_finite_validation(loss)
        if top1 > self.best_top1:
            self.best_top1 = top1
            if trainer.is_global_zero:
                best = {"epoch": trainer.current_epoch + 1, "val_top1": top1, "network": module.network.state_dict()}
                trainer.strategy.checkpoint_io.save_checkpoint(best, self.folder / BEST)
        self.save(trainer, trainer.current_epoch + 1, 0)
        if self.stop.stop_requested(trainer):
            self._leave(trainer, trainer.current_epoch + 1, 0)

    def on_exception(self, trainer, module, exception) -> None:
        together = getattr(exception, "on_all_processes", False)
        whole = (trainer.world_size == 1 or together) and not self._within and isinstance(exception, Exception)
        try:
            # what is being written is finished; an error there does not hide this one
            trainer.strategy.checkpoint_io.teardown()
            if whole and not isinstance(exception, RunError) and self._reached not in (None, self._position):
                if self._parts:
                    copy_together(_changed_by_parts(module), self._before)
                self.save(trainer, *self._reached)
                trainer.strategy.checkpoint_io.teardown()
                if trainer.is_global_zero:
                    print(self.stop.saved_at(*self._reached), file=sys.stderr)
        except Exception as error:
            print(error, file=sys.stderr)
        if together:
            trainer.strategy.barrier()  # a process that has ended would end the one that still writes

    def _leave(self, trainer, epoch: int, step: int) -> None:
        trainer.strategy.checkpoint_io.teardown()  # what is said to be saved is
        trainer.strategy.barrier()
        self.stop.raise_interrupted(epoch, step)

    def save(self, trainer, epoch: int, step: int) -> None:
        """Saves last.ckpt, unless the weights or the loss have stopped being finite; a thread writes it."""
        trainer.lightning_module.assert_finite()
        self._position = (epoch, step)
        try:
            trainer.datamodule.agree_on_unreadable()
        except UnreadableImageError:  # on every process: more are allowed in a run that goes on
            trainer.save_checkpoint(self.folder / LAST, weights_only=False)
            raise
        trainer.save_checkpoint(self.folder / LAST, weights_only=False)

    def on_save_checkpoint(self, trainer, module, checkpoint: dict) -> None:
        assert self._position is not None  # set by save()
        epoch, step = self._position
        del checkpoint["loops"]
        checkpoint["position"] = {"epoch": epoch, "step": step, "global_step": trainer.global_step}
        checkpoint["best_top1"] = self.best_top1
        checkpoint["config"] = self._config
        checkpoint["fingerprint"] = trainer.datamodule.fingerprint
        if files := trainer.datamodule.files():
            checkpoint["files"] = files

    def on_load_checkpoint(self, trainer, module, checkpoint: dict) -> None:
        self.best_top1 = checkpoint["best_top1"]
        position = checkpoint["position"]
        self._resumed_step = position["global_step"]
        trainer.datamodule.resume(position["epoch"], position["step"])
        trainer.datamodule.note_replaced(checkpoint.get("files"))
        steps = trainer.datamodule.train_images // module.recipe.batch_size
        epoch, step = position["epoch"], position["step"]
        possible = 0 <= epoch <= module.recipe.epochs and 0 <= step <= steps
        if not possible or epoch * steps + step != self._resumed_step:
            raise RunError(
                f"{trainer.ckpt_path}: step {step} of {steps} in epoch {epoch} cannot be step {self._resumed_step} of "
                f"all; delete it to continue from {PREVIOUS}, or {self.folder} to start over"
            )
        checkpoint["loops"] = {
            "fit_loop": loop_state(
                trainer.fit_loop.state_dict(), trainer.accumulate_grad_batches, steps=steps, **position
            )
        }


def _changed_by_parts(module: Any) -> list[torch.Tensor]:
    """What the parts of an accumulated step change before it: of what a checkpoint holds, in place."""
    return [*module.buffers(), module.train_sums]


def loop_state(fresh: dict[str, Any], accumulate: int, steps: int, epoch: int, step: int, global_step: int) -> dict:
    """`fresh` (the state of Lightning's fit loop before training) moved to `step` of `steps` in epoch `epoch`.

    step 0: between epochs. 0 < step < steps: within. step = steps: trained, to be validated.
    """

    def counts(tracker: dict, **values: int) -> dict:
        return {key: values.get(key, values["all"]) for key in tracker}

    state = dict(fresh)
    begun = epoch + (step > 0)
    for part in ("total", "current"):
        state["epoch_progress"][part] = counts(state["epoch_progress"][part], all=epoch, ready=begun, started=begun)
    batches = state["epoch_loop.batch_progress"]
    batches["total"] = counts(batches["total"], all=global_step * accumulate)
    batches["current"] = counts(batches["current"], all=step * accumulate)
    batches["is_last_batch"] = False
    optimizer = state["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    for progress in (optimizer["step"], optimizer["zero_grad"]):
        progress["total"] = counts(progress["total"], all=global_step)
        progress["current"] = counts(progress["current"], all=step)
    state["epoch_loop.state_dict"] = {"_batches_that_stepped": global_step}
    if step == steps:
        # what Lightning takes for a validation that was begun and not finished
        total = state["epoch_loop.val_loop.batch_progress"]["total"]
        state["epoch_loop.val_loop.batch_progress"]["total"] = counts(total, all=0, ready=1, started=1)
    return state
