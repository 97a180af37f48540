"""What the page of a report says on its first screen, and its runs."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pandas as pd

from onlinenorm.report import clamp_words, words
from onlinenorm.report.tables import Report
from onlinenorm.text import duration

OUTCOMES = ("equivalent", "different")  # which have a colour of their own


class Sortable(NamedTuple):
    """A cell, and the number that its column is sorted by; None: by the text."""

    text: str
    by: float | None = None


def what_was_run(report: Report) -> str:
    """How many runs of what, and what became of them."""
    tallies = [row.tally for row in report.rows.itertuples() if row.tally.runs]
    if not tallies:
        return "No run yet."
    runs, tries = sum(tally.runs for tally in tallies), sum(tally.tries for tally in tallies)
    ends = {"finished": "finished", "diverged": "diverged", "failed": "failed", "not finished": "running"}
    counts = {words: sum(getattr(tally, key) for tally in tallies) for words, key in ends.items()}
    ended = ", ".join(f"{count} {words}" for words, count in counts.items() if count)
    attempts = f" in {tries} attempts" * (tries > runs)
    return f"{_count(runs, 'run')} of {_count(len(tallies), 'normalizer')}{attempts}: {ended}."


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'s' * (number != 1)}"


def what_came_out(report: Report) -> list[tuple[str, str, str, str]]:
    """(outcome, comparison, difference in best accuracy or "", why there is none or "") of two rows, then of published.

    Where no row can be held against what was published that is one line.
    """
    found = []
    for published in (False, True):
        groups = words.comparison_groups(report, published)
        if published and words.shared_verdict(report):
            (verdict, *_) = [c[0].verdict for c in groups.values() if c[0].verdict.outcome != "not run"]
            found.append((verdict.outcome, "with the published values", "", verdict.reason))
            continue
        for name, (comparison, *_) in groups.items():
            verdict = comparison.verdict
            if verdict.outcome != "not run":
                found.append((verdict.outcome, name, gap(comparison), "" if verdict.difference else verdict.reason))
    return found


def gap(comparison: Any) -> str:
    """The difference alone, "" where there is none; its interval is in the figure."""
    found, metric = comparison.verdict.difference, comparison.metric
    return f"{words.difference(found.mean, metric)} {words.unit(metric)}" if found else ""


def levels(report: Report) -> str:
    """Of the intervals of differences between rows, "90 %"; "" where there are none."""
    found = [one.verdict.difference for one in report.comparisons.itertuples() if one.second]
    return ", ".join(dict.fromkeys(f"{100 * difference.level:g} %" for difference in found if difference))


def mean(row: Any, metric: str) -> str:
    """A row's figure alone: a mean over seeds."""
    summary = row.summaries[metric]
    return words.DASH if summary is None else words.figure(summary.mean, metric)


def kind(outcome: str) -> str:
    return outcome if outcome in OUTCOMES else "other"


def _way(metric: str) -> Callable[[Any], words.Cell]:
    def show(way: Any) -> words.Cell:
        verdict, gap = (way.verdicts or {}).get(metric), way.gaps.get(metric)
        if verdict is None or verdict.difference is None or gap is None:
            return clamp_words.way_verdict(way, metric)
        told = f"{words.difference(gap, metric)} {words.unit(metric)}; {verdict.reason}"
        return words.Cell(words.verdict_words(verdict), told)

    return show


# What networks do without the clamp, their differences without intervals.
WAYS: words.Columns = {
    **clamp_words.WAYS,
    "accuracy, against as trained": _way("last_top1"),
    "loss, against as trained": _way("last_loss"),
}


def runs(report: Report, found: pd.DataFrame, links: Mapping[str, str]) -> list[dict[str, Any]]:
    """A row a run: its name, its folder's address ("" for none) and the cells of its columns."""
    told = {run.name: run for run in found.itertuples()}
    known = words.labels(report)
    rows = []
    for place in report.provenance.itertuples():
        run = told[place.run]
        cells = {
            "normalizer": Sortable(known.get(run.normalizer, run.normalizer)),
            "seed": Sortable(str(run.seed), run.seed),
            "status": Sortable(place.status),
        }
        for metric in ("best_top1", "last_top1", "best_loss"):
            value = getattr(run, metric)
            there = value is not None and not pd.isna(value)
            cells[words.METRIC_NAMES[metric]] = Sortable(*((words.figure(value, metric), value) if there else ("",)))
        speed, seconds = place.images_per_second, place.wall_seconds
        cells["images/s"] = Sortable("unknown") if speed is None else Sortable(f"{speed:,.0f}", speed)
        cells["wall time"] = Sortable("unknown") if seconds is None else Sortable(duration(seconds), seconds)
        cells["resumed"] = Sortable("unknown") if place.resumed is None else Sortable(str(place.resumed), place.resumed)
        command = {"command": place.command, "parameters": place.parameters_sha256[:12]}
        rows.append({"name": place.run, "link": links.get(place.run, ""), "cells": cells, **command})
    return rows
