"""What activation clamps did: their removal after training, and the clamped fraction while the learning rate falls."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onlinenorm.report import text
from onlinenorm.report.ablation import CLAMP_KEY, value_of
from onlinenorm.report.checks import lookup
from onlinenorm.report.markdown import markdown_table
from onlinenorm.report.runs import Run, milestones
from onlinenorm.report.tally import tally

HOW = (
    "The clamped fraction is that of activations beyond the clamp value before clamp, residual and ReLU, over all "
    "clamped layers: over training in about ten batches of each epoch's validation, after it over the whole validation "
    "set. `0` means that not one was."
)


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


def removal_table(studies: Mapping[str, Sequence[Run]]) -> str:
    """A line a run: what changed when its clamps were removed."""
    body = []
    for study, run in clamped_runs(studies):
        figures, images = run.results["clamping"], run.results["dataset"]["val_images"]
        loss = figures["without"]["val_loss"] - figures["with"]["val_loss"]
        top1 = figures["without"]["val_top1"] - figures["with"]["val_top1"]
        changed = figures["changed_predictions"]
        cells = [study, run.name, str(figures["layers"]), f"{figures['clamp_value']:g}", f"{changed:,} of {images:,}"]
        cells += [
            "0" if loss == 0 else f"{loss:+.1e}",
            text.difference(top1, "top1"),
            fraction(figures["clamped_fraction"]),
        ]
        body.append([*cells, f"{figures['max_abs_activation']:.3g}"])
    head = [
        "study", "run", "layers", "clamp value", "changed predictions", "val loss, without − with, nats",
        "val accuracy, without − with, points", "clamped fraction", "largest |activation|",
    ]  # fmt: skip
    return markdown_table(head, body)


def course_table(studies: Mapping[str, Sequence[Run]]) -> str:
    """A line a study and clamp value: the clamped fraction over training, lowest and highest of its runs."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for study, runs in studies.items():
        for run in runs:
            if clamps(run):
                groups.setdefault((study, value_of(run, CLAMP_KEY)), []).append(run)
    body = []
    for (study, value), mine in groups.items():
        found = [c for run in mine if run.finished and (c := course(run))]
        if not found:
            continue
        mark = tally(mine).mark
        before = [c.before_drop for c in found if c.before_drop is not None]
        cells = [span([c.first for c in found]), span(before), span([c.last for c in found])]
        zero = f"{sum(c.last == 0 for c in found)} of {len(found)}"
        body.append(
            [
                study,
                value,
                str(len(found)) + f" ({mark})" * bool(mark),
                *cells,
                zero,
                span([c.largest for c in found], "{:.3g}"),
            ]
        )
    head = [
        "study", "clamp value", "runs", "clamped fraction, first epoch", "before the first drop of the learning rate",
        "last epoch", "runs that end at 0", "largest |activation|, last epoch",
    ]  # fmt: skip
    return markdown_table(head, body)


def fraction(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def span(values: Sequence[float], form: str = "") -> str:
    """Lowest to highest; one value where they print alike; a dash for none."""
    if not values:
        return "–"
    low, high = (form.format(v) if form else fraction(v) for v in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def render_clamping(studies: Mapping[str, Sequence[Run]], picture: str | None) -> str:
    """All of it as Markdown; `picture` is the file name of the figure, if there is one."""
    parts = ["# What the activation clamps did", HOW]
    if any(course(run) for runs in studies.values() for run in runs):
        parts += ["## The clamped fraction over training", course_table(studies)]
    if picture:
        parts.append(f"![Clamped fraction and largest activation against epoch]({picture})")
    return "\n\n".join([*parts, "## Removal after training", removal_table(studies)]) + "\n"
