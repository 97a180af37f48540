"""What a folder of studies shows, in sentences whose every number comes from run data; what was not run says so."""

import re
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from onlinenorm.report import words
from onlinenorm.report.ablation import Ablation, clamp_removals, courses, of_clamped
from onlinenorm.report.runs import Runs
from onlinenorm.report.settings import ReportSpec, StudySpec
from onlinenorm.report.statistics import EQUIVALENT, INCONCLUSIVE, NOT_RUN, excludes_zero
from onlinenorm.report.tables import Report, Tally, recount, tally

Found = Mapping[str, tuple[Report | Ablation, Runs, Any]]


def table_lines(report: Report, runs: Runs, spec: ReportSpec, side_by_side: int = 1) -> list[str]:
    """Rows over seeds, and the verdicts between them; `side_by_side` runs shared a machine."""
    main, others = _parted(report)
    lines = [f"best val accuracy and loss {_rows(main)}."] if main else []
    if others:
        lines.append(f"{'The other normalizers: ' if main else ''}{_rows(others)}.")
    judged = _judged(report)
    if judged:
        margins = {c.metric: c.margin for group in judged.values() for c in group}
        allowed = []
        for metric, value in margins.items():
            number = words.difference(value, metric).lstrip("+").rstrip("0").rstrip(".")
            unit = "point" + "s" * (number != "1") if words.is_accuracy(metric) else "nats"
            allowed.append(f"{number} {unit}")
        told = "; ".join(f"{name}: {', '.join(map(_verdict, group))}" for name, group in judged.items())
        lines.append(f"Verdicts by the margins fixed before the runs ({' and '.join(allowed)}): {told}.")
    elif rates := [f"{_rate(row, runs)} ({row.label})" for row in report.rows.itertuples() if row.seeds]:
        shared = f", {side_by_side} runs side by side" if side_by_side > 1 else ""
        lines.append(
            f"One seed a row gives no verdict ({INCONCLUSIVE}). Training ran at {', '.join(rates)} images/s{shared}."
        )
    return lines


def summary_line(report: Report) -> str:
    """Accuracy of the main rows and the outcomes of their comparisons, in one sentence."""
    main, others = _parted(report)
    rows = [f"{row.label} {_figure(row, 'best_top1')}{_mark(row.tally)}" for row in main or others]
    left_out = [f"{row.label}: {row.tally.mark}" for row in others if main and row.tally.mark]
    rows += [f"of the others {', '.join(left_out)}"] if left_out else []
    return "; ".join([f"best val accuracy {', '.join(rows)}", *_outcomes(report)]) + "."


def _outcomes(report: Report) -> list[str]:
    """What came of each comparison between rows, the same for several metrics said once."""
    told = []
    for name, group in _judged(report).items():
        outcomes = [c.verdict.outcome if c.verdict.difference else words.verdict_text(c) for c in group]
        figures = [_difference(c) for c in group]
        if len(set(outcomes)) == 1:
            parts = [outcomes[0] + (f" ({', '.join(figures)})" if all(figures) else "")]
        else:
            parts = [o + (f" ({figure})" if figure else "") for o, figure in zip(outcomes, figures, strict=True)]
        told.append(f"{name} {', '.join(parts)}")
    return told


def _parted(report: Report) -> tuple[list[Any], list[Any]]:
    """Rows with published values that have runs, and the others."""
    main = [row for row in report.rows.itertuples() if row.published and (row.seeds or row.unfinished)]
    return main, [row for row in report.rows.itertuples() if not row.published]


def _judged(report: Report) -> dict[str, list[Any]]:
    """Anys between rows by name, where one of the two has several seeds and neither was left out."""
    n = {row.normalizer: len(row.seeds) for row in report.rows.itertuples()}
    groups = words.comparison_groups(report, published=False)
    told = {
        name: [c for c in group if c.verdict.outcome != NOT_RUN and max(n.get(c.first, 0), n.get(c.second, 0)) > 1]
        for name, group in groups.items()
    }
    return {name: group for name, group in told.items() if group}


def recount_line(found: Found) -> str | None:
    """What accuracies of runs recorded by two rules are by one."""
    recounts = [recount(study.runs) for _, study, _ in found.values()]
    each_run = [list(of.itertuples()) for each in recounts for _, of in each.groupby("run", sort=False)]
    top1 = [[c for c in each if c.figure.endswith("top1")] for each in each_run]
    apart = [[abs(c.recorded - c.counted) for c in each if c.recorded != c.counted] for each in top1]
    if not any(apart):
        return None
    worst = max(max(each, default=0) for each in apart)
    return (
        f"**Accuracies by one rule**: the last ones of {sum(map(bool, apart))} of {len(top1)} runs here, which were "
        f"recorded before accuracy had one, differ from those counted in predictions.npz, by {worst} "
        f"image{'s' * (worst != 1)} at most (ties of bfloat16 logits; the tables name them)."
    )


def _details(scale_label: str, brief: bool) -> str:
    """What stands in the brackets of a scale's label: images, network, pixels, epochs; the last two only, if brief."""
    details = scale_label.rpartition(" (")[2].removesuffix(")")
    network, _, epochs = details.split(", ")[-3:]
    return f"{network}, {epochs}" if brief else details


def _rows(rows: Sequence[Any]) -> str:
    told = []
    for row in rows:
        figures = _figure(row, "best_top1", "best_loss") if row.seeds else "no figures"
        mark = [row.tally.mark] if row.seeds and row.tally.mark else []
        seeds = "; ".join([f"n = {len(row.seeds)}", *mark, *row.unfinished, *row.attempts])
        told.append(f"{row.label} {figures} ({seeds})")
    return ", ".join(told)


def _figure(row: Any, *metrics: str) -> str:
    """Mean and spread of each metric, else how the runs ended."""
    if not row.seeds:
        return "; ".join(row.unfinished)
    return " and ".join(words.mean_and_spread(row.summaries[metric], metric) for metric in metrics)


def _mark(counts: Tally) -> str:
    return f" ({counts.mark})" if counts.finished and counts.mark else ""


def _verdict(comparison: Any) -> str:
    found, metric = comparison.verdict.difference, comparison.metric
    name = "accuracy" if words.is_accuracy(metric) else "loss"
    if found is None:
        return f"{name} {words.verdict_text(comparison)}"
    diverged = f"; {comparison.verdict.reason}" if "diverged" in comparison.verdict.reason else ""
    interval = words.interval_words(found, metric)
    return f"{name} **{comparison.verdict.outcome}** ({_difference(comparison, bare=True)}, {interval}{diverged})"


def _difference(comparison: Any, bare: bool = False) -> str:
    """ "-0.41 points", "+0.0138 nats"; unless bare, with what keeps "equivalent" from being read as "equal"."""
    found, unit = comparison.verdict.difference, "points" if words.is_accuracy(comparison.metric) else "nats"
    if found is None:
        return ""
    apart = not bare and comparison.verdict.outcome == EQUIVALENT and excludes_zero(found)
    return f"{words.difference(found.mean, comparison.metric)} {unit}" + ", interval excludes 0" * apart


def _rate(row: Any, runs: Runs) -> str:
    mine = runs.runs[runs.runs["finished"] & (runs.runs["normalizer"] == row.normalizer)]
    rates = [results["images_per_second"] for results in mine["results"]]
    return f"{median(rates):,.0f}"


def paired_line(pooled: Any, spec: ReportSpec) -> str | None:
    """Agreement of networks image by image, beside that of two seeds; None for single seeds."""
    parts = []
    for p in pooled.itertuples():
        same = [f"{share:.1%}" for share in (p.same_first, p.same_second) if share is not None]
        if same:
            first, second = spec.row(p.first).label, spec.row(p.second).label
            parts.append(
                f"{first} and {second} on {p.same:.1%} of the images (two seeds of either: {' and '.join(same)})"
            )
    return f"The same class at the last epoch: {'; '.join(parts)}." if parts else None


def removal_line(studies: Mapping[str, Runs], brief: bool = False) -> str | None:
    """The claim: removing the clamp leaves validation identical; by study, or, if brief, over all runs."""
    every = clamp_removals(studies)
    if every.empty:
        return None
    changed = every["changed_predictions"].tolist()
    exact, total = changed.count(0), len(every)
    claim = (
        "**Removing the clamp** after training ([table](clamping.md)), claimed to leave validation identical, changed"
    )
    if brief:
        images = every["images"].tolist()
        percent = words.span([100 * count / of for count, of in zip(changed, images, strict=True)], "{:.1f}".format)
        return f"{claim} {percent} % of the predictions, and none in {exact} of {total} runs{_of_clamped(studies)}."
    parts = []
    for study, found in every.groupby("study", sort=False):
        counts = words.span(found["changed_predictions"].tolist(), "{:,}".format)
        worst = words.difference(max(found["top1"], key=abs), "top1")
        parts.append(
            f"{study}: {counts} of {found['images'].iloc[0]:,} predictions in {len(found)} "
            f"run{'s' * (len(found) > 1)}, accuracy {worst} points at most"
        )
    return f"{claim} no prediction in {exact} of {total} runs{_of_clamped(studies)} ({'; '.join(parts)})."


def _of_clamped(studies: Mapping[str, Runs]) -> str:
    """What runs with clamps came to, where not all of them finished at once."""
    return _mark(tally(of_clamped(studies)))


def course_line(studies: Mapping[str, Runs], brief: bool = False) -> str | None:
    """Does the clamped fraction go to 0 as the learning rate is annealed? By study, or, if brief, over all runs."""
    parts, total, ends, fallen, compared = [], 0, 0, 0, 0
    ended = courses(studies)
    for study, mine in ended[ended["finished"]].dropna(subset="last").groupby("study", sort=False):
        found = list(mine.itertuples())
        total += len(found)
        ends += sum(c.last == 0 for c in found)
        before = [c for c in found if c.before_drop == c.before_drop]
        compared += len(before)
        fallen += sum(c.last < c.before_drop for c in before)
        drop, last = (
            words.fraction(median(values))
            for values in ([c.before_drop for c in before] or [0], [c.last for c in found])
        )
        parts.append(
            f"{study}: median {drop} before the first drop, {last} at the end"
            if before
            else f"{study}: {last} at the end"
        )
    if not parts:
        return None
    studied = "" if brief else f" ({'; '.join(parts)})"
    return (
        "**The clamped fraction**, claimed to vanish as the learning rate is annealed, is lower at the end than "
        f"before the first drop in {fallen} of {compared} runs and exactly 0 in {ends} of {total}{_of_clamped(studies)}"
        f"{studied}."
    )


def ablation_line(ablation: Ablation, brief: bool = False) -> str:
    """Range of the last accuracy over the values, beside the spread of seeds unless brief; what diverged."""
    series: dict[str, list[Any]] = {}
    for point in ablation.points.itertuples():
        series.setdefault(point.series, []).append(point)
    parts = []
    for name, points in series.items():
        reached = [p for p in points if p.seeds]
        if not reached:
            parts.append(f"{name} finished nowhere")
            continue
        low, high = (pick(reached, key=lambda p: p.summaries["last_top1"].mean) for pick in (min, max))
        at = [
            f"{words.figure(p.summaries['last_top1'].mean, 'top1')} at {p.value}{_mark(p.tally)}" for p in (low, high)
        ]
        sds = [p.summaries["last_top1"].sd for p in reached if p.summaries["last_top1"].sd is not None]
        within = 100 * (sum(sd**2 for sd in sds) / len(sds)) ** 0.5 if sds else 0.0
        seeds = f", seeds at one value ± {within:.2f}" if sds and not brief else ""
        where = "every value" if len(reached) > 1 else low.value
        one = f"{words.figure(low.summaries['last_top1'].mean, 'top1')} at {where}{_mark(low.tally)}"
        parts.append(f"{name} {one}" if low is high else f"{name} {at[0]} to {at[1]}{seeds}")
    diverged = [
        f"{p.tally.diverged} of {p.tally.tries} ({p.value}, {p.series})"
        for p in ablation.points.itertuples()
        if p.tally.diverged
    ]
    unfinished = [
        f"{p.value}, {p.series}: {'; '.join(p.unfinished)}" for p in ablation.points.itertuples() if p.unfinished
    ]
    ends = [
        f"diverged: {', '.join(diverged) or 'none'}",
        *(["not finished: " + ", ".join(unfinished)] if unfinished else []),
    ]
    values = ", ".join(value + ("*" if value == ablation.published else "") for value in ablation.values)
    star = "; * published" if ablation.published in ablation.values else ""
    return f"last val accuracy over {values}{star}: {'; '.join(parts)}; {'; '.join(ends)}."


def cost_line(results: Mapping[str, Any] | None, brief: bool = False) -> str:
    """Is clamping less expensive than layer scaling? The first setting only, if brief."""
    sentences = words.cost_sentences(results, trained=True)[: 1 if brief else None] if results else []
    if not sentences:
        return "clamping against layer scaling: not measured here: `scripts/bench/training.py` on a GPU."
    return f"a training step of ResNet-50 at 224 px, {results['device']}: {'; '.join(sentences)} ([table](cost.md))."


def render_findings(
    found: Found, results: Mapping[str, Any] | None, spec: ReportSpec, picture: str | None, brief: bool = False
) -> str:
    """The findings as a Markdown list, or, with `brief`, a line a study; `picture` is the file name of the figure."""
    lines = []
    for name in sorted(found, key=lambda name: [*spec.studies, *found].index(name)):
        study = spec.studies.get(name) or StudySpec(name, "")
        made, runs, pooled = found[name]
        file = "ablation" if isinstance(made, Ablation) else "table1"
        if isinstance(made, Ablation):
            told = [ablation_line(made, brief), "" if brief else study.note]
        elif brief:
            told = [summary_line(made)]
        else:
            told = [*table_lines(made, runs, spec, study.parallel), study.note, paired_line(pooled, spec)]
        lines.append(f"**{study.title}** ([table]({name}/{file}.md); {_details(made.scale_label, brief)}): {told[0]}")
        lines += filter(None, told[1:])
    # Of ablations the table tells: values chosen to go wrong, and runs that other studies hold too.
    studies = {name: runs for name, (made, runs, _) in found.items() if not isinstance(made, Ablation)}
    lines += [line for line in (removal_line(studies, brief), course_line(studies, brief)) if line]
    if not brief:
        lines += filter(None, [recount_line(found)])
    lines.append(f"**Cost of error compensation**: {cost_line(results, brief)}")
    missing = [study for name, study in spec.studies.items() if name not in found]
    lines += [f"**{study.title}**: not run here: `{study.command}`" for study in missing]
    parts = ["\n".join(f"- {line}" for line in lines)]
    if brief:  # "OnlineNorm (layer scaling)" by what it is known by
        parts = [re.sub(r"OnlineNorm \(([^)]+)\)", r"\1", parts[0])]
    if picture:
        parts.append(f"![Accuracy by normalizer, clamped fraction over training, batch sizes, cost]({picture})")
    return "\n\n".join(parts) + "\n"
