"""Which runs may share a table, a row of one or a point: those whose settings agree in what is compared there."""

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pandas as pd

from onlinenorm.arguments import flatten
from onlinenorm.errors import ReportError
from onlinenorm.records import lookup
from onlinenorm.scales import UNKNOWN

# Where files lie, how many workers read them and how fast a step runs does not change what is computed.
_IRRELEVANT = {
    "data.root", "data.num_workers", "data.on_device", "data.keep_decoded", "data.val_batch_size",
    "data.on_unreadable", "data.unreadable_limit", "model.compile", "normalizer.backend", "normalizer._colour_",
    "normalizer._label_",
}  # fmt: skip
_COMPARED_GROUPS = ("model", "data", "recipe")


def check_one_table(runs: pd.DataFrame) -> None:
    """Raises ReportError if runs differ in scale, data, model or recipe, or a row in its normalizer's arguments."""
    _refuse_mixture({run.name: _setting(run) for run in runs.itertuples()}, "all rows")
    for normalizer, row in runs.groupby("normalizer"):
        _refuse_mixture({run.name: _normalizer_setting(run) for run in row.itertuples()}, f"the row of {normalizer}")
        seen: dict[int, str] = {}
        for run in row.itertuples():
            if run.seed in seen:
                raise ReportError(
                    f"{seen[run.seed]} and {run.name} are both seed {run.seed} of {normalizer}: the same seed "
                    "cannot count twice. Name the folder of one experiment"
                )
            seen[run.seed] = run.name


def check_joins(runs: pd.DataFrame, config: Mapping[str, Any]) -> None:
    """Raises ReportError if a run of `config`, as composed, would not share a table with `runs`; "auto" fits all."""
    planned = _setting(SimpleNamespace(config=config, results=None, environment={}))
    settings = {"this command": {key: value for key, value in planned.items() if value != "auto"}}
    others = {run.name: _setting(run) for run in runs.itertuples()}
    if odd := {name: other for name, other in others.items() if _mixture({**settings, name: other})}:
        raise ReportError(
            f"{_few(list(odd))}: of other settings than this command, in what all rows of one table must share:\n  "
            + "\n  ".join(_shortened(_mixture(settings | odd)))
        )


def check_one_point(runs: pd.DataFrame, where: str) -> None:
    """Raises ReportError if runs that are averaged differ in anything but the seed."""
    _refuse_mixture({run.name: _setting(run) | _normalizer_setting(run) for run in runs.itertuples()}, where)


def differences(runs: pd.DataFrame, besides: Sequence[str]) -> list[str]:
    """Lines "key: value (runs) | value (runs)" where runs differ in more than the keys `besides` and the experiment."""
    keep = {*besides, "experiment"}

    def mixture(of: Callable[[Any], dict[str, Any]], runs: pd.DataFrame) -> list[str]:
        return _mixture({r.name: {k: v for k, v in of(r).items() if k not in keep} for r in runs.itertuples()})

    rows = [mixture(_normalizer_setting, row) for _, row in runs.groupby("normalizer")]
    return [*mixture(_setting, runs), *itertools.chain(*rows)]


def _setting(run: Any) -> dict[str, Any]:
    chosen = {group: run.config[group] for group in _COMPARED_GROUPS if group in run.config}
    flat = {key: value for key, value in flatten(chosen).items() if key not in _IRRELEVANT}
    flat["experiment"] = lookup(run.config, "choices.experiment", UNKNOWN)
    flat["trainer.precision"] = lookup(run.config, "trainer.precision", UNKNOWN)
    flat |= _own_code(run, "model", "data")
    if run.results:
        dataset = run.results["dataset"]
        flat |= {key: run.results[key] for key in ("experiment", "scale", "epochs")}
        flat["dataset.fingerprint"] = dataset.get("fingerprint", UNKNOWN)
        flat |= {f"dataset.{key}": dataset[key] for key in ("name", "train_images", "val_images")}
    return flat


def _normalizer_setting(run: Any) -> dict[str, Any]:
    flat = flatten({"normalizer": run.config.get("normalizer", UNKNOWN)})
    flat = {key: value for key, value in flat.items() if key not in _IRRELEVANT}
    divided = {f"{name} (divides the images that a statistic sees)": count for name, count in _divided(run).items()}
    return flat | divided | _own_code(run, "normalizer")


def _divided(run: Any) -> dict[str, int]:
    """How batches are divided, as far as the normalizer's statistics see it: parts by processes and accumulation.

    As the run recorded it. Of runs from before that, BatchNorm's statistics see both divisions (with `sync_batchnorm`
    only the latter), and local statistics the former.
    """
    if isinstance(recorded := run.environment.get("statistics"), dict):
        return {key: recorded.get(key, 1) for key in ("processes", "accumulation")} if recorded else {}
    trainer = run.config.get("trainer") or {}
    processes = run.environment.get("world_size", trainer.get("devices", 1))
    if "BatchNorm" in str(lookup(run.config, "normalizer._target_", "")):
        processes = 1 if trainer.get("sync_batchnorm") else processes
        return {"processes": processes, "accumulation": trainer.get("accumulate_grad_batches", 1)}
    local = lookup(run.config, "normalizer.statistics") == "local"
    return {"processes": processes, "accumulation": 1} if local else {}


def _own_code(run: Any, *groups: str) -> dict[str, Any]:
    """SHA-256 of the files of the user's own that made these parts of a run."""
    recorded = run.environment.get("own_code", {})
    mine = {group: recorded[group] for group in groups if group in recorded}
    return flatten({"own_code": mine}) if mine else {}


def _refuse_mixture(settings: dict[str, dict[str, Any]], where: str) -> None:
    if lines := _mixture(settings):
        raise ReportError(
            f"these runs differ in what {where} of one table must share:\n  " + "\n  ".join(_shortened(lines)) + "\n"
            f"Leave out those of another setting, as with --without {' '.join(_odd(settings))}, or name a folder whose "
            "runs agree, e.g. that of one experiment"
        )


def _shortened(lines: list[str]) -> list[str]:
    return lines[:12] + ([f"and {len(lines) - 12} more"] if len(lines) > 12 else [])


def _odd(settings: dict[str, dict[str, Any]]) -> list[str]:
    """The runs that do not share the setting of most."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name, setting in _one_name_a_set(settings).items():
        alike[repr(sorted(setting.items(), key=str))].append(name)
    most = max(alike.values(), key=len)
    return [name for name in settings if name not in most]


def _mixture(settings: dict[str, dict[str, Any]]) -> list[str]:
    """Compares runs key by key; one that lacks a key (older or unfinished) does not contradict the others."""
    settings, lines = _one_name_a_set(settings), []
    for key in sorted({key for setting in settings.values() for key in setting}):
        values: dict[str, list[str]] = defaultdict(list)
        for name, setting in settings.items():
            if key in setting:
                values[_as_given(setting[key])].append(name)
        if len(values) > 1:
            shown = " | ".join(f"{value} ({_few(names)})" for value, names in values.items())
            lines.append(f"{key}: {shown}")
    return lines


def _one_name_a_set(settings: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The settings with one name for images of one fingerprint, whatever the folder that they lie in is called."""
    names: dict[str, str] = {}

    def named(setting: dict[str, Any]) -> dict[str, Any]:
        digest = setting.get("dataset.fingerprint", UNKNOWN)
        if digest == UNKNOWN or "dataset.name" not in setting:
            return setting
        return setting | {"dataset.name": names.setdefault(digest, setting["dataset.name"])}

    return {run: named(setting) for run, setting in settings.items()}


def _as_given(value: Any) -> str:
    """One spelling for equal values, as on a command line; of a fingerprint the beginning, which tells it apart."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return f"{value[:12]}..."
    return repr(value)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
