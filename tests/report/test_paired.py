"""Two runs image by image."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from run_folders import write_run
from scipy.stats import binomtest

from onlinenorm.report.paired import mcnemar, pair


def predictions(right, label=None):
    right = np.asarray(right, dtype=bool)
    label = np.zeros(len(right), dtype=np.int64) if label is None else label
    return pd.DataFrame(
        {"index": np.arange(len(right)), "label": label, "prediction": np.where(right, label, label + 1)}
    )


def sides(both, only_a, only_b, neither):
    a = [True] * (both + only_a) + [False] * (only_b + neither)
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return predictions(a), predictions(b)


def test_counts_and_accuracies():
    result = pair(*sides(50, 10, 20, 20))
    assert (result.both_right, result.only_a, result.only_b, result.both_wrong) == (50, 10, 20, 20)
    assert (result.top1_a, result.top1_b, result.difference) == (0.6, 0.7, pytest.approx(0.1))
    assert result.same_prediction == 70 and result.images == 100


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (0, 1), (3, 3), (10, 20), (0, 12), (400, 300), (2000, 2100)])
def test_mcnemar_is_the_exact_binomial_test(only_a, only_b):
    total = only_a + only_b
    expected = binomtest(only_a, total).pvalue if total else 1.0
    assert mcnemar(only_a, only_b) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(only_a, only_b) == mcnemar(only_b, only_a)


def test_interval_is_that_of_a_bootstrap_over_images():
    a, b = sides(500, 60, 100, 340)
    result = pair(a, b, seed=1)
    per_image = ((b.prediction == b.label).astype(float) - (a.prediction == a.label)).to_numpy()
    random = np.random.default_rng(0)
    means = [per_image[random.integers(0, 1000, 1000)].mean() for _ in range(4000)]
    low, high = np.quantile(means, [0.025, 0.975])
    assert result.low == pytest.approx(low, abs=2e-3) and result.high == pytest.approx(high, abs=2e-3)
    assert pair(a, b, level=0.5).low > result.low
    assert pair(a, b) == pair(a, b)


def test_images_without_label_are_left_out():
    a, b = predictions([1, 1, 0], np.array([2, -1, 3])), predictions([1, 0, 1], np.array([2, -1, 3]))
    assert (pair(a, b).images, pair(a, b).only_b) == (2, 1)
    with pytest.raises(ValueError, match="no image has a label"):
        pair(predictions([1], np.array([-1])), predictions([1], np.array([-1])))


@pytest.fixture(scope="session")
def main(root):
    spec = importlib.util.spec_from_file_location("compare", root / "scripts" / "compare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: module.main([str(argument) for argument in arguments])


def finished(root: Path, normalizer: str, seed: int = 0, **arrays) -> Path:
    folder = write_run(root, normalizer, seed)
    label = np.arange(40) % 10
    usual = {
        "index": np.arange(40),
        "label": label,
        "prediction": np.where(np.arange(40) < 30, label, (label + 1) % 10),
    }
    np.savez(folder / "predictions.npz", **(usual | arrays))
    return folder


def test_script_prints_the_comparison(main, tmp_path, capsys):
    label = np.arange(40) % 10
    a, b = finished(tmp_path, "batch"), finished(tmp_path, "group", prediction=label)
    assert main(a, b) == 0
    printed = capsys.readouterr().out
    assert "| A right | 30 (75.00%) | 0 (0.00%) |" in printed and "B - A: +25.00 points" in printed
    assert "p = 0.00195" in printed
    assert main(a, b, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["only_b"] == 10 and content["p_value"] == pytest.approx(2 * 0.5**10)
    assert 0 < content["low"] < 0.25 < content["high"]


def test_networks_with_clamp_are_compared_with_it_or_without(main, tmp_path, capsys):
    label = np.arange(40) % 10
    a = finished(tmp_path, "batch")
    b = finished(tmp_path, "online_clamp", with_clamp=label, without_clamp=(label + 1) % 10)
    arrays = dict(np.load(b / "predictions.npz"))
    del arrays["prediction"]
    np.savez(b / "predictions.npz", **arrays)
    assert main(a, b, "--json") == 0
    assert json.loads(capsys.readouterr().out)["top1_b"] == 1
    assert main(a, b, "--json", "--clamp", "without") == 0
    assert json.loads(capsys.readouterr().out)["top1_b"] == 0


def test_runs_of_other_images_or_labels_are_refused(main, tmp_path, capsys):
    a = finished(tmp_path, "batch")
    cases = [
        (finished(tmp_path, "group", 1, index=np.arange(40) + 1), "different images"),
        (finished(tmp_path, "group", 2, label=np.arange(40) % 9), "disagree on labels, first on that of image 9"),
        (finished(tmp_path, "group", 3, prediction=np.arange(39)), "one an image"),
        (finished(tmp_path, "group", 4, label=np.array([{}] * 40)), "is damaged"),
    ]
    other = finished(tmp_path, "group", 5)
    results = json.loads((other / "results.json").read_text())
    results["dataset"]["fingerprint"] = "another"
    (other / "results.json").write_text(json.dumps(results))
    cases.append((other, "fingerprints differ"))
    for b, words in cases:
        assert main(a, b) == 2
        printed = capsys.readouterr()
        assert words in printed.err and printed.err.count("\n") == 1 and printed.out == "", printed.err


def test_missing_unfinished_and_damaged_runs_are_refused(main, tmp_path, capsys):
    a, missing = finished(tmp_path, "batch"), finished(tmp_path, "group", 1)
    (missing / "predictions.npz").unlink()
    damaged = finished(tmp_path, "group", 2)
    (damaged / "predictions.npz").write_bytes((a / "predictions.npz").read_bytes()[:100])
    flipped = finished(tmp_path, "group", 4)
    np.savez_compressed(flipped / "predictions.npz", **dict(np.load(a / "predictions.npz")))
    content = bytearray((flipped / "predictions.npz").read_bytes())
    content[60:66] = bytes(byte ^ 0xFF for byte in content[60:66])  # of the first compressed stream
    (flipped / "predictions.npz").write_bytes(content)
    unfinished = write_run(tmp_path, "group", 3, finish=False)
    cases = {missing: "predictions.npz: missing", damaged: "is damaged", flipped: "predictions.npz: is damaged",
             unfinished: "only finished runs",
             tmp_path / "nowhere": "is no folder", tmp_path: "config.yaml: missing"}  # fmt: skip
    for b, words in cases.items():
        assert main(a, b) == 2
        printed = capsys.readouterr()
        assert words in printed.err and printed.err.count("\n") == 1 and printed.out == "", printed.err
    assert main(a, a, "--level", 1) == 2
    assert "level: 1.0" in capsys.readouterr().err
