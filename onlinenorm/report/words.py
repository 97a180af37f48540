"""Numbers as words, and the columns of a report's tables: what a cell shows of a row, whoever draws it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from onlinenorm.report import benchmarks
from onlinenorm.report.ablation import Ablation
from onlinenorm.report.settings import ReportSpec
from onlinenorm.report.statistics import Difference, Summary, Verdict, excludes_zero, spreads
from onlinenorm.report.tables import COMPARED_METRICS, Report, plain
from onlinenorm.text import duration

METRIC_NAMES = {
    "best_loss": "best val loss",
    "best_top1": "best val accuracy",
    "last_loss": "last epoch val loss",
    "last_top1": "last epoch val accuracy",
}
COMPARED = [METRIC_NAMES[metric] for metric in COMPARED_METRICS]
DASH = "–"
Columns = Mapping[str, Callable[[Any], object]]  # heads of a table's columns, and what stands below them for a row


@dataclass(frozen=True)
class Cell:
    """A table cell: the figure, and in `detail` its interval, range or epoch."""

    main: str
    detail: str = ""

    def __str__(self) -> str:
        return self.main + (f"<br>{self.detail}" if self.detail else "")


# Numbers


def is_accuracy(metric: str) -> bool:
    return metric.endswith("top1")


def unit(metric: str) -> str:
    return "points" if is_accuracy(metric) else "nats"


def figure(value: float, metric: str, digits: int | None = None) -> str:
    """0.763 as "76.30 %" for an accuracy, 0.93 as "0.930" for a loss in nats."""
    if is_accuracy(metric):
        return f"{100 * value:.{2 if digits is None else digits}f} %"
    return f"{value:.{3 if digits is None else digits}f}"


def without_unit(value: float, metric: str) -> str:
    return figure(value, metric).removesuffix(" %")


def mean_and_spread(summary: Summary | None, metric: str) -> str:
    """Mean +- sd with its unit; the value alone for one seed; a dash for none."""
    if summary is None:
        return DASH
    if summary.sd is None:
        return figure(summary.mean, metric)
    return f"{without_unit(summary.mean, metric)} ± {figure(summary.sd, metric)}"


def difference(value: float, metric: str) -> str:
    """A signed difference: points for accuracies, nats for losses."""
    return f"{100 * value:+z.2f}" if is_accuracy(metric) else f"{value:+z.4f}"


def ends(found: Difference, metric: str) -> str:
    return f"{difference(found.low, metric)} to {difference(found.high, metric)}"


def interval_words(found: Difference, metric: str) -> str:
    """The interval of a difference, and whether it leaves room for none."""
    return f"{100 * found.level:g} % CI {ends(found, metric)}" + ", which excludes 0" * excludes_zero(found)


def margin_words(margin: float, metric: str) -> str:
    return difference(margin, metric).lstrip("+").rstrip("0").rstrip(".")


def fraction(value: float, digits: int = 1) -> str:
    return f"{value:.{digits}e}" if value else "0"


def span(values: Sequence[float], show: Callable[[float], str] = fraction) -> str:
    """Lowest to highest; one value where they print alike; a dash for none."""
    if not len(values):
        return DASH
    low, high = show(min(values)), show(max(values))
    return low if low == high else f"{low} to {high}"


def markdown_table(head: Sequence[str], body: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def cells(columns: Columns, rows: pd.DataFrame) -> list[list[str]]:
    return [[str(show(row)) for show in columns.values()] for row in rows.itertuples()]


def table(columns: Columns, rows: pd.DataFrame) -> str:
    """A Markdown table of these rows."""
    return markdown_table(list(columns), cells(columns, rows))


# A table over normalizers


def published_cell(row: Any, metric: str) -> Cell:
    """Published value with the digits it was printed with."""
    if row.published is None:
        return Cell(DASH)
    return Cell(figure(getattr(row.published, metric), metric, digits=1 if is_accuracy(metric) else 2))


def reproduced_cell(row: Any, metric: str, confidence: float = 0.95) -> Cell:
    """Mean +- sd with interval and range; for n = 1 the value and its epoch; for n = 0 "not run" or the progress.

    Each says of how many attempts it is, where some are left out.
    """
    summary, mark = row.summaries[metric], [row.tally.mark] * bool(row.tally.mark)
    if summary is None:
        return Cell("; ".join([*row.unfinished, *row.attempts]) if row.unfinished else "not run")
    if summary.n == 1:
        return Cell(figure(summary.mean, metric), "; ".join([f"epoch {row.epochs[metric][0]}", *mark]))
    spread = [f"min–max {without_unit(summary.minimum, metric)}–{without_unit(summary.maximum, metric)}"]
    if summary.low is not None:
        low, high = without_unit(summary.low, metric), without_unit(summary.high, metric)
        spread.insert(0, f"{100 * confidence:g} % CI {low} to {high}")
    return Cell(mean_and_spread(summary, metric), "; ".join([*spread, *mark]))


def seeds_cell(row: Any) -> Cell:
    """n, and what became of the runs and attempts that are not among the finished ones."""
    return Cell(str(len(row.seeds)), "; ".join([*row.unfinished, *row.attempts]) if row.seeds else row.tally.mark)


def main_columns(report: Report) -> Columns:
    """Published against reproduced."""
    here = f"here: {report.scale_short}"
    columns: dict[str, Callable[[Any], object]] = {
        "Normalizer (error compensation)": lambda row: row.label,
        "n": seeds_cell,
    }

    def published(metric: str) -> Callable[[Any], Cell]:
        return lambda row: published_cell(row, metric)

    def reproduced(metric: str) -> Callable[[Any], Cell]:
        return lambda row: reproduced_cell(row, metric, report.confidence)

    for metric in ("best_loss", "best_top1"):
        columns[f"{METRIC_NAMES[metric]}, published: {report.published_short}"] = published(metric)
        columns[f"{METRIC_NAMES[metric]}, {here}"] = reproduced(metric)
    return columns | {f"{METRIC_NAMES[metric]}, {here}": reproduced(metric) for metric in ("last_loss", "last_top1")}


def main_table(report: Report) -> str:
    return table(main_columns(report), report.rows)


def verdict_table(report: Report, published: bool, title: str) -> str:
    """A line a comparison, a column a metric."""
    groups = comparison_groups(report, published).items()
    body = [[name, *(Cell(f"**{verdict_text(c)}**", verdict_detail(c)) for c in group)] for name, group in groups]
    return markdown_table([title, *COMPARED], body)


def labels(report: Report) -> dict[str, str]:
    return dict(zip(report.rows["normalizer"], report.rows["label"], strict=True))


def comparison_groups(report: Report, published: bool) -> dict[str, list[Any]]:
    """Comparisons with published values, or those between rows, by name; each name has one entry a metric.

    A name has the two sides in the order of the subtraction.
    """
    groups: dict[str, list[Any]] = {}
    known = labels(report) | {None: "published"}
    for comparison in report.comparisons[report.comparisons["second"].isna() == published].itertuples():
        name = " − ".join(known.get(side, side) for side in (comparison.first, comparison.second))
        groups.setdefault(name, []).append(comparison)
    return groups


def shared_verdict(report: Report) -> str | None:
    """The sentence that holds for all comparisons with published values, when there is no difference in any."""
    against = [c for group in comparison_groups(report, published=True).values() for c in group]
    texts = {verdict_text(c) for c in against if c.verdict.outcome != "not run"}
    if any(c.verdict.difference for c in against):
        return None
    return texts.pop() if len(texts) == 1 and next(iter(texts)).startswith("not comparable") else None


def verdict_text(comparison: Any) -> str:
    """`verdict_words` of a comparison."""
    return verdict_words(comparison.verdict)


def verdict_words(verdict: Verdict) -> str:
    """ "equivalent", "not comparable: scale ...", "inconclusive: n = 1", "not run"."""
    plain = verdict.difference or verdict.outcome == "not run"
    return verdict.outcome if plain else f"{verdict.outcome}: {verdict.reason}"


def verdict_detail(comparison: Any) -> str:
    """Difference, its interval, the margin and how the difference was taken; empty where there is none."""
    found, metric = comparison.verdict.difference, comparison.metric
    if found is None:
        return ""
    told = f"{difference(found.mean, metric)} {unit(metric)} ({interval_words(found, metric)})"
    return f"{told}, margin ±{margin_words(comparison.margin, metric)}; {comparison.verdict.reason}"


RECOUNTS: Columns = {
    "run": lambda found: found.run,
    "figure": lambda found: found.figure,
    "recorded, images": lambda found: f"{found.recorded:,}",
    "counted in predictions.npz": lambda found: f"{found.counted:,}",
    "of": lambda found: f"{found.images:,}",
}
RUNS: Columns = {
    "run": lambda run: run.run,
    "status": lambda run: run.status,
    "images/s": lambda run: "unknown" if run.images_per_second is None else f"{run.images_per_second:,.0f}",
    "wall time": lambda run: "unknown" if run.wall_seconds is None else duration(run.wall_seconds),
    "resumed": lambda run: "unknown" if run.resumed is None else run.resumed,
    "parameters (sha256)": lambda run: run.parameters_sha256[:12],
    "command": lambda run: run.command,
}
RUNS_IN_MARKDOWN = {**RUNS, "command": lambda run: f"`{run.command}`"}


def departure_columns(report: Report) -> Columns:
    """Setting, published value, this run's value; says for which rows and what the note adds."""
    known = labels(report)

    def rows(departure) -> str:
        return f" ({', '.join(known.get(n, n) for n in departure.normalizers)})" if departure.normalizers else ""

    return {
        "setting": lambda departure: departure.name + rows(departure),
        "published": lambda departure: plain(departure.published) + (f" ({departure.note})" if departure.note else ""),
        "here": lambda departure: plain(departure.actual),
    }


def environments(provenance: pd.DataFrame) -> list[tuple[list[str], dict[str, str]]]:
    """Runs that share commit, software and hardware, with these as words."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for run in provenance.itertuples():
        versions = ", ".join(f"{name} {version}" for name, version in run.versions.items()) or "unknown"
        groups.setdefault((run.commit, versions, run.hardware, run.world_size), []).append(run.run)
    names = ("commit", "versions", "hardware", "processes")
    return [(runs, dict(zip(names, values, strict=True))) for values, runs in groups.items()]


# Swept keys, pairs of runs


def ablation_columns(ablation: Ablation) -> Columns:
    """Value x series: n, diverged runs, and mean +- sd of last and best figures."""

    def spread(metric: str) -> Callable[[Any], str]:
        return lambda point: mean_and_spread(point.summaries[metric], metric)

    columns: dict[str, Callable[[Any], object]] = {
        ablation.name: lambda point: point.value + (" (published)" if point.value == ablation.published else ""),
        "normalizer": lambda point: point.series,
        "n": lambda point: "; ".join([str(len(point.seeds)), *point.unfinished]),
        "diverged": lambda point: point.tally.mark if point.tally.attempts else point.tally.diverged,
    }
    for metric in ("last_top1", "last_loss", "best_top1", "best_loss"):
        columns[METRIC_NAMES[metric]] = spread(metric)
    return columns


def ablation_table(ablation: Ablation) -> str:
    return table(ablation_columns(ablation), ablation.points)


def interval(found: Difference | None, n: int) -> str:
    """Its ends in points, or how many there are of what there are too few."""
    if found is None:
        return f"n = {n}"
    return ends(found, "top1") if spreads(found) else "no spread"


def pooled_columns(spec: ReportSpec) -> Columns:
    level = f"{100 * spec.confidence:g} %"

    def share(value: float | None) -> str:
        return DASH if value is None else f"{value:.2%}"

    return {
        "image by image, last epoch": lambda p: f"{spec.row(p.first).label} − {spec.row(p.second).label}",
        "seeds": lambda p: "; ".join([str(len(p.seeds)), *p.marks]),
        "only the first right, images a seed": lambda p: f"{p.only_first:,.1f}",
        "only the second right": lambda p: f"{p.only_second:,.1f}",
        "difference, points": lambda p: difference(p.over_images.mean, "top1"),
        f"{level} CI over seeds": lambda p: interval(p.over_seeds, len(p.seeds)),
        f"{level} CI over images": lambda p: interval(p.over_images, p.images),
        "same class": lambda p: share(p.same),
        "same class, two seeds of the first": lambda p: share(p.same_first),
        "two seeds of the second": lambda p: share(p.same_second),
        "McNemar's p, seed by seed": lambda p: ", ".join(f"{value:.2g}" for value in p.p_values),
    }


# Benchmarks


def describe(case: Any) -> str:
    """A setting in words."""
    optimizer = ", with optimizer" if case.optimizer else ""
    return f"batch {case.batch}, {case.backend} backend, {case.mode}, {case.dtype}{optimizer}"


def step_time(row: Any) -> str:
    """Milliseconds of a step, and half the spread of repeats, where it was recorded."""
    spread = row["repeat_spread"]
    return f"{row['milliseconds']:.2f}" + ("" if pd.isna(spread) else f" ± {spread / 2:.1%}")


def origin(results: Mapping[str, Any]) -> str:
    """Where a recorded benchmark comes from, in one line."""
    commit = f"commit {results['commit']}"
    return f"torch {results['torch']}, triton {results['triton']}, {commit}; `{results['command']}`"


def cost_columns(spec: ReportSpec) -> Columns:
    def beyond(row: Any, value: float, form: str) -> str:
        return DASH if row.normalizer == benchmarks.BARE or pd.isna(value) else format(value, form)

    return {
        "setting": describe,
        "normalizer": lambda row: spec.row(row.normalizer).label,
        "ms a step": lambda row: step_time(row._asdict()),
        "images/s": lambda row: f"{row.images_per_second:,.0f}",
        "peak memory, GiB": lambda row: f"{row.peak_memory_gib:.2f}",
        "time over no compensation": lambda row: beyond(row, row.over, "+.1%"),
        "memory over it, GiB": lambda row: beyond(row, row.memory_over, "+.2f"),
    }


def cost_sentence(case: Any) -> str:
    """Is clamping cheaper than layer scaling, in one setting of both?"""
    verdict = "clamping and layer scaling are equal within the spread of repeats"
    if abs(case.gap) > case.noise:
        verdict = f"clamping is {'cheaper' if case.gap > 0 else 'dearer'} than layer scaling"
    numbers = f"{case.milliseconds_clamp:.2f} against {case.milliseconds_scaling:.2f} ms a step"
    memory = f"{case.peak_memory_gib_clamp:.2f} against {case.peak_memory_gib_scaling:.2f} GiB"
    beyond = f"; over no compensation they cost {case.over_clamp:+.1%} and {case.over_scaling:+.1%}"
    return f"{describe(case)}: {verdict} ({numbers}, {memory}{'' if pd.isna(case.over_clamp) else beyond})"


def cost_sentences(results: Mapping[str, Any], trained: bool = False) -> list[str]:
    found = benchmarks.clamping_against_scaling(benchmarks.steps(results), trained)
    return [cost_sentence(case) for case in found.itertuples()]
