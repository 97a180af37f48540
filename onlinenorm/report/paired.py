"""Two runs image by image: who is right where, McNemar's exact test, and an interval of the accuracy difference."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import bdtr

from onlinenorm.errors import ReportError
from onlinenorm.report.predictions import Predictions, load_predictions
from onlinenorm.report.runs import Run


@dataclass(frozen=True)
class Pairing:
    """Images by who is right, and the difference of accuracies B - A with its interval; accuracies are fractions.

    `same_prediction` counts images on which both say the same, right or wrong; `p_value` is McNemar's.
    """

    images: int
    both_right: int
    only_a: int
    only_b: int
    both_wrong: int
    same_prediction: int
    top1_a: float
    top1_b: float
    difference: float
    low: float
    high: float
    level: float
    p_value: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_predictions(run: Run, clamp: str = "with") -> Predictions:
    """predictions.npz of a finished run; `clamp` is "with" or "without" and matters only to networks that have one.

    Raises ReportError for a run that has not finished and for a file that is missing, damaged or incomplete.
    """
    if not run.finished:
        raise ReportError(f"{run.folder}: {run.status}; only finished runs can be compared")
    return load_predictions(run.folder / "predictions.npz", clamp)


def check_same_images(run_a: Run, run_b: Run, a: Predictions, b: Predictions) -> None:
    """Raises ReportError unless both validated the same images with the same labels in the same dataset."""
    where = f"{run_a.folder} and {run_b.folder}"
    prints = [run.results["dataset"].get("fingerprint") for run in (run_a, run_b)]
    if prints[0] != prints[1]:
        names = [run.results["dataset"]["name"] for run in (run_a, run_b)]
        raise ReportError(f"{where}: were made with different data ({names[0]} and {names[1]}, fingerprints differ)")
    if not np.array_equal(a.index, b.index):
        raise ReportError(f"{where}: were validated on different images ({len(a.index)} and {len(b.index)})")
    if not np.array_equal(a.label, b.label):
        image = a.index[np.flatnonzero(a.label != b.label)[0]]
        raise ReportError(f"{where}: disagree on labels, first on that of image {image}")


def pair(a: Predictions, b: Predictions, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Pairing:
    """Compares two sets of predictions of the same images; images without a label (-1) are left out.

    McNemar: given n images on which exactly one is right, the smaller count k is binomial(n, 1/2) if neither network is
    better; p = min(1, 2 P(K <= k)). The interval is the percentile bootstrap over images: a resample's counts are
    multinomial, so none is drawn image by image.

    Raises ValueError for a level outside (0, 1), and where no image has a label.
    """
    if not 0 < level < 1:
        raise ValueError(f"level: {level!r} must lie between 0 and 1")
    known = a.label >= 0
    images = int(known.sum())
    if not images:
        raise ValueError("no image has a label")
    right_a, right_b = ((p.prediction == p.label)[known] for p in (a, b))
    both, only_a = int((right_a & right_b).sum()), int((right_a & ~right_b).sum())
    only_b = int((~right_a & right_b).sum())
    shares = np.array([only_a, only_b, images - only_a - only_b]) / images
    counts = np.random.default_rng(seed).multinomial(images, shares, size=resamples)
    low, high = np.quantile((counts[:, 1] - counts[:, 0]) / images, [(1 - level) / 2, (1 + level) / 2])
    return Pairing(
        images=images,
        both_right=both,
        only_a=only_a,
        only_b=only_b,
        both_wrong=images - both - only_a - only_b,
        same_prediction=int((a.prediction == b.prediction)[known].sum()),
        top1_a=(both + only_a) / images,
        top1_b=(both + only_b) / images,
        difference=(only_b - only_a) / images,
        low=float(low),
        high=float(high),
        level=level,
        p_value=mcnemar(only_a, only_b),
    )


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p-value of McNemar's test for the two counts of images on which one network alone is right."""
    return min(1.0, 2 * float(bdtr(min(only_a, only_b), only_a + only_b, 0.5))) if only_a + only_b else 1.0


def render_pairing(pairing: Pairing, name_a: str, name_b: str) -> str:
    """The comparison in words and a table (Markdown)."""
    p, n = pairing, pairing.images
    sides = "includes 0" if p.low <= 0 <= p.high else "excludes 0"
    return (
        f"A: {name_a}\nB: {name_b}\n\n"
        f"| of {n} images | B right | B wrong |\n|---|---|---|\n"
        f"| A right | {p.both_right} ({p.both_right / n:.2%}) | {p.only_a} ({p.only_a / n:.2%}) |\n"
        f"| A wrong | {p.only_b} ({p.only_b / n:.2%}) | {p.both_wrong} ({p.both_wrong / n:.2%}) |\n\n"
        f"Top-1: A {p.top1_a:.2%}, B {p.top1_b:.2%}; the same class on {p.same_prediction / n:.2%} of the images.\n"
        f"B - A: {100 * p.difference:+.2f} points, {p.level:.0%} interval [{100 * p.low:+.2f}, {100 * p.high:+.2f}] "
        f"(bootstrap over images), which {sides}.\n"
        f"McNemar's exact test on the {p.only_a + p.only_b} images that one alone gets right: p = {p.p_value:.3g}.\n"
        "The interval and the test speak of these two networks on other images like these, not of other seeds.\n"
    )
