"""The clamp's removal: measured over a run, and its remedies."""

import json
import math
import signal

import pytest
import torch
from tests_training import outcome, rows

from onlinenorm.data import gpu_cache
from onlinenorm.errors import Diverged, Interrupted
from onlinenorm.normalizers import update_statistics
from onlinenorm.records import check_results, read_rows
from onlinenorm.report.runs import load_runs
from onlinenorm.report.settings import load_spec
from onlinenorm.report.tables import build_report
from onlinenorm.training import ImageClassifier, final_validation

CLAMP = ("recipe.epochs=5", "normalizer.clamp_value=0.5", "recipe.lr=1")
REMEDY = ("recipe.clamp_raise_epochs=2", "recipe.clamp_off_epochs=1")


@pytest.fixture(scope="module")
def plain(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    return folder, run(folder, *CLAMP)


def test_removal_is_measured_in_each_epoch_and_changes_nothing(plain, run, tmp_path):
    folder, _ = plain
    measured = run(tmp_path, *CLAMP, "recipe.removal_every_epoch=true")
    assert outcome(tmp_path) == outcome(folder)
    curve, clamping = read_rows(tmp_path / "clamping.csv"), measured["clamping"]
    assert [row["epoch"] for row in curve] == [1, 2, 3, 4, 5]
    last = {key: curve[-1][key] for key in ("without_val_loss", "without_val_top1", "changed_predictions")}
    without = clamping["without"]
    expected = [without["val_loss"], without["val_top1"], clamping["changed_predictions"]]
    assert list(last.values()) == pytest.approx(expected, rel=1e-6)
    assert curve[0]["without_val_loss"] != read_rows(tmp_path / "metrics.csv")[0]["val_loss"]
    assert "without" not in (folder / "clamping.csv").read_text()


def test_the_clamp_is_raised_and_taken_away_in_training(plain, run, tmp_path, monkeypatch):
    values, step = {}, ImageClassifier.training_step

    def training_step(self, *arguments):
        clamps = {layer.clamp_value if layer.error_compensation == "clamp" else None for layer in self.clamps.layers}
        values.setdefault(self.current_epoch + 1, set()).update(clamps)
        return step(self, *arguments)

    monkeypatch.setattr(ImageClassifier, "training_step", training_step)
    results = run(tmp_path, *CLAMP, *REMEDY)
    assert values == {1: {0.5}, 2: {0.5}, 3: {1.0}, 4: {2.0}, 5: {None}}
    clamping, last = results["clamping"], results["last"]
    assert clamping["clamp_value"] == 2 and clamping["layers"] == 9  # with: put back as in epoch 4
    assert clamping["without"] == {key: last[key] for key in ("val_loss", "val_top1")}
    assert clamping["with"]["val_loss"] != last["val_loss"]
    assert rows(tmp_path)[:2] == rows(plain[0])[:2] and rows(tmp_path)[2] != rows(plain[0])[2]
    assert [row["epoch"] for row in read_rows(tmp_path / "clamping.csv")] == [1, 2, 3, 4]


@pytest.mark.parametrize("call", [3 * 4 + 2, 4 * 4 + 2])  # within an epoch that raises, and in the one without
def test_a_run_with_remedies_goes_on_where_it_was(run, tmp_path, monkeypatch, call):
    options = (*CLAMP, *REMEDY, "recipe.removal_every_epoch=true", "recipe.reestimate_images=32")
    run(tmp_path / "undisturbed", *options)
    calls, step = iter(range(1, 100)), ImageClassifier.training_step

    def training_step(self, *arguments):
        if next(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return step(self, *arguments)

    monkeypatch.setattr(ImageClassifier, "training_step", training_step)
    with pytest.raises(Interrupted):
        run(tmp_path / "run", *options)
    run(tmp_path / "run", *options)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "undisturbed")
    files = [(tmp_path / name / "clamping.csv").read_text() for name in ("run", "undisturbed")]
    assert files[0] == files[1]


def expected_statistics(module, data, batches):
    """Mean over these training batches of the mean of what the first norm sees."""
    data.resume(module.recipe.epochs, 0)
    loader = iter(data.train_dataloader())
    with torch.no_grad():
        inputs = [data.on_after_batch_transfer(next(loader))[0] for _ in range(batches)]
        return [module.network.conv1(x).mean((0, 2, 3)) for x in inputs], inputs


@pytest.mark.parametrize("normalizer", ["batch", "batch_renorm", "online_clamp"])
def test_statistics_are_estimated_anew_and_put_back(run, tmp_path, monkeypatch, normalizer):
    seen, validate = [], final_validation.validate

    def recorded(trainer, module, data):
        seen.append((module, data, module.network.bn1.running_mean.clone()))
        return validate(trainer, module, data)

    options = (f"normalizer={normalizer}", "recipe.lr=1")
    before = run(tmp_path / "plain", *options)
    monkeypatch.setattr(final_validation, "validate", recorded)
    results = run(tmp_path / "again", *options, "recipe.reestimate_images=20")
    assert results["parameters_sha256"] == before["parameters_sha256"] and "reestimated" not in before
    assert results["reestimated"]["images"] == 32  # whole batches of 16
    module, data, mean = seen[-1]
    means, inputs = expected_statistics(module, data, batches=2)
    if normalizer != "online_clamp":
        torch.testing.assert_close(mean, torch.stack(means).mean(0))
    else:
        assert all(layer.error_compensation == "none" for layer in module.clamps.layers)
        update_statistics(module, inputs)
        torch.testing.assert_close(mean, module.network.bn1.running_mean, rtol=0, atol=0)
    assert results["reestimated"]["val_loss"] != results["last"]["val_loss"]


def test_images_on_the_device_are_those_of_training(run, tmp_path, monkeypatch):
    load, loaded = gpu_cache.load, []
    monkeypatch.setattr(gpu_cache, "load", lambda dataset, *rest: loaded.append(dataset) or load(dataset, *rest))
    options = ("normalizer=batch", "recipe.reestimate_images=20")
    results = run(tmp_path / "device", *options, "data.on_device=true")
    assert sorted(map(len, loaded)) == [21, 70]  # each set once
    assert results["reestimated"] == run(tmp_path / "workers", *options, "data.on_device=false")["reestimated"]


def test_a_network_without_such_statistics_has_none_to_estimate(run, tmp_path, capsys):
    assert run(tmp_path, "normalizer=layer", "recipe.reestimate_images=20")["reestimated"] is None
    told = (
        "  recipe.reestimate_images: without effect, as no layer of the network is OnlineNorm, BatchNorm or BatchRenorm"
    )
    assert capsys.readouterr().out.splitlines().count(told) == 2, "before and after"


# a clamp that holds every activation back, in front of statistics that do not: 1e20 a layer without it
INFINITE = (
    "recipe.epochs=1", "recipe.milestones=[]", "model=cifar_resnet20", "data.image_size=32", "data.num_train=64",
    "normalizer.clamp_value=0.001", "normalizer.eps=1e-20", "normalizer.alpha_fwd=0.5", "normalizer.alpha_bkw=0.5",
    "recipe.reestimate_images=32", "recipe.removal_every_epoch=true",
)  # fmt: skip


def test_a_network_that_is_not_finite_without_its_clamp_keeps_its_results(run, tmp_path, capsys):
    folder = tmp_path / "online_clamp" / "seed0"
    clamping = run(folder, *INFINITE)["clamping"]
    results = json.loads((folder / "results.json").read_text())
    check_results(results)
    assert results["clamping"] == clamping and clamping["without"]["val_loss"] is None
    assert clamping["with"] == {key: results["last"][key] for key in ("val_loss", "val_top1")}
    assert results["reestimated"]["val_loss"] is None
    said = capsys.readouterr().out
    assert "removed not finite: " in said and "statistics estimated anew on 32 training images: not finite" in said
    assert "not finite without the clamp: its removal made logits NaN or infinite. Keep it (scripts/export.py" in said
    run(folder, *INFINITE)
    assert "removed not finite: " in capsys.readouterr().out, "told again"
    curve = read_rows(folder / "clamping.csv")
    assert "without_val_loss" not in curve[0]
    assert curve[0]["without_val_top1"] == clamping["without"]["val_top1"]
    report = load_runs(tmp_path)
    assert report.runs["finished"].all()
    assert "not finite without the clamp" in build_report(report.runs, load_spec()).removals["sentence"].iloc[0]


def test_a_network_that_is_not_finite_as_trained_has_diverged_in_its_last_epoch(run, tmp_path, monkeypatch):
    validate = final_validation.validate
    monkeypatch.setattr(final_validation, "validate", lambda *parts: validate(*parts) | {"val_loss": math.nan})
    with pytest.raises(Diverged, match=r"at step 12 \(epoch 3, learning rate 0.000163546\)"):
        run(tmp_path)
    assert not (tmp_path / "results.json").exists()


def test_the_last_lines_tell_a_run_that_trained_without_its_clamp(plain, run, tmp_path, capsys):
    run(tmp_path, *CLAMP, *REMEDY)
    results = json.loads((tmp_path / "results.json").read_text())
    sides = [results["clamping"][side] for side in ("without", "with")]
    figures = [f"{side['val_loss']:.4f} and {side['val_top1']:.2%}" for side in sides]
    told = f"  trained without the clamp in the last 1 epoch: {figures[0]}; with it put back {figures[1]}: "
    assert told in capsys.readouterr().out
    run(plain[0], *CLAMP)
    assert "  with clamp " in (said := capsys.readouterr().out) and ", removed " in said
