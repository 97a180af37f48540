"""Clamps as words: the columns of tables of what they did, and of what taking them away does."""

from statistics import median
from typing import Any

from onlinenorm.report.words import (
    DASH,
    Cell,
    Columns,
    difference,
    figure,
    fraction,
    interval_words,
    mean_and_spread,
    span,
    unit,
    verdict_words,
)


def if_finite(value: float | None, form: str) -> str:
    """A figure of results.json in this form; null there says that it is not finite."""
    return "not finite" if value is None else form.format(value)


REMOVALS: Columns = {
    "run": lambda removal: removal.run or "",
    "layers": lambda removal: removal.figures["layers"],
    "clamp value": lambda removal: f"{removal.figures['clamp_value']:g}",
    "val loss with": lambda removal: if_finite(removal.figures["with"]["val_loss"], "{:.4f}"),
    "val loss without": lambda removal: if_finite(removal.figures["without"]["val_loss"], "{:.4f}"),
    "val accuracy with": lambda removal: figure(removal.figures["with"]["val_top1"], "top1"),
    "val accuracy without": lambda removal: figure(removal.figures["without"]["val_top1"], "top1"),
    "changed predictions": lambda removal: f"{removal.figures['changed_predictions']:,} of {removal.images:,}",
    "clamped fraction": lambda removal: fraction(removal.figures["clamped_fraction"], 2),
    "largest |activation|": lambda removal: if_finite(removal.figures["max_abs_activation"], "{:.3g}"),
}
CLAMP_REMOVALS: Columns = {
    "study": lambda run: run.study,
    "run": lambda run: run.run,
    "layers": lambda run: run.layers,
    "clamp value": lambda run: f"{run.clamp_value:g}",
    "changed predictions": lambda run: f"{run.changed_predictions:,} of {run.images:,}",
    "val loss, without − with, nats": lambda run: "0" if run.loss == 0 else if_finite(run.loss, "{:+.1e}"),
    "val accuracy, without − with, points": lambda run: difference(run.top1, "top1"),
    "clamped fraction": lambda run: fraction(run.clamped_fraction),
    "largest |activation|": lambda run: if_finite(run.max_abs_activation, "{:.3g}"),
}
CLAMP_COURSES: Columns = {
    "study": lambda runs: runs.study,
    "clamp value": lambda runs: runs.clamp_value,
    "runs": lambda runs: f"{len(runs.last)}" + f" ({runs.mark})" * bool(runs.mark),
    "clamped fraction, first epoch": lambda runs: span(runs.first),
    "before the first drop of the learning rate": lambda runs: span(runs.before_drop),
    "last epoch": lambda runs: span(runs.last),
    "runs that end at 0": lambda runs: f"{runs.last.count(0)} of {len(runs.last)}",
    "largest |activation|, last epoch": lambda runs: span(runs.largest, "{:.3g}".format),
}
REMOVAL_COURSES: Columns = {
    "study": lambda epochs: ", ".join(filter(None, [epochs.study, epochs.setting])),
    "drops of the learning rate before": lambda epochs: epochs.drops,
    "learning rate": lambda epochs: span(epochs.lr, "{:.2g}".format),
    "epochs": lambda epochs: f"{len(epochs.top1)}" + f" of {epochs.runs} runs" * (epochs.runs > 1),
    "predictions changed, median": lambda epochs: f"{median(epochs.changed):.2%}",
    "lowest to highest": lambda epochs: span(epochs.changed, "{:.2%}".format),
    "val accuracy, without − with, points, median": lambda epochs: difference(median(epochs.top1), "top1"),
    "range": lambda epochs: span(epochs.top1, lambda value: difference(value, "top1")),
    "val loss, without − with, nats, median": lambda epochs: f"{median(epochs.loss):+.1e}" if epochs.loss else DASH,
}


def way_verdict(way: Any, metric: str) -> Cell:
    """What a way does against the network as trained: outcome, difference and its interval, if there are any."""
    if not way.verdicts:
        return Cell(DASH)
    verdict, gap = way.verdicts[metric], way.gaps[metric]
    if gap is None:
        return Cell(verdict_words(verdict))
    told = f"{difference(gap, metric)} {unit(metric)}"
    if (found := verdict.difference) is None:
        return Cell(told, verdict_words(verdict))
    return Cell(f"**{verdict_words(verdict)}**", f"{told} ({interval_words(found, metric)}); {verdict.reason}")


WAYS: Columns = {
    "normalizer": lambda way: ", ".join(filter(None, [way.label, way.setting])),
    "last epoch": lambda way: way.way,
    "n": lambda way: Cell(str(len(way.seeds)), way.mark),
    "val accuracy": lambda way: mean_and_spread(way.summaries["last_top1"], "last_top1"),
    "val loss": lambda way: mean_and_spread(way.summaries["last_loss"], "last_loss"),
    "accuracy, against as trained": lambda way: way_verdict(way, "last_top1"),
    "loss, against as trained": lambda way: way_verdict(way, "last_loss"),
    "predictions changed": lambda way: DASH if way.changed is None else f"{way.changed:.2%}",
}
