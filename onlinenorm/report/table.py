"""Runs and spec in, `Report` out: every number and sentence that the table, the page and the terminal show."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from onlinenorm.records import lookup
from onlinenorm.report.checks import counted
from onlinenorm.report.runs import Run, milestones
from onlinenorm.report.settings import Departure, check_one_table, departures, planned_scale
from onlinenorm.report.spec import Published, ReportSpec
from onlinenorm.report.statistics import (
    MIN_SEEDS,
    NOT_COMPARABLE,
    NOT_RUN,
    Summary,
    Verdict,
    compare_published,
    compare_rows,
    removal_outcome,
    summarize,
)
from onlinenorm.report.tally import Tally, former_attempts, tally
from onlinenorm.scales import UNKNOWN

METRICS = ("best_loss", "best_top1", "last_loss", "last_top1")
COMPARED_METRICS = ("best_top1", "best_loss")
COMPARABLE_SCALE = "imagenet"


@dataclass(frozen=True)
class Row:
    """One normalizer: published values, summaries over finished seeds by metric, and what its other runs are doing.

    `tally` counts all runs and attempts; `attempts` tells of those that were not a run's last.
    """

    normalizer: str
    label: str
    colour: str
    published: Published | None
    seeds: list[int]
    summaries: dict[str, Summary | None]
    epochs: dict[str, list[int]]
    unfinished: list[str]
    attempts: list[str]
    tally: Tally

    @property
    def n(self) -> int:
        return len(self.seeds)


@dataclass(frozen=True)
class Recount:
    """A figure of a run recorded before accuracy had one rule, and what its predictions.npz gives; in images."""

    run: str
    figure: str
    recorded: int
    counted: int
    images: int


@dataclass(frozen=True)
class Comparison:
    """A verdict on one metric: between two rows, or (second is None) between a row and its published value."""

    first: str
    second: str | None
    metric: str
    margin: float
    verdict: Verdict


@dataclass(frozen=True)
class Removal:
    """Clamp removal of one run (`figures` as in results.json), or in `sentence` why there is nothing to tell."""

    normalizer: str
    label: str
    run: str | None
    images: int | None
    figures: dict[str, Any] | None
    sentence: str


@dataclass(frozen=True)
class Provenance:
    """Where one run's numbers come from; what its environment.json does not tell is "unknown"."""

    run: str
    status: str
    seed: int
    command: str
    commit: str
    versions: dict[str, str]
    hardware: str
    world_size: str
    images_per_second: float | None
    wall_seconds: float | None
    resumed: int | None
    parameters_sha256: str


@dataclass(frozen=True)
class Report:
    """A whole report; `scale_label` is part of every title."""

    title: str
    scale: str
    scale_label: str
    scale_short: str
    rule: str
    confidence: float
    rows: list[Row]
    comparisons: list[Comparison]
    removals: list[Removal]
    departures: list[Departure]
    provenance: list[Provenance]
    milestones: list[int]
    recounts: list[Recount]
    note: str = ""  # by hand: what the data of the runs do not tell

    @property
    def heading(self) -> str:
        return f"{self.title} on {self.scale_label}"

    def as_dict(self) -> dict[str, Any]:
        """Plain content of table1.json."""
        return {"schema": 1, "heading": self.heading, **asdict(self)}


def build_report(runs: Sequence[Run], spec: ReportSpec) -> Report:
    """The report on runs of one setting (none: all rows "not run"); ReportError when they cannot share a table."""
    check_one_table(runs)
    spec = spec.with_rows_of(runs)
    scale, label, short = scale_labels(runs, spec)
    extra = sorted({run.normalizer for run in runs} - set(spec.rows), key=_order(spec))
    rows = [_row(name, runs, spec) for name in [*spec.rows, *extra]]
    found = departures(runs, spec.published_setting)
    return Report(
        title=spec.title,
        scale=scale,
        scale_label=label,
        scale_short=short,
        rule=_rule(spec),
        confidence=spec.confidence,
        rows=rows,
        comparisons=_against_published(rows, runs, spec, scale, found) + _between_rows(rows, runs, spec, scale),
        removals=[removal for row in rows for removal in _removals(row, runs, spec)],
        departures=found,
        provenance=[provenance(run) for run in runs],
        milestones=milestones(runs[0]) if runs else [],
        recounts=[found for run in runs for found in recount(run) if found.recorded != found.counted],
    )


def scale_labels(runs: Sequence[Run], spec: ReportSpec) -> tuple[str, str, str]:
    """Scale of these runs, its full label with the number of images and the network, and its short label."""
    finished = [run for run in runs if run.finished]
    scale = finished[0].results["scale"] if finished else next(filter(None, map(planned_scale, runs)), UNKNOWN)
    label, details = spec.scale(scale).label, []
    if finished:
        dataset = finished[0].results["dataset"]
        details = [f"{dataset['train_images']:,} training, {dataset['val_images']:,} validation images"]
    for key, words in (("model._target_", "{}"), ("data.image_size", "{} px"), ("recipe.epochs", "{} epochs")):
        if found := {plain(value) for run in runs if (value := lookup(run.config, key)) is not None}:
            details.append(words.format("/".join(sorted(found))))
    return scale, label + (f" ({', '.join(details)})" if details else ""), spec.scale(scale).short


def _order(spec: ReportSpec):
    known = list(spec.further_rows)
    return lambda name: (known.index(name) if name in known else len(known), name)


def _row(normalizer: str, runs: Sequence[Run], spec: ReportSpec) -> Row:
    mine = [run for run in runs if run.normalizer == normalizer]
    finished = sorted((run for run in mine if run.finished), key=lambda run: run.seed)
    row = spec.row(normalizer)
    return Row(
        normalizer=normalizer,
        label=row.label,
        colour=row.colour,
        published=row.published,
        seeds=[run.seed for run in finished],
        summaries={m: summarize([run.value(m) for run in finished], spec.confidence) for m in METRICS},
        epochs={m: [_epoch(run, m) for run in finished] for m in METRICS},
        unfinished=[f"seed {run.seed} {run.status}" for run in mine if not run.finished],
        attempts=former_attempts(mine),
        tally=tally(mine),
    )


def recount(run: Run) -> list[Recount]:
    """The figures of a finished run that its predictions.npz tells too, if it was recorded by no one rule."""
    if not run.finished or run.results.get("top1_rule"):
        return []
    images = run.results["dataset"]["val_images"]
    return [Recount(run.name, name, *pair, images) for name, pair in counted(run.results, run.folder).items()]


def _epoch(run: Run, metric: str) -> int:
    return run.results["last" if metric.startswith("last") else metric]["epoch"]


def _figures(normalizer: str, metric: str, runs: Sequence[Run]) -> dict[int, float]:
    return {run.seed: run.value(metric) for run in runs if run.finished and run.normalizer == normalizer}


def _margin(spec: ReportSpec, scale: str, metric: str) -> float:
    return spec.margins.get(scale, spec.margins[COMPARABLE_SCALE])[metric]


def _against_published(
    rows: list[Row], runs: Sequence[Run], spec: ReportSpec, scale: str, found: list[Departure]
) -> list[Comparison]:
    comparisons = []
    for row in (row for row in rows if row.published):
        obstacles = [
            f"{d.name} {plain(d.actual)} (published: {plain(d.published)})"
            for d in found
            if d.decisive and (not d.normalizers or row.normalizer in d.normalizers)
        ]
        if scale != COMPARABLE_SCALE:  # then nothing else matters
            obstacles = [f"scale {spec.scale(scale).short} (published: {spec.scale(COMPARABLE_SCALE).short})"]
        for metric in COMPARED_METRICS:
            values = list(_figures(row.normalizer, metric, runs).values())
            margin, target = _margin(spec, COMPARABLE_SCALE, metric), getattr(row.published, metric)
            verdict = compare_published(values, target, margin, obstacles, spec.alpha, _diverged([row]))
            comparisons.append(Comparison(row.normalizer, None, metric, margin, verdict))
    return comparisons


def _diverged(rows: Sequence[Row]) -> list[str]:
    """What verdicts on these rows must say of runs that diverged."""
    return [f"{row.label}: {row.tally.mark}" for row in rows if row.tally.diverged]


def _between_rows(rows: list[Row], runs: Sequence[Run], spec: ReportSpec, scale: str) -> list[Comparison]:
    comparisons = []
    for first, second in spec.comparisons:
        diverged = _diverged([row for row in rows if row.normalizer in (first, second)])
        for metric in COMPARED_METRICS:
            margin = _margin(spec, scale, metric)
            a, b = _figures(first, metric, runs), _figures(second, metric, runs)
            verdict = compare_rows(a, b, margin, spec.alpha, diverged)
            if a and b and scale not in spec.margins:
                reason = f"onlinenorm/report/published.yaml has no margin for {spec.scale(scale).short}"
                verdict = Verdict(NOT_COMPARABLE, reason, verdict.difference)
            comparisons.append(Comparison(first, second, metric, margin, verdict))
    return comparisons


def _removals(row: Row, runs: Sequence[Run], spec: ReportSpec) -> list[Removal]:
    sentence = spec.row(row.normalizer).removal
    mine = [run for run in runs if run.finished and run.normalizer == row.normalizer]
    clamped = [run for run in mine if run.results.get("clamping")]
    if clamped:
        found = []
        for run in clamped:
            figures, images = run.results["clamping"], run.results["dataset"]["val_images"]
            with_clamp, without = figures["with"]["val_top1"], figures["without"]["val_top1"]
            outcome = removal_outcome(figures["changed_predictions"], images, with_clamp, without)
            found.append(Removal(row.normalizer, row.label, run.name, images, figures, outcome))
        return found
    if sentence:
        return [Removal(row.normalizer, row.label, None, None, None, sentence)]
    if row.normalizer not in spec.rows:
        return []
    sentence = "The finished runs have no clamp to remove." if mine else NOT_RUN
    return [Removal(row.normalizer, row.label, None, None, None, sentence)]


def provenance(run: Run) -> Provenance:
    """Where a run's numbers come from, as its environment.json tells it."""
    environment, results = run.environment, run.results or {}
    git = environment.get("git") if isinstance(environment.get("git"), dict) else {}
    commit = str(git.get("commit") or environment.get("git_commit") or environment.get("commit") or "unknown")
    dirty = git.get("dirty", environment.get("git_dirty", environment.get("dirty")))
    versions = environment.get("versions")
    return Provenance(
        run=run.name,
        status=run.status,
        seed=run.seed,
        command=plain(environment.get("command", "unknown")),
        commit=commit + (" with uncommitted changes" if dirty else ""),
        versions={str(k): str(v) for k, v in versions.items()} if isinstance(versions, dict) else {},
        hardware=plain(environment.get("hardware", "unknown")),
        world_size=str(environment.get("world_size", "unknown")),
        images_per_second=results.get("images_per_second"),
        wall_seconds=results.get("wall_seconds"),
        resumed=results.get("resumed"),
        parameters_sha256=str(results.get("parameters_sha256", "unknown")),
    )


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


def _rule(spec: ReportSpec) -> str:
    level, alpha = f"{100 * (1 - 2 * spec.alpha):g} %", f"{100 * spec.alpha:g} %"
    return (
        f"Two rows are equivalent when the {level} Student t interval of their difference lies wholly inside the "
        f"margin (two one-sided tests at {alpha}), different when it lies wholly outside, and inconclusive otherwise. "
        f"Inconclusive too are fewer than {MIN_SEEDS} seeds, seeds that show no spread, and instead of equivalent rows "
        "of which a run or a former attempt diverged: added after the runs recorded so far, this only takes verdicts "
        "away. "
        "Differences are paired by seed when both rows have the same seeds. The published values are single runs and "
        "are taken as fixed. Margins and the rest of the rule were fixed in onlinenorm/report/published.yaml before "
        "the runs."
    )
