"""Reads run folders (config.yaml, metrics.csv, results.json, ...) into `Run` and checks what they say."""

import csv
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onlinenorm.errors import ReportError
from onlinenorm.records import Failure, lookup, read_failure, read_record
from onlinenorm.report.checks import check_agreement, check_predictions

REQUIRED_COLUMNS = ("epoch", "train_loss", "train_top1", "val_loss", "val_top1")
CLAMPING_COLUMNS = ("epoch", "step", "clamped_fraction", "max_abs_activation")
_NOT_RUN_FOLDERS = {"attempts", "checkpoints", "wandb", "tensorboard", "lightning_logs", "node_modules"}


@dataclass(frozen=True)
class Attempt:
    """An attempt at a run that was not the last one, and what it came to."""

    status: str

    @property
    def diverged(self) -> bool:
        return self.status.startswith("diverged")


@dataclass(frozen=True)
class Run:
    """One training run as its folder tells it; `results` is None until the run is done.

    `metrics` maps a column of metrics.csv to float64 values, one an epoch (counted from 1), NaN where a field is empty;
    `clamping` the same of clamping.csv, {} for a run without clamps. `failure` is what ended it, if anything.
    `attempts` are those before this one, the first first.
    """

    folder: Path
    name: str
    normalizer: str
    seed: int
    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: dict[str, np.ndarray]
    results: dict[str, Any] | None
    clamping: dict[str, np.ndarray] = field(default_factory=dict)
    failure: Failure | None = None
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return self.results is not None

    @property
    def epochs_done(self) -> int:
        return _epochs_done(self.metrics)

    @property
    def epochs_planned(self) -> int | None:
        """Epochs the configuration asks for, or None when it does not say."""
        if self.results:
            return self.results["epochs"]
        epochs = lookup(self.config, "recipe.epochs")
        return epochs if isinstance(epochs, int) else None

    @property
    def status(self) -> str:
        """ "finished", "diverged: step s, epoch e of E", "failed: epoch e of E", or "running: epoch e of E".

        Diverged are runs that a NaN or infinity ended, as failed.json or the last line of metrics.csv says; an
        interrupted run cannot be told from a running one.
        """
        if self.finished:
            return "finished"
        return _status(self.failure, self.metrics, self.epochs_planned, "running")

    @property
    def diverged(self) -> bool:
        return self.status.startswith("diverged")

    @property
    def divided(self) -> dict[str, int]:
        """How batches are divided, as far as the normalizer's statistics see it: parts by processes and accumulation.

        As the run recorded it. Of runs from before that, BatchNorm's statistics see both divisions (with
        `sync_batchnorm` only the latter), and local statistics the former.
        """
        if isinstance(recorded := self.environment.get("statistics"), dict):
            return {key: recorded.get(key, 1) for key in ("processes", "accumulation")} if recorded else {}
        trainer = self.config.get("trainer") or {}
        processes = self.environment.get("world_size", trainer.get("devices", 1))
        if "BatchNorm" in str(lookup(self.config, "normalizer._target_", "")):
            processes = 1 if trainer.get("sync_batchnorm") else processes
            return {"processes": processes, "accumulation": trainer.get("accumulate_grad_batches", 1)}
        local = lookup(self.config, "normalizer.statistics") == "local"
        return {"processes": processes, "accumulation": 1} if local else {}

    def value(self, metric: str) -> float:
        """A figure of a finished run: "best_loss", "best_top1", "last_loss" or "last_top1" (nats; fractions)."""
        assert self.results is not None, "only finished runs have figures"
        part, kind = metric.split("_")
        entry = self.results["last" if part == "last" else metric]
        return float(entry[f"val_{kind}"])


def milestones(run: Run) -> list[int]:
    """Epochs after which the learning rate drops."""
    step = lookup(run.config, "recipe.schedule", "step") == "step"
    return list(lookup(run.config, "recipe.milestones", None) or []) if step else []


def load_runs(root: str | Path, read_yaml: Callable[[Path], Any], without: Sequence[str] = ()) -> list[Run]:
    """All runs in or below `root`, sorted by folder, but for those named in `without`, or in folders named there.

    `read_yaml` turns a YAML file into plain Python values. Raises ReportError when `root` holds no run or a file of one
    is damaged.
    """
    root = Path(root)
    if not root.is_dir():
        raise ReportError(f"{root}: no such folder. Name the folder that holds runs, e.g. runs/quickstart")
    folders = list(find_run_folders(root))
    for name in without:
        if not any(folder.is_relative_to(root / name) for folder in folders):
            raise ReportError(f"--without {name}: there is no such run below {root}")
    left = [folder for folder in folders if not any(folder.is_relative_to(root / name) for name in without)]
    runs = [load_run(folder, read_yaml, name=_name(folder, root)) for folder in left]
    if not runs:
        raise ReportError(
            f"{root}: holds no run. A run is a folder <normalizer>/seed<k>/ with config.yaml and metrics.csv; "
            "scripts/quickstart.sh or `python train.py experiment=table1` make some"
        )
    return runs


def find_run_folders(root: Path) -> Iterator[Path]:
    """Folders in or below `root` that hold a run's files, in a fixed order; does not look inside a run."""
    for folder, children, files in os.walk(root):
        present = set(files)
        if present & {"metrics.csv", "results.json"} or {"config.yaml", "environment.json"} <= present:
            children.clear()
            yield Path(folder)
        children[:] = sorted(c for c in children if not c.startswith(".") and c not in _NOT_RUN_FOLDERS)


def load_run(folder: Path, read_yaml: Callable[[Path], Any], name: str | None = None) -> Run:
    """The run in `folder`; raises ReportError naming the file that is missing or damaged."""
    config = _read_config(folder / "config.yaml", read_yaml)
    environment = _read_environment(folder)
    results = None
    if (folder / "results.json").exists():
        results = read_record(folder / "results.json", ReportError)
    metrics = read_metrics(folder / "metrics.csv") if (folder / "metrics.csv").exists() or results else {}
    if results:
        check_agreement(results, metrics, folder)
        check_predictions(results, folder)
    seed_in_name = re.fullmatch(r"seed(\d+)", folder.name)
    seed = results["seed"] if results else config.get("seed", seed_in_name and int(seed_in_name[1]))
    if not isinstance(seed, int):
        raise ReportError(f"{folder / 'config.yaml'}: key seed is missing")
    normalizer = (
        results["normalizer"] if results else lookup(config, "choices.normalizer", folder.resolve().parent.name)
    )
    clamping = folder / "clamping.csv"
    planned = results["epochs"] if results else lookup(config, "recipe.epochs")
    return Run(
        folder, name or folder.name, normalizer, seed, config, environment, metrics, results,
        clamping=read_metrics(clamping, CLAMPING_COLUMNS) if clamping.exists() else {},
        failure=read_failure(folder, ReportError),
        attempts=_read_attempts(folder, environment, (results or {}).get("attempts", []), planned),
    )  # fmt: skip


def _read_attempts(
    folder: Path, environment: dict[str, Any], recorded: list[dict[str, Any]], planned: Any
) -> list[Attempt]:
    """The attempts before the present one: those in attempts/, and of those in results.json what is no longer there.

    One that failed and was continued from a checkpoint, as `starts` of environment.json tells, is no other attempt
    unless it diverged.
    """
    found, seen, starts = [], set(), environment.get("starts", [])
    kept = [path for path in folder.glob("attempts/*") if re.fullmatch(r"[0-9]+", path.name, re.ASCII)]
    for path in sorted(kept, key=lambda path: int(path.name)):
        seen.add(f"attempts/{path.name}")
        metrics = read_metrics(path / "metrics.csv") if (path / "metrics.csv").exists() else {}
        begun = _read_environment(path).get("starts", [])
        attempt = Attempt(_status(read_failure(path, ReportError), metrics, planned, "stopped"))
        continued = begun and len(begun) < len(starts) and starts[: len(begun)] == begun
        if attempt.diverged or not continued:
            found.append(attempt)
    for entry in recorded:
        if entry.get("folder") not in seen:
            failure = _recorded_failure(entry)
            status = _status(failure, {"epoch": np.array([entry.get("epochs", 0)])}, planned, "stopped")
            found.append(Attempt(f"{status}; its data no longer exist"))
    return found


def _recorded_failure(entry: dict[str, Any]) -> Failure | None:
    """What ended an attempt of results.json, which before `kind` told it in words alone."""
    if entry.get("kind") in ("diverged", "failed"):
        return Failure(entry["kind"], entry.get("step"), entry.get("epoch"))
    return Failure.from_text(entry["failure"]) if entry.get("failure") else None


def _status(failure: Failure | None, metrics: dict[str, np.ndarray], planned: Any, unfinished: str) -> str:
    """What a run that is not done came to; `unfinished` is the word for one that nothing has ended."""
    planned, done = planned or "unknown", _epochs_done(metrics)
    if failure is not None and failure.kind == "diverged" and failure.step is not None:
        return f"diverged: step {failure.step}, epoch {failure.epoch or done + 1} of {planned}"
    losses = [metrics[key][-1] for key in ("train_loss", "val_loss") if done and key in metrics]
    word = "failed" if failure is not None else unfinished
    word = "diverged" if any(math.isinf(x) or math.isnan(x) for x in losses) else word
    return f"{word}: epoch {done} of {planned}"


def _epochs_done(metrics: dict[str, np.ndarray]) -> int:
    epochs = metrics.get("epoch", np.empty(0))
    return int(epochs[-1]) if epochs.size else 0


def read_metrics(path: Path, required: tuple[str, ...] = REQUIRED_COLUMNS) -> dict[str, np.ndarray]:
    """Columns of a metrics.csv (or another file with a line an epoch) as float64 arrays; empty fields are NaN."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
    except FileNotFoundError:
        raise ReportError(f"{path}: missing, although the run is marked as done by its results.json") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ReportError(f"{path}: cannot be read: {error}") from error
    if not rows:
        return {}
    header, body = rows[0], rows[1:]
    if missing := [column for column in required if column not in header]:
        raise ReportError(f"{path}: column {', '.join(missing)} is missing from its first line")
    table = np.empty((len(body), len(header)))
    for index, fields in enumerate(body):
        line = f"{path}, line {index + 2}"
        if len(fields) != len(header):
            raise ReportError(f"{line}: {len(fields)} fields where the first line names {len(header)}; cut off?")
        try:
            table[index] = [float(field) if field.strip() else math.nan for field in fields]
        except ValueError as error:
            raise ReportError(f"{line}: {error}") from None
    metrics = {column: table[:, i] for i, column in enumerate(header)}
    epochs = metrics["epoch"]
    whole = np.isfinite(epochs).all() and (epochs == np.floor(epochs)).all() and (epochs >= 1).all()
    if not whole or (np.diff(epochs) <= 0).any():
        raise ReportError(f"{path}: epochs must be whole numbers that rise from line to line, got {epochs.tolist()}")
    return metrics


def _name(folder: Path, root: Path) -> str:
    relative = folder.relative_to(root)
    return relative.as_posix() if relative.parts else f"{folder.resolve().parent.name}/{folder.resolve().name}"


def _read_config(path: Path, read_yaml: Callable[[Path], Any]) -> dict[str, Any]:
    if not path.exists():
        raise ReportError(f"{path}: missing. A run folder without its configuration cannot be reported")
    try:
        config = read_yaml(path)
    except Exception as error:  # the reader is the caller's, so its errors are unknown here
        raise ReportError(f"{path}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ReportError(f"{path}: does not hold a configuration")
    return config


def _read_environment(folder: Path) -> dict[str, Any]:
    path = folder / "environment.json"
    return read_record(path, ReportError) if path.exists() else {}
