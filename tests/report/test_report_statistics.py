import math

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from scipy import stats

from onlinenorm.report import statistics as rules

figures = st.floats(0.0, 1.0).map(lambda x: round(x, 6))
samples = st.lists(figures, min_size=rules.MIN_SEEDS, max_size=8)
margins = st.floats(1e-4, 0.5)


def test_summary_of_a_known_sample():
    # mean 5, sum of squares 32, so sd = sqrt(32 / 7); t(0.975, 7) = 2.364624
    summary = rules.summarize([2, 4, 4, 4, 5, 5, 7, 9])
    assert (summary.n, summary.mean, summary.minimum, summary.maximum) == (8, 5, 2, 9)
    assert summary.sd == pytest.approx(2.138090, abs=1e-6)
    half = 2.364624 * 2.138090 / math.sqrt(8)
    assert (summary.low, summary.high) == pytest.approx((5 - half, 5 + half), abs=1e-5)


def test_summary_of_none_and_of_one():
    assert rules.summarize([]) is None
    one = rules.summarize([0.763])
    assert (one.n, one.mean, one.sd, one.low, one.high) == (1, 0.763, None, None, None)


@pytest.mark.parametrize("values", [[math.nan], [1.0, math.inf]])
def test_summary_refuses_what_is_not_finite(values):
    with pytest.raises(ValueError, match="finite"):
        rules.summarize(values)


@given(samples, st.randoms())
def test_summary_does_not_depend_on_the_order(values, random):
    shuffled = random.sample(values, len(values))
    a, b = rules.summarize(values), rules.summarize(shuffled)
    assert (a.mean, a.minimum, a.maximum) == (b.mean, b.minimum, b.maximum)
    assert (a.sd, a.low, a.high) == pytest.approx((b.sd, b.low, b.high))
    assert a.minimum - 1e-12 <= a.mean <= a.maximum + 1e-12


@given(samples, samples)
def test_welch_agrees_with_scipy(first, second):
    assume(np.ptp(first) >= 1e-3 and np.ptp(second) >= 1e-3)
    difference = rules.welch_difference(first, second, 0.9)
    expected = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.9)
    assert (difference.low, difference.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


@given(samples, margins)
def test_equivalent_exactly_when_both_one_sided_tests_reject(values, margin):
    assume(np.ptp(values) >= 1e-3)
    below = stats.ttest_1samp(values, 0.5 - margin, alternative="greater").pvalue
    above = stats.ttest_1samp(values, 0.5 + margin, alternative="less").pvalue
    assume(abs(max(below, above) - 0.05) >= 1e-9)
    verdict = rules.compare_published(values, 0.5, margin, alpha=0.05)
    assert (verdict.outcome == rules.EQUIVALENT) == (max(below, above) < 0.05)


@given(samples, samples, margins)
def test_swapping_the_rows_turns_the_sign_and_keeps_the_verdict(first, second, margin):
    a, b = dict(enumerate(first)), dict(enumerate(second))
    there, back = rules.compare_rows(a, b, margin), rules.compare_rows(b, a, margin)
    assert there.outcome == back.outcome
    assert there.difference.mean == pytest.approx(-back.difference.mean, abs=1e-12)
    assert there.difference.paired == (len(first) == len(second))


@example([0.7, 0.701, 0.702], [0.7, 0.701, 0.7021], 0.1, 2.0).via("equivalent at both")
@example([0.7, 0.701, 0.702], [0.2, 0.201, 0.2021], 0.1, 2.0).via("different at both")
@given(samples, samples, margins, st.floats(1.0, 5.0))
def test_a_wider_margin_never_undoes_an_equivalence(first, second, margin, factor):
    a, b = dict(enumerate(first)), dict(enumerate(second))
    narrow, wide = rules.compare_rows(a, b, margin).outcome, rules.compare_rows(a, b, margin * factor).outcome
    if narrow == rules.EQUIVALENT:
        assert wide == rules.EQUIVALENT
    if wide == rules.DIFFERENT:
        assert narrow == rules.DIFFERENT


def test_pairing_removes_what_seeds_share():
    # seeds move both rows by whole points, the rows differ by 0.1 points: only the paired test sees it
    first = {seed: 0.70 + 0.01 * seed for seed in range(5)}
    second = {seed: value - 0.001 - 0.0001 * (seed % 2) for seed, value in first.items()}
    paired = rules.compare_rows(first, second, margin=0.003)
    assert paired.outcome == rules.EQUIVALENT and "paired" in paired.reason
    other_seeds = {seed + 10: value for seed, value in second.items()}
    unpaired = rules.compare_rows(first, other_seeds, margin=0.003)
    assert unpaired.outcome == rules.INCONCLUSIVE and "unpaired" in unpaired.reason


def test_a_difference_beyond_the_margin():
    first, second = {0: 0.80, 1: 0.801, 2: 0.799}, {0: 0.76, 1: 0.762, 2: 0.761}
    assert rules.compare_rows(first, second, margin=0.003).outcome == rules.DIFFERENT


@pytest.mark.parametrize("step", [0.0, 0.001, 0.1])
@pytest.mark.parametrize("first_seed", [0, 5])
@pytest.mark.parametrize("n", [3, 5])
def test_seeds_without_spread_give_no_verdict(step, first_seed, n):
    """Their interval has no width: how other seeds would fall is not known from them."""
    first = {seed: 0.5 + 0.1 * (seed % 2) * (not first_seed) for seed in range(n)}
    second = {first_seed + seed: value - step for seed, value in first.items()}
    verdict = rules.compare_rows(first, second, 0.003)
    assert verdict.outcome == rules.INCONCLUSIVE and "the seeds show no spread" in verdict.reason
    assert rules.compare_published([0.5 - step] * n, 0.5, 0.003).outcome == rules.INCONCLUSIVE


@given(st.lists(figures, min_size=2, max_size=2), figures, margins)
def test_two_seeds_give_neither_an_interval_nor_a_verdict(values, shift, margin):
    first, second = dict(enumerate(values)), dict(enumerate(value - shift for value in values))
    nothing = rules.Verdict(rules.INCONCLUSIVE, "n = 2")
    assert rules.compare_rows(first, second, margin) == rules.compare_published(values, 0.5, margin) == nothing
    assert rules.compare_rows(first, {7: 0.5, 8: 0.5, 9: 0.5}, margin) == nothing
    summary = rules.summarize(values)
    assert summary.sd is not None and summary.low is None and summary.high is None


@given(samples, samples, margins)
def test_rows_of_which_a_run_diverged_are_never_equivalent(first, second, margin):
    a, b, mark = dict(enumerate(first)), dict(enumerate(second)), "BatchNorm: 2 of 5 finished, 3 of 5 diverged"
    whole, marked = rules.compare_rows(a, b, margin), rules.compare_rows(a, b, margin, diverged=[mark])
    assert marked.outcome == (rules.INCONCLUSIVE if whole.outcome == rules.EQUIVALENT else whole.outcome)
    assert mark in marked.reason and marked.difference == whole.difference
    published = rules.compare_published(first, 0.5, margin, diverged=[mark])
    assert published.outcome != rules.EQUIVALENT and mark in published.reason


def test_a_row_that_diverged_altogether_was_run():
    assert rules.compare_rows({}, {0: 0.5}, 0.003, diverged=["x: 5 of 5 diverged"]) == rules.Verdict(
        rules.INCONCLUSIVE, "x: 5 of 5 diverged"
    )
    assert rules.compare_published([], 0.5, 0.003, diverged=["x"]) == rules.Verdict(rules.INCONCLUSIVE, "x")
    assert rules.compare_published([], 0.5, 0.003, ["scale"], diverged=["x"]).outcome == rules.NOT_COMPARABLE


def test_one_seed_is_never_enough():
    assert rules.compare_rows({0: 0.5}, {0: 0.5}, 0.003) == rules.Verdict(rules.INCONCLUSIVE, "n = 1")
    assert rules.compare_rows({0: 0.5}, {0: 0.5, 1: 0.5}, 0.003).outcome == rules.INCONCLUSIVE
    assert rules.compare_published([0.763], 0.763, 0.003) == rules.Verdict(rules.INCONCLUSIVE, "n = 1")


def test_no_seed_and_no_common_ground():
    assert rules.compare_rows({}, {0: 0.5}, 0.003).outcome == rules.NOT_RUN
    assert rules.compare_published([], 0.763, 0.003, ["scale embedded"]).outcome == rules.NOT_RUN
    verdict = rules.compare_published([0.763] * 5, 0.763, 0.003, ["scale embedded", "epochs 5"])
    assert verdict == rules.Verdict(rules.NOT_COMPARABLE, "scale embedded; epochs 5")


@pytest.mark.parametrize("margin", [0.0, -0.1, math.nan, math.inf])
def test_a_margin_must_be_positive(margin):
    with pytest.raises(ValueError, match="margin"):
        rules.compare_rows({0: 0.5, 1: 0.5}, {0: 0.5, 1: 0.5}, margin)


def test_intervals_need_three_values():
    for call in (
        lambda: rules.paired_difference([1.0, 2.0], [1.0, 2.0], 0.9),
        lambda: rules.paired_difference([1.0, 2.0, 3.0], [1.0, 2.0], 0.9),
        lambda: rules.welch_difference([1.0, 2.0], [1.0, 2.0, 3.0], 0.9),
        lambda: rules.one_sample_difference([1.0, 2.0], 1.0, 0.9),
    ):
        with pytest.raises(ValueError, match="3 or more"):
            call()
    with pytest.raises(ValueError, match="between 0 and 1"):
        rules.summarize([1.0], confidence=95)


def test_removal_outcome():
    assert rules.removal_outcome(0, 2000, 0.88, 0.88) == "identical: no prediction changed"
    sentence = rules.removal_outcome(3, 2000, 0.88, 0.8795)
    assert sentence == "not identical: 3 of 2,000 predictions changed (0.15 %), accuracy -0.05 points"
