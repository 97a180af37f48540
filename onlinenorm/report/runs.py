"""Run folders (config.yaml, metrics.csv, results.json, ...) as two frames, checked: of runs, and of their epochs."""

import csv
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pandas as pd
import yaml

from onlinenorm.errors import ReportError
from onlinenorm.records import Failure, lookup, parse_yaml, read_failure, read_record, with_added_keys
from onlinenorm.report.predictions import counted

METRICS = ("best_loss", "best_top1", "last_loss", "last_top1")  # nats; fractions
REQUIRED_COLUMNS = ("epoch", "train_loss", "train_top1", "val_loss", "val_top1")
CLAMPING_COLUMNS = ("epoch", "step", "clamped_fraction", "max_abs_activation")
_NOT_RUN_FOLDERS = {"attempts", "checkpoints", "wandb", "tensorboard", "lightning_logs", "node_modules"}


class Runs(NamedTuple):
    """A frame with a row a run, and one with a row an epoch of a run (`folder` tells which).

    runs: `folder`, `name` (below the folder that was asked for), `normalizer`, `seed`, `config`, `environment`,
    `results` (None until it is done), `epochs` done and `planned` (None: not said), `status`, of which `finished`,
    `diverged` and `failed` are parts, `attempts` (what those before this one came to, the first first), and METRICS,
    NaN until it is done.

    epochs: `folder`, `epoch` (from 1), columns of metrics.csv, those of clamping.csv, NaN where a field is empty;
    `recorded` is False where only clamping.csv has the epoch.
    """

    runs: pd.DataFrame
    epochs: pd.DataFrame

    def of(self, chosen: pd.Series) -> "Runs":
        """The runs for which `chosen` is True."""
        runs = self.runs[chosen]
        return Runs(runs, self.epochs[self.epochs["folder"].isin(runs["folder"])])


def frame(records: Iterable[Any], columns: Iterable[str]) -> pd.DataFrame:
    """A frame of these records whose cells stay as they are: no None becomes NaN, no whole number a float."""
    return pd.DataFrame(list(records), columns=list(columns), dtype=object)


def read_yaml(path: Path) -> Any:
    """Plain content of a YAML file; ${...} of a configuration that came from elsewhere stays as it is written."""
    return parse_yaml(path.read_text(encoding="utf-8"))


def milestones(run: Any) -> list[int]:
    """Epochs after which the learning rate drops."""
    step = lookup(run.config, "recipe.schedule", "step") == "step"
    return list(lookup(run.config, "recipe.milestones", None) or []) if step else []


def load_runs(root: str | Path, without: Sequence[str] = ()) -> Runs:
    """All runs in or below `root`, sorted by folder, but for those named in `without`, or in folders named there.

    Raises ReportError when `root` holds no run or a file of one is damaged.
    """
    root = Path(root)
    if not root.is_dir():
        raise ReportError(f"{root.absolute()}: no such folder. Name the folder that holds runs, e.g. runs/quickstart")
    folders = list(find_run_folders(root))
    for name in without:
        if not any(folder.is_relative_to(root / name) for folder in folders):
            raise ReportError(f"--without {name}: there is no such run below {root}")
    left = [folder for folder in folders if not any(folder.is_relative_to(root / name) for name in without)]
    if not left:
        raise ReportError(
            f"{root}: holds no run. A run is a folder <normalizer>/seed<k>/ with config.yaml and metrics.csv; "
            "scripts/quickstart.sh or `python train.py experiment=table1` make some"
        )
    read = [_read_run(folder, _name(folder, root)) for folder in left]
    _check_weights([run for run, _ in read])
    return _frames(read)


def load_run(folder: Path) -> Runs:
    """The run in `folder`; raises ReportError naming the file that is missing or damaged."""
    return _frames([_read_run(folder, folder.name)])


def _frames(read: Sequence[tuple[dict[str, Any], pd.DataFrame]]) -> Runs:
    records, epochs = zip(*read, strict=True)
    kinds = {"seed": int, "epochs": int, "finished": bool, "diverged": bool, "failed": bool}
    runs = frame(records, records[0]).astype(kinds | dict.fromkeys(METRICS, float))
    return Runs(runs, pd.concat(epochs, ignore_index=True))


def find_run_folders(root: Path) -> Iterator[Path]:
    """Folders in or below `root` that hold a run's files, in a fixed order; below a run, too.

    Links are followed, to each folder once. Raises ReportError where one cannot be read: a run there would go missing.
    """

    def unreadable(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # gone meanwhile
            raise ReportError(
                f"{error.filename}: cannot be read ({error.strerror}), and may hold runs; correct its permissions"
            )

    seen = set()
    for folder, children, files in os.walk(root, onerror=unreadable, followlinks=True):
        present = set(files)
        if (place := os.path.realpath(folder)) in seen:
            children.clear()
            continue
        seen.add(place)
        for name in files:
            path = os.path.join(folder, name)
            if not name.startswith(".") and os.path.islink(path) and not os.path.exists(path):
                raise ReportError(f"{path}: is a link to {os.readlink(path)}, which is not there; repair or remove it")
        if present & {"metrics.csv", "results.json"} or {"config.yaml", "environment.json"} <= present:
            yield Path(folder)
        children[:] = sorted(c for c in children if not c.startswith(".") and c not in _NOT_RUN_FOLDERS)


def _read_run(folder: Path, name: str) -> tuple[dict[str, Any], pd.DataFrame]:
    config = _read_config(folder / "config.yaml")
    environment = _read_environment(folder)
    results = read_record(folder / "results.json", ReportError) if (folder / "results.json").exists() else None
    metrics = read_epochs(folder / "metrics.csv") if (folder / "metrics.csv").exists() or results else _no_epochs()
    if results:
        _check_agreement(results, config, metrics, folder)
        _check_predictions(results, config, folder)
    seed_in_name = re.fullmatch(r"seed(\d+)", folder.name)
    seed = results["seed"] if results else config.get("seed", seed_in_name and int(seed_in_name[1]))
    if not isinstance(seed, int):
        raise ReportError(f"{folder / 'config.yaml'}: key seed is missing")
    planned = results["epochs"] if results else lookup(config, "recipe.epochs")
    planned = planned if isinstance(planned, int) else None
    status = "finished" if results else _status(read_failure(folder, ReportError), metrics, planned, "running")
    run = {
        "folder": str(folder),
        "name": name,
        "normalizer": (results or {}).get("normalizer")
        or lookup(config, "choices.normalizer", folder.resolve().parent.name),
        "seed": seed,
        "config": config,
        "environment": environment,
        "results": results,
        "epochs": _epochs_done(metrics),
        "planned": planned,
        "status": status,
        "finished": results is not None,
        "diverged": status.startswith("diverged"),
        "failed": status.startswith("failed"),
        "attempts": _read_attempts(folder, environment, (results or {}).get("attempts", []), planned),
    }
    for metric in METRICS:
        part, kind = metric.split("_")
        run[metric] = float(results["last" if part == "last" else metric][f"val_{kind}"]) if results else math.nan
    clamping = folder / "clamping.csv"
    clamped = read_epochs(clamping, CLAMPING_COLUMNS) if clamping.exists() else _no_epochs(CLAMPING_COLUMNS)
    epochs = metrics.merge(clamped.drop(columns="step"), on="epoch", how="outer", indicator="recorded")
    return run, epochs.assign(folder=str(folder), recorded=epochs["recorded"] != "right_only")


def _read_attempts(
    folder: Path, environment: dict[str, Any], recorded: list[dict[str, Any]], planned: Any
) -> list[str]:
    """What the attempts before the present one came to: those in attempts/, and of those in results.json what is gone.

    One that failed and was continued from a checkpoint, as `starts` of environment.json tells, is no other attempt
    unless it diverged.
    """
    found, seen, starts = [], set(), environment.get("starts", [])
    kept = [path for path in folder.glob("attempts/*") if re.fullmatch(r"[0-9]+", path.name, re.ASCII)]
    for path in sorted(kept, key=lambda path: int(path.name)):
        seen.add(f"attempts/{path.name}")
        metrics = read_epochs(path / "metrics.csv") if (path / "metrics.csv").exists() else _no_epochs()
        begun = _read_environment(path).get("starts", [])
        status = _status(read_failure(path, ReportError), metrics, planned, "stopped")
        continued = begun and len(begun) < len(starts) and starts[: len(begun)] == begun
        if status.startswith("diverged") or not continued:
            found.append(status)
    for entry in recorded:
        if entry.get("folder") not in seen:
            done = pd.DataFrame({"epoch": [entry.get("epochs", 0)]})
            found.append(f"{_status(_recorded_failure(entry), done, planned, 'stopped')}; its data no longer exist")
    return found


def _recorded_failure(entry: dict[str, Any]) -> Failure | None:
    """What ended an attempt of results.json, which before `kind` told it in words alone."""
    if entry.get("kind") in ("diverged", "failed"):
        return Failure(entry["kind"], entry.get("step"), entry.get("epoch"))
    return Failure.from_text(entry["failure"]) if entry.get("failure") else None


def _status(failure: Failure | None, metrics: pd.DataFrame, planned: Any, unfinished: str) -> str:
    """What a run that is not done came to: "diverged: step s, epoch e of E", "failed: epoch e of E", or `unfinished`.

    Diverged are runs that a NaN or infinity ended, as failed.json or the last line of metrics.csv says; an interrupted
    run cannot be told from a running one.
    """
    planned, done = planned or "unknown", _epochs_done(metrics)
    if failure is not None and failure.kind == "diverged" and failure.step is not None:
        return f"diverged: step {failure.step}, epoch {failure.epoch or done + 1} of {planned}"
    losses = [metrics[key].iloc[-1] for key in ("train_loss", "val_loss") if done and key in metrics]
    word = "failed" if failure is not None else unfinished
    word = "diverged" if not np.isfinite(losses).all() else word
    return f"{word}: epoch {done} of {planned}"


def _epochs_done(metrics: pd.DataFrame) -> int:
    return 0 if metrics.empty else int(metrics["epoch"].iloc[-1])


def _no_epochs(columns: Sequence[str] = REQUIRED_COLUMNS) -> pd.DataFrame:
    return pd.DataFrame(columns=list(columns), dtype=float)


def read_epochs(path: Path, required: Sequence[str] = REQUIRED_COLUMNS) -> pd.DataFrame:
    """Columns of a metrics.csv (or another file with a line an epoch) as float64; empty fields are NaN."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
    except FileNotFoundError:
        raise ReportError(f"{path}: missing, although the run is marked as done by its results.json") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ReportError(f"{path}: cannot be read: {error}") from error
    if not rows:
        return _no_epochs(required)
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
    metrics = pd.DataFrame(table, columns=header)
    epochs = metrics["epoch"]
    whole = np.isfinite(epochs).all() and (epochs == np.floor(epochs)).all() and (epochs >= 1).all()
    if not whole or (np.diff(epochs) <= 0).any():
        raise ReportError(f"{path}: epochs must be whole numbers that rise from line to line, got {epochs.tolist()}")
    return metrics


def _name(folder: Path, root: Path) -> str:
    relative = folder.relative_to(root)
    return relative.as_posix() if relative.parts else f"{folder.resolve().parent.name}/{folder.resolve().name}"


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ReportError(f"{path}: missing. A run folder without its configuration cannot be reported")
    try:
        config = read_yaml(path)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ReportError(f"{path}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ReportError(f"{path}: does not hold a configuration")
    return with_added_keys(config)


def _read_environment(folder: Path) -> dict[str, Any]:
    path = folder / "environment.json"
    return read_record(path, ReportError) if path.exists() else {}


# Whether the files of a finished run tell one story


def _check_weights(runs: Sequence[dict[str, Any]]) -> None:
    """Runs of different seeds end with different weights, or one of them is a copy of the other."""
    first: dict[str, dict[str, Any]] = {}
    for run in runs:
        weights = (run["results"] or {}).get("parameters_sha256")
        other = first.setdefault(weights, run) if weights else run
        if other["seed"] != run["seed"]:
            raise ReportError(
                f"{other['name']} (seed {other['seed']}) and {run['name']} (seed {run['seed']}) ended with the same "
                "weights, which would count twice; run one of them again"
            )


def _check_agreement(results: dict[str, Any], config: dict[str, Any], metrics: pd.DataFrame, folder: Path) -> None:
    """results.json must be of the run of config.yaml, its last epoch that of metrics.csv, its best epochs the best."""
    for key, dotted in (("seed", "seed"), ("normalizer", "choices.normalizer"), ("epochs", "recipe.epochs")):
        if (asked := lookup(config, dotted, results[key])) != results[key]:
            _contradiction(folder, key, results[key], asked, "config.yaml")
    if metrics.empty:
        raise ReportError(f"{folder / 'metrics.csv'}: holds no epoch, although the run is marked as done")
    if metrics["epoch"].tolist() != list(range(1, results["epochs"] + 1)):
        _contradiction(folder, "epochs", results["epochs"], f"{len(metrics)} up to {metrics['epoch'].max():.0f}")
    metrics = metrics.set_index("epoch")
    best = {"last": lambda values: values.iloc[-1], "best_loss": pd.Series.min, "best_top1": pd.Series.max}
    entries = (("last", "val_loss"), ("last", "val_top1"), ("best_loss", "val_loss"), ("best_top1", "val_top1"))
    for entry, column in entries:
        values, said = metrics[column], results[entry]
        if values.isna().all():
            raise ReportError(f"{folder / 'metrics.csv'}: column {column} is empty")
        seen = float(best[entry](values))
        if not _same(said[column], seen):
            _contradiction(folder, f"{entry}.{column}", said[column], seen)
        named = float(values.get(said["epoch"], math.nan))  # of equally good epochs any
        if not _same(named, seen) or (entry == "last" and said["epoch"] != values.index[-1]):
            _contradiction(folder, f"{entry}.epoch", said["epoch"], int(values.index[values == seen][-1]))


def _same(first: float, second: float) -> bool:
    return abs(first - second) <= 1e-9 * max(1.0, abs(second))  # figures are written with all their digits


def _contradiction(folder: Path, key: str, said: Any, seen: Any, file: str = "metrics.csv") -> NoReturn:
    raise ReportError(
        f"{folder / 'results.json'}: {key} is {said}, but {file} shows {seen}; "
        "one of the two files belongs to another run"
    )


def _check_predictions(results: dict[str, Any], config: dict[str, Any], folder: Path) -> None:
    """predictions.npz must give the accuracies of results.json, if that names the rule by which both were counted.

    Runs from before that counted ties in two ways; what differs there is told in their table.
    """
    for found in counted(results, config, folder).itertuples() if results.get("top1_rule") else ():
        if found.recorded != found.counted:
            _contradiction(folder, found.figure, found.recorded, found.counted, "predictions.npz")
