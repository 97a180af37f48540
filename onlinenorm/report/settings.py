"""Which settings a set of runs shares, and where it departs from the published one."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from onlinenorm.arguments import flatten
from onlinenorm.errors import ReportError
from onlinenorm.records import lookup
from onlinenorm.report.runs import Run
from onlinenorm.report.spec import SettingSpec
from onlinenorm.scales import UNKNOWN

# Where files lie, how many workers read them and how fast a step runs does not change what is computed.
_IRRELEVANT = {
    "data.root", "data.num_workers", "data.on_device", "data.keep_decoded", "data.val_batch_size",
    "data.on_unreadable", "data.unreadable_limit", "model.compile", "normalizer.backend", "normalizer._colour_",
    "normalizer._label_",
}  # fmt: skip
_COMPARED_GROUPS = ("model", "data", "recipe")
NOT_SET = "not set"


@dataclass(frozen=True)
class Departure:
    """A point where runs differ from the published setting; `normalizers` is empty when it holds for all rows."""

    name: str
    published: Any
    actual: Any
    decisive: bool
    normalizers: list[str]
    note: str = ""


def check_one_table(runs: Sequence[Run]) -> None:
    """Raises ReportError if runs differ in scale, data, model or recipe, or a row in its normalizer's arguments."""
    _refuse_mixture({run.name: _setting(run) for run in runs}, "all rows")
    for normalizer in sorted({run.normalizer for run in runs}):
        row = [run for run in runs if run.normalizer == normalizer]
        _refuse_mixture({run.name: _normalizer_setting(run) for run in row}, f"the row of {normalizer}")
        seen: dict[int, str] = {}
        for run in row:
            if run.seed in seen:
                raise ReportError(
                    f"{seen[run.seed]} and {run.name} are both seed {run.seed} of {normalizer}: the same seed "
                    "cannot count twice. Name the folder of one experiment"
                )
            seen[run.seed] = run.name


def check_one_point(runs: Sequence[Run], where: str) -> None:
    """Raises ReportError if runs that are averaged differ in anything but the seed."""
    _refuse_mixture({run.name: _setting(run) | _normalizer_setting(run) for run in runs}, where)


def differences(runs: Sequence[Run], besides: Sequence[str]) -> list[str]:
    """Lines "key: value (runs) | value (runs)" where runs differ in more than the keys `besides` and the experiment."""
    keep = {*besides, "experiment"}
    lines = _mixture({run.name: {k: v for k, v in _setting(run).items() if k not in keep} for run in runs})
    for normalizer in sorted({run.normalizer for run in runs}):
        row = [run for run in runs if run.normalizer == normalizer]
        lines += _mixture({r.name: {k: v for k, v in _normalizer_setting(r).items() if k not in keep} for r in row})
    return lines


def planned_scale(run: Run) -> str | None:
    """Scale of a run that is not done, where its configuration tells it; a folder of ImageNet's layout does not."""
    target = lookup(run.config, "data._target_", "")
    if target == "onlinenorm.data.FashionMNIST":
        return "embedded" if lookup(run.config, "data.embedded") else "fashion_mnist"
    return "synthetic" if target == "onlinenorm.data.Synthetic" else None


def departures(runs: Sequence[Run], setting: Sequence[SettingSpec]) -> list[Departure]:
    """Entries of the published setting that the runs do not share, in the file's order; not set counts as differing."""
    found = []
    for entry in setting:
        actual: dict[str, tuple[Any, list[str]]] = {}
        for run in runs:
            if entry.only and run.normalizer not in entry.only:
                continue
            value = next((v for key in entry.key if (v := lookup(run.config, key, NOT_SET)) != NOT_SET), NOT_SET)
            if not same(value, entry.value):
                names = actual.setdefault(repr(value), (value, []))[1]
                if run.normalizer not in names:
                    names.append(run.normalizer)
        for value, names in actual.values():
            found.append(
                Departure(entry.name, entry.value, value, entry.decisive, names if entry.only else [], entry.note)
            )
    return found


def same(first: Any, second: Any) -> bool:
    """Equality that takes 1 and 1.0, 0.1 and 0.1 + 1e-17, and (1, 2) and [1, 2] for the same."""
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, int | float) and isinstance(second, int | float):
        return math.isclose(first, second, rel_tol=1e-9)
    return first == second


def _setting(run: Run) -> dict[str, Any]:
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


def _normalizer_setting(run: Run) -> dict[str, Any]:
    flat = flatten({"normalizer": run.config.get("normalizer", UNKNOWN)})
    divided = {f"{name} (divides the images that a statistic sees)": count for name, count in run.divided.items()}
    return (
        {key: value for key, value in flat.items() if key not in _IRRELEVANT} | divided | _own_code(run, "normalizer")
    )


def _own_code(run: Run, *groups: str) -> dict[str, Any]:
    """SHA-256 of the files of the user's own that made these parts of a run."""
    recorded = run.environment.get("own_code", {})
    return flatten({"own_code": {group: recorded[group] for group in groups if group in recorded}})


def _refuse_mixture(settings: dict[str, dict[str, Any]], where: str) -> None:
    if lines := _mixture(settings):
        shown = lines[:12] + ([f"and {len(lines) - 12} more"] if len(lines) > 12 else [])
        raise ReportError(
            f"these runs differ in what {where} of one table must share:\n  " + "\n  ".join(shown) + "\n"
            f"Leave out those of another setting, as with --without {' '.join(_odd(settings))}, or name a folder whose "
            "runs agree, e.g. that of one experiment"
        )


def _odd(settings: dict[str, dict[str, Any]]) -> list[str]:
    """The runs that do not share the setting of most."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name, setting in settings.items():
        alike[repr(sorted(setting.items(), key=str))].append(name)
    most = max(alike.values(), key=len)
    return [name for name in settings if name not in most]


def _mixture(settings: dict[str, dict[str, Any]]) -> list[str]:
    """Compares runs key by key; one that lacks a key (older or unfinished) does not contradict the others."""
    lines = []
    for key in sorted({key for setting in settings.values() for key in setting}):
        values: dict[str, list[str]] = defaultdict(list)
        for name, setting in settings.items():
            if key in setting:
                value = setting[key]
                values[repr(float(value)) if type(value) is int else repr(value)].append(name)
        if len(values) > 1:
            shown = " | ".join(f"{value} ({_few(names)})" for value, names in values.items())
            lines.append(f"{key}: {shown}")
    return lines


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
