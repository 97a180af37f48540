"""Figures of recorded studies by name, each with what it leaves out, for a page that a person writes about them."""

import re
from collections.abc import Mapping
from statistics import fmean, median
from typing import Any

import pandas as pd
from scipy import stats

from onlinenorm.errors import ReportError
from onlinenorm.records import lookup
from onlinenorm.report import benchmarks, words
from onlinenorm.report.ablation import Ablation, clamp_removals, courses, of_clamped
from onlinenorm.report.predictions import OFF_KEY, RAISE_KEY, epochs_without_clamp
from onlinenorm.report.removal import ANEW, AS_TRAINED, KEPT, REMOVED, removal_courses
from onlinenorm.report.runs import Runs
from onlinenorm.report.seeds import tally
from onlinenorm.report.settings import ReportSpec
from onlinenorm.report.statistics import NOT_COMPARABLE, NOT_RUN
from onlinenorm.report.swept import plain_value, swept
from onlinenorm.report.tables import Report, plain, recount


class Findings:
    """What a template may ask for, as words; a study, row or value that is not there is a ReportError, but for `has`.

    Of a study that is there, normalizers and values that have no run yet are "not run".

    Args:
        studies: tables and ablations by the name of their study.
        runs: their runs.
        pooled: of tables, the comparisons image by image.
        results: rows of scripts/bench/training.py, None without.
        spec: what runs are held against.
    """

    def __init__(
        self,
        studies: Mapping[str, Report | Ablation],
        runs: Mapping[str, Runs],
        pooled: Mapping[str, pd.DataFrame],
        results: Mapping[str, Any] | None,
        spec: ReportSpec,
    ):
        self.studies, self.runs, self.pooled, self.results, self.spec = studies, runs, pooled, results, spec
        tables = {name: runs[name] for name, made in studies.items() if isinstance(made, Report)}
        self.tables = tables  # ablations have values chosen to go wrong, and runs of other studies too

    def has(self, *studies: str) -> bool:
        """Are runs of all of these recorded?"""
        return all(study in self.studies for study in studies)

    def setting(self, study: str, key: str) -> str:
        """The value that all runs of a study have at a key of their configuration."""
        runs = self._find(self.runs, study, "study").runs
        values = {plain_value(plain(value)) for config in runs["config"] if (value := lookup(config, key)) is not None}
        if len(values) != 1:
            raise ReportError(f"findings: {key} of {study} is not one value but {len(values)}")
        return values.pop()

    def details(self, study: str) -> str:
        """Images, network, pixels and epochs."""
        return self._find(self.studies, study, "study").scale_label.rpartition(" (")[2].removesuffix(")")

    def row(self, study: str, normalizer: str, metric: str = "best_top1") -> str:
        """Mean and spread, and of how many attempts where some are left out; where none finished, how they ended."""
        rows = self._find(self.studies, study, "study").rows.set_index("normalizer")
        row = self._find(rows.T, normalizer, f"row of {study}")
        ended = "; ".join([*row["unfinished"], *row["attempts"]])
        told = words.mean_and_spread(row["summaries"][metric], metric)
        return self._with_mark(told, row) if row["seeds"] else ended or NOT_RUN

    def further(self, study: str, metric: str = "best_top1") -> str:
        """`row` of each normalizer beside the usual three, with its published value, if any, and its n; "" without."""
        rows = self._find(self.studies, study, "study").rows
        told = []
        for row in rows[~rows["normalizer"].isin(list(self.spec.rows))].itertuples():
            published = f"published {words.published_cell(row, metric)}, " if row.published else ""
            told.append(f"{row.label} {self.row(study, row.normalizer, metric)} ({published}n = {len(row.seeds)})")
        return ", ".join(told)

    def seeds(self, study: str, normalizer: str) -> str:
        """How many finished."""
        finished = self.runs[study].runs["finished"] & (self.runs[study].runs["normalizer"] == normalizer)
        return str(int(finished.sum()))

    def verdict(self, study: str, first: str, second: str, metric: str = "best_top1") -> str:
        """Outcome, difference and its interval, or the reason that there is none."""
        found = self._find(self.studies, study, "study").comparisons
        found = found[(found["first"] == first) & (found["second"] == second) & (found["metric"] == metric)]
        return self._verdict(self._find(dict(enumerate(found.itertuples())), 0, f"{first} - {second} of {study}"))

    def against_published(self, study: str, normalizer: str, metric: str = "best_top1") -> str:
        """`verdict` on a row and its published value; where there is none, why, and the difference all the same."""
        found = self._find(self.studies, study, "study").comparisons
        found = found[(found["first"] == normalizer) & found["second"].isna() & (found["metric"] == metric)]
        return self._verdict(self._find(dict(enumerate(found.itertuples())), 0, f"published {normalizer} of {study}"))

    @staticmethod
    def _verdict(comparison: Any) -> str:
        verdict, metric = comparison.verdict, comparison.metric
        if (gap := verdict.difference) is None:
            return words.verdict_text(comparison)
        why = f"; {verdict.reason}" if "diverged" in verdict.reason or verdict.outcome == NOT_COMPARABLE else ""
        told = f"{words.difference(gap.mean, metric)} {words.unit(metric)}, {words.interval_words(gap, metric)}"
        return f"{verdict.outcome} ({told}{why})"

    def margin(self, study: str, metric: str = "best_top1") -> str:
        """What two rows may differ by and still be equivalent."""
        found = self._find(self.studies, study, "study").comparisons
        margin = found[found["second"].notna() & (found["metric"] == metric)].iloc[0]["margin"]
        number = words.margin_words(margin, metric)
        return f"{number} {words.unit(metric)}".replace("1 points", "1 point")

    def same(self, study: str, first: str, second: str) -> str:
        """Share of images on which both say the same, beside that of two seeds of either."""
        found = self._find(self.pooled, study, "comparison image by image of")
        found = found[(found["first"] == first) & (found["second"] == second)]
        pair = self._find(dict(enumerate(found.itertuples())), 0, f"{first} - {second} of {study}")
        either = [f"{share:.1%}" for share in (pair.same_first, pair.same_second) if share is not None]
        return f"{pair.same:.1%} of the images" + (f" (two seeds of either: {' and '.join(either)})" if either else "")

    def at(self, study: str, value: str, series: str, metric: str = "last_top1") -> str:
        """A swept value's mean and spread, marked as those of a row."""
        points = self._find(self.studies, study, "study").points
        points = points[(points["value"] == value) & (points["series"] == series)]
        point = self._find(dict(enumerate(points.to_dict("records"))), 0, f"{series} at {value} of {study}")
        ended = "; ".join([*point["diverged"], *point["unfinished"], *point["attempts"]])
        told = words.mean_and_spread(point["summaries"][metric], metric)
        return self._with_mark(told, point) if point["seeds"] else ended

    def over(self, study: str, series: str, metric: str = "last_top1") -> str:
        """`at` for all values of a sweep that the series has, the published one marked."""
        made = self._find(self.studies, study, "study")
        values = made.points[made.points["series"] == series]["value"]
        marks = {made.published: " (published)"}
        return ", ".join(f"{self.at(study, v, series, metric)} at {v}{marks.get(v, '')}" for v in values) or NOT_RUN

    def between(self, study: str, first: str, second: str, series: str, metric: str = "last_top1") -> str:
        """Two swept values of a series, the first minus the second: outcome, difference and its interval."""
        points = self._find(self.studies, study, "study").points
        asked = re.split("[=, ]", self.spec.studies[study].sweep) if study in self.spec.studies else []
        sides = []
        for value in (first, second):
            mine = points[(points["value"] == value) & (points["series"] == series)]
            if mine.empty and value in asked:
                return NOT_RUN
            point = self._find(dict(enumerate(mine.to_dict("records"))), 0, f"{series} at {value} of {study}")
            sides.append(dict(zip(point["seeds"], point["figures"][metric], strict=True)))
        return self._gap(sides[0], sides[1], metric, study)

    def way(self, study: str, normalizer: str, start: str, setting: str = "", metric: str = "last_top1") -> str:
        """A last figure of the way that begins so, and its difference to the network as trained; see `removal.ways`."""
        row = self._way(study, normalizer, start, setting)
        if row is None:
            return NOT_RUN
        mean = words.mean_and_spread(row.summaries[metric], metric)
        if row.verdicts is None:
            return mean
        verdict, gap = row.verdicts[metric], row.gaps[metric]
        told = words.DASH if gap is None else f"{words.difference(gap, metric)} {words.unit(metric)}"
        if verdict.difference is None:
            return f"{mean} ({told}, n = {len(row.seeds)})"
        return f"{mean} ({told}, {words.interval_words(verdict.difference, metric)}: {verdict.outcome})"

    def ways_to(self, study: str, normalizer: str, word: str, without: str | None = None) -> str:
        """`way` for each way that has a word in it, and not that other one, by name."""
        ways = self._find(self.studies, study, "study").ways
        names = [way for way in ways[ways["normalizer"] == normalizer]["way"] if word in way]
        names = [name for name in names if without is None or without not in name]
        return "; ".join(f"{name} {self.way(study, normalizer, name)}" for name in names) or NOT_RUN

    def cheapest(self, normalizer: str, *studies: str) -> str:
        """The way to a network without its clamp whose last accuracy is highest against the network as trained, over
        those of these studies that are there: its difference, in points, and n."""
        found = []
        for study in filter(self.has, studies):
            ways = self.studies[study].ways
            found += [(row.gaps.get("last_top1"), row) for row in ways[ways["normalizer"] == normalizer].itertuples()]
        found = [(gap, row) for gap, row in found if gap is not None and not row.setting and "kept" not in row.way]
        if not found:
            return NOT_RUN
        gap, best = max(found, key=lambda pair: pair[0])
        return f"{best.way} ({words.difference(gap, 'top1')} points, n = {len(best.seeds)})"

    def way_at(self, study: str, normalizer: str, start: str) -> str:
        """The difference of a way to the network as trained, in points, at each value of a sweep, with its n."""
        ways = self._find(self.studies, study, "study").ways
        ways = ways[(ways["normalizer"] == normalizer) & ways["way"].str.startswith(start)]
        told = [(row, row.gaps["last_top1"]) for row in ways.itertuples()]
        shown = (
            f"{words.difference(gap, 'top1')} at {row.setting.rpartition(' ')[2]} (n = {len(row.seeds)})"
            for row, gap in told
            if gap is not None
        )
        return ", ".join(shown) or NOT_RUN

    def against_anew(self, study: str, first: str, second: str) -> str:
        """The last accuracy of `first` as trained minus that of `second` on statistics estimated anew."""
        usual = KEPT if self._has_way(study, first, KEPT) else AS_TRAINED
        ours, rival = self._way(study, first, usual), self._way(study, second, ANEW)
        if ours is None or rival is None:
            return NOT_RUN
        return self._gap(ours.figures["last_top1"], rival.figures["last_top1"], "last_top1", study)

    def last(self, study: str, first: str, second: str) -> str:
        """Two rows at the last epoch, the first minus the second: outcome, difference and its interval."""
        runs = self._find(self.runs, study, "study").runs
        runs = runs[runs["finished"]]
        rows = {name: runs[runs["normalizer"] == name] for name in (first, second)}
        by_seed = {name: dict(zip(row["seed"], row["last_top1"], strict=True)) for name, row in rows.items()}
        return self._gap(by_seed[first], by_seed[second], "last_top1", study)

    def free(self) -> dict[str, str]:
        """Over tables of seeds enough for a verdict: in how many of `tables` removal leaves accuracy `equivalent`."""
        found = [
            row.verdicts["last_top1"].outcome
            for name in self.tables
            for row in self.studies[name].ways.itertuples()
            if row.way == REMOVED and row.verdicts["last_top1"].difference
        ]
        return {"equivalent": str(found.count("equivalent")), "tables": str(len(found))}

    def association(self) -> dict[str, str]:
        """Spearman's rank correlation over `runs` of the share of predictions that removal changed with the clamped
        `fraction` of activations, and with the `largest` one."""
        found = clamp_removals(self.runs)
        if found.empty:
            return dict.fromkeys(("fraction", "largest", "runs"), "not run")
        found = found.drop_duplicates("weights").dropna(subset=["clamped_fraction", "max_abs_activation"])
        share = (found["changed_predictions"] / found["images"]).astype(float)
        columns = {"fraction": "clamped_fraction", "largest": "max_abs_activation"}
        told = {key: stats.spearmanr(share, found[column].astype(float)).statistic for key, column in columns.items()}
        return {key: f"{round(value, 2) + 0.0:.2f}" for key, value in told.items()} | {"runs": str(len(found))}

    def over_drops(self, study: str) -> str:
        """Median share of predictions that removal changes, by how often the learning rate had dropped."""
        found = removal_courses({study: self._find(self.runs, study, "study")})
        if found.empty:
            return NOT_RUN
        told = [f"{median(row.changed):.1%} at {words.span(row.lr, '{:.2g}'.format)}" for row in found.itertuples()]
        return ", ".join(told)

    def jump(self, study: str, normalizer: str) -> str:
        """The largest rise of the validation loss from one epoch to the next, from least to most over runs."""
        runs = self._find(self.runs, study, "study")
        mine = runs.runs[runs.runs["finished"] & (runs.runs["normalizer"] == normalizer)]
        losses = runs.epochs[runs.epochs["folder"].isin(mine["folder"])].groupby("folder")["val_loss"]
        rises = losses.apply(lambda loss: loss.diff().max()).tolist()
        return f"{words.span(rises, '{:.2f}'.format)} nats" if rises else f"{words.DASH} ({NOT_RUN})"

    def removal(self, study: str | None = None) -> dict[str, str]:
        """Of runs whose clamps were removed (of one study, or all): `exact` of `runs` changed no prediction, `share` of
        the predictions changed, and accuracy by `points` at most."""
        tables = self.tables if study is None else {study: self._find(self.tables, study, "study")}
        found = clamp_removals(tables)
        if found.empty:
            return dict.fromkeys(("exact", "runs", "share", "points"), "not run")
        share = 100 * found["changed_predictions"] / found["images"]
        tried = of_clamped(tables)
        tried = tried[[not epochs_without_clamp(config) for config in tried["config"]]]
        return {
            "exact": str(int((found["changed_predictions"] == 0).sum())),
            "runs": self._with_mark(f"{len(found)} run{'s' * (len(found) > 1)}", {"tally": tally(tried)}),
            "share": f"{words.span(share.tolist(), '{:.1f}'.format)} %",
            "points": f"{words.difference(max(found['top1'], key=abs), 'top1')} points",
        }

    def removal_in_sweeps(self) -> str:
        """What `removal` leaves out: accuracy's largest change in each sweep, in points, and the values it came at."""
        sweeps = {name: runs for name, runs in self.runs.items() if name not in self.tables}
        found = clamp_removals(sweeps)
        if found.empty:
            return "not run"
        keys = found["run"].map(swept)
        found = found.assign(at=[" ".join(map("=".join, each.items())) for each in keys])
        found = found[[bool(each) and not {OFF_KEY, RAISE_KEY} & set(each) for each in keys]]
        worst = found.loc[found.groupby("study")["top1"].apply(lambda change: change.abs().idxmax())]
        worst = worst.sort_values("top1", key=abs, ascending=False)
        return ", ".join(f"{words.difference(row.top1, 'top1')} at {row.at}" for row in worst.itertuples()) or "not run"

    def course(self) -> dict[str, str]:
        """Of clamped fractions: `fallen` of `compared` are lower at the end than before the rate first drops, `zero` of
        `runs` end at exactly 0."""
        found = courses(self.tables)
        found = found[found["finished"]].dropna(subset="last")
        before = found.dropna(subset="before_drop")
        counts = {"fallen": (before["last"] < before["before_drop"]).sum(), "compared": len(before)}
        counts |= {"zero": (found["last"] == 0).sum(), "runs": len(found)}
        return {key: str(int(count)) for key, count in counts.items()}

    def recounts(self) -> dict[str, str]:
        """Of `runs` recorded before accuracy had one rule, `apart` differ in the last accuracy, by `worst` images."""
        found = pd.concat([recount(study.runs).assign(study=name) for name, study in self.runs.items()])
        of_runs = found.groupby(["study", "run"])
        found = found[found["figure"].str.endswith("top1") & (found["recorded"] != found["counted"])]
        worst = max((found["recorded"] - found["counted"]).abs(), default=0)
        apart = found.groupby(["study", "run"]).ngroups
        return {"runs": str(of_runs.ngroups), "apart": str(apart), "worst": str(worst)}

    def cost(self, batch: int) -> str:
        """Is clamping cheaper than layer scaling, in the fastest setting of this batch?"""
        if not self.results:
            return "not measured here"
        found = benchmarks.clamping_against_scaling(benchmarks.steps(self.results), trained=True)
        found = found[found["batch"] == batch]
        return words.cost_sentence(self._find(dict(enumerate(found.itertuples())), 0, f"cost of batches of {batch}"))

    def device(self) -> str:
        """What costs were measured on."""
        return self.results["device"] if self.results else "no GPU"

    def _gap(self, first: Mapping[int, float], second: Mapping[int, float], metric: str, study: str) -> str:
        """Of the seeds that both have."""
        shared = sorted(first.keys() & second.keys())
        if not shared:
            return "no seed is in both" if first and second else NOT_RUN
        a, b = ({seed: side[seed] for seed in shared} for side in (first, second))
        scale = next(results["scale"] for results in self.runs[study].runs["results"].dropna())
        verdict = self.spec.compare(a, b, metric.replace("last", "best"), scale, [])
        mean = fmean(a[seed] - b[seed] for seed in shared)
        told = f"{words.difference(mean, metric)} {words.unit(metric)}"
        if verdict.difference is None:
            return f"{told}, n = {len(shared)}"
        return f"{verdict.outcome} ({told}, {words.interval_words(verdict.difference, metric)}, n = {len(shared)})"

    def _way(self, study: str, normalizer: str, start: str, setting: str = "") -> Any:
        """None where no run of that normalizer is done."""
        ways = self._find(self.studies, study, "study").ways
        if normalizer in {**self.spec.rows, **self.spec.further_rows} and self.seeds(study, normalizer) == "0":
            return None
        mine = ways[(ways["normalizer"] == normalizer) & (ways["setting"] == setting)]
        mine = mine[mine["way"].str.startswith(start)]
        return self._find(dict(enumerate(mine.itertuples())), 0, f"{normalizer}, {start} of {study}")

    def _has_way(self, study: str, normalizer: str, way: str) -> bool:
        ways = self._find(self.studies, study, "study").ways
        return bool(((ways["normalizer"] == normalizer) & (ways["way"] == way)).any())

    @staticmethod
    def _with_mark(told: str, row: Any) -> str:
        return told + (f" ({row['tally'].mark})" if row["tally"].mark else "")

    @staticmethod
    def _find(among: Any, key: Any, what: str) -> Any:
        try:
            return among[key]
        except KeyError:
            name = f": {key}" if key else ""
            raise ReportError(f"findings: there is no {what}{name}; its run data are missing") from None
