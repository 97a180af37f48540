"""One rule of accuracy, from the sums of a batch to results.json, metrics.csv and predictions.npz."""

import csv
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onlinenorm.deploy.verification import Agreement
from onlinenorm.training.accuracy import TOP1_RULE, predicted, rank, ranked
from onlinenorm.training.module import ImageClassifier, _losses, _sums


@given(st.integers(1, 12), st.integers(0, 2**31), st.sampled_from([torch.bfloat16, torch.float32, torch.float64]))
def test_ties_are_counted_as_they_are_predicted(classes, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-2, 3, (16, classes), generator=generator).to(dtype)  # few values: ties in most rows
    labels = torch.randint(-1, classes, (16,), generator=generator)
    known = labels >= 0
    top1, top5 = _sums(logits, labels, _losses(logits, labels)[1])[1:3].tolist()
    assert top1 == (predicted(logits) == labels)[known].sum()
    order = ranked(logits, 5)
    assert torch.equal(order[:, 0], predicted(logits))
    assert top5 == (order == labels[:, None]).any(1)[known].sum()
    agreement = Agreement()
    agreement.add(logits, logits, labels)
    assert (agreement.correct, agreement.changed_predictions) == (top1, 0)


def test_the_lowest_class_of_equal_ones_is_predicted():
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]], dtype=torch.bfloat16)
    assert predicted(logits).item() == 1 and ranked(logits, 3).tolist() == [[1, 2, 3]]
    assert [rank(logits, torch.tensor([label])).item() for label in range(4)] == [3, 0, 1, 2]


@pytest.mark.parametrize("classes", [3, 10])
def test_logits_that_are_not_numbers_are_never_right(classes):
    labels = torch.zeros(2, dtype=torch.long)
    sums = _sums(torch.full((2, classes), torch.nan), labels, torch.tensor(0.0))
    assert sums[1:3].tolist() == [0, 0]


@pytest.mark.parametrize("normalizer", ["online_clamp", "batch"])
def test_a_run_tells_one_accuracy_everywhere(run, tmp_path, monkeypatch, normalizer):
    """With logits that tie, as those in bfloat16 do, and an evaluation at the end that rounds otherwise."""
    original = ImageClassifier.forward

    def coarse(self, images):
        logits = original(self, images)
        return logits if self.training else logits.mul(2 if self.collected is None else 1.7).round()

    monkeypatch.setattr(ImageClassifier, "forward", coarse)
    results = run(tmp_path, f"normalizer={normalizer}", "recipe.epochs=2", "recipe.milestones=[]")
    assert results["top1_rule"] == TOP1_RULE and json.loads((tmp_path / "results.json").read_text()) == results
    with np.load(tmp_path / "predictions.npz") as arrays:
        right = {
            key: int((arrays[key] == arrays["label"]).sum()) for key in arrays.files if key not in ("index", "label")
        }
        changed = arrays["with_clamp"] != arrays["without_clamp"] if "with_clamp" in arrays else None
    images = results["dataset"]["val_images"]
    assert results["last"]["val_top1"] == right.get("prediction", right.get("with_clamp")) / images
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {key: float(rows[-1][key]) for key in results["last"]} == results["last"]
    assert results["best_top1"]["val_top1"] == max(float(row["val_top1"]) for row in rows)
    if changed is not None:
        clamping = results["clamping"]
        assert clamping["with"] == {key: results["last"][key] for key in ("val_loss", "val_top1")}
        assert clamping["without"]["val_top1"] == right["without_clamp"] / images
        assert clamping["changed_predictions"] == changed.sum()
