"""Frames of runs in, frames of tables out: normalizers over seeds, verdicts between them, where figures come from."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from onlinenorm.records import lookup
from onlinenorm.report.mixtures import check_one_table
from onlinenorm.report.predictions import counted, epochs_without_clamp
from onlinenorm.report.removal import ways
from onlinenorm.report.runs import frame, milestones
from onlinenorm.report.seeds import over_seeds
from onlinenorm.report.settings import ReportSpec, departures, planned_scale
from onlinenorm.report.statistics import (
    NOT_COMPARABLE,
    NOT_RUN,
    Verdict,
    compare_published,
    removal_outcome,
    rule,
)
from onlinenorm.scales import UNKNOWN
from onlinenorm.text import plural

COMPARED_METRICS = ("best_top1", "best_loss")


@dataclass(frozen=True)
class Report:
    """A table over normalizers, as frames; `scale_label` is part of every title.

    rows: `normalizer`, `label`, `colour`, `published` (None: nothing was) and the columns of `over_seeds`. comparisons:
    `first` minus `second` (None: the published value), `metric`, `margin`, `verdict`. removals: of a run that
    kept its clamps to the end its `figures` as in results.json, of others in `sentence` why nothing was removed. ways:
    as `removal.ways` makes them. recounts: figures of runs recorded before accuracy had one rule, in images, where
    predictions.npz gives others. `note` is by hand: what the data of the runs do not tell.
    """

    title: str
    scale: str
    scale_label: str
    scale_short: str
    published_short: str  # of what the published values are of
    rule: str
    confidence: float
    rows: pd.DataFrame
    comparisons: pd.DataFrame
    removals: pd.DataFrame
    ways: pd.DataFrame
    departures: pd.DataFrame
    provenance: pd.DataFrame
    milestones: list[int]
    recounts: pd.DataFrame
    note: str = ""

    @property
    def heading(self) -> str:
        return f"{self.title} on {self.scale_label}"


def build_report(runs: pd.DataFrame, spec: ReportSpec, note: str = "") -> Report:
    """The report on runs of one setting (none: all rows "not run"); ReportError when they cannot share a table."""
    check_one_table(runs)
    spec = spec.with_rows_of(runs)
    scale, label, short = scale_labels(runs, spec)
    spec = spec.published_on(scale)
    rows = _rows([*spec.rows, *spec.extra_rows(runs)], runs, spec)
    found = departures(zip(runs["normalizer"], runs["config"], strict=True), spec.published_setting)
    recounts = recount(runs)
    return Report(
        title=spec.title,
        scale=scale,
        scale_label=label,
        scale_short=short,
        published_short=spec.scale(spec.published_scale).short,
        rule=rule(spec.alpha),
        confidence=spec.confidence,
        rows=rows,
        comparisons=_comparisons(rows, runs, spec, scale, found),
        removals=_removals(rows, runs, spec),
        ways=ways(runs, spec),
        departures=found,
        provenance=provenance(runs),
        milestones=next(map(milestones, runs.itertuples()), []),
        recounts=recounts[recounts["recorded"] != recounts["counted"]],
        note=note,
    )


def scale_labels(runs: pd.DataFrame, spec: ReportSpec) -> tuple[str, str, str]:
    """Scale of these runs, its full label with the number of images and the network, and its short label."""
    finished = runs["results"].dropna()
    planned = next(filter(None, map(planned_scale, runs.itertuples())), UNKNOWN)
    scale = planned if finished.empty else finished.iloc[0]["scale"]
    label, details = spec.scale(scale).label, []
    if not finished.empty:
        dataset = finished.iloc[0]["dataset"]
        details = [f"{dataset['train_images']:,} training, {dataset['val_images']:,} validation images"]
    for key, unit in (("model._target_", ""), ("data.image_size", " px"), ("recipe.epochs", " epochs")):
        if found := {plain(value) for config in runs["config"] if (value := lookup(config, key)) is not None}:
            details.append("/".join(sorted(found)) + (" epoch" if unit == " epochs" and found == {"1"} else unit))
    return scale, label + (f" ({', '.join(details)})" if details else ""), spec.scale(scale).short


def _rows(normalizers: Iterable[str], runs: pd.DataFrame, spec: ReportSpec) -> pd.DataFrame:
    columns = ("seeds", "summaries", "epochs", "unfinished", "attempts", "tally")
    rows = []
    for name in normalizers:
        row, found = spec.row(name), over_seeds(runs[runs["normalizer"] == name], spec.confidence)
        rows.append((name, row.label, row.colour, row.published, *(found[key] for key in columns)))
    return frame(rows, ("normalizer", "label", "colour", "published", *columns))


def recount(runs: pd.DataFrame) -> pd.DataFrame:
    """The figures of finished runs that their predictions.npz tells too, of those recorded by no one rule."""
    rows = []
    for run in runs.itertuples():
        if run.finished and not run.results.get("top1_rule"):
            images = run.results["dataset"]["val_images"]
            found = counted(run.results, run.config, Path(run.folder))
            rows += [(run.name, row.figure, row.recorded, row.counted, images) for row in found.itertuples()]
    return frame(rows, ("run", "figure", "recorded", "counted", "images"))


def _comparisons(
    rows: pd.DataFrame, runs: pd.DataFrame, spec: ReportSpec, scale: str, found: pd.DataFrame
) -> pd.DataFrame:
    finished = runs[runs["finished"]]

    def figures(normalizer: str, metric: str) -> dict[int, float]:
        mine = finished[finished["normalizer"] == normalizer]
        return dict(zip(mine["seed"], mine[metric], strict=True))

    def diverged(*normalizers: str) -> list[str]:
        mine = rows[rows["normalizer"].isin(normalizers)]
        return [f"{row.label}: {row.tally.mark}" for row in mine.itertuples() if row.tally.diverged]

    comparisons: list[tuple[str, str | None, str, float, Verdict]] = []
    for row in rows[rows["published"].notna()].itertuples():
        obstacles = [
            f"{d.name} {plain(d.actual)} (published: {plain(d.published)})"
            for d in found[found["decisive"].astype(bool)].itertuples()
            if not d.normalizers or row.normalizer in d.normalizers
        ]
        other = ""
        if scale != spec.published_scale:  # then nothing else matters
            obstacles = [f"scale {spec.scale(scale).short} (published: {spec.scale(spec.published_scale).short})"]
        elif scale in spec.elsewhere and len(finished):  # the same photographs may be there in other pixels
            name = finished.iloc[0]["results"]["dataset"]["name"]
            other = f"images {name} (published: {scale})" if name != scale else ""
        for metric in COMPARED_METRICS:
            values, margin = list(figures(row.normalizer, metric).values()), spec.margins[spec.published_scale][metric]
            target, lost = getattr(row.published, metric), diverged(row.normalizer)
            verdict = compare_published(values, target, margin, obstacles, spec.alpha, lost)
            if other and verdict.outcome != NOT_RUN:
                verdict = _of_other_pixels(verdict, other)
            comparisons.append((row.normalizer, None, metric, margin, verdict))
    for first, second in spec.pairs(runs):
        for metric in COMPARED_METRICS:
            a, b = figures(first, metric), figures(second, metric)
            verdict = spec.compare(a, b, metric, scale, diverged(first, second))
            comparisons.append((first, second, metric, spec.margin(metric, scale), verdict))
    return frame(comparisons, ("first", "second", "metric", "margin", "verdict"))


def _of_other_pixels(verdict: Verdict, images: str) -> Verdict:
    """No verdict on images that are not the published ones to the bit, but what the figures alone would say."""
    if verdict.difference is not None:
        return Verdict(NOT_COMPARABLE, f"{images}; by the figures alone {verdict.outcome}", verdict.difference)
    reasons = [images] + [verdict.reason] * (verdict.outcome == NOT_COMPARABLE)
    return Verdict(NOT_COMPARABLE, "; ".join(reasons))


def _removals(rows: pd.DataFrame, runs: pd.DataFrame, spec: ReportSpec) -> pd.DataFrame:
    found: list[tuple[Any, ...]] = []
    for row in rows.itertuples():
        mine = runs[runs["finished"] & (runs["normalizer"] == row.normalizer)]
        clamped = [run for run in mine.itertuples() if run.results.get("clamping")]
        for run in clamped:
            figures, images = run.results["clamping"], run.results["dataset"]["val_images"]
            with_clamp, without = figures["with"]["val_top1"], figures["without"]["val_top1"]
            if epochs := epochs_without_clamp(run.config):  # nothing was removed
                outcome = removal_outcome(figures["changed_predictions"], images, without, with_clamp)
                infinite = "not finite: " * (figures["with"]["val_loss"] is None)
                told = f"trained without the clamp in the last {plural(epochs, 'epoch')}; with it put back, "
                found.append((row.normalizer, row.label, run.name, images, None, told + infinite + outcome))
                continue
            outcome = removal_outcome(figures["changed_predictions"], images, with_clamp, without)
            if figures["without"]["val_loss"] is None:
                outcome = f"not finite without the clamp: {outcome}"
            found.append((row.normalizer, row.label, run.name, images, figures, outcome))
        sentence = spec.row(row.normalizer).removal
        if not sentence and row.normalizer in spec.rows:
            sentence = NOT_RUN if mine.empty else "The finished runs have no clamp to remove."
        if sentence and not clamped:
            found.append((row.normalizer, row.label, None, None, None, sentence))
    return frame(found, ("normalizer", "label", "run", "images", "figures", "sentence"))


def provenance(runs: pd.DataFrame) -> pd.DataFrame:
    """Where each run's numbers come from; what its environment.json does not tell is "unknown"."""
    rows = []
    for run in runs.itertuples():
        environment, results = run.environment, run.results or {}
        git = environment.get("git") if isinstance(environment.get("git"), dict) else {}
        commit = str(git.get("commit") or environment.get("git_commit") or environment.get("commit") or "unknown")
        dirty = git.get("dirty", environment.get("git_dirty", environment.get("dirty")))
        versions = environment.get("versions")
        rows.append({
            "run": run.name,
            "status": run.status,
            "seed": run.seed,
            "command": plain(environment.get("command", "unknown")),
            "commit": commit + (" with uncommitted changes" if dirty else ""),
            "versions": {str(k): str(v) for k, v in versions.items()} if isinstance(versions, dict) else {},
            "hardware": plain(environment.get("hardware", "unknown")),
            "world_size": str(environment.get("world_size", "unknown")),
            **{key: results.get(key) for key in ("images_per_second", "wall_seconds", "resumed")},
            "parameters_sha256": str(results.get("parameters_sha256", "unknown")),
        })  # fmt: skip
    return frame(rows, rows[0] if rows else ())


def plain(value: Any) -> str:
    """A setting as a person writes it: "resnet50" for its import path, "gpu H100, cpus 16" for a dictionary."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(sub)}" for key, sub in value.items() if sub not in (None, "", []))
    if isinstance(value, list | tuple):
        words = all(isinstance(item, str) for item in value)
        return " ".join(value) if words else ", ".join(plain(item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = str(value)
    return text.rsplit(".", 1)[1] if text.startswith("onlinenorm.") else text
