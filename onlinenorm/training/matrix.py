"""A matrix of runs: where each stands, what it will still take, and how what is missing is run or submitted."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from onlinenorm.arguments import flatten
from onlinenorm.data.workers import STOP_SIGNALS
from onlinenorm.errors import ConfigError, FolderInUse, RunError
from onlinenorm.records import CONFIG, FAILURE_TEXT, lookup, read_failure, read_record, read_rows, run_path
from onlinenorm.text import duration
from onlinenorm.training.attempts import former_attempts
from onlinenorm.training.config_check import AUTO, AUTO_KEYS
from onlinenorm.training.opening import OF_GUARD
from onlinenorm.training.probe import probe_settings
from onlinenorm.training.run_folder import RunFolder

# exit codes of runs that have saved themselves, or had not begun
STOPPED = {code for number in STOP_SIGNALS for code in (128 + number, -number)}
UNDONE = ("failed", "stopped", "missing")
LINES_KEPT = 30
LOOK_SECONDS = 0.1  # between looks at what a run has printed
_DECODER = "data.decoder"


@dataclass(frozen=True)
class Row:
    """One run of the matrix.

    images: rows that are alike in it show the same files, and leave to "auto" what decodes them; "" for others.
    settings: key and value of all that its configuration sets and that has an effect.
    """

    overrides: tuple[str, ...]
    folder: Path
    normalizer: str
    epochs: int
    devices: int | str = 1
    images: str = ""
    settings: frozenset[tuple[str, Any]] = frozenset()

    @property
    def failure(self) -> Path:
        return self.folder / FAILURE_TEXT

    @property
    def job(self) -> Path:
        return self.folder / "job.txt"

    def state(self, queue: dict[str, str]) -> str:
        """done | running | queued | diverged | failed | stopped (unfinished, to be continued) | missing"""
        if (results := self.folder / "results.json").exists():
            read_record(results)
            return "done"
        if RunFolder(self.folder).is_locked():
            return "running"
        number = self.job.read_text().strip() if self.job.exists() else None
        if number in queue:
            return "running" if queue[number] == "RUNNING" else "queued"
        failure = read_failure(self.folder)
        if failure is not None or number is not None:
            return failure.kind if failure is not None else "failed"
        return "stopped" if any(self.folder.glob("checkpoints/*.ckpt")) else "missing"

    @property
    def decoder(self) -> str | None:
        """What decodes the images of the run that the folder holds, where "auto" chose it; None where none is there."""
        config = self.folder / CONFIG
        begun = self.images and config.exists() and self.state({}) in ("done", "running", "stopped")
        return lookup(read_record(config), _DECODER, AUTO_KEYS[_DECODER]) if begun else None

    def command(self, folder: Path, decoder: str | None = None) -> list[str]:
        """What train.py, or a batch script, is called with; `decoder` stands for "auto"."""
        fixed = [f"{_DECODER}={decoder}"] if decoder and self.images else []
        return [*self.overrides, *fixed, f"run_dir={folder}"]


def plan_row(
    overrides: Sequence[str], config: dict[str, Any], experiment: str, swept: Iterable[str], runs: Path
) -> Row:
    """The row of one run, its configuration checked; the folder is a function of the overrides alone.

    Args:
        overrides: of the run, as for train.py.
        config: what they compose to.
        experiment: name of its first folder.
        swept: keys besides experiment, normalizer and seed of which there are several values.
        runs: where the folders go.
    """
    probe_settings(config)
    last = {part.partition("=")[0].lstrip("+"): part for part in overrides}  # the last of a key counts
    values = sorted(last[key] for key in set(swept) & last.keys())
    between = [",".join(values).replace("/", "_")] if values else []
    names = config["choices"]
    folder = run_path({**config, "run_dir": None, "choices": {**names, "experiment": experiment}}, runs, between)
    # of the trainer only train.py knows what it resolves to, on the machine where it runs
    RunFolder(folder, rank_zero=False).check_config(config, ignored=("trainer",))
    data = config["data"]
    chosen = lookup(config, _DECODER) == AUTO and data.get("root") is not None
    images = json.dumps([experiment, data]) if chosen else ""
    devices = config["trainer"]["devices"]
    return Row(
        tuple(overrides), folder, names["normalizer"], config["recipe"]["epochs"], devices, images, _settings(config)
    )


def _settings(config: dict[str, Any]) -> frozenset[tuple[str, Any]]:
    """What of a configuration two runs that train alike have in common, by values: 5 is 5.0."""
    guard = lookup(config, "normalizer.error_compensation")
    idle = {f"normalizer.{key}" for key, needed in OF_GUARD.items() if guard is not None and guard != needed}
    return frozenset(
        (key, value if isinstance(value, (int, float)) and not isinstance(value, bool) else repr(value))
        for key, value in flatten(config).items()
        if key not in idle
    )


def decoder_of(row: Row, rows: Iterable[Row]) -> str | None:
    """What decodes the images of a row of `rows`, as it does those of the first run of them that has begun.

    What "auto" stands for depends on the machine, and a table takes one decoder. None where it is left to the run.
    """
    alike = [other for other in rows if other.images == row.images != ""]
    return row.decoder or next(filter(None, (other.decoder for other in alike)), None)


def decoder_notes(rows: Sequence[Row], todo: Sequence[Row], submitted: bool) -> list[str]:
    """Sentences on rows whose images more than one decoder decodes, or may where jobs begin on several machines."""
    notes = []
    for images in dict.fromkeys(row.images for row in rows if row.images):
        alike = [row for row in rows if row.images == images]
        by_decoder = {row.decoder: row.folder for row in reversed(alike) if row.decoder}
        if len(by_decoder) > 1:
            found = ", ".join(f"{decoder} ({folder})" for decoder, folder in sorted(by_decoder.items()))
            notes.append(f"{_DECODER}: {found} decode the same images: a table takes runs of one; delete the others")
        elif not by_decoder and submitted and sum(row.images == images for row in todo) > 1:
            notes.append(
                f"{_DECODER}: auto, by each job's machine, and a table takes runs of one decoder: where the machines "
                f"differ, give one, as {_DECODER}=pillow"
            )
    return notes


def check_folders(rows: Sequence[Row]) -> None:
    """Raises ConfigError where two rows have one folder, or one configuration under two names."""
    doubled = [folder for folder, count in Counter(row.folder for row in rows).items() if count > 1]
    if doubled:
        raise ConfigError(f"{doubled[0]}: two runs would share this folder; name each value once")
    first: dict[frozenset, Row] = {}
    for row in rows:
        if (other := first.setdefault(row.settings, row)) is not row:
            raise ConfigError(
                f"{other.folder} and {row.folder}: are two names of one run: their configurations are equal in all "
                "that has an effect; name each value once, and sweep a key with those normalizers alone that it changes"
            )


def queued_jobs(rows: Iterable[Row]) -> dict[str, str]:
    """Job number -> state of this user's SLURM jobs; {} where none of these rows waits for one, or without SLURM.

    Raises RunError where SLURM does not answer: a job in its queue would be taken for one that has failed.
    """
    waiting = [row for row in rows if row.job.exists() and not (row.folder / "results.json").exists()]
    if not waiting or shutil.which("squeue") is None:
        return {}
    answer = subprocess.run(["squeue", "--me", "-h", "-o", "%i|%T"], capture_output=True, text=True, check=False)
    if answer.returncode:
        raise RunError(
            f"squeue: exit code {answer.returncode} ({' '.join(answer.stderr.split())}); without it nobody knows "
            f"whether the job of {waiting[0].folder} still waits or has failed; try again when SLURM answers"
        )
    return dict(line.split("|") for line in answer.stdout.splitlines())


def seconds_left(rows: list[Row], states: list[str]) -> list[float | None]:
    """What each row will still take, from its own epochs, else from those of its normalizer, else of all rows.

    Nothing where it is done or has failed.
    """
    spent = [
        [epoch["seconds"] for epoch in read_rows(row.folder / "metrics.csv") if "seconds" in epoch] for row in rows
    ]

    def mean(choose) -> float | None:
        epochs = [
            seconds for row, epochs_done in zip(rows, spent, strict=True) if choose(row) for seconds in epochs_done
        ]
        return sum(epochs) / len(epochs) if epochs else None

    left: list[float | None] = []
    for row, epochs_done, state in zip(rows, spent, states, strict=True):
        each = (
            sum(epochs_done) / len(epochs_done)
            if epochs_done
            else mean(lambda other, row=row: other.normalizer == row.normalizer)
        )
        each = mean(lambda other: True) if each is None else each
        over = state in ("done", "diverged", "failed")
        left.append(0.0 if over else None if each is None else each * (row.epochs - len(epochs_done)))
    return left


def table(rows: list[Row]) -> tuple[list[str], list[str]]:
    """(states, lines for people)."""
    queue = queued_jobs(rows)
    states = [row.state(queue) for row in rows]
    left = seconds_left(rows, states)
    lines = [f"{'state':8} {'epoch':>9} {'left':>12}  folder"]
    for row, state, seconds in zip(rows, states, left, strict=True):
        epochs = f"{len(read_rows(row.folder / 'metrics.csv'))}/{row.epochs}"
        time = "-" if state in ("diverged", "failed") else "?" if seconds is None else duration(seconds)
        former = len(former_attempts(row.folder))
        again = f"  (after {former} failed attempt{'s' * (former > 1)})" if former else ""
        lines.append(f"{state:8} {epochs:>9} {time:>12}  {row.folder}{again}")
    counts = Counter(states)
    text = ", ".join(f"{counts[state]} {state}" for state in sorted(counts))
    known = [seconds for seconds in left if seconds is not None]
    more = "" if len(known) == len(left) else " and what is not known yet"
    lines.append(f"{text}; {duration(sum(known))} of computing left{more}")
    if counts["diverged"]:
        lines.append("Diverged runs would end alike again and are left alone; --retry starts them once more")
    return states, lines


class Sweep:
    """Takes rows, `parallel` at a time; a signal goes to the runs in hand and ends the sweep.

    Args:
        program: the command that trains, before its overrides.
        rows: of the whole matrix, also those that are not to be taken.
        parallel: runs at a time; with several the machine's GPUs serve in turn.
    """

    def __init__(self, program: Sequence[str], rows: Sequence[Row], parallel: int = 1):
        self.program, self.rows, self.parallel, self.signum = program, rows, parallel, 0
        self._runs: set[subprocess.Popen] = set()
        self._gpus = visible_gpus() if parallel > 1 else []
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self._stop)

    def take_all(self, rows: list[Row]) -> None:
        """Runs rows that nobody else has taken; one that fails keeps its last lines in failed.txt."""
        waiting = deque(rows)
        workers = [threading.Thread(target=self._work, args=(waiting, slot)) for slot in range(self.parallel)]
        for worker in workers:
            worker.start()
        for worker in workers:
            while worker.is_alive():
                worker.join(0.2)  # signals are handled here: the main thread must not block for long

    def _stop(self, signum: int, frame: Any) -> None:
        self.signum = signum
        for run in list(self._runs):
            self._pass_on(run)

    def _pass_on(self, run: subprocess.Popen) -> None:
        run.send_signal(self.signum)

    def _work(self, waiting: deque[Row], slot: int) -> None:
        while not self.signum:
            try:
                row = waiting.popleft()
            except IndexError:
                return
            try:
                if row.state({}) in (*UNDONE, "diverged"):  # another sweep may have come first
                    self._take(row, slot)
            except FolderInUse:  # it has, just now
                continue
            except RunError as error:
                print(error, file=sys.stderr)

    def _take(self, row: Row, slot: int) -> None:
        RunFolder(row.folder).keep_attempt()
        row.job.unlink(missing_ok=True)
        last: deque[str] = deque(maxlen=LINES_KEPT)
        mark = f"{row.folder}  " if self.parallel > 1 else "  "
        gpu = {"CUDA_VISIBLE_DEVICES": self._gpus[slot % len(self._gpus)]} if self._gpus else {}
        print(f"\n{row.folder}", flush=True)
        # a session of its own: a terminal's Ctrl-C reaches the run as a signal that it saves itself on; and its output
        # goes to a file, not to this process, which it outlives where this one is killed
        with open(row.folder / "output.log", "a+b") as log:
            shown = log.seek(0, os.SEEK_END)
            run = subprocess.Popen(
                [*self.program, *row.command(row.folder, decoder_of(row, self.rows))], env={**os.environ, **gpu},
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self._runs.add(run)
        if self.signum:
            self._pass_on(run)
        with run, open(row.folder / "output.log", "rb") as log:
            log.seek(shown)
            for line in _lines(run, log):
                print(f"{mark}{line}", end="", flush=True)
                last.append(line)
        self._runs.discard(run)
        if run.returncode and run.returncode not in (*STOPPED, FolderInUse.exit_code):
            row.failure.write_text(f"exit code {run.returncode}\n{''.join(last)}", encoding="utf-8")


def _lines(run: subprocess.Popen, log: BinaryIO) -> Iterator[str]:
    """The lines of a file that a process writes, as they come, until it has ended."""
    line, ended = b"", False
    while not ended:
        ended = run.poll() is not None  # before the last look
        while part := log.readline():
            line += part
            if line.endswith(b"\n"):
                yield line.decode(errors="replace")
                line = b""
        if not ended:
            time.sleep(LOOK_SECONDS)
    if line:
        yield line.decode(errors="replace")


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may be set to for one GPU each."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(k) for k in range(torch.cuda.device_count())] if named is None else [k for k in named.split(",") if k]


def submit(row: Row, script: Path, project: Path, decoder: str | None = None) -> None:
    """Hands a row to SLURM, to be run in the folder `project` by a batch script; `decoder` stands for "auto"."""
    folder = row.folder.resolve()
    try:
        RunFolder(row.folder).keep_attempt()
    except FolderInUse:  # somebody has begun it just now
        return
    options = ["--parsable", f"--job-name={row.folder}", f"--chdir={project}", f"--output={folder / 'output.log'}"]
    sbatch = ["sbatch", *options, str(script.resolve()), *row.command(folder, decoder)]
    answer = subprocess.run(sbatch, capture_output=True, text=True, check=False)
    if answer.returncode:
        row.failure.write_text(f"sbatch: exit code {answer.returncode}\n{answer.stderr}", encoding="utf-8")
        print(f"{row.folder}: {answer.stderr.strip()}", file=sys.stderr)
    else:
        row.job.write_text(answer.stdout.partition(";")[0].strip() + "\n")
