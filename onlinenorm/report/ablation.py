"""Swept keys and clamps: frames with a row a value, and what clamps did over training and when they were removed.

scripts/sweep.py names the folders <key>=<value>[,<key>=<value>]/<normalizer>/seed<k>. A run without such a part takes
its value from its configuration; a network that does not clamp stands at OFF when the clamp value is swept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from onlinenorm.errors import ReportError
from onlinenorm.records import lookup
from onlinenorm.report.mixtures import check_one_point, differences
from onlinenorm.report.predictions import epochs_without_clamp
from onlinenorm.report.removal import ways
from onlinenorm.report.runs import Runs, frame, milestones
from onlinenorm.report.seeds import over_seeds, tally
from onlinenorm.report.settings import NOT_SET, ReportSpec
from onlinenorm.report.swept import CLAMP_KEY, in_order, number, plain_value, swept, value_of
from onlinenorm.report.tables import provenance, scale_labels


@dataclass(frozen=True)
class Ablation:
    """A swept key with its values in order; `published` is its value in the published setting, `notes` what else
    differs between the runs and so has a share in what they show. points: `value`, `series`, `colour` and the columns
    of `over_seeds`, of which `unfinished` leaves out what diverged. ways: as `removal.ways` makes them."""

    key: str
    name: str
    scale_label: str
    values: list[str]
    published: str | None
    points: pd.DataFrame
    ways: pd.DataFrame
    notes: list[str]
    provenance: pd.DataFrame
    note: str = ""  # by hand: what the data of the runs do not tell

    @property
    def heading(self) -> str:
        return f"{self.name[0].upper()}{self.name[1:]} on {self.scale_label}"


def build_ablation(runs: pd.DataFrame, spec: ReportSpec, note: str = "") -> Ablation:
    """The ablation of the key that takes most values in the folder names; other swept keys make series of their own.

    Raises ReportError where no folder names a key, or one seed would count twice.
    """
    taken: dict[str, set[str]] = {}
    for pairs in runs["name"].map(swept):
        for key, value in pairs.items():
            taken.setdefault(key, set()).add(value)
    if not taken:
        raise ReportError(
            "no folder is named <key>=<value>: an ablation needs runs of scripts/sweep.py with a key of several "
            "values; normalizers and seeds are compared by scripts/table1.py"
        )
    for run in runs.itertuples():
        _check_folder(run)
    key = max(taken, key=lambda name: (len(taken[name]), name))
    others = sorted(name for name in taken if name != key)
    spec = spec.with_rows_of(runs)
    order = [*spec.rows, *spec.further_rows]
    rank = [order.index(name) if name in order else len(order) for name in runs["normalizer"]]
    ordered = runs.assign(
        rank=rank,
        value=[value_of(run, key) for run in runs.itertuples()],
        series=[_series(run, others, spec) for run in runs.itertuples()],
    ).sort_values(["rank", "name"])
    values = in_order(ordered["value"])
    ordered = ordered.assign(place=ordered["value"].map(values.index)).sort_values("place", kind="stable")
    groups = ordered.groupby(["value", "series"], sort=False)
    points = [_point(value, series, mine, spec) for (value, series), mine in groups]
    rows = set(runs["normalizer"])
    settings = (entry for entry in spec.published_setting if key in entry.key)
    setting = next((entry for entry in settings if not entry.only or rows & set(entry.only)), None)
    return Ablation(
        key=key,
        name=setting.name if setting else spec.key_names.get(key, key),
        scale_label=scale_labels(runs, spec)[1],
        values=values,
        published=plain_value(setting.value) if setting else None,
        points=frame(points, points[0]),
        ways=ways(runs, spec),
        notes=differences(runs, list(taken)),
        provenance=provenance(runs),
        note=note,
    )


def _check_folder(run: Any) -> None:
    """Raises ReportError where a number in the run's folder names is not that of its configuration."""
    for key, value in swept(run.name).items():
        said = plain_value(lookup(run.config, key, NOT_SET))
        if number(value) is not None and number(said) is not None and said != plain_value(value):
            raise ReportError(
                f"{run.folder}: the folder says {key}={value}, its config.yaml {said}; name the folder by what was run"
            )


def _series(run: Any, others: Sequence[str], spec: ReportSpec) -> str:
    settings = [f"{name.split('.')[-1]} {value_of(run, name)}" for name in others]
    return ", ".join([spec.row(run.normalizer).label, *settings])


def _point(value: str, series: str, runs: pd.DataFrame, spec: ReportSpec) -> dict[str, Any]:
    doubled = runs[runs["seed"].duplicated(keep=False)]
    if not doubled.empty:
        names = ", ".join(doubled["name"])
        raise ReportError(f"{names}: the same seed of {series} at {value} cannot count twice; remove all but one")
    check_one_point(runs, f"{series} at {value}")
    found = over_seeds(runs, spec.confidence)
    found["unfinished"] = [line for line in found["unfinished"] if line not in found["diverged"]]
    columns = ("seeds", "figures", "summaries", "diverged", "unfinished", "attempts", "tally")
    colour = spec.row(runs.iloc[0]["normalizer"]).colour
    return {"value": value, "series": series, "colour": colour, **{key: found[key] for key in columns}}


def _studies(studies: Mapping[str, Runs]) -> pd.DataFrame:
    """The runs of all studies, `study` telling which."""
    parts = [study.runs.assign(study=name) for name, study in studies.items()]
    return pd.concat(parts, ignore_index=True) if parts else frame([], ("study", "finished", "results"))


def clamp_removals(studies: Mapping[str, Runs]) -> pd.DataFrame:
    """A row a finished run that had clamps to its end: what changed when they were removed; `loss`, `top1` without
    minus with.

    `weights` tell runs that several studies show.
    """
    rows = []
    for run in _studies(studies).itertuples():
        if run.finished and (figures := run.results["clamping"]) and not epochs_without_clamp(run.config):
            change = {key: _change(figures, f"val_{key}") for key in ("loss", "top1")}
            images = run.results["dataset"]["val_images"]
            told = {"study": run.study, "run": run.name, "images": images, "weights": run.results["parameters_sha256"]}
            rows.append({**told, **figures, **change})
    return frame(rows, rows[0] if rows else ("study", "run", "images", "changed_predictions", "top1"))


def _change(clamping: Mapping[str, Any], key: str) -> float | None:
    """A figure without minus with the clamp; None where one of them is not finite."""
    after, before = clamping["without"][key], clamping["with"][key]
    return None if None in (after, before) else after - before


def courses(studies: Mapping[str, Runs]) -> pd.DataFrame:
    """A row a run with clamps: the clamped fraction after the first epoch, before the learning rate first drops, and
    after the last epoch, NaN where it has no such; and the largest activation there."""
    rows = []
    for name, study in studies.items():
        clamped = study.epochs.dropna(subset="clamped_fraction")
        for run in study.runs.itertuples():
            said = lookup(run.config, "normalizer.error_compensation")
            mine = clamped[clamped["folder"] == run.folder]
            if mine.empty and not (said == "clamp" or (said is None and run.normalizer == "online_clamp")):
                continue
            row = {"study": name, "run": run.name, "clamp_value": value_of(run, CLAMP_KEY), "finished": run.finished}
            if not mine.empty:
                drops = [m for m in milestones(run) if m < mine["epoch"].iloc[-1]]
                before = mine[mine["epoch"] <= drops[0]] if drops else mine[:0]
                row |= {"first": mine["clamped_fraction"].iloc[0], "last": mine["clamped_fraction"].iloc[-1]}
                row |= {"largest": mine["max_abs_activation"].iloc[-1]}
                row |= {} if before.empty else {"before_drop": before["clamped_fraction"].iloc[-1]}
            rows.append(row)
    columns = ["study", "run", "clamp_value", "finished", "first", "before_drop", "last", "largest"]
    return pd.DataFrame(rows, columns=columns).astype({"finished": bool})


def of_clamped(studies: Mapping[str, Runs]) -> pd.DataFrame:
    """The runs of `courses`."""
    clamped, runs = courses(studies), _studies(studies)
    return runs.merge(clamped[["study", "run"]].rename(columns={"run": "name"}), on=["study", "name"])


def clamp_courses(studies: Mapping[str, Runs]) -> pd.DataFrame:
    """A row a study and clamp value: lists of the figures of `courses` of finished runs, and what those leave out."""
    clamped, runs = courses(studies), of_clamped(studies)
    rows = []
    for (study, value), mine in clamped.groupby(["study", "clamp_value"], sort=False):
        found = mine[mine["finished"]].dropna(subset="last")
        if not found.empty:
            mark = tally(runs[(runs["study"] == study) & runs["name"].isin(mine["run"])]).mark
            figures = {key: found[key].dropna().tolist() for key in ("first", "before_drop", "last", "largest")}
            rows.append({"study": study, "clamp_value": value, "mark": mark, **figures})
    return pd.DataFrame(rows)
