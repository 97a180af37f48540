"""Two normalizers image by image over seeds."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from run_folders import write_run
from scipy import stats

from onlinenorm.errors import ReportError
from onlinenorm.report.paired import pool, pool_runs
from onlinenorm.report.render import render_pooled
from onlinenorm.report.runs import load_runs


def predictions(right):
    right = np.asarray(right, dtype=bool)
    return pd.DataFrame({"index": np.arange(len(right)), "label": 0, "prediction": np.where(right, 0, 1)})


def pooled(first, second, level=0.95):
    return SimpleNamespace(**pool(first, second, ("a", "b"), level))


def test_known_counts():
    first = {0: predictions([1, 1, 1, 0]), 1: predictions([1, 1, 0, 0])}
    second = {0: predictions([1, 0, 0, 0]), 1: predictions([1, 0, 1, 0]), 7: predictions([0, 0, 0, 0])}
    result = pooled(first, second)
    assert (result.seeds, result.images) == ([0, 1], 4)
    assert (result.only_first, result.only_second) == (1.5, 0.5)  # (2, 1) and (0, 1)
    assert result.over_images.mean == 0.25 and result.over_seeds is None, "two seeds have no interval"
    more = pooled({**first, 7: predictions([1, 0, 0, 0])}, second)
    assert more.over_images.mean == more.over_seeds.mean == 0.25
    assert (result.same, result.same_first) == (0.5, 0.75) and result.same_second == pytest.approx(
        (0.75 + 0.75 + 0.5) / 3
    )
    assert result.p_values == [0.5, 1.0]


def test_intervals_are_those_of_scipy():
    random = np.random.default_rng(0)
    sides = [{seed: predictions(random.random(500) < p) for seed in range(4)} for p in (0.9, 0.85)]
    result = pooled(*sides, level=0.9)
    right = np.array([[side[s].prediction == 0 for s in range(4)] for side in sides], dtype=float)
    by_seed = stats.ttest_1samp((right[0] - right[1]).mean(axis=1), 0).confidence_interval(0.9)
    assert (result.over_seeds.low, result.over_seeds.high) == pytest.approx((by_seed.low, by_seed.high))
    per_image = (right[0] - right[1]).mean(axis=0)
    by_image = stats.norm.interval(0.9, per_image.mean(), stats.sem(per_image))
    assert (result.over_images.low, result.over_images.high) == pytest.approx(by_image)


def test_an_image_counts_once_however_many_seeds_agree_on_it():
    one = predictions(np.arange(100) < 90), predictions(np.arange(100) < 80)
    single = pooled({0: one[0]}, {0: one[1]})
    fivefold = pooled(dict.fromkeys(range(5), one[0]), dict.fromkeys(range(5), one[1]))
    assert fivefold.over_images == single.over_images
    assert single.over_seeds is None and (single.same_first, single.same_second) == (None, None)


def test_comparisons_of_runs(tmp_path, spec):
    for seed in range(2):
        write_run(tmp_path, "online_clamp", seed, wrong=[0, 1])
        write_run(tmp_path, "batch", seed, wrong=[1, 2, 3])
    write_run(tmp_path, "online_layer_scaling", 5, wrong=[])
    write_run(tmp_path, "batch", 2, done=2)
    rows = pool_runs(load_runs(tmp_path).runs, spec)
    assert [(p.first, p.second, p.seeds) for p in rows.itertuples()] == [("online_clamp", "batch", [0, 1])]
    line = render_pooled(rows, spec, "some images").splitlines()[4]
    assert "| 2; BatchNorm: 2 of 3 finished, 1 of 3 not finished | 2.0 | 1.0 | +1.00 | n = 2 |" in line, line
    assert line.endswith("| 97.00% | 100.00% | 100.00% | 1, 1 |"), line
    write_run(tmp_path, "online_clamp", 3, wrong=[0, 1])
    write_run(tmp_path, "batch", 3, wrong=[1, 2, 3])
    line = render_pooled(pool_runs(load_runs(tmp_path).runs, spec), spec, "some images").splitlines()[4]
    assert "| +1.00 | no spread |" in line, "an interval without width would claim that all seeds fall alike"


def test_other_labels_are_refused(tmp_path, spec):
    write_run(tmp_path, "online_clamp", wrong=[0])
    folder = write_run(tmp_path, "batch", wrong=[0])
    np.savez(folder / "predictions.npz", index=np.arange(100), label=np.zeros(100, int), prediction=np.zeros(100, int))
    with pytest.raises(ReportError, match="disagree on labels"):
        pool_runs(load_runs(tmp_path).runs, spec)
