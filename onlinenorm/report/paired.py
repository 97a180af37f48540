"""Two networks, or two normalizers over all seeds that both have, compared image by image.

Networks of the same seed saw the same images in the same order with the same augmentation, so they are paired. What one
image adds to the difference is averaged over seeds first: counting an image once a seed would take the answers of five
networks to one image for independent, and make the interval too narrow. Two things vary and each gets its interval:
the images (other test images, these networks) and the seeds (other seeds, these test images). No test is pooled for the
same reason; McNemar's test stands beside each pair.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from onlinenorm.errors import ReportError
from onlinenorm.report.predictions import as_trained, load_predictions
from onlinenorm.report.runs import frame
from onlinenorm.report.seeds import tally
from onlinenorm.report.settings import ReportSpec
from onlinenorm.report.statistics import MIN_SEEDS, Difference, one_sample_difference


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


def read_predictions(run: Any, clamp: str | None = None) -> pd.DataFrame:
    """predictions.npz of a finished run: of the network as trained, or "with" or "without" the clamp if it has one.

    Raises ReportError for a run that has not finished and for a file that is missing, damaged or incomplete.
    """
    if not run.finished:
        raise ReportError(f"{run.folder}: {run.status}; only finished runs can be compared")
    return load_predictions(Path(run.folder) / "predictions.npz", clamp or as_trained(run.config))


def check_same_images(run_a: Any, run_b: Any, a: pd.DataFrame, b: pd.DataFrame) -> None:
    """Raises ReportError unless both validated the same images with the same labels in the same dataset."""
    where = f"{run_a.folder} and {run_b.folder}"
    data_a, data_b = (run.results["dataset"] for run in (run_a, run_b))
    if data_a.get("fingerprint") != data_b.get("fingerprint"):
        names = f"{data_a['name']} and {data_b['name']}"
        raise ReportError(f"{where}: were made with different data ({names}, fingerprints differ)")
    if not np.array_equal(a["index"], b["index"]):
        raise ReportError(f"{where}: were validated on different images ({len(a)} and {len(b)})")
    if (other := a["label"] != b["label"]).any():
        raise ReportError(f"{where}: disagree on labels, first on that of image {a['index'][other].iloc[0]}")


def pair(a: pd.DataFrame, b: pd.DataFrame, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Pairing:
    """Compares two sets of predictions of the same images; images without a label (-1) are left out.

    McNemar: given n images on which exactly one is right, the smaller count k is binomial(n, 1/2) if neither network is
    better; p = min(1, 2 P(K <= k)). The interval is the percentile bootstrap over images: a resample's counts are
    multinomial, so none is drawn image by image.

    Raises ValueError for a level outside (0, 1), and where no image has a label.
    """
    if not 0 < level < 1:
        raise ValueError(f"level: {level!r} must lie between 0 and 1")
    known = a["label"] >= 0
    images = int(known.sum())
    if not images:
        raise ValueError("no image has a label")
    right_a, right_b = ((side["prediction"] == side["label"])[known] for side in (a, b))
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
        same_prediction=int((a["prediction"] == b["prediction"])[known].sum()),
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
    return float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def pool(
    first: Mapping[int, pd.DataFrame], second: Mapping[int, pd.DataFrame], names: tuple[str, str], level: float
) -> dict[str, Any]:
    """A row of `pool_runs`: predictions by seed compared; both must hold the same images, and share a seed."""
    seeds = sorted(first.keys() & second.keys())
    known = (first[seeds[0]]["label"] >= 0).to_numpy()
    sides = [{seed: side["prediction"].to_numpy()[known] for seed, side in of.items()} for of in (first, second)]
    label = first[seeds[0]]["label"].to_numpy()[known]
    right = np.array([[side[seed] == label for seed in seeds] for side in sides])
    only_first, only_second = (right[0] & ~right[1]).sum(axis=1), (right[1] & ~right[0]).sum(axis=1)
    per_image = (right[0].astype(float) - right[1]).mean(axis=0)
    images = len(per_image)
    mean = int((only_first - only_second).sum()) / (len(seeds) * images)  # of whole numbers: no -0.00
    half = float(stats.norm.ppf((1 + level) / 2) * stats.sem(per_image)) if images > 1 else math.inf
    by_seed = [float(a - b) / images for a, b in zip(only_first, only_second, strict=True)]
    within = []
    for side in sides:
        shares = [_same(side[a], side[b]) for a, b in itertools.combinations(sorted(side), 2)]
        within.append(float(np.mean(shares)) if shares else None)
    return {
        "first": names[0],
        "second": names[1],
        "seeds": seeds,
        "images": images,
        "only_first": float(only_first.mean()),
        "only_second": float(only_second.mean()),
        "same": float(np.mean([_same(sides[0][seed], sides[1][seed]) for seed in seeds])),
        "same_first": within[0],
        "same_second": within[1],
        "over_images": Difference(mean, mean - half, mean + half, level, True, images),
        "over_seeds": one_sample_difference(by_seed, 0.0, level, paired=True) if len(seeds) >= MIN_SEEDS else None,
        "p_values": [mcnemar(int(a), int(b)) for a, b in zip(only_first, only_second, strict=True)],
    }


def pool_runs(runs: pd.DataFrame, spec: ReportSpec) -> pd.DataFrame:
    """A row a comparison of the spec of which finished runs with predictions.npz share a seed: first minus second.

    Counts `only_first` and `only_second` are means a seed; `same` is the share of images on which the two of a seed say
    the same, `same_first` and `same_second` that of two seeds of one side (None for a single seed). `over_seeds` is
    None for fewer than MIN_SEEDS. `marks` say what either side leaves out.
    """
    told = runs[runs["finished"]]
    told = told[told["folder"].map(lambda folder: (Path(folder) / "predictions.npz").exists()).astype(bool)]
    pooled = []
    for names in spec.pairs(runs):
        sides = [list(told[told["normalizer"] == name].itertuples()) for name in names]
        if not {run.seed for run in sides[0]} & {run.seed for run in sides[1]}:
            continue
        predictions = [{run.seed: read_predictions(run) for run in side} for side in sides]
        every = [(run, predictions[i][run.seed]) for i, side in enumerate(sides) for run in side]
        for run, mine in every[1:]:
            check_same_images(every[0][0], run, every[0][1], mine)
        marks = {name: tally(runs[runs["normalizer"] == name]).mark for name in names}
        left_out = [f"{spec.row(name).label}: {mark}" for name, mark in marks.items() if mark]
        pooled.append({**pool(predictions[0], predictions[1], names, spec.confidence), "marks": left_out})
    return frame(pooled, pooled[0] if pooled else ("first", "second"))


def _same(a: np.ndarray, b: np.ndarray) -> float:
    return float((a == b).mean())
