"""Drawing: curves in the layout of the published Figure 3, swept keys, and the summary."""

import io
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from onlinenorm.report import words
from onlinenorm.report.ablation import Ablation
from onlinenorm.report.runs import Runs
from onlinenorm.report.settings import ReportSpec
from onlinenorm.report.swept import number
from onlinenorm.report.tables import Report

STYLE: Any = {
    "font.size": 11, "font.family": "DejaVu Sans", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#e4e4e4", "grid.linewidth": 0.8, "axes.axisbelow": True,
}  # fmt: skip
_FACTOR = {"loss": 1.0, "top1": 100.0}
_AXIS = {"loss": "loss (nats)", "top1": "top-1 accuracy (%)"}
_NESTED = 3  # rows whose curves are drawn in different widths
_LONG = 50  # letters of a name of which a legend has two side by side, not three
_CROWDED = 4  # more normalizers than this get train and val in panels of their own


def draw_curves(study: Runs, report: Report, narrow: bool = False) -> bytes:
    """PNG of loss and accuracy: train dashed, val solid, a colour a normalizer; thin seeds and bold mean for n > 1.

    Many normalizers have a band from the lowest to the highest seed in place of thin lines. Runs of ten epochs or more
    are shown again from the first drop of the learning rate on, where they differ least. Two columns of panels, or
    with `narrow` one column for small screens.
    """
    runs, epochs = study.runs, study.epochs[study.epochs["recorded"]]
    begun = runs[runs["epochs"] > 0]
    shown = list(report.rows[report.rows["normalizer"].isin(begun["normalizer"])].itertuples())
    crowded = len(shown) > _CROWDED
    splits: list[tuple[tuple[str, ...], int]] = [(("train",), 0), (("val",), 0)] if crowded else [(("train", "val"), 0)]
    done = max(runs["epochs"], default=0)
    if done >= 10 and (drops := [m for m in report.milestones if m < done - 1]):
        splits.append((("val",), drops[0]))
    panels = [(split, start, kind) for split, start in splits for kind in ("loss", "top1")]
    across, legend_columns = (1, 1) if narrow else (2, 3)
    entries = _legend(shown, report.milestones, legend_columns)
    if legend_columns > 2 and any(len(line) > _LONG for e in entries for line in str(e.get_label()).splitlines()):
        legend_columns = 2
        entries = _legend(shown, report.milestones, legend_columns)
    size = (12 / (2 if narrow else 1), 4.2 * len(panels) / across + 0.9 + 0.23 * len(entries) / legend_columns)
    last = max((run.planned or run.epochs for run in runs.itertuples()), default=1)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(len(panels) // across, across, figsize=size, squeeze=False, layout="constrained")
        for axis, (split, start, kind) in zip(axes.flat, panels, strict=True):
            for place, row in enumerate(shown):
                mine = begun[begun["normalizer"] == row.normalizer]
                for part in split:
                    curves = _curves(mine, epochs, f"{part}_{kind}")
                    _draw_row(axis, mine, curves, _FACTOR[kind], row.colour, part == "train", place, crowded)
            late = epochs[epochs["epoch"] > start]
            pool = np.concatenate([_FACTOR[kind] * late[f"{part}_{kind}"].to_numpy() for part in split])
            _dress(axis, pool, last, split, kind, report.milestones, start)
        label = "\n(".join(report.scale_label.rsplit(" (", 1))
        label = textwrap.fill(report.scale_label, 52) if narrow else label
        figure.suptitle(f"{report.title}: training curves\n{label}", fontsize=11 if narrow else 13, fontweight="bold")
        figure.legend(handles=entries, loc="outside lower center", ncols=legend_columns, frameon=False)
        return png(figure, dpi=130)


def _curves(runs: pd.DataFrame, epochs: pd.DataFrame, column: str) -> dict[str, pd.Series]:
    """Of each run, by folder, the column by epoch."""
    mine = epochs[epochs["folder"].isin(runs["folder"])]
    return {folder: of.set_index("epoch")[column] for folder, of in mine.groupby("folder", sort=False)}


def over_runs(curves: Sequence[pd.Series], how: Callable[..., np.ndarray]) -> pd.Series:
    """np.mean, np.min or np.max over curves at the epochs that all share."""
    shared = pd.concat(curves, axis=1, join="inner")
    return pd.Series(how(list(shared.to_numpy().T), axis=0), index=shared.index)


def _draw_row(
    axis: Axes, runs: pd.DataFrame, curves: Mapping[str, pd.Series], factor: float, colour: str, dashed: bool,
    place: int, crowded: bool,
) -> None:  # fmt: skip
    """All seeds of a normalizer; later rows are drawn wider and underneath, so that equal curves stay visible."""
    finished = [curves[folder] for folder in runs[runs["finished"]]["folder"]]
    several = len(finished) > 1
    look: dict[str, Any] = {"color": colour, "linestyle": (0, (4, 2)) if dashed else "-", "markersize": 5}
    look["markerfacecolor"] = "white" if dashed else colour
    bold = look | {"linewidth": 1.6 + 0.7 * (place if place < _NESTED else 0), "zorder": 4 - 0.1 * place}
    thin = look | {"linewidth": 0.8, "alpha": 0.45, "zorder": 2}
    band = crowded and several
    for run in runs.itertuples():
        if band and run.finished:
            continue
        curve, light = factor * curves[run.folder], several or not run.finished
        few = len(curve) == 1 or (len(curve) <= 5 and not light)
        axis.plot(curve, marker="o" if few else None, **(thin if light else bold))
    if several:
        mean = factor * over_runs(finished, np.mean)
        if band:
            low, high = (factor * over_runs(finished, how) for how in (np.min, np.max))
            axis.fill_between(mean.index, low, high, color=colour, alpha=0.15, linewidth=0, zorder=2)
        axis.plot(mean, marker="o" if len(mean) <= 5 else None, **bold)


def _dress(
    axis: Axes, pool: np.ndarray, last: int, splits: tuple[str, ...], kind: str, milestones: Sequence[int], start: int
) -> None:
    """Ranges, ticks and names of a panel that shows the epochs after `start`; `pool` has all values drawn."""
    low, high = _limits(pool[np.isfinite(pool)], kind)
    axis.set_ylim(low, high)
    margin = max(0.25, 0.02 * last)
    axis.set_xlim(start if start else 1 - margin if last < 20 else 0, last + margin)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=10, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axis.set_xlabel("epoch")
    name = " and ".join({"train": "train", "val": "validation"}[split] for split in splits)
    axis.set_ylabel(_AXIS[kind])
    after = f", from epoch {start + 1} on" if start else ""
    axis.set_title(f"{name} {'loss' if kind == 'loss' else 'accuracy'}{after}", fontsize=12)
    for milestone in (m for m in milestones if m < last):
        axis.axvline(milestone, color="#a8a8a8", linewidth=0.9, linestyle=":", zorder=1)


def _limits(values: np.ndarray, kind: str) -> tuple[float, float]:
    """Axis range with room around the curves; a loss that blew up leaves the picture rather than flatten the others."""
    if not values.size:
        return (0.0, 1.0) if kind == "loss" else (0.0, 100.0)
    low, high = float(values.min()), float(values.max())
    if kind == "loss":
        high = min(high, 10 * float(np.median(values)))
    room = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return max(0.0, low - room), high + room if kind == "loss" else min(101.0, high + room)


def _legend(rows: Sequence[Any], milestones: Sequence[int], columns: int) -> list[Line2D]:
    """Handles for colours, then for line styles, ordered so that a legend filled by columns reads line by line."""
    colours = []
    for row in rows:
        seeds = len(row.seeds)
        n = f"n = {seeds}" if seeds > 1 else "" if seeds else row.unfinished[0].split(" ", 2)[-1]
        told = [row.label + (f" ({n})" if n else ""), *(row.tally.mark if seeds else "").split(", ")]
        colours.append(Line2D([], [], color=row.colour, linewidth=3, label="\n".join(filter(None, told))))
    dashed = {"linestyle": (0, (4, 2)), "linewidth": 1.8}
    styles: list[tuple[str, dict[str, Any]]] = [("train", dashed), ("validation", {"linewidth": 1.8})]
    if any(len(row.seeds) > 1 for row in rows):
        band = ("lowest to highest seed (mean: bold)", {"linewidth": 6, "alpha": 0.2})
        styles.append(band if len(rows) > _CROWDED else ("one seed (mean: bold)", {"linewidth": 0.8, "alpha": 0.6}))
    if milestones:
        styles.append(("learning rate drops", {"linestyle": ":", "linewidth": 1.2}))
    lines = [colours, [Line2D([], [], color="#444444", label=label, **style) for label, style in styles]]
    blank = Line2D([], [], linestyle="none", label=" ")
    padded = [handle for line in lines for handle in line + [blank] * (-len(line) % columns)]
    return [padded[i] for column in range(columns) for i in range(column, len(padded), columns)]


def draw_ablation(ablation: Ablation) -> bytes:
    """PNG: last accuracy and loss against the swept value: a point a seed, lines through means, diverged runs."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
        for axis, metric in zip(axes, ("last_top1", "last_loss"), strict=True):
            ablation_panel(axis, ablation, metric)
        figure.suptitle("\n(".join(ablation.heading.rsplit(" (", 1)), fontsize=12, fontweight="bold")
        handles, labels = unique(axes)
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
        return png(figure)


def ablation_panel(axis: Axes, ablation: Ablation, metric: str) -> None:
    """One metric against the swept value."""
    places, label = positions(ablation.values, ablation.key)
    factor = 100 if words.is_accuracy(metric) else 1
    series = dict(list(ablation.points.groupby("series", sort=False)))
    colours = [points["colour"].iloc[0] for points in series.values()]
    axis.set_ylim(*_ablation_limits(ablation, metric))
    for place, (name, of_series) in enumerate(series.items()):
        points = sorted(of_series.itertuples(), key=lambda p: places[p.value])
        look: dict[str, Any] = {"color": points[0].colour, "zorder": 3 + place}
        reached = [p for p in points if p.seeds]
        means = [factor * p.summaries[metric].mean for p in reached]
        # series of one normalizer share its colour
        style: dict[str, Any] = {"linestyle": ("-", "--", "-.", ":")[colours[:place].count(points[0].colour) % 4]}
        axis.plot([places[p.value] for p in reached], means, marker="o", label=name, linewidth=1.8, **style, **look)
        for p in reached:
            values = [factor * value for value in p.figures[metric]]
            axis.plot([places[p.value]] * len(values), values, ".", markersize=5, alpha=0.5, **look)
        for p in points:
            if p.tally.diverged:
                x = places[p.value] + 0.06 * (place - (len(series) - 1) / 2) * _step(places)
                where: dict[str, Any] = {"transform": axis.get_xaxis_transform(), "clip_on": False}
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
    beside = {word: float(right + step * (i + 1)) for i, word in enumerate(others)}
    return {k: float(v) for k, v in size.items()} | beside, scale


def _step(places: Mapping[str, float]) -> float:
    ordered = sorted(places.values())
    return float(np.mean(np.diff(ordered))) if len(ordered) > 1 else 1.0


def _ablation_limits(ablation: Ablation, metric: str) -> tuple[float, float]:
    """Axis range around all points, with a strip for the crosses of diverged runs.

    A loss beyond four times the median is left out, rather than flatten the others.
    """
    factor = 100 if words.is_accuracy(metric) else 1
    values = [factor * value for figures in ablation.points["figures"] for value in figures[metric]]
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    if not words.is_accuracy(metric):
        high = min(high, 4 * float(np.median(values)))
    room = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    strip = 2 * room if any(tally.diverged for tally in ablation.points["tally"]) else 0.0
    return (low - room - strip, high + room) if words.is_accuracy(metric) else (low - room, high + room + strip)


def accuracy_panel(axis: Axes, report: Report, runs: pd.DataFrame) -> None:
    """Best validation accuracy by normalizer: a point a seed, a bar at the mean."""
    rows = [row for row in report.rows.itertuples() if row.tally.runs]
    for place, row in enumerate(reversed(rows)):
        values = 100 * runs[runs["finished"] & (runs["normalizer"] == row.normalizer)]["best_top1"]
        axis.plot(values, [place] * len(values), "o", color=row.colour, alpha=0.6, markersize=6, zorder=3)
        if len(values):
            axis.plot([np.mean(values)] * 2, [place - 0.3, place + 0.3], color=row.colour, linewidth=2.5, zorder=4)
    labels = []
    for row in reversed(rows):
        name = f"{row.label} (n = {len(row.seeds)})".replace(" (", "\n(", 1)
        labels.append("\n".join(filter(None, [name, *row.tally.mark.split(", ")])))
    axis.set_yticks(range(len(rows)), labels, fontsize=9)  # four lines at most fit between two rows
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.set_xlabel("best val accuracy (%)")


def loss_panel(axis: Axes, report: Report, study: Runs) -> None:
    """Validation loss against epoch: a line a finished run."""
    found = study.of(study.runs["finished"])
    for row in report.rows[report.rows["seeds"].map(len) > 0].itertuples():
        mine = _curves(found.runs[found.runs["normalizer"] == row.normalizer], found.epochs, "val_loss")
        for place, curve in enumerate(mine.values()):
            axis.plot(curve, color=row.colour, linewidth=1.2, alpha=0.75, label=None if place else row.label)
    _dress(
        axis, found.epochs["val_loss"].to_numpy(), found.runs["epochs"].max(), ("val",), "loss", report.milestones, 0
    )
    axis.legend(framealpha=0.85, edgecolor="none", fontsize=9)


def draw_intervals(report: Report, narrow: bool = False) -> bytes:
    """PNG of what came out, b"" where no row has two seeds: means of rows, and below them differences between rows.

    Whiskers are intervals, of two seeds, which have none, the range; ticks beside a difference are at the margin.
    Accuracy and loss stand side by side, with `narrow` one above the other. Published values are drawn where they are
    comparable.
    """
    rows = [row for row in report.rows.itertuples() if row.seeds]
    between = [found for found in report.comparisons.itertuples() if found.second and found.verdict.difference]
    if all(len(row.seeds) < 2 for row in rows):
        return b""
    names = words.labels(report)
    pairs = list(dict.fromkeys((found.first, found.second) for found in between))
    heights = [1.1 + 0.36 * len(rows)] + [1.1 + 0.48 * len(pairs)] * bool(pairs)
    across = 1 if narrow else 2
    size = (6 if narrow else 12, sum(heights) * (2 if narrow else 1))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            2 * len(heights) // across, across, figsize=size, squeeze=False, layout="constrained",
            height_ratios=heights * (2 if narrow else 1),
        )  # fmt: skip
        for column, metric in enumerate(("best_top1", "best_loss")):
            panels = axes[column * len(heights) :, 0] if narrow else axes[:, column]
            _means(panels[0], rows, metric, report.scale_short == report.published_short)
            if pairs:
                mine = {(found.first, found.second): found for found in between if found.metric == metric}
                _differences(panels[1], [mine.get(pair) for pair in pairs], metric)
            if narrow or not column:
                panels[0].set_yticks(range(len(rows)), [row.label for row in rows])
                if pairs:
                    panels[1].set_yticks(
                        range(len(pairs)), [" −\n".join(names[side] for side in pair) for pair in pairs]
                    )
        return png(figure)


def _means(axis: Axes, rows: Sequence[Any], metric: str, published: bool) -> None:
    """A line a row from above: mean and whiskers, the published value hollow."""
    factor = 100 if words.is_accuracy(metric) else 1
    for place, row in enumerate(rows):
        if (summary := row.summaries[metric]) is None:
            continue
        low, high = (summary.minimum, summary.maximum) if summary.low is None else (summary.low, summary.high)
        _whisker(axis, place, factor * summary.mean, factor * low, factor * high, row.colour)
        if published and row.published:
            axis.plot(factor * getattr(row.published, metric), place, "D", color=row.colour, markerfacecolor="white")
    _rows_from_above(axis, len(rows), f"{words.METRIC_NAMES[metric]} ({'%' if factor > 1 else 'nats'})")


def _differences(axis: Axes, found: Sequence[Any], metric: str) -> None:
    """A line a comparison from above: the difference with its interval, and ticks at the margin on both sides of 0."""
    factor = 100 if words.is_accuracy(metric) else 1
    axis.axvline(0, color="#888888", linewidth=1)
    for place, comparison in enumerate(found):
        if comparison is None:
            continue
        difference, margin = comparison.verdict.difference, factor * comparison.margin
        middle, low, high = (factor * end for end in (difference.mean, difference.low, difference.high))
        _whisker(axis, place, middle, low, high, "#1d2430")
        for side in (-margin, margin):
            axis.plot([side] * 2, [place - 0.35, place + 0.35], color="#8a4b00", linewidth=1.6)
    _rows_from_above(axis, len(found), f"difference in {words.METRIC_NAMES[metric]} ({words.unit(metric)})")


def _whisker(axis: Axes, place: float, middle: float, low: float, high: float, colour: str) -> None:
    sides = [[middle - low], [high - middle]]
    axis.errorbar(middle, place, xerr=sides, fmt="o", color=colour, capsize=4, linewidth=2, markersize=6)


def _rows_from_above(axis: Axes, count: int, label: str) -> None:
    axis.set_ylim(count - 0.4, -0.6)
    axis.set_yticks(range(count), [""] * count)
    axis.set_xlabel(label)


def cost_panel(axis: Axes, rows: pd.DataFrame, spec: ReportSpec) -> None:
    """Milliseconds a step by normalizer, each in its fastest settings; rows of `benchmarks.best`."""
    rows = rows[::-1]
    shown = [spec.row(name) for name in rows["normalizer"]]
    bars = axis.barh(range(len(rows)), rows["milliseconds"], color=[row.colour for row in shown], height=0.6)
    axis.bar_label(bars, fmt="%.2f", padding=3)
    axis.set_yticks(range(len(rows)), [row.label.replace(" (", "\n(") for row in shown])
    axis.margins(x=0.15)
    of = rows.iloc[0]
    optimizer = ", with optimizer" if of["optimizer"] else ""
    what = f"ms a step, ResNet-50, 224 px, batch {of['batch']}, {of['dtype']}{optimizer}"
    axis.set_xlabel(f"{what}\neach by the fastest compiler settings measured", fontsize=9)


def draw_overview(panels: Mapping[str, Callable[[Axes], Any]]) -> bytes:
    """PNG of panels by title, two in a row."""
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
        return png(figure)


def unique(axes: Iterable[Axes]) -> tuple[list, list[str]]:
    seen: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            seen.setdefault(label, handle)
    return list(seen.values()), list(seen)


def png(figure: Figure, dpi: int = 120) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()
