"""Two normalizers image by image, over all seeds that both have.

Networks of the same seed saw the same images in the same order with the same augmentation, so they are paired. What one
image adds to the difference is averaged over seeds first: counting an image once a seed would take the answers of five
networks to one image for independent, and make the interval too narrow. Two things vary and each gets its interval:
the images (other test images, these networks) and the seeds (other seeds, these test images). No test is pooled for the
same reason; McNemar's test stands beside each pair.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import ndtri

from onlinenorm.report.paired import Predictions, check_same_images, mcnemar, read_predictions
from onlinenorm.report.runs import Run
from onlinenorm.report.spec import ReportSpec
from onlinenorm.report.statistics import MIN_SEEDS, Difference, one_sample_difference
from onlinenorm.report.tally import tally


@dataclass(frozen=True)
class Pooled:
    """First minus second over the shared seeds; counts are means a seed, shares are fractions.

    `same` is the share of images on which the two of a seed say the same; `same_within` that of two seeds of the first,
    and of the second, None for a single seed. `over_seeds` is None for fewer than MIN_SEEDS.
    """

    first: str
    second: str
    seeds: list[int]
    images: int
    only_first: float
    only_second: float
    same: float
    same_within: tuple[float | None, float | None]
    over_images: Difference
    over_seeds: Difference | None
    p_values: list[float]
    marks: tuple[str, ...] = ()  # what either side leaves out, as of `Tally.mark`


def pool(
    first: Mapping[int, Predictions], second: Mapping[int, Predictions], names: tuple[str, str], level: float
) -> Pooled:
    """Compares predictions by seed; both must hold the same images, and share a seed."""
    seeds = sorted(first.keys() & second.keys())
    known = first[seeds[0]].label >= 0
    right = np.array(
        [[(side[s].prediction == side[s].label)[known] for s in seeds] for side in (first, second)], dtype=bool
    )
    only_first, only_second = (right[0] & ~right[1]).sum(axis=1), (right[1] & ~right[0]).sum(axis=1)
    per_image = (right[0].astype(float) - right[1]).mean(axis=0)
    images = len(per_image)
    mean = int((only_first - only_second).sum()) / (len(seeds) * images)  # of whole numbers: no -0.00
    half = float(ndtri((1 + level) / 2)) * float(per_image.std(ddof=1)) / math.sqrt(images) if images > 1 else math.inf
    by_seed = [float(a - b) / images for a, b in zip(only_first, only_second, strict=True)]
    within = []
    for side in (first, second):
        shares = [_same(side[a], side[b], known) for a, b in itertools.combinations(sorted(side), 2)]
        within.append(float(np.mean(shares)) if shares else None)
    return Pooled(
        *names,
        seeds=seeds,
        images=images,
        only_first=float(only_first.mean()),
        only_second=float(only_second.mean()),
        same=float(np.mean([_same(first[s], second[s], known) for s in seeds])),
        same_within=(within[0], within[1]),
        over_images=Difference(mean, mean - half, mean + half, level, True, images),
        over_seeds=one_sample_difference(by_seed, 0.0, level, paired=True) if len(seeds) >= MIN_SEEDS else None,
        p_values=[mcnemar(int(a), int(b)) for a, b in zip(only_first, only_second, strict=True)],
    )


def pool_runs(runs: Sequence[Run], spec: ReportSpec) -> list[Pooled]:
    """The comparisons of the spec, as far as finished runs with predictions.npz share a seed."""
    found = {}
    for run in runs:
        if run.finished and (run.folder / "predictions.npz").exists():
            found.setdefault(run.normalizer, {})[run.seed] = run
    pooled = []
    for names in spec.comparisons:
        sides = [found.get(name, {}) for name in names]
        if not sides[0].keys() & sides[1].keys():
            continue
        predictions = [{seed: read_predictions(run) for seed, run in side.items()} for side in sides]
        every = [(run, predictions[i][seed]) for i, side in enumerate(sides) for seed, run in side.items()]
        for run, mine in every[1:]:
            check_same_images(every[0][0], run, every[0][1], mine)
        pooled.append(replace(pool(*predictions, names, spec.confidence), marks=_marks(runs, names, spec)))
    return pooled


def _marks(runs: Sequence[Run], names: tuple[str, str], spec: ReportSpec) -> tuple[str, ...]:
    marks = {name: tally([run for run in runs if run.normalizer == name]).mark for name in names}
    return tuple(f"{spec.row(name).label}: {mark}" for name, mark in marks.items() if mark)


def _same(a: Predictions, b: Predictions, known: np.ndarray) -> float:
    return float((a.prediction == b.prediction)[known].mean())
