"""Runs of one swept key: value x normalizer -> figures over seeds, and what diverged, as a table.

scripts/sweep.py names the folders `<key>=<value>[,<key>=<value>]/<normalizer>/seed<k>`. A run without such a part takes
its value from its configuration; a network that does not clamp stands at "off" when the clamp value is swept.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from onlinenorm.errors import ReportError
from onlinenorm.records import lookup
from onlinenorm.report.runs import Run
from onlinenorm.report.settings import NOT_SET, check_one_point, differences
from onlinenorm.report.spec import ReportSpec
from onlinenorm.report.statistics import Summary, summarize
from onlinenorm.report.table import METRICS, Provenance, provenance, scale_labels
from onlinenorm.report.tally import Tally, former_attempts, tally

OFF = "off"
CLAMP_KEY = "normalizer.clamp_value"
_NEXT_PAIR = re.compile(r",(?=[+~]*[\w.@]+=)")


@dataclass(frozen=True)
class Point:
    """The runs of one value in one series: summaries over finished seeds by metric, and what the others came to."""

    value: str
    series: str
    colour: str
    seeds: list[int]
    figures: dict[str, list[float]]
    summaries: dict[str, Summary | None]
    diverged: list[str]
    unfinished: list[str]
    attempts: list[str]
    tally: Tally

    @property
    def n(self) -> int:
        return len(self.seeds)


@dataclass(frozen=True)
class Ablation:
    """A swept key with its values in order; `published` is its value in the published setting, `notes` what else
    differs between the runs and so has a share in what they show."""

    key: str
    name: str
    scale_label: str
    values: list[str]
    published: str | None
    points: list[Point]
    notes: list[str]
    provenance: list[Provenance]
    note: str = ""  # by hand: what the data of the runs do not tell

    @property
    def heading(self) -> str:
        return f"{self.name[0].upper()}{self.name[1:]} on {self.scale_label}"

    def as_dict(self) -> dict[str, Any]:
        """Plain content of ablation.json."""
        return {"schema": 1, "heading": self.heading, **asdict(self)}


def swept(run: Run) -> dict[str, str]:
    """Keys and values in the folder names above a run, e.g. {"normalizer.clamp_value": "3"}."""
    pairs = [pair for part in run.name.split("/")[:-2] if "=" in part for pair in _NEXT_PAIR.split(part)]
    return {key.lstrip("+~"): plain_value(value) for key, _, value in (pair.partition("=") for pair in pairs)}


def plain_value(value: Any) -> str:
    """One spelling for a number: "5" for "5.0", 5 and 5.0."""
    try:
        return f"{float(value):.12g}"
    except (TypeError, ValueError):
        return str(value)


def build_ablation(runs: Sequence[Run], spec: ReportSpec) -> Ablation:
    """The ablation of the key that takes most values in the folder names; other swept keys make series of their own.

    Raises ReportError where no folder names a key, or one seed would count twice.
    """
    taken: dict[str, set[str]] = {}
    for run in runs:
        for key, value in swept(run).items():
            taken.setdefault(key, set()).add(value)
    if not taken:
        raise ReportError(
            "no folder is named <key>=<value>: an ablation needs runs of scripts/sweep.py with a key of several "
            "values; normalizers and seeds are compared by scripts/table1.py"
        )
    for run in runs:
        _check_folder(run)
    key = max(taken, key=lambda name: (len(taken[name]), name))
    others = sorted(name for name in taken if name != key)
    groups: dict[tuple[str, str], list[Run]] = {}
    spec = spec.with_rows_of(runs)
    order = [*spec.rows, *spec.further_rows]
    for run in sorted(runs, key=lambda r: (order.index(r.normalizer) if r.normalizer in order else 99, r.name)):
        groups.setdefault((value_of(run, key), _series(run, others, spec)), []).append(run)
    setting = next((entry for entry in spec.published_setting if key in entry.key), None)
    values = in_order(value for value, _ in groups)
    rank = {value: place for place, value in enumerate(values)}
    return Ablation(
        key=key,
        name=setting.name if setting else key,
        scale_label=scale_labels(runs, spec)[1],
        values=values,
        published=plain_value(setting.value) if setting else None,
        points=[_point(*group, spec) for group in sorted(groups.items(), key=lambda group: rank[group[0][0]])],
        notes=differences(runs, taken),
        provenance=[provenance(run) for run in runs],
    )


def _check_folder(run: Run) -> None:
    """Raises ReportError where a number in the run's folder names is not that of its configuration."""
    for key, value in swept(run).items():
        said = plain_value(lookup(run.config, key, NOT_SET))
        if number(value) is not None and number(said) is not None and said != plain_value(value):
            raise ReportError(
                f"{run.folder}: the folder says {key}={value}, its config.yaml {said}; name the folder by what was run"
            )


def value_of(run: Run, key: str) -> str:
    """Value of a key in a run, in one spelling; OFF for the clamp value of a network that does not clamp."""
    if key == CLAMP_KEY and lookup(run.config, "normalizer.error_compensation", "clamp") != "clamp":
        return OFF
    return swept(run).get(key) or plain_value(lookup(run.config, key, NOT_SET))


def in_order(values) -> list[str]:
    """Numbers by size, then words."""
    return sorted(set(values), key=lambda value: (number(value) is None, number(value) or 0.0, value))


def number(value: str) -> float | None:
    """The value as a finite number, else None."""
    try:
        found = float(value)
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def _series(run: Run, others: Sequence[str], spec: ReportSpec) -> str:
    return ", ".join(
        [spec.row(run.normalizer).label, *(f"{name.split('.')[-1]} {value_of(run, name)}" for name in others)]
    )


def _point(name: tuple[str, str], runs: Sequence[Run], spec: ReportSpec) -> Point:
    finished = sorted((run for run in runs if run.finished), key=lambda run: run.seed)
    seeds = [run.seed for run in runs]
    if doubled := {seed for seed in seeds if seeds.count(seed) > 1}:
        names = ", ".join(run.name for run in runs if run.seed in doubled)
        raise ReportError(f"{names}: the same seed of {name[1]} at {name[0]} cannot count twice; remove all but one")
    check_one_point(runs, f"{name[1]} at {name[0]}")
    figures = {metric: [run.value(metric) for run in finished] for metric in METRICS}
    return Point(
        value=name[0],
        series=name[1],
        colour=spec.row(runs[0].normalizer).colour,
        seeds=[run.seed for run in finished],
        figures=figures,
        summaries={metric: summarize(values, spec.confidence) for metric, values in figures.items()},
        diverged=[f"seed {run.seed} {run.status}" for run in runs if run.diverged],
        unfinished=[f"seed {run.seed} {run.status}" for run in runs if not run.finished and not run.diverged],
        attempts=former_attempts(runs),
        tally=tally(runs),
    )
