"""The run folder: who may write to it, whether it is this run's, and the records at its top."""

import contextlib
import errno
import fcntl
import json
import os
import platform
import stat
import struct
import traceback
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from onlinenorm.arguments import flatten
from onlinenorm.errors import ConfigError, FolderInUse, Interrupted, RunError
from onlinenorm.files import locked, write_atomically
from onlinenorm.provenance import environment
from onlinenorm.records import CONFIG, ENVIRONMENT, FAILURE, FAILURE_TEXT, Failure, read_record, with_added_keys
from onlinenorm.training.attempts import former_attempts, keep_attempt, keep_epochs
from onlinenorm.training.config_check import AUTO, AUTO_KEYS
from onlinenorm.training.divisions import KEYS as DIVIDING
from onlinenorm.training.divisions import changed_divisions, statistics_seen
from onlinenorm.training.own_code import changed_code, own_code, own_files

# Keys that may differ from one start of a run to the next: they change how it is computed, not what. Those of DIVIDING
# may only where the statistics of the run's normalizer do not depend on how a batch is divided.
MAY_CHANGE = (
    "choices.trainer",
    "choices.logger",
    "data.on_device",
    "data.keep_decoded",
    "data.num_workers",
    "data.on_unreadable",
    "data.root",
    "data.unreadable_limit",
    "logger",
    "normalizer._colour_",
    "normalizer._label_",
    "normalizer.exchange",
    "run_dir",
    "trainer.accumulate_grad_batches",
    "trainer.checkpoint_every_n_steps",
    "trainer.devices",
    "trainer.log_every_n_steps",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.sync_batchnorm",
)


def changed_keys(old: dict[str, Any], new: dict[str, Any], ignored: tuple[str, ...] = ()) -> list[str]:
    """A line "key: old -> new" for each key that differs and may not.

    Keys below those in `ignored` are not compared, but for how batches are divided where the normalizer depends on it;
    nor is what `new` leaves to the run by "auto" (`AUTO_KEYS`).
    """
    before, after = flatten(with_added_keys(old)), flatten(with_added_keys(new))
    divided = DIVIDING if changed_divisions(old, new) else ()
    free = tuple(f"{key}." for key in (*MAY_CHANGE, *ignored) if key not in divided)
    lines = []
    left = {key for key in AUTO_KEYS if after.get(key) == AUTO}
    for key in sorted((before | after).keys() - left):
        if before.get(key) != after.get(key) and (key in divided or not f"{key}.".startswith(free)):
            why = " (it divides the images that a statistic of this normalizer sees)" if key in divided else ""
            lines.append(f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}{why}")
    return lines


class RunFolder:
    """A run's folder, locked by one run at a time (`with folder.lock():`).

    Args:
        path: of the folder; made when it is locked.
        rank_zero: whether this process keeps the records; the others of a run only read.
    """

    def __init__(self, path: Path, rank_zero: bool = True):
        self.path, self.rank_zero = path, rank_zero
        self.checkpoints = path / "checkpoints"

    @contextlib.contextmanager
    def lock(self):
        """Context in which no other run may write here; raises FolderInUse where one does already.

        An error that ends it is left in failed.json and, for people, failed.txt; when the run is started again that
        attempt is kept (`attempts`). A run that was interrupted, or killed, has not failed.
        """
        if not self.rank_zero:
            yield
            return
        with self._locked():
            keep_attempt(self.path)
            former_attempts(self.path)  # read at the end of the run: what is damaged raises before it
            try:
                yield
            except Exception as error:
                if not isinstance(error, Interrupted):
                    with contextlib.suppress(RunError):  # on a full disk
                        write_atomically(self.path / FAILURE, json.dumps(asdict(Failure.of(error))) + "\n")
                        write_atomically(self.path / FAILURE_TEXT, "".join(traceback.format_exception_only(error)))
                raise

    def keep_attempt(self) -> None:
        """What `lock` does first, for those who start the run in a process of its own: see `attempts.keep_attempt`."""
        with self._locked():
            keep_attempt(self.path)

    @contextlib.contextmanager
    def _locked(self):
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"run_dir: {self.path} cannot be made ({error.strerror}); choose another run_dir=") from None
        in_use = FolderInUse(
            f"{self.path}: another run is writing to this folder. Wait for it or stop it, or choose another run_dir"
        )
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(self.path / ".lock", in_use))
            except OSError as error:
                raise RunError(
                    f"run_dir: {self.path} cannot be written to ({error.strerror}); choose another run_dir="
                ) from None
            yield

    def is_locked(self) -> bool:
        """Whether a run is known to be writing here now.

        The lock is not taken: a run that starts just then would fail. Where the file system has no locks, or the folder
        may not be read, nothing is known.
        """
        try:
            with open(self.path / ".lock", "rb") as lock:  # may be somebody else's
                question = struct.pack("hhqqi0q", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # struct flock
                return struct.unpack("hhqqi0q", fcntl.fcntl(lock, fcntl.F_GETLK, question))[0] != fcntl.F_UNLCK
        except OSError:
            return False

    def results(self, config: dict[str, Any]) -> dict[str, Any] | None:
        """results.json of a finished run, or None; ConfigError where the folder is of another configuration."""
        self.check_config(config)
        path = self.path / "results.json"
        if not path.exists():
            return None
        return read_record(path)

    def check_config(self, config: dict[str, Any], ignored: tuple[str, ...] = ()) -> None:
        """Raises ConfigError, naming keys or files, where the folder holds progress of a run of other settings or code.

        The parts of the configuration in `ignored` are not compared, see `changed_keys`; of code, the user's own is.
        """
        for folder in (self.path, self.checkpoints):
            _check_folder(folder)
        record = self.recorded_config()
        if record is None:
            return
        if changes := changed_keys(record, config, ignored):
            raise ConfigError(
                f"run_dir: {self.path} holds a run with another configuration:\n  "
                + "\n  ".join(changes)
                + "\nChoose another run_dir=, take the change back, or delete the folder to start over"
            )
        recorded = self._environment().get("own_code")
        if recorded is not None and (changes := changed_code(recorded, config)):
            raise ConfigError(
                f"run_dir: {self.path} holds a run of other code:\n  "
                + "\n  ".join(changes)
                + "\nChoose another run_dir=, take the change back, or delete the folder to start over"
            )

    def recorded_config(self) -> dict[str, Any] | None:
        """The configuration of the run whose progress or results lie here; None where there are none."""
        progress = [self.path / "results.json", *self.checkpoints.glob("*.ckpt")]
        return read_record(self.path / CONFIG) if any(file.exists() for file in progress) else None

    def _environment(self) -> dict[str, Any]:
        path = self.path / ENVIRONMENT
        return read_record(path) if path.exists() else {}

    def record_start(self, config: dict[str, Any], world_size: int, resumed_from: dict[str, int] | None) -> int:
        """Writes config.yaml and environment.json for this start; returns how often the run has been resumed."""
        if self.rank_zero and resumed_from is None:
            keep_epochs(self.path)  # their checkpoints are gone, or they would be continued
        starts = self._environment().get("starts", []) if resumed_from else []
        code = {"own_code": own_code(config)}
        files = [file for group in own_files(config).values() for file in group.values()]
        now = environment(world_size, files) | code | {"statistics": statistics_seen(config)}
        time = datetime.now(UTC).isoformat(timespec="seconds")
        starts.append({"time": time, "host": platform.node(), "world_size": world_size, "resumed_from": resumed_from})
        if self.rank_zero:
            write_atomically(self.path / CONFIG, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
            write_atomically(self.path / ENVIRONMENT, json.dumps({**now, "starts": starts}, indent=2) + "\n")
        return sum(start["resumed_from"] is not None for start in starts)


def _check_folder(path: Path) -> None:
    """Raises ConfigError where neither a folder is nor can be made."""
    problem = ""
    try:
        if not stat.S_ISDIR(path.stat().st_mode):
            problem = "is a file, not a folder"
    except OSError as error:
        if os.path.islink(path):
            problem = f"is a link to {os.readlink(path)}, which does not exist"
        elif error.errno not in (errno.ENOENT, errno.ENOTDIR):
            problem = f"cannot be used ({error.strerror})"
    if problem:
        raise ConfigError(f"run_dir: {path} {problem}; choose another run_dir=")
