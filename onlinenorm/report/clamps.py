"""What activation clamps did: their removal after training, and the clamped fraction while the learning rate falls."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from onlinenorm.records import lookup
from onlinenorm.report.ablation import CLAMP_KEY, value_of
from onlinenorm.report.runs import Run, milestones
from onlinenorm.report.tally import tally


@dataclass(frozen=True)
class Course:
    """Clamped fraction of a run: after the first epoch, before the learning rate first drops, and after the last."""

    first: float
    before_drop: float | None
    last: float
    largest: float


def course(run: Run) -> Course | None:
    """The run's clamping.csv in brief; None where it has none."""
    if not run.clamping or not run.clamping["epoch"].size:
        return None
    epochs, fractions = run.clamping["epoch"], run.clamping["clamped_fraction"]
    full_rate = [m for m in milestones(run) if m < epochs[-1]]
    before = fractions[epochs <= full_rate[0]] if full_rate else fractions[:0]
    return Course(
        first=float(fractions[0]),
        before_drop=float(before[-1]) if before.size else None,
        last=float(fractions[-1]),
        largest=float(run.clamping["max_abs_activation"][-1]),
    )


def clamped_runs(studies: Mapping[str, Sequence[Run]]) -> list[tuple[str, Run]]:
    """(study, finished run) of every run that had a clamp to remove."""
    return [(name, run) for name, runs in studies.items() for run in runs if run.finished and run.results["clamping"]]


def clamps(run: Run) -> bool:
    """Whether the run's network has clamps, as far as its folder tells."""
    said = lookup(run.config, "normalizer.error_compensation")
    return bool(course(run)) or said == "clamp" or (said is None and run.normalizer == "online_clamp")


def clamp_removals(studies: Mapping[str, Sequence[Run]]) -> pd.DataFrame:
    """A row a run: what changed when its clamps were removed; `loss` and `top1` are without minus with."""
    rows = []
    for study, run in clamped_runs(studies):
        figures = run.results["clamping"]
        change = {key: figures["without"][f"val_{key}"] - figures["with"][f"val_{key}"] for key in ("loss", "top1")}
        images = run.results["dataset"]["val_images"]
        rows.append({"study": study, "run": run.name, "images": images, **figures, **change})
    return pd.DataFrame(rows)


def clamp_courses(studies: Mapping[str, Sequence[Run]]) -> pd.DataFrame:
    """A row a study and clamp value: the clamped fractions of its finished runs over training, as of `Course`."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for study, runs in studies.items():
        for run in runs:
            if clamps(run):
                groups.setdefault((study, value_of(run, CLAMP_KEY)), []).append(run)
    rows = []
    for (study, value), mine in groups.items():
        found = [c for run in mine if run.finished and (c := course(run))]
        if found:
            before = [c.before_drop for c in found if c.before_drop is not None]
            figures = {key: [getattr(c, key) for c in found] for key in ("first", "last", "largest")}
            mark = tally(mine).mark
            rows.append({"study": study, "clamp_value": value, "mark": mark, "before_drop": before, **figures})
    return pd.DataFrame(rows)
