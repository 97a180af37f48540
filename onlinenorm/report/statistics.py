"""Summaries, equivalence tests and verdicts as pure functions of numbers.

The rule is symmetric. Take the interval of a difference at level 1 - 2 alpha. If it lies wholly inside the margin the
two are equivalent (this is the pair of one-sided t tests, TOST, of Schuirmann 1987); wholly outside, they differ by
more than the margin; otherwise the seeds at hand cannot tell. A difference is never turned into a ranking.

Seeds that are too few, or show no spread, cannot tell either: an interval needs MIN_SEEDS values and two that differ.
Nor are rows equivalent of which a run diverged: means over the runs that survived say nothing of it.
"""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from scipy import stats

EQUIVALENT = "equivalent"
DIFFERENT = "different"
INCONCLUSIVE = "inconclusive"
MIN_SEEDS = 3  # of two values, equal ones are no rarity, and the interval spans 12 deviations of their mean
NOT_COMPARABLE = "not comparable"
NOT_RUN = "not run"


@dataclass(frozen=True)
class Summary:
    """Spread of one figure over seeds; `sd` is None for one seed, `low` and `high` (interval of the mean) for few."""

    n: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None
    minimum: float
    maximum: float


@dataclass(frozen=True)
class Difference:
    """Mean difference with its interval; `paired` says whether it was taken seed by seed, `n` of how many a side."""

    mean: float
    low: float
    high: float
    level: float
    paired: bool
    n: int


@dataclass(frozen=True)
class Verdict:
    """Outcome (one of this module's constants), the reason in words, and the difference it rests on, if any."""

    outcome: str
    reason: str
    difference: Difference | None = None


def summarize(values: Iterable[float], confidence: float = 0.95) -> Summary | None:
    """Mean, sample standard deviation, smallest and largest, Student t interval of the mean from MIN_SEEDS values on.

    None without values.

    Raises ValueError when a value is not finite or confidence lies outside (0, 1).
    """
    values = [float(value) for value in values]
    if not 0 < confidence < 1:
        raise ValueError(f"level of an interval must lie between 0 and 1, got {confidence}")
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"cannot summarise values that are not finite: {values}")
    if not values:
        return None
    n, mean = len(values), fmean(values)
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1)) if n > 1 else None
    low = high = None
    if sd is not None and n >= MIN_SEEDS:
        half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * (sd / math.sqrt(n))
        low, high = mean - half, mean + half
    return Summary(n, mean, sd, low, high, min(values), max(values))


def paired_difference(first: Sequence[float], second: Sequence[float], level: float) -> Difference:
    """Mean of first[i] - second[i] with its t interval on n - 1 degrees of freedom; needs MIN_SEEDS pairs or more."""
    if len(first) != len(second) or len(first) < MIN_SEEDS:
        raise ValueError(
            f"a paired difference needs {MIN_SEEDS} or more pairs, got {len(first)} and {len(second)} values"
        )
    return one_sample_difference([a - b for a, b in zip(first, second, strict=True)], 0.0, level, paired=True)


def one_sample_difference(values: Sequence[float], target: float, level: float, paired: bool = False) -> Difference:
    """Mean of `values` minus a fixed target with its t interval; needs MIN_SEEDS values or more."""
    summary = summarize((value - target for value in values), level)
    if summary is None or summary.low is None or summary.high is None:
        raise ValueError(f"an interval needs {MIN_SEEDS} or more values, got {len(values)}")
    return Difference(summary.mean, summary.low, summary.high, level, paired, summary.n)


def welch_difference(first: Sequence[float], second: Sequence[float], level: float) -> Difference:
    """Difference of two means with unequal variances; degrees of freedom by Welch and Satterthwaite."""
    sides = summarize(first, level), summarize(second, level)
    n = min(len(first), len(second))
    if n < MIN_SEEDS or sides[0] is None or sides[1] is None:
        raise ValueError(
            f"Welch's interval needs {MIN_SEEDS} or more values a side, got {len(first)} and {len(second)}"
        )
    mean = sides[0].mean - sides[1].mean
    if not (sides[0].sd or sides[1].sd):
        return Difference(mean, mean, mean, level, False, n)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of one side without spread, which this interval allows
        interval = stats.ttest_ind(first, second, equal_var=False).confidence_interval(level)
    return Difference(mean, float(interval.low), float(interval.high), level, False, n)


def decide(difference: Difference, margin: float) -> str:
    """EQUIVALENT, DIFFERENT or INCONCLUSIVE by where the interval lies against the open interval (-margin, margin).

    INCONCLUSIVE too where the interval has no width: values without spread do not tell how they would spread.
    """
    _check_margin(margin)
    if not spreads(difference):
        return INCONCLUSIVE
    if -margin < difference.low and difference.high < margin:
        return EQUIVALENT
    if difference.low > margin or difference.high < -margin:
        return DIFFERENT
    return INCONCLUSIVE


def spreads(difference: Difference) -> bool:
    """Whether the interval is wider than rounding makes it."""
    return difference.high - difference.low > 1e-12


def excludes_zero(difference: Difference) -> bool:
    return difference.low > 0 or difference.high < 0


def compare_rows(
    first: Mapping[int, float],
    second: Mapping[int, float],
    margin: float,
    alpha: float = 0.05,
    diverged: Sequence[str] = (),
) -> Verdict:
    """Verdict on two rows of one study, each a mapping seed -> figure; paired by seed when both have the same seeds.

    `diverged` tells of runs of either row that have no figure, as in "BatchNorm: 3 of 5 diverged".
    """
    _check_margin(margin)
    if not first or not second:
        return Verdict(INCONCLUSIVE, "; ".join(diverged)) if diverged else Verdict(NOT_RUN, "a row has no finished run")
    n = min(len(first), len(second))
    if n < MIN_SEEDS:
        return Verdict(INCONCLUSIVE, "; ".join([f"n = {n}", *diverged]))
    if first.keys() == second.keys():
        seeds = sorted(first)
        difference = paired_difference([first[s] for s in seeds], [second[s] for s in seeds], 1 - 2 * alpha)
        how = f"paired by seed, n = {n}"
    else:
        difference = welch_difference(list(first.values()), list(second.values()), 1 - 2 * alpha)
        how = f"seeds differ, so unpaired, n = {len(first)} and {len(second)}"
    return _verdict(difference, margin, how, diverged)


def compare_published(
    values: Sequence[float],
    published: float,
    margin: float,
    obstacles: Sequence[str] = (),
    alpha: float = 0.05,
    diverged: Sequence[str] = (),
) -> Verdict:
    """Verdict on reproduced values against one published figure.

    The published figure is taken as fixed: it is a single run, so its own seed spread is unknown here and has to be
    covered by the margin. `obstacles` are the reasons (scale, decisive departures) that forbid the comparison,
    `diverged` as of `compare_rows`.
    """
    if not values and not diverged:
        return Verdict(NOT_RUN, "no finished run")
    if obstacles:
        return Verdict(NOT_COMPARABLE, "; ".join(obstacles))
    if not values:
        return Verdict(INCONCLUSIVE, "; ".join(diverged))
    if len(values) < MIN_SEEDS:
        return Verdict(INCONCLUSIVE, "; ".join([f"n = {len(values)}", *diverged]))
    difference = one_sample_difference(values, published, 1 - 2 * alpha)
    return _verdict(difference, margin, f"published value taken as fixed, n = {len(values)}", diverged)


def _verdict(difference: Difference, margin: float, how: str, diverged: Sequence[str]) -> Verdict:
    outcome, reasons = decide(difference, margin), [how, *diverged]
    if not spreads(difference):
        reasons.append("the seeds show no spread")
    if outcome == EQUIVALENT and diverged:
        outcome = INCONCLUSIVE  # what diverged is not in the means
    return Verdict(outcome, "; ".join(reasons), difference)


def removal_outcome(changed_predictions: int, images: int, top1_with: float, top1_without: float) -> str:
    """Sentence on a network validated with and without its clamps: the claim is identical validation performance."""
    if changed_predictions == 0:
        return "identical: no prediction changed"
    points = 100 * (top1_without - top1_with)
    share = f" ({100 * changed_predictions / images:.2f} %)" if images else ""
    changed = f"{changed_predictions:,} of {images:,} predictions changed{share}"
    return f"not identical: {changed}, accuracy {points:+.2f} points"


def _check_margin(margin: float) -> None:
    if not (math.isfinite(margin) and margin > 0):
        raise ValueError(f"margin must be positive and finite, got {margin}")


def rule(alpha: float) -> str:
    """How verdicts are reached, in words."""
    level, each = f"{100 * (1 - 2 * alpha):g} %", f"{100 * alpha:g} %"
    return (
        f"Two rows are equivalent when the {level} Student t interval of their difference lies wholly inside the "
        f"margin (two one-sided tests at {each}), different when it lies wholly outside, and inconclusive otherwise. "
        f"Inconclusive too are fewer than {MIN_SEEDS} seeds, seeds that show no spread, and instead of equivalent rows "
        "of which a run or a former attempt diverged: added after the runs recorded so far, this only takes verdicts "
        "away. "
        "Differences are paired by seed when both rows have the same seeds. The published values are single runs and "
        "are taken as fixed. Margins and the rest of the rule were fixed in onlinenorm/report/published.yaml before "
        "the runs."
    )
