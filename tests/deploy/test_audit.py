"""The audit measures what the run recorded, and changes nothing."""

import json
import re

import pytest
import torch
from PIL import Image

from onlinenorm.deploy import DeployError, load_trained
from onlinenorm.deploy.audit import audit, render_audit
from onlinenorm.deploy.images import validation_batches
from onlinenorm.normalizers import OnlineNorm

CPU = torch.device("cpu")


def test_audit_agrees_with_the_run_and_with_itself(clamp_run):
    trained = load_trained(clamp_run)
    recorded = json.loads((clamp_run / "results.json").read_text())["clamping"]
    result = audit(trained, [2.0, 100.0, 0.5], None, CPU)
    own, removed, tight, loose = result.settings
    assert (own.clamp_value, removed.clamp_value, tight.clamp_value, loose.clamp_value) == (2.0, None, 0.5, 100.0)
    for side, setting in (("with", own), ("without", removed)):
        assert setting.val_top1 == pytest.approx(recorded[side]["val_top1"])
        assert setting.val_loss == pytest.approx(recorded[side]["val_loss"], rel=1e-4)
    assert own.changed_predictions == 0 and removed.changed_predictions == recorded["changed_predictions"]
    assert own.clamped_fraction == pytest.approx(recorded["clamped_fraction"], rel=1e-3)
    assert loose.val_loss == pytest.approx(removed.val_loss) and loose.clamped_fraction == 0  # a clamp nothing reaches
    assert tight.clamped_fraction > own.clamped_fraction > 0
    assert own.images == 60


def test_layers_are_measured_one_by_one(clamp_run):
    trained = load_trained(clamp_run)
    recorded = json.loads((clamp_run / "results.json").read_text())["clamping"]
    layers = audit(trained, [], None, CPU).layers
    assert [layer.name for layer in layers] == [
        name for name, module in trained.network.named_modules() if isinstance(module, OnlineNorm)
    ]
    assert max(layer.max_abs_activation for layer in layers) == pytest.approx(recorded["max_abs_activation"], rel=1e-4)
    clamped = sum(layer.clamped_fraction * layer.activations for layer in layers)
    assert clamped / sum(layer.activations for layer in layers) == pytest.approx(recorded["clamped_fraction"], rel=1e-3)
    assert layers[0].activations == 60 * 16 * 28 * 28


def test_the_layer_where_removal_starts_to_cost_is_named(clamp_run):
    trained = load_trained(clamp_run)
    for layer in trained.network.modules():
        if isinstance(layer, OnlineNorm):
            layer.clamp_value = 0.5
    images = torch.cat([images for images, _, _ in validation_batches(trained, None, CPU)])
    trained.network.fc.bias -= trained.network(images).mean(0)  # so that its predictions differ, and change
    result = audit(trained, [], None, CPU)
    removed, last = result.settings[1], result.layers[-1]
    assert last.removed_val_loss == pytest.approx(removed.val_loss, rel=1e-6)
    assert last.removed_changed_predictions == removed.changed_predictions > 0
    start = [layer.name for layer in result.layers].index(result.start.name)
    changed = [layer.removed_changed_predictions for layer in result.layers]
    assert changed[start] >= 0.1 * removed.changed_predictions > max(changed[:start], default=0)
    third = result.layers[2]
    for layer in [module for module in trained.network.modules() if isinstance(module, OnlineNorm)][:3]:
        layer.error_compensation = "none"
    logits, labels = zip(*((trained.network(x), y) for x, y, _ in validation_batches(trained, None, CPU)), strict=True)
    loss = torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(labels))
    assert third.removed_val_loss == pytest.approx(float(loss), rel=1e-5)
    for top1, does in ((0.9, "costs"), (0.1, "gains"), (removed.val_top1, "changes")):
        result.settings[0].val_top1 = top1
        assert f"What removal {does} starts at {result.start.name}:" in render_audit(result)
    result.settings[1].changed_predictions = 0
    assert result.start is None and "changes no prediction" in render_audit(result)


def test_the_first_layer_against_a_direct_computation(clamp_run):
    trained = load_trained(clamp_run)
    first = audit(trained, [], 7, CPU).layers[0]
    images = torch.cat([batch[0] for batch in validation_batches(trained, 7, CPU)])
    bn1 = trained.network.bn1
    w = torch.nn.functional.batch_norm(
        trained.network.conv1(images), bn1.running_mean, bn1.running_var, bn1.weight, bn1.bias, eps=bn1.eps
    )
    assert first.max_abs_activation == pytest.approx(float(w.abs().max()), rel=1e-4)
    assert first.clamped_fraction == pytest.approx(float((w.abs() > 2).double().mean()), abs=1e-5)


@pytest.mark.gpu
def test_gpu_and_cpu_agree(clamp_run):
    on_gpu, on_cpu = (audit(load_trained(clamp_run), [4.0], None, torch.device(d)) for d in ("cuda", "cpu"))
    for a, b in zip(on_gpu.settings, on_cpu.settings, strict=True):
        assert a.val_loss == pytest.approx(b.val_loss, rel=1e-2)
        assert a.clamped_fraction == pytest.approx(b.clamped_fraction, rel=0.05, abs=1e-5)


def test_network_is_left_as_it_was(clamp_run):
    trained = load_trained(clamp_run)
    images = torch.randn(2, 1, 28, 28)
    before = trained.network(images)
    audit(trained, [0.1], 3, CPU)
    assert trained.guard == "clamp"
    torch.testing.assert_close(trained.network(images), before, rtol=0, atol=1e-6)


def test_script_writes_numbers_tables_and_picture(clamp_run, script, tmp_path, capsys):
    output = tmp_path / "audit"
    assert script("audit_clamping")(clamp_run, "--values", 1, 4, "--output", output, "--images", 10) == 0
    assert {path.name for path in output.iterdir()} == {"clamping.json", "clamping.md", "clamping.png"}
    content = json.loads((output / "clamping.json").read_text())
    assert [setting["clamp_value"] for setting in content["settings"]] == [2.0, None, 1.0, 4.0]
    assert (
        len(content["layers"]) == 9
        and "start" in content
        and content["command"].startswith("scripts/audit_clamping.py")
    )
    with Image.open(output / "clamping.png") as picture:
        assert picture.format == "PNG" and picture.size[0] > 800
    printed = capsys.readouterr().out
    assert "| removed |" in printed and "2 (as trained)" in printed and "layer3.0.downsample.1" in printed


@pytest.mark.parametrize(("run", "words"), [("scaling_run", "layer scaling"), ("batch_run", "no OnlineNorm layers")])
def test_networks_without_clamps_are_refused(run, words, script, tmp_path, capsys, request):
    assert script("audit_clamping")(request.getfixturevalue(run), "--output", tmp_path / "new") == 2
    assert words in capsys.readouterr().err and not (tmp_path / "new").exists()


@pytest.mark.parametrize("value", [0.0, -1.0, 1e5, 1e39, float("inf"), float("nan")])
def test_impossible_clamp_values_are_refused(value, clamp_run):
    with pytest.raises(DeployError, match=r"--values: clamp_value: .* 0 < clamp_value < 65504"):
        audit(load_trained(clamp_run), [value], 3, CPU)


def test_a_network_that_is_not_finite_without_its_clamps_is_told_with_the_layer(copied, clamp_run, script, capsys):
    run = copied(clamp_run)
    path = run / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    layers = [name for name, module in load_trained(run).network.named_modules() if isinstance(module, OnlineNorm)]
    for name in layers[2:]:
        content["state_dict"][f"network.{name}.weight"].fill_(1e30)
    torch.save(content, path)
    assert script("audit_clamping")(run, "--images", 10) == 2
    told = capsys.readouterr().err
    assert re.search(rf"NaN or infinite once the clamps up to ({'|'.join(layers[2:])}) are removed; keep", told)
    assert "export.py --keep-clamp" in told and told.count("\n") == 1 and not (run / "clamping").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
@pytest.mark.parametrize("name", ["audit_clamping", "predict"])
def test_a_gpu_that_is_not_there_is_said_so(name, clamp_run, script, capsys, tmp_path):
    (tmp_path / "x.png").write_bytes(b"")
    extra = [tmp_path / "x.png"] if name == "predict" else []
    assert script(name)(clamp_run, *extra, "--device", "cuda") == 2
    assert "no GPU" in capsys.readouterr().err
