"""Checkpoint files: written atomically by a thread, verified, read without trusting them; and which a run resumes."""

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
from pytorch_lightning.plugins.io import CheckpointIO

from onlinenorm.errors import ConfigError, RunError
from onlinenorm.files import FULL
from onlinenorm.records import misfit
from onlinenorm.text import first_line
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
