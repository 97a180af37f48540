"""The study's figures: a swept key, clamps over training, and the summary for the README."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from onlinenorm.report import words
from onlinenorm.report.ablation import CLAMP_KEY, Ablation, Point, number, swept, value_of
from onlinenorm.report.clamps import course
from onlinenorm.report.curves import STYLE
from onlinenorm.report.runs import Run, milestones
from onlinenorm.report.spec import ReportSpec
from onlinenorm.report.table import Report

_DECADE = 0.25  # zeros on a logarithmic axis are drawn this many decades above its lower end
COLUMNS = 4  # of studies side by side in one figure


def draw_ablation(ablation: Ablation) -> bytes:
    """PNG: last accuracy and loss against the swept value: a point a seed, lines through means, diverged runs."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
        for axis, metric in zip(axes, ("last_top1", "last_loss"), strict=True):
            ablation_panel(axis, ablation, metric)
        figure.suptitle("\n(".join(ablation.heading.rsplit(" (", 1)), fontsize=12, fontweight="bold")
        handles, labels = _unique(axes)
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
        return _png(figure)


def ablation_panel(axis: Axes, ablation: Ablation, metric: str) -> None:
    """One metric against the swept value."""
    places, label = positions(ablation.values, ablation.key)
    factor = 100 if words.is_accuracy(metric) else 1
    series: dict[str, list[Point]] = {}
    for point in ablation.points:
        series.setdefault(point.series, []).append(point)
    axis.set_ylim(*_limits(ablation, metric))
    for place, (name, points) in enumerate(series.items()):
        points = sorted(points, key=lambda p: places[p.value])
        look = {"color": points[0].colour, "zorder": 3 + place}
        reached = [p for p in points if p.n]
        means = [factor * p.summaries[metric].mean for p in reached]
        alike = [other for other in series if series[other][0].colour == points[0].colour]
        style = {
            "linestyle": ("-", "--", "-.", ":")[alike.index(name) % 4]
        }  # series of one normalizer share its colour
        axis.plot([places[p.value] for p in reached], means, marker="o", label=name, linewidth=1.8, **style, **look)
        for p in reached:
            axis.plot(
                [places[p.value]] * p.n, [factor * v for v in p.figures[metric]], ".", markersize=5, alpha=0.5, **look
            )
        for p in points:
            if p.tally.diverged:
                x = places[p.value] + 0.06 * (place - (len(series) - 1) / 2) * _step(places)
                where = {"transform": axis.get_xaxis_transform(), "clip_on": False}
                end = 0.05 if words.is_accuracy(metric) else 0.95
                axis.plot([x], [end], "x", markersize=9, markeredgewidth=2.2, color=p.colour, **where, label="diverged")
    axis.set_xticks(list(places.values()), list(places))
    axis.set_xlabel(f"{ablation.name}{label}")
    axis.set_ylabel(f"{words.METRIC_NAMES[metric]} ({'%' if factor == 100 else 'nats'})")
    if ablation.published in places:
        axis.axvline(
            places[ablation.published], color="#a8a8a8", linewidth=1.2, linestyle=":", zorder=1, label="published"
        )


def positions(values: Sequence[str], key: str) -> tuple[dict[str, float], str]:
    """Where values stand on the axis, and words about its scale; what is no number stands to the right of the numbers.

    Decay factors stand by 1 / (1 - alpha), the number of samples they remember; positive numbers that span a factor of
    four or more stand by their logarithm.
    """
    numbers = {value: found for value in values if (found := number(value)) is not None}
    size, scale = dict(numbers), ""
    if numbers and "alpha" in key and all(0 <= v < 1 for v in numbers.values()):
        size, scale = {k: -np.log10(1 - v) for k, v in numbers.items()}, ", by 1/(1 − value) on a log scale"
    elif numbers and min(numbers.values()) > 0 and max(numbers.values()) >= 4 * min(numbers.values()):
        size, scale = {k: np.log10(v) for k, v in numbers.items()}, ", log scale"
    step = _step(size)
    right = max(size.values(), default=0.0)
    others = [value for value in values if value not in numbers]
    return {
        **{k: float(v) for k, v in size.items()},
        **{w: float(right + step * (i + 1)) for i, w in enumerate(others)},
    }, scale


def _step(places: Mapping[str, float]) -> float:
    ordered = sorted(places.values())
    return float(np.mean(np.diff(ordered))) if len(ordered) > 1 else 1.0


def _limits(ablation: Ablation, metric: str) -> tuple[float, float]:
    """Axis range around all points, with a strip for the crosses of diverged runs.

    A loss beyond four times the median is left out, rather than flatten the others.
    """
    factor = 100 if words.is_accuracy(metric) else 1
    values = [factor * value for point in ablation.points for value in point.figures[metric]]
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    if not words.is_accuracy(metric):
        high = min(high, 4 * float(np.median(values)))
    room = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    strip = 2 * room if any(point.tally.diverged for point in ablation.points) else 0.0
    return (low - room - strip, high + room) if words.is_accuracy(metric) else (low - room, high + room + strip)


def clamp_panels(studies: Mapping[str, Sequence[Run]]) -> dict[str, list[Run]]:
    """Studies whose clamps are drawn: those over normalizers, and the ablation of the clamp value."""
    shown = {}
    for name, runs in studies.items():
        keys = {key for run in runs for key in swept(run)}
        mine = [run for run in runs if course(run)]
        if mine and (not keys or keys == {CLAMP_KEY}):
            shown[name] = mine
    return shown


def draw_clamping(studies: Mapping[str, Sequence[Run]], titles: Mapping[str, str]) -> bytes | None:
    """PNG: clamped fraction above largest activation against epoch, a study a pair, a line a run; None without data."""
    shown = clamp_panels(studies)
    if not shown:
        return None
    columns = min(len(shown), COLUMNS)
    bands = -(-len(shown) // columns)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            2 * bands, columns, figsize=(max(7.0, 5.2 * columns), 8.2 * bands), squeeze=False, layout="constrained"
        )
        for axis in axes[-2:, len(shown) - columns * (bands - 1) :].flat:
            axis.set_visible(False)
        for i, (name, runs) in enumerate(shown.items()):
            band, column = divmod(i, columns)
            fraction_panel(axes[2 * band, column], runs)
            largest_panel(axes[2 * band + 1, column], runs)
            axes[2 * band, column].set_title(titles.get(name, name), fontsize=11)
        figure.suptitle(
            "Activation clamps over training (dotted: the learning rate drops)", fontsize=13, fontweight="bold"
        )
        return _png(figure)


def _coloured(runs: Sequence[Run]) -> list[tuple[Run, str, Any]]:
    """(run, clamp value, colour), a colour a clamp value."""
    values = sorted({value_of(run, CLAMP_KEY) for run in runs}, key=lambda v: number(v) or 0.0)
    colours = ["#0072B2"] if len(values) == 1 else plt.get_cmap("plasma")(np.linspace(0, 0.85, len(values)))
    found = [(run, value_of(run, CLAMP_KEY)) for run in runs]
    return [(run, v, colours[values.index(v)]) for run, v in sorted(found, key=lambda pair: values.index(pair[1]))]


def fraction_panel(axis: Axes, runs: Sequence[Run]) -> None:
    """Clamped fraction against epoch on a logarithmic axis, zeros at its foot."""
    everything = np.concatenate([run.clamping["clamped_fraction"] for run in runs])
    positive = everything[everything > 0]
    floor = 10 ** np.floor(np.log10(positive.min()) - 0.5) if positive.size else 1e-9
    foot = floor * 10 ** (-1 + _DECADE)
    labelled = set()
    for run, value, colour in _coloured(runs):
        fractions = run.clamping["clamped_fraction"]
        label = None if value in labelled else f"clamp value {value}"
        labelled.add(value)
        drawn = np.where(fractions == 0, foot, fractions)
        axis.plot(run.clamping["epoch"], drawn, color=colour, linewidth=1.3, alpha=0.85, label=label, zorder=3)
        zeros = fractions == 0
        axis.plot(run.clamping["epoch"][zeros], drawn[zeros], "o", color=colour, markersize=4, zorder=4)
    axis.set_yscale("log")
    top = positive.max() * 3 if positive.size else 1.0
    if (everything == 0).any():
        axis.set_ylim(floor / 10, top)
        ticks = [t for t in 10.0 ** np.arange(np.log10(floor), 1) if t <= top]
        axis.set_yticks([foot, *ticks], ["0", *(f"$10^{{{round(np.log10(t))}}}$" for t in ticks)])
        axis.axhline(floor, color="#c8c8c8", linewidth=0.9, zorder=1)
    axis.minorticks_off()
    axis.set_ylabel("clamped fraction of activations")
    _epochs(axis, runs)
    if labelled:
        axis.legend(framealpha=0.85, edgecolor="none", fontsize=9)


def largest_panel(axis: Axes, runs: Sequence[Run]) -> None:
    """Largest activation before the clamp against epoch, with the clamp values."""
    for run, value, colour in _coloured(runs):
        axis.plot(run.clamping["epoch"], run.clamping["max_abs_activation"], color=colour, linewidth=1.3, alpha=0.85)
        axis.axhline(float(value), color=colour, linewidth=1.0, linestyle="--", alpha=0.7)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.minorticks_off()
    axis.set_ylabel("largest |activation| (dashed: clamp value)")
    _epochs(axis, runs)


def _epochs(axis: Axes, runs: Sequence[Run]) -> None:
    axis.set_xlabel("epoch")
    last = max(run.epochs_planned or 1 for run in runs)
    axis.set_xlim(0, last + 0.4)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))
    for milestone in {m for run in runs for m in milestones(run) if m < last}:
        axis.axvline(milestone, color="#a8a8a8", linewidth=0.9, linestyle=":", zorder=1)


def accuracy_panel(axis: Axes, report: Report, runs: Sequence[Run]) -> None:
    """Best validation accuracy by normalizer: a point a seed, a bar at the mean."""
    rows = [row for row in report.rows if row.tally.runs]
    for place, row in enumerate(reversed(rows)):
        values = [100 * run.value("best_top1") for run in runs if run.finished and run.normalizer == row.normalizer]
        axis.plot(values, [place] * len(values), "o", color=row.colour, alpha=0.6, markersize=6, zorder=3)
        if values:
            axis.plot([np.mean(values)] * 2, [place - 0.3, place + 0.3], color=row.colour, linewidth=2.5, zorder=4)
    labels = []
    for row in reversed(rows):
        name = f"{row.label} (n = {row.n})".replace(" (", "\n(", 1)
        labels.append("\n".join(filter(None, [name, *row.tally.mark.split(", ")])))
    axis.set_yticks(range(len(rows)), labels)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.set_xlabel("best val accuracy (%)")


def cost_panel(axis: Axes, rows: pd.DataFrame, spec: ReportSpec) -> None:
    """Milliseconds a step by normalizer in one setting."""
    rows = rows[::-1]
    shown = [spec.row(name) for name in rows["normalizer"]]
    bars = axis.barh(range(len(rows)), rows["milliseconds"], color=[row.colour for row in shown], height=0.6)
    axis.bar_label(bars, fmt="%.2f", padding=3)
    axis.set_yticks(range(len(rows)), [row.label.replace(" (", "\n(") for row in shown])
    axis.margins(x=0.15)
    axis.set_xlabel(f"ms a step, ResNet-50, 224 px\n{words.describe(next(rows.itertuples()))}", fontsize=9)


def draw_overview(panels: Mapping[str, Callable[[Axes], Any]]) -> bytes:
    """PNG of up to four panels by title, two in a row."""
    lines = (len(panels) + 1) // 2
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            lines, min(2, len(panels)), figsize=(13, 4.6 * lines), squeeze=False, layout="constrained"
        )
        for axis, (title, draw) in zip(axes.flat, panels.items(), strict=False):
            draw(axis)
            axis.set_title(title, fontsize=12)
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
        return _png(figure)


def _unique(axes: Sequence[Axes]) -> tuple[list, list[str]]:
    seen: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            seen.setdefault(label, handle)
    return list(seen.values()), list(seen)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()
