"""Drawing of what clamps do over training, and of what their removal would."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from onlinenorm.report.figures import STYLE, png, unique
from onlinenorm.report.removal import KEPT, REMOVED, removal_epochs
from onlinenorm.report.runs import Runs, milestones
from onlinenorm.report.swept import CLAMP_KEY, in_order, number, swept, value_of

COLUMNS = 4  # of studies side by side in one figure
_DECADE = 0.25  # zeros on a logarithmic axis are drawn this many decades above its lower end


def clamp_panels(studies: Mapping[str, Runs]) -> dict[str, Runs]:
    """Studies whose clamps are drawn, runs with clamps alone: those over normalizers, and one of the clamp value."""
    shown = {}
    for name, study in studies.items():
        clamped = set(study.epochs.dropna(subset="clamped_fraction")["folder"])
        keys = {key for run in study.runs["name"] for key in swept(run)}
        if clamped and (not keys or keys == {CLAMP_KEY}):
            shown[name] = study.of(study.runs["folder"].isin(clamped))
    return shown


def draw_clamping(studies: Mapping[str, Runs], titles: Mapping[str, str]) -> bytes | None:
    """PNG: clamped fraction above largest activation against epoch, a study a pair, a line a run; None without data."""
    shown = clamp_panels(studies)
    if not shown:
        return None
    with plt.rc_context(STYLE):
        figure, columns = _columns(len(shown), (4.1, 4.1))
        for (name, study), (fraction, largest) in zip(shown.items(), columns, strict=True):
            fraction_panel(fraction, study)
            largest_panel(largest, study)
            fraction.set_title(titles.get(name, name), fontsize=11)
        figure.suptitle(
            "Activation clamps over training (dotted: the learning rate drops)", fontsize=13, fontweight="bold"
        )
        return png(figure)


def _columns(studies: int, heights: Sequence[float]) -> tuple[Figure, list[Any]]:
    """A figure with panels of these heights, in inches, one below the other for each study; COLUMNS studies a band."""
    across, rows = min(studies, COLUMNS), len(heights)
    bands = -(-studies // across)
    figure, axes = plt.subplots(
        rows * bands, across, figsize=(max(7.0, 5.2 * across), sum(heights) * bands), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    columns = [axes[rows * band : rows * (band + 1), column] for band in range(bands) for column in range(across)]
    for axis in (axis for column in columns[studies:] for axis in column):
        axis.set_visible(False)
    return figure, columns[:studies]


def _coloured(study: Runs) -> list[tuple[pd.DataFrame, str, Any]]:
    """(epochs, clamp value, colour) of each run, a colour a clamp value."""
    clamped = study.epochs.dropna(subset="clamped_fraction")
    found = [(clamped[clamped["folder"] == run.folder], value_of(run, CLAMP_KEY)) for run in study.runs.itertuples()]
    values = sorted({value for _, value in found}, key=lambda v: number(v) or 0.0)
    colours = ["#0072B2"] if len(values) == 1 else plt.get_cmap("plasma")(np.linspace(0, 0.85, len(values)))
    return [(run, v, colours[values.index(v)]) for run, v in sorted(found, key=lambda pair: values.index(pair[1]))]


def fraction_panel(axis: Axes, study: Runs) -> None:
    """Clamped fraction against epoch on a logarithmic axis, zeros at its foot."""
    everything = study.epochs["clamped_fraction"].dropna()
    positive = everything[everything > 0]
    floor = 10 ** np.floor(np.log10(positive.min()) - 0.5) if positive.size else 1e-9
    foot = floor * 10 ** (-1 + _DECADE)
    labelled = set()
    for epochs, value, colour in _coloured(study):
        curve = epochs.set_index("epoch")["clamped_fraction"]
        label = None if value in labelled else f"clamp value {value}"
        labelled.add(value)
        drawn = curve.mask(curve == 0, foot)
        axis.plot(drawn, color=colour, linewidth=1.3, alpha=0.85, label=label, zorder=3)
        axis.plot(drawn[curve == 0], "o", color=colour, markersize=4, zorder=4)
    axis.set_yscale("log")
    top = positive.max() * 3 if positive.size else 1.0
    if (everything == 0).any():
        axis.set_ylim(floor / 10, top)
        ticks = [t for t in 10.0 ** np.arange(np.log10(floor), 1) if t <= top]
        axis.set_yticks([foot, *ticks], ["0", *(f"$10^{{{round(np.log10(t))}}}$" for t in ticks)])
        axis.axhline(floor, color="#c8c8c8", linewidth=0.9, zorder=1)
    elif positive.size and positive.max() < 100 * positive.min():  # decades alone would be one label or none
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}"))
    axis.minorticks_off()
    axis.set_ylabel("clamped fraction of activations")
    _epochs(axis, study.runs)
    if labelled:
        axis.legend(framealpha=0.85, edgecolor="none", fontsize=9)


def largest_panel(axis: Axes, study: Runs) -> None:
    """Largest activation before the clamp against epoch, with the clamp values."""
    for epochs, value, colour in _coloured(study):
        axis.plot(epochs.set_index("epoch")["max_abs_activation"], color=colour, linewidth=1.3, alpha=0.85)
        axis.axhline(float(value), color=colour, linewidth=1.0, linestyle="--", alpha=0.7)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.minorticks_off()
    axis.set_ylabel("largest |activation| (dashed: clamp value)")
    _epochs(axis, study.runs)


def _epochs(axis: Axes, runs: pd.DataFrame) -> None:
    axis.set_xlabel("epoch")
    last = max(planned or 1 for planned in runs["planned"])
    axis.set_xlim(0, last + 0.4)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))
    for milestone in {m for run in runs.itertuples() for m in milestones(run) if m < last}:
        axis.axvline(milestone, color="#a8a8a8", linewidth=0.9, linestyle=":", zorder=1)


def draw_removal(studies: Mapping[str, Runs], titles: Mapping[str, str]) -> bytes | None:
    """PNG of what removing the clamp would do at each epoch, a study three panels; None where no run was asked.

    Accuracy with and without, the share of predictions that change, and that against the learning rate.
    """
    shown = {name: study for name, study in studies.items() if len(removal_epochs(study))}
    if not shown:
        return None
    with plt.rc_context(STYLE):
        figure, columns = _columns(len(shown), (4.0, 4.0, 4.0))
        for (name, study), (accuracy, by_epoch, by_lr) in zip(shown.items(), columns, strict=True):
            removal_panel(accuracy, study)
            changed_panel(by_epoch, study, "epoch")
            changed_panel(by_lr, study, "lr")
            accuracy.set_title(titles.get(name, name), fontsize=11)
        figure.suptitle("Removing the clamp at every epoch", fontsize=13, fontweight="bold")
        return png(figure)


def _by_setting(epochs: pd.DataFrame) -> Iterator[tuple[str, Any, list[pd.DataFrame]]]:
    """(setting, colour, epochs of each run), a colour a setting."""
    settings = in_order(epochs["setting"])
    colours = ["#0072B2"] if len(settings) == 1 else plt.get_cmap("plasma")(np.linspace(0, 0.85, len(settings)))
    for setting, colour in zip(settings, colours, strict=True):
        yield setting, colour, [run for _, run in epochs[epochs["setting"] == setting].groupby("folder")]


def removal_panel(axis: Axes, study: Runs) -> None:
    """Validation accuracy against epoch, as trained and with the clamp removed: a line a run."""
    for setting, colour, runs in _by_setting(removal_epochs(study)):
        for place, run in enumerate(runs):
            curve, look = 100 * run.set_index("epoch"), {"color": colour, "alpha": 0.85, "zorder": 3}
            axis.plot(curve["val_top1"], linewidth=1.6, label=None if place or not setting else setting, **look)
            axis.plot(curve["without_val_top1"], linewidth=1.1, linestyle=(0, (3, 1.5)), **look)
    for label, style in {"as trained": "-", "clamp removed": (0, (3, 1.5))}.items():
        axis.plot([], [], color="#444444", linewidth=1.3, linestyle=style, label=label)
    axis.set_ylabel("val accuracy (%)")
    _epochs(axis, study.runs)
    axis.legend(framealpha=0.85, edgecolor="none", fontsize=9)


def changed_panel(axis: Axes, study: Runs, against: str) -> None:
    """Share of predictions that removal changes, a line a run against "epoch" or a point an epoch against "lr"."""
    epochs = removal_epochs(study)
    for setting, colour, runs in _by_setting(epochs):
        for place, run in enumerate(runs):
            label = None if place or not setting else setting
            look: dict[str, Any] = {"color": colour, "label": label, "zorder": 3}
            if against == "epoch":
                axis.plot(100 * run.set_index("epoch")["changed"], linewidth=1.3, alpha=0.85, **look)
            else:
                axis.plot(run["lr"], 100 * run["changed"], ".", markersize=6, alpha=0.5, **look)
    axis.set_yscale("symlog", linthresh=0.1, linscale=0.5)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_ylim(bottom=0)
    axis.set_ylabel("predictions changed by removal (%)")
    if against == "epoch":
        _epochs(axis, study.runs)
    else:
        axis.set_xscale("log")
        axis.set_xlabel("learning rate (log scale)")
    if epochs["setting"].any():
        axis.legend(framealpha=0.85, edgecolor="none", fontsize=9)


def draw_removals(removals: pd.DataFrame, titles: Mapping[str, str]) -> bytes:
    """PNG of `ablation.clamp_removals`: predictions changed by removal against the clamped fraction, a point a run."""
    removals = removals.drop_duplicates("weights")
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(9, 5.4), layout="constrained")
        studies = list(dict.fromkeys(removals["study"]))
        for study, colour in zip(studies, plt.get_cmap("tab20")(np.arange(len(studies)) % 20), strict=True):
            mine = removals[removals["study"] == study]
            share = 100 * mine["changed_predictions"].astype(float) / mine["images"].astype(float)
            label = titles.get(study, study)
            axis.plot(mine["clamped_fraction"].astype(float), share, "o", color=colour, alpha=0.8, label=label)
        axis.set_xscale("symlog", linthresh=1e-6, linscale=0.8)
        axis.set_yscale("symlog", linthresh=0.1, linscale=0.3)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.minorticks_off()
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=-0.02)
        axis.set_xlabel("fraction of activations clamped, whole validation set")
        axis.set_ylabel("predictions changed by removal (%)")
        axis.set_title("Removing the clamp after training: a point a run", fontsize=12, fontweight="bold")
        figure.legend(loc="outside right upper", frameon=False, fontsize=9)
        return png(figure)


def removal_by_value_panel(axis: Axes, ways: pd.DataFrame) -> None:
    """Last accuracy against the clamp value, as trained and with the clamp removed: a point a seed, lines by means."""
    for way, label, style in ((KEPT, "as trained", "-"), (REMOVED, "clamp removed", (0, (3, 1.5)))):
        rows = [row for row in ways.itertuples() if row.way == way]
        places = [float(row.setting.rpartition(" ")[2]) for row in rows]
        look: dict[str, Any] = {"color": rows[0].colour, "zorder": 3}
        means = [100 * row.summaries["last_top1"].mean for row in rows]
        axis.plot(places, means, marker="o", linewidth=1.6, linestyle=style, label=label, **look)
        for place, row in zip(places, rows, strict=True):
            values = [100 * value for value in row.figures["last_top1"].values()]
            axis.plot([place] * len(values), values, ".", markersize=5, alpha=0.5, **look)
    axis.set_xscale("log")
    axis.set_xticks(places, [f"{place:g}" for place in places])
    axis.minorticks_off()
    axis.set_xlabel("clamp value (log scale)")
    axis.set_ylabel("last epoch val accuracy (%)")
    axis.legend(framealpha=0.85, edgecolor="none", fontsize=9)


def draw_ways(found: Mapping[str, pd.DataFrame]) -> bytes | None:
    """PNG of ways by the name of their images, one below the other; None without any."""
    if not found:
        return None
    heights = [1.0 + 0.34 * len(ways) for ways in found.values()]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(found), 1, figsize=(12, sum(heights) + 0.5), squeeze=False, layout="constrained", height_ratios=heights
        )
        for axis, (name, ways) in zip(axes.flat, found.items(), strict=True):
            ways_panel(axis, ways)
            axis.set_title(name, fontsize=12)
        handles, labels = unique(axes.flat)
        figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=3, frameon=False, fontsize=9)
        figure.suptitle("Ways to take the clamp away, and statistics estimated anew", fontsize=13, fontweight="bold")
        return png(figure)


def ways_panel(axis: Axes, ways: pd.DataFrame, width: int = 200) -> None:
    """Last accuracy by way: a point a seed, a bar at the mean, and a line at the mean of the network as trained.

    Names are broken into lines of `width` characters.
    """
    rows = list(ways.itertuples())[::-1]
    for place, row in enumerate(rows):
        values = [100 * value for value in row.figures["last_top1"].values()]
        label = None if any(row.label == other.label for other in rows[:place]) else row.label
        axis.plot(values, [place] * len(values), "o", color=row.colour, alpha=0.6, markersize=6, zorder=3, label=label)
        axis.plot([np.mean(values)] * 2, [place - 0.3, place + 0.3], color=row.colour, linewidth=2.5, zorder=4)
        if row.verdicts is None:
            axis.axvline(float(np.mean(values)), color=row.colour, linewidth=1.0, linestyle=":", zorder=1)
    names = [textwrap.fill(f"{row.way} (n\xa0=\xa0{len(row.seeds)})", width) for row in rows]  # no break before n
    axis.set_yticks(range(len(rows)), names, fontsize=9)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.set_xlabel("last epoch val accuracy (%), dotted: as trained")
