"""What removing the clamp does, at the end and over a run, and other ways to take it away or to mend statistics."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import pandas as pd

from onlinenorm.records import lookup
from onlinenorm.report.predictions import OFF_KEY, RAISE_KEY, as_trained, epochs_without_clamp
from onlinenorm.report.runs import Runs, frame, milestones
from onlinenorm.report.seeds import tally
from onlinenorm.report.settings import ReportSpec
from onlinenorm.report.statistics import EQUIVALENT, Verdict, summarize
from onlinenorm.report.swept import natural, swept, value_of
from onlinenorm.scales import UNKNOWN
from onlinenorm.text import plural

AS_TRAINED, KEPT, REMOVED = "as trained", "clamp kept", "clamp removed after training, as published"
ANEW = "statistics anew"  # how the way is named, before its images
METRICS = {"last_top1": "val_top1", "last_loss": "val_loss"}
_COLUMNS = (
    "normalizer", "label", "colour", "setting", "way", "seeds", "figures", "summaries", "changed", "gaps", "verdicts",
    "mark",
)  # fmt: skip


def with_settings(runs: pd.DataFrame) -> pd.DataFrame:
    """With `setting`, a run's values of the keys that these runs sweep, as in "lr 0.05", "" for none; but for those
    keys that are ways to take the clamp away."""
    keys = sorted({key for name in runs["name"] for key in swept(name)} - {OFF_KEY, RAISE_KEY})

    def words(run: Any) -> str:
        return ", ".join(f"{key.split('.')[-1]} {value_of(run, key)}" for key in keys)

    return runs.assign(setting=[words(run) for run in runs.itertuples()])


def ways(runs: pd.DataFrame, spec: ReportSpec) -> pd.DataFrame:
    """A row a normalizer, setting and way to take the clamp away or to estimate statistics anew, of finished runs.

    Nothing of runs that have but one way. `figures` are those of the last epoch by metric and seed, `changed` the mean
    share of predictions that the way changed (None: it was trained so). `gaps` by metric are means of the way minus the
    network as trained, with its clamp (of a way that is `retrained`: another network), over the seeds that both have,
    `verdicts` those on them, within the margins of best figures; None for that network, and where it was not run.
    """
    spec = spec.with_rows_of(runs)
    runs = with_settings(runs)
    groups: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for run in runs[runs["finished"]].sort_values("seed").itertuples():
        for way, figures in _ways_of(run):
            found = groups.setdefault((run.normalizer, run.setting), {})
            found.setdefault(way, []).append({"seed": run.seed, **figures})
    scale = next((results["scale"] for results in runs["results"].dropna()), UNKNOWN)
    order = [*spec.rows, *spec.extra_rows(runs)]
    rows = []
    for normalizer, setting in sorted(groups, key=lambda group: (order.index(group[0]), natural(group[1]))):
        found = groups[normalizer, setting]
        mine = runs[(runs["normalizer"] == normalizer) & (runs["setting"] == setting)]
        count, row = tally(mine), spec.row(normalizer)
        usual = next((found[way] for way in (KEPT, AS_TRAINED) if way in found), [])
        for way, entries in sorted(found.items(), key=lambda item: _rank(item[0])) if len(found) > 1 else ():
            figures = {
                metric: {entry["seed"]: entry[key] for entry in entries if entry[key] is not None}
                for metric, key in METRICS.items()
            }
            changed = [entry["changed"] for entry in entries if entry["changed"] is not None]
            summaries = {metric: summarize(values.values(), spec.confidence) for metric, values in figures.items()}
            lost = [f"{row.label}: {count.mark}"] if count.diverged else []
            infinite = len(entries) - len(figures["last_loss"])
            unlike = f"{infinite} of {len(entries)} not finite" if infinite else ""
            lost += [f"{row.label}: {unlike}"] if infinite else []
            against = entries is not usual and bool(usual)
            gaps, verdicts = _against(figures, usual, changed, scale, lost, spec) if against else ({}, None)
            rows.append((
                normalizer, row.label, row.colour, setting, way, list(figures["last_top1"]), figures, summaries,
                fmean(changed) if changed else None, gaps, verdicts, ", ".join(filter(None, [count.mark, unlike])),
            ))  # fmt: skip
    return frame(rows, _COLUMNS)


def _against(
    figures: Mapping[str, Mapping[int, float]], usual: Sequence[Mapping[str, Any]], changed: Sequence[float],
    scale: str, lost: Sequence[str], spec: ReportSpec,
) -> tuple[dict[str, float | None], dict[str, Verdict]]:  # fmt: skip
    """`gaps` and `verdicts` of a way, against the entries as usual; equal where no prediction changed."""
    gaps, verdicts = {}, {}
    for metric, key in METRICS.items():
        trained = {entry["seed"]: entry[key] for entry in usual if entry["seed"] in figures[metric]}
        shared = {seed: figures[metric][seed] for seed in trained}
        gaps[metric] = fmean(shared[seed] - trained[seed] for seed in trained) if trained else None
        verdicts[metric] = spec.compare(shared, trained, metric.replace("last", "best"), scale, lost)
    found = verdicts["last_top1"]
    if found.difference and changed and not any(changed) and not lost:
        verdicts["last_top1"] = Verdict(EQUIVALENT, "no prediction changed", found.difference)
    return gaps, verdicts


def _ways_of(run: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The ways that a run has figures of, with `val_top1`, `val_loss` and the share of predictions `changed`."""
    results, images = run.results, run.results["dataset"]["val_images"]
    clamping, anew = results.get("clamping"), results.get("reestimated")
    off, raised = epochs_without_clamp(run.config), int(lookup(run.config, RAISE_KEY, 0) or 0)
    each = "each of " * (raised > 1)
    if not clamping:
        way = AS_TRAINED
        yield way, {**results["last"], "changed": None}
    elif off:
        doubled = f"doubled in {each}{plural(raised, 'epoch')}, then " if raised else ""
        way = f"clamp {doubled}off in the last {plural(off, 'epoch')}"
        yield way, {**clamping[as_trained(run.config)], "changed": None}
    else:
        doubled = f"clamp doubled in {each}the last {plural(raised, 'epoch')}"
        kept, way = (f"{doubled}, kept", f"{doubled}, then removed") if raised else (KEPT, REMOVED)
        yield kept, {**clamping["with"], "changed": None}
        yield way, {**clamping["without"], "changed": clamping["changed_predictions"] / images}
    if anew:
        told = f"{ANEW} ({anew['images']:,} images)"
        way = {AS_TRAINED: told, REMOVED: f"clamp removed, {told}"}.get(way, f"{way}, {told}")
        yield way, {**anew, "changed": anew["changed_predictions"] / images}


def retrained(ways: pd.DataFrame) -> pd.Series:
    """Which rows of `ways` are of networks whose clamp was doubled or off in training: others than those they face."""
    return ways["way"].str.contains("off in|doubled in").astype(bool)


def joined(parts: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Rows of several studies in one order; of equal ways those of the first study alone."""
    rows = pd.concat(parts, ignore_index=True).drop_duplicates(["normalizer", "setting", "way"])
    order = list(dict.fromkeys(rows["normalizer"]))
    return rows.loc[sorted(rows.index, key=lambda i: (order.index(rows["normalizer"][i]), _rank(rows["way"][i])))]


def _rank(way: str) -> tuple[int, list[Any]]:
    first = (KEPT, AS_TRAINED, REMOVED)
    return first.index(way) if way in first else len(first), natural(way.replace("each of ", ""))


def removal_epochs(study: Runs) -> pd.DataFrame:
    """Epochs validated without the clamp too, of a study whose runs keep it to the end as it is.

    `setting` of the run, `drops` of the learning rate before, `changed` share of predictions, and `top1` and `loss`
    without minus with (NaN: not finite).
    """
    columns = ["folder", "epoch", "lr", "setting", "drops", "changed", "top1", "loss", "without_val_top1", "val_top1"]
    remedied = any(lookup(config, key, 0) for config in study.runs["config"] for key in (OFF_KEY, RAISE_KEY))
    if remedied or "without_val_top1" not in study.epochs:
        return pd.DataFrame(columns=columns, dtype=float)
    parts = []
    runs = with_settings(study.runs)
    for run in runs[runs["finished"]].itertuples():
        mine = study.epochs[study.epochs["folder"] == run.folder].dropna(subset="without_val_top1")
        passed = [sum(m < epoch for m in milestones(run)) for epoch in mine["epoch"]]
        parts.append(mine.assign(
            setting=run.setting, drops=passed,
            changed=mine["changed_predictions"] / run.results["dataset"]["val_images"],
            top1=mine["without_val_top1"] - mine["val_top1"], loss=mine["without_val_loss"] - mine["val_loss"],
        ))  # fmt: skip
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns, dtype=float)


def removal_courses(studies: Mapping[str, Runs]) -> pd.DataFrame:
    """A row a study, setting and number of drops of the learning rate: lists of what removal does at its epochs."""
    rows = []
    for name, study in studies.items():
        groups = list(removal_epochs(study).groupby(["setting", "drops"]))
        for (setting, drops), mine in sorted(groups, key=lambda group: (natural(group[0][0]), group[0][1])):
            figures = {key: mine[key].dropna().tolist() for key in ("lr", "changed", "top1", "loss")}
            runs = mine["folder"].nunique()
            rows.append({"study": name, "setting": setting, "drops": int(drops), "runs": runs, **figures})
    return pd.DataFrame(rows)
