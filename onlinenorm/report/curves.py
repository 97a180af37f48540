"""Loss and accuracy against epoch, in the layout of the published Figure 3."""

import io
import textwrap
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from onlinenorm.report.runs import Run
from onlinenorm.report.table import Report, Row

STYLE = {
    "font.size": 11,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
}
_FACTOR = {"loss": 1.0, "top1": 100.0}
_AXIS = {"loss": "loss (nats)", "top1": "top-1 accuracy (%)"}
_NESTED = 3  # rows whose curves are drawn in different widths
_CROWDED = 4  # more normalizers than this get train and val in panels of their own


def draw_curves(runs: Sequence[Run], report: Report, narrow: bool = False) -> bytes:
    """PNG of loss and accuracy: train dashed, val solid, a colour a normalizer; thin seeds and bold mean for n > 1.

    Many normalizers have a band from the lowest to the highest seed in place of thin lines. Runs of ten epochs or more
    are shown again from the first drop of the learning rate on, where they differ least. Two columns of panels, or
    with `narrow` one column for small screens.
    """
    shown = [row for row in report.rows if any(run.normalizer == row.normalizer and run.epochs_done for run in runs)]
    crowded = len(shown) > _CROWDED
    splits = [(("train",), 0), (("val",), 0)] if crowded else [(("train", "val"), 0)]
    done = max((run.epochs_done for run in runs), default=0)
    if done >= 10 and (drops := [m for m in report.milestones if m < done - 1]):
        splits.append((("val",), drops[0]))
    panels = [(split, start, kind) for split, start in splits for kind in ("loss", "top1")]
    across, legend_columns = (1, 1) if narrow else (2, 3)
    entries = _legend(shown, report.milestones, legend_columns)
    size = (12 / (2 if narrow else 1), 4.2 * len(panels) / across + 0.9 + 0.23 * len(entries) / legend_columns)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(len(panels) // across, across, figsize=size, squeeze=False, layout="constrained")
        for axis, (split, start, kind) in zip(axes.flat, panels, strict=True):
            for place, row in enumerate(shown):
                mine = [run for run in runs if run.normalizer == row.normalizer and run.epochs_done]
                for part in split:
                    _draw_row(axis, mine, f"{part}_{kind}", _FACTOR[kind], row.colour, part == "train", place, crowded)
            _dress(axis, runs, split, kind, report.milestones, start)
        label = "\n(".join(report.scale_label.rsplit(" (", 1))
        label = textwrap.fill(report.scale_label, 52) if narrow else label
        figure.suptitle(f"{report.title}: training curves\n{label}", fontsize=11 if narrow else 13, fontweight="bold")
        figure.legend(handles=entries, loc="outside lower center", ncols=legend_columns, frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
        plt.close(figure)
    return buffer.getvalue()


def mean_curve(runs: Sequence[Run], column: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs that all runs share and the mean over runs there."""
    epochs, values = _shared(runs, column)
    return epochs, np.mean(values, axis=0)


def _range(runs: Sequence[Run], column: str) -> tuple[np.ndarray, np.ndarray]:
    values = _shared(runs, column)[1]
    return np.min(values, axis=0), np.max(values, axis=0)


def _shared(runs: Sequence[Run], column: str) -> tuple[np.ndarray, list[np.ndarray]]:
    epochs = runs[0].metrics["epoch"]
    for run in runs[1:]:
        epochs = np.intersect1d(epochs, run.metrics["epoch"])
    return epochs, [run.metrics[column][np.isin(run.metrics["epoch"], epochs)] for run in runs]


def _draw_row(
    axis: Axes, runs: Sequence[Run], column: str, factor: float, colour: str, dashed: bool, place: int, crowded: bool
) -> None:
    """All seeds of a normalizer; later rows are drawn wider and underneath, so that equal curves stay visible."""
    finished = [run for run in runs if run.finished]
    several = len(finished) > 1
    look = {"color": colour, "linestyle": (0, (4, 2)) if dashed else "-", "markersize": 5}
    look["markerfacecolor"] = "white" if dashed else colour
    bold = look | {"linewidth": 1.6 + 0.7 * (place if place < _NESTED else 0), "zorder": 4 - 0.1 * place}
    thin = look | {"linewidth": 0.8, "alpha": 0.45, "zorder": 2}
    band = crowded and several
    for run in (run for run in runs if not (band and run.finished)):
        epochs, values = run.metrics["epoch"], factor * run.metrics[column]
        light = several or not run.finished
        few = len(epochs) == 1 or (len(epochs) <= 5 and not light)
        axis.plot(epochs, values, marker="o" if few else None, **(thin if light else bold))
    if several:
        epochs, values = mean_curve(finished, column)
        if band:
            low, high = (factor * curve for curve in _range(finished, column))
            axis.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0, zorder=2)
        axis.plot(epochs, factor * values, marker="o" if len(epochs) <= 5 else None, **bold)


def _dress(
    axis: Axes, runs: Sequence[Run], splits: tuple[str, ...], kind: str, milestones: Sequence[int], start: int = 0
) -> None:
    """Ranges, ticks and names of a panel that shows the epochs after `start`."""
    last = max((run.epochs_planned or run.epochs_done for run in runs), default=1)
    values = [
        _FACTOR[kind] * run.metrics[f"{split}_{kind}"][run.metrics["epoch"] > start]
        for run in runs
        if run.epochs_done
        for split in splits
    ]
    pool = np.concatenate(values) if values else np.empty(0)
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
    if kind == "loss":
        return max(0.0, low - room), high + room
    return max(0.0, low - room), min(101.0, high + room)


def _legend(rows: Sequence[Row], milestones: Sequence[int], columns: int) -> list[Line2D]:
    """Handles for colours, then for line styles, ordered so that a legend filled by columns reads line by line."""
    colours = []
    for row in rows:
        n = f"n = {row.n}" if row.n > 1 else "" if row.n else row.unfinished[0].split(" ", 2)[-1]
        n = "; ".join(filter(None, [n, row.tally.mark if row.n else ""]))
        n = f" ({n})" if n else ""
        colours.append(Line2D([], [], color=row.colour, linewidth=3, label=row.label + n))
    styles = [("train", {"linestyle": (0, (4, 2)), "linewidth": 1.8}), ("validation", {"linewidth": 1.8})]
    if any(row.n > 1 for row in rows):
        one = "lowest to highest seed (mean: bold)" if len(rows) > _CROWDED else "one seed (mean: bold)"
        styles.append(
            (one, {"linewidth": 6 if len(rows) > _CROWDED else 0.8, "alpha": 0.2 if len(rows) > _CROWDED else 0.6})
        )
    if milestones:
        styles.append(("learning rate drops", {"linestyle": ":", "linewidth": 1.2}))
    lines = [colours, [Line2D([], [], color="#444444", label=label, **style) for label, style in styles]]
    blank = Line2D([], [], linestyle="none", label=" ")
    padded = [handle for line in lines for handle in line + [blank] * (-len(line) % columns)]
    return [padded[i] for column in range(columns) for i in range(column, len(padded), columns)]
