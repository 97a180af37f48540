"""Drawing of what clamps do over training, and of what their removal would."""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from onlinenorm.report.ablation import CLAMP_KEY, number, swept, value_of
from onlinenorm.report.figures import STYLE, png
from onlinenorm.report.runs import Runs, milestones

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
    columns = min(len(shown), COLUMNS)
    bands = -(-len(shown) // columns)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            2 * bands, columns, figsize=(max(7.0, 5.2 * columns), 8.2 * bands), squeeze=False, layout="constrained"
        )
        for axis in axes[-2:, len(shown) - columns * (bands - 1) :].flat:
            axis.set_visible(False)
        for i, (name, study) in enumerate(shown.items()):
            band, column = divmod(i, columns)
            fraction_panel(axes[2 * band, column], study)
            largest_panel(axes[2 * band + 1, column], study)
            axes[2 * band, column].set_title(titles.get(name, name), fontsize=11)
        figure.suptitle(
            "Activation clamps over training (dotted: the learning rate drops)", fontsize=13, fontweight="bold"
        )
        return png(figure)


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
