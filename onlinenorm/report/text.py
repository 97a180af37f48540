"""Numbers and table cells as words, shared by the terminal, the Markdown table and the page."""

from collections.abc import Sequence
from dataclasses import dataclass

from onlinenorm.report.settings import Departure
from onlinenorm.report.statistics import Difference, Summary, excludes_zero
from onlinenorm.report.table import Comparison, Provenance, Recount, Removal, Report, Row, plain
from onlinenorm.text import duration

METRIC_NAMES = {
    "best_loss": "best val loss",
    "best_top1": "best val accuracy",
    "last_loss": "last epoch val loss",
    "last_top1": "last epoch val accuracy",
}


@dataclass(frozen=True)
class Cell:
    """A table cell: the figure, and in `detail` its interval, range or epoch."""

    main: str
    detail: str = ""


def is_accuracy(metric: str) -> bool:
    return metric.endswith("top1")


def figure(value: float, metric: str, digits: int | None = None) -> str:
    """0.763 as "76.30 %" for an accuracy, 0.93 as "0.930" for a loss in nats."""
    if is_accuracy(metric):
        return f"{100 * value:.{2 if digits is None else digits}f} %"
    return f"{value:.{3 if digits is None else digits}f}"


def bare(value: float, metric: str) -> str:
    return figure(value, metric).removesuffix(" %")


def difference(value: float, metric: str) -> str:
    """A signed difference: points for accuracies, nats for losses."""
    return f"{100 * value:+.2f}" if is_accuracy(metric) else f"{value:+.4f}"


def published_cell(row: Row, metric: str) -> Cell:
    """Published value with the digits it was printed with."""
    if row.published is None:
        return Cell("–")
    return Cell(figure(getattr(row.published, metric), metric, digits=1 if is_accuracy(metric) else 2))


def reproduced_cell(row: Row, metric: str, confidence: float = 0.95) -> Cell:
    """Mean +- sd with interval and range; for n = 1 the value and its epoch; for n = 0 "not run" or the progress.

    Each says of how many attempts it is, where some are left out.
    """
    summary, mark = row.summaries[metric], [row.tally.mark] * bool(row.tally.mark)
    if summary is None:
        return Cell("; ".join([*row.unfinished, *row.attempts]) if row.unfinished else "not run")
    if summary.n == 1:
        return Cell(figure(summary.mean, metric), "; ".join([f"epoch {row.epochs[metric][0]}", *mark]))
    unit = " %" if is_accuracy(metric) else ""
    return Cell(
        f"{bare(summary.mean, metric)} ± {bare(summary.sd, metric)}{unit}",
        "; ".join([*_spread(summary, metric, confidence), *mark]),
    )


def _spread(summary: Summary, metric: str, confidence: float) -> list[str]:
    ends = f"min–max {bare(summary.minimum, metric)}–{bare(summary.maximum, metric)}"
    if summary.low is None:
        return [ends]
    return [f"{100 * confidence:g} % CI {bare(summary.low, metric)} to {bare(summary.high, metric)}", ends]


def seeds_cell(row: Row) -> Cell:
    """n, and what became of the runs and attempts that are not among the finished ones."""
    return Cell(str(row.n), "; ".join([*row.unfinished, *row.attempts]) if row.n else row.tally.mark)


def comparison_name(comparison: Comparison, report: Report) -> str:
    """The two sides of a comparison, in the order of the subtraction."""
    labels = {row.normalizer: row.label for row in report.rows}
    first = labels.get(comparison.first, comparison.first)
    second = "published" if comparison.second is None else labels.get(comparison.second, comparison.second)
    return f"{first} − {second}"


def comparison_groups(report: Report, published: bool) -> dict[str, list[Comparison]]:
    """Comparisons with published values, or those between rows, by name; each name has one entry a metric."""
    groups: dict[str, list[Comparison]] = {}
    for comparison in report.comparisons:
        if (comparison.second is None) == published:
            groups.setdefault(comparison_name(comparison, report), []).append(comparison)
    return groups


def shared_verdict(report: Report) -> str | None:
    """The sentence that holds for all comparisons with published values, when none of them was possible."""
    texts = {verdict_text(c) for c in report.comparisons if c.second is None and c.verdict.outcome != "not run"}
    return texts.pop() if len(texts) == 1 and next(iter(texts)).startswith("not comparable") else None


def verdict_text(comparison: Comparison) -> str:
    """ "equivalent", "not comparable: scale ...", "inconclusive: n = 1", "not run"."""
    verdict = comparison.verdict
    return (
        verdict.outcome
        if verdict.difference or verdict.outcome == "not run"
        else f"{verdict.outcome}: {verdict.reason}"
    )


def verdict_detail(comparison: Comparison) -> str:
    """Difference, its interval, the margin and how the difference was taken; empty where there is none."""
    found, metric = comparison.verdict.difference, comparison.metric
    if found is None:
        return ""
    unit = "points" if is_accuracy(metric) else "nats"
    margin = difference(comparison.margin, metric).lstrip("+").rstrip("0").rstrip(".")
    told = f"{difference(found.mean, metric)} {unit} ({interval_words(found, metric)})"
    return f"{told}, margin ±{margin}; {comparison.verdict.reason}"


def interval_words(found: Difference, metric: str) -> str:
    """The interval of a difference, and whether it leaves room for none."""
    ends = f"{difference(found.low, metric)} to {difference(found.high, metric)}"
    return f"{100 * found.level:g} % CI {ends}" + ", which excludes 0" * excludes_zero(found)


RECOUNT_HEAD = ["run", "figure", "recorded, images", "counted in predictions.npz", "of"]
RECOUNT_NOTE = (
    "These runs were recorded before accuracy had one rule: val accuracies took classes whose bfloat16 logits tie in "
    "another order than predictions.npz. The tables show the recorded figures; counted again, these differ. Epochs "
    "before the last cannot be counted again."
)


def recount_cells(recount: Recount) -> list[str]:
    """One figure in the order of RECOUNT_HEAD."""
    return [recount.run, recount.figure, *(f"{n:,}" for n in (recount.recorded, recount.counted, recount.images))]


REMOVAL_HEAD = [
    "run", "layers", "clamp value", "val loss with", "val loss without", "val accuracy with", "val accuracy without",
    "changed predictions", "clamped fraction", "largest |activation|",
]  # fmt: skip


def removal_cells(removal: Removal) -> list[str]:
    """One run's clamp removal in the order of REMOVAL_HEAD."""
    figures = removal.figures
    assert figures is not None and removal.images is not None, "only for runs with a clamp"
    return [
        removal.run or "",
        str(figures["layers"]),
        f"{figures['clamp_value']:g}",
        f"{figures['with']['val_loss']:.4f}",
        f"{figures['without']['val_loss']:.4f}",
        figure(figures["with"]["val_top1"], "top1"),
        figure(figures["without"]["val_top1"], "top1"),
        f"{figures['changed_predictions']:,} of {removal.images:,}",
        f"{figures['clamped_fraction']:.2e}" if figures["clamped_fraction"] else "0",
        f"{figures['max_abs_activation']:.3g}",
    ]


def departure_cells(departure: Departure, report: Report) -> list[str]:
    """Setting, published value, this run's value; says for which rows and what the note adds."""
    labels = {row.normalizer: row.label for row in report.rows}
    rows = f" ({', '.join(labels.get(n, n) for n in departure.normalizers)})" if departure.normalizers else ""
    note = f" ({departure.note})" if departure.note else ""
    return [departure.name + rows, plain(departure.published) + note, plain(departure.actual)]


def environments(provenance: Sequence[Provenance]) -> list[tuple[list[str], dict[str, str]]]:
    """Runs that share commit, software and hardware, with these as words."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for run in provenance:
        versions = ", ".join(f"{name} {version}" for name, version in run.versions.items()) or "unknown"
        groups.setdefault((run.commit, versions, run.hardware, run.world_size), []).append(run.run)
    names = ("commit", "versions", "hardware", "processes")
    return [(runs, dict(zip(names, values, strict=True))) for values, runs in groups.items()]


RUN_HEAD = ["run", "status", "images/s", "wall time", "resumed", "parameters (sha256)", "command"]


def run_cells(run: Provenance) -> list[str]:
    """One run in the order of RUN_HEAD."""
    speed = "unknown" if run.images_per_second is None else f"{run.images_per_second:,.0f}"
    resumed = "unknown" if run.resumed is None else str(run.resumed)
    wall = "unknown" if run.wall_seconds is None else duration(run.wall_seconds)
    sha = run.parameters_sha256[:12]
    return [run.run, run.status, speed, wall, resumed, sha, run.command]
