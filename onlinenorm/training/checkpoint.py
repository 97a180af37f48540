"""Checkpoint files: written atomically by a thread, verified, read without trusting them; and where a run resumes."""

import concurrent.futures
import contextlib
import os
import pickle
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
import yaml
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import CheckpointIO

from onlinenorm.errors import ArgumentError, ConfigError, RunError, UnreadableImageError
from onlinenorm.files import FULL
from onlinenorm.records import CONFIG, misfit
from onlinenorm.text import first_line
from onlinenorm.training.cuda_graph import copy_together
from onlinenorm.training.host_copy import host_copy
from onlinenorm.training.run_folder import changed_keys

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
# What a run continues from, see `records.misfit`; one of an older version or of another program may lack some of it.
SHAPE = {
    "position": {"epoch": int, "step": int, "global_step": int},
    "best_top1": (float, int),
    "state_dict": dict,
    "optimizer_states": [dict],
    "callbacks": dict,
    "schedule": dict,
    "train_sums": list,
    "local_statistics": {str: torch.Tensor},
    "exchange?": (dict, type(None)),
    "pytorch-lightning_version": str,
    "config": dict,
    "fingerprint": str,
}


def verify(path: Path) -> str:
    """What is wrong with a checkpoint file, or "" when every record of it matches its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile, and zlib below it, raise almost anything
        return f"{type(error).__name__}: {error}"
    return f"record {damaged} does not match its checksum" if damaged else ""


def write(state: dict[str, Any], path: Path) -> None:
    """Replaces `path` by a verified file with `state`; a whole last.ckpt that was there becomes previous.ckpt.

    At any moment, also of a power cut, last.ckpt or previous.ckpt is whole. Raises RunError when it cannot be written.
    """
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if problem := verify(partial):
            raise RuntimeError(f"what was written cannot be read back: {problem}")
        if path.name == LAST and path.exists() and not verify(path):
            os.replace(path, path.with_name(PREVIOUS))
        os.replace(partial, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        cause = next((each for each in (error, error.__context__) if isinstance(each, OSError)), error)
        said = first_line(cause)
        if said.startswith("[enforce fail"):  # torch's, without the system's word
            said = "the file system took a part of it only, as when there is No space left on device"
        full = not isinstance(cause, OSError) or cause.errno in FULL
        left = [name for name in (LAST, PREVIOUS) if (path.parent / name).is_file()]
        raise RunError(
            f"{path}: could not be saved ({said}). {'Free some space' if full else 'Mend that'} and run the same "
            f"command again: it {f'continues from {path.parent / left[0]}' if left else 'starts over'}"
        ) from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems do not know it for folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint on the CPU: tensors and plain values only.

    Raises RunError where it is damaged, holds anything else, or is no checkpoint.
    """
    if problem := verify(path):
        raise RunError(f"{path} is damaged or no checkpoint ({problem})")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))  # the rest of torch's message advises to load it regardless
        raise RunError(
            f"{path} holds more than tensors and plain values{f' ({name[1]})' if name else ''} and is refused: "
            "loading it could run code"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise RunError(f"{path} is no checkpoint ({first_line(error)})") from error


def resumable(
    folder: Path, config: dict[str, Any] | None = None, data: Any = None
) -> tuple[Path | None, dict[str, int] | None]:
    """(checkpoint to continue from, its position), or (None, None) where there is none; reports unusable ones.

    Raises RunError when there are checkpoints and none can be used: starting over is for the user to say; ConfigError
    when the one to continue from belongs to another configuration or to other images than those of the data module
    `data`, where these are given.
    """
    unusable = []
    for name in (LAST, PREVIOUS):
        path = folder / name
        if path.exists():
            try:
                content = read(path)
                if problem := misfit(content, SHAPE):
                    raise RunError(f"{path} was written by another program or version: {problem}")
            except RunError as error:
                unusable.append(str(error))
                continue
            _check_kinship(path, content, config, data)
            for line in unusable:
                print(f"{line}: continuing from {path}", file=sys.stderr)
            return path, content["position"]
    if unusable:
        raise RunError(
            "; ".join(unusable) + f". Nothing is left to continue from: delete {folder} to start over, "
            "or choose another run_dir"
        )
    return None, None


def _check_kinship(path: Path, content: dict[str, Any], config: dict[str, Any] | None, data: Any) -> None:
    if config is not None and (changes := changed_keys(content["config"], config)):
        raise ConfigError(
            f"run_dir: {path} is a checkpoint of another configuration:\n  "
            + "\n  ".join(changes)
            + "\nChoose another run_dir=, take the change back, or delete the folder to start over"
        )
    if data is None or content["fingerprint"] == data.fingerprint:
        return
    if data.replaced_since(content.get("files")) is None:
        raise ConfigError(
            f"data.root: holds other images than those that {path} was trained on; give back the former ones, or "
            "choose another run_dir= to start over"
        )


class VerifiedIO(CheckpointIO):
    """Lightning's door to `write`, which a thread calls, and `read`.

    A save returns once the state is copied. One to a path whose last save is still being written waits for that: no
    more than a copy a path is held. What goes wrong in the thread is raised by the next call.
    """

    def __init__(self) -> None:
        self._writer = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: dict[Path, concurrent.futures.Future] = {}

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        path = Path(path)
        if path in self._writing:
            self._writing.pop(path).result()
        self.check()
        state, ready = host_copy(checkpoint)

        def write_when_ready() -> None:
            if ready is not None:
                ready.synchronize()
            write(state, path)

        self._writing[path] = self._writer.submit(write_when_ready)

    def check(self) -> None:
        """Raises what went wrong in the thread; does not wait."""
        for path in [path for path, written in self._writing.items() if written.done()]:
            self._writing.pop(path).result()

    def teardown(self) -> None:
        """Waits until all is written, then raises what went wrong. May be called at any time."""
        writing, self._writing = self._writing, {}
        concurrent.futures.wait(writing.values())
        for written in writing.values():
            written.result()

    def load_checkpoint(self, path, map_location=None, weights_only=True) -> dict[str, Any]:
        return read(Path(path))

    def remove_checkpoint(self, path) -> None:
        Path(path).unlink(missing_ok=True)


class Checkpoints(Checkpoint):
    """Saves last.ckpt after each epoch, every so many steps and when asked to stop; best.ckpt at the best accuracy.

    A checkpoint holds where it was taken as (epoch, step): optimizer steps of epoch `epoch`, counted from 0.
    Lightning's own loop counters are derived from that on loading, so that accumulation and the number of processes
    may change.

    Where an error ends a run between two steps, or in a validation, as one of an image that cannot be read does, the
    last step is saved too; not of several processes, which are elsewhere by then.

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
        whole = trainer.world_size == 1 and not self._within and isinstance(exception, Exception)
        try:
            # what is being written is finished; an error there does not hide this one
            trainer.strategy.checkpoint_io.teardown()
            if whole and not isinstance(exception, RunError) and self._reached not in (None, self._position):
                if self._parts:
                    copy_together(_changed_by_parts(module), self._before)
                self.save(trainer, *self._reached)
                trainer.strategy.checkpoint_io.teardown()
                print(self.stop.saved_at(*self._reached), file=sys.stderr)
        except Exception as error:
            print(error, file=sys.stderr)

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
