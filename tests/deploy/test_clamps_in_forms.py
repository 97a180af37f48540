"""Exports with the clamp, without it, and on statistics estimated anew; what each is said to cost."""

import json
import re

import onnx
import pytest
import torch
from torch import nn

from onlinenorm.deploy import FORMS, load_folded, load_trained
from onlinenorm.deploy.card import removal_line
from onlinenorm.deploy.export import export
from onlinenorm.deploy.forms import with_hardtanh, without_clamp
from onlinenorm.deploy.images import validation_batches
from onlinenorm.normalizers import OnlineNorm2d

SIDES = ("with", "without")


def test_onnx_and_exported_programs_hold_the_clamp(clamp_run, tmp_path, script):
    for form in ("onnx", "exported-program"):
        assert script("export")(clamp_run, "--to", form, "--output", tmp_path, "--keep-clamp") == 0
    nodes = [node.op_type for node in onnx.load(tmp_path / "cifar_resnet8-onnx.onnx").graph.node]
    assert nodes.count("Clip") == 9
    program = torch.export.load(tmp_path / "cifar_resnet8-exported-program.pt2")
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("aten.hardtanh.default") == 9
    assert sum("batch_norm" in target for target in targets) == 9, "as operators that runtimes fuse"


def test_a_kept_clamp_is_batch_norm_and_hardtanh_wherever_its_layer_is_used():
    layer = OnlineNorm2d(3, error_compensation="clamp", clamp_value=0.5)
    layer.running_mean.fill_(0.2)
    network = nn.Sequential(layer, nn.Sequential(layer), OnlineNorm2d(3, error_compensation="none")).eval()
    images = torch.randn(4, 3, 5, 5)
    before = network(images)
    with_hardtanh(network)
    torch.testing.assert_close(network(images), before)
    assert network[0] is network[1][0] and network[0][1].max_val == 0.5
    assert type(network[0][0]) is type(network[2]) is nn.BatchNorm2d

    class Own(OnlineNorm2d):
        pass

    own = nn.Sequential(Own(3, error_compensation="clamp"))
    with_hardtanh(own)
    assert type(own[0]) is Own


def test_what_removal_costs_and_what_helps_is_said():
    found = {"changed_predictions": 3, "images": 60, "max_logit_difference": 0.5, "top1": 0.5}
    assert removal_line(found).endswith("predictions (logits by up to 5.00e-01).")  # recorded before
    assert removal_line({**found, "top1_with_clamp": 0.5005}).endswith(
        "50.05% to 50.00% there: free, no remedy needed."
    )
    again = {"reestimated_top1": 0.59, "reestimated_images": 128}
    line = removal_line({**found, "top1_with_clamp": 0.6, **again})
    assert "from 60.00% to 50.00% there. Better keep it, with --keep-clamp" in line
    assert "(--reestimate 128) the run measured 59.00%" in line
    for whole in ({}, {"recorded": {"images": 500, "with": 0.5905, "without": 0.5}}):  # what counts where it is there
        line = removal_line({**found, "top1_with_clamp": 0.6 if whole else 0.5905, **again, **whole})
        assert "Better estimate statistics anew without it, with --reestimate 128: the run measured 59.00% so" in line
        assert line.endswith(
            "; or keep it, with --keep-clamp in a form that holds it (onnx, torchscript, exported-program)."
        )
    off = removal_line({**found, "top1_with_clamp": 0.6, "clamp_off_epochs": 2})
    assert off.endswith("; or take the run's last weights, trained without it in the last 2 epochs.")
    line = removal_line({**found, "top1_with_clamp": 0.6, "images_anew": 128})
    assert line.startswith("Removing the clamp and estimating statistics anew on 128 training images changed 3 of 60")


def test_statistics_estimated_anew_are_those_that_the_run_measured(train_run, tmp_path, script, capsys):
    tiny = (
        "experiment=quickstart",
        "data.limit_train=128",
        "data.limit_val=60",
        "recipe.epochs=1",
        "recipe.milestones=[]",
    )
    clamp = ("recipe.batch_size=16", "normalizer=online_clamp", "normalizer.clamp_value=2.0")
    run = train_run("anew", *tiny, *clamp, "recipe.reestimate_images=100")
    results = json.loads((run / "results.json").read_text())["reestimated"]
    trained = load_trained(run)
    before = trained.network.bn1.running_mean.clone()
    result = export(trained, ["torchvision", "folded", "onnx"], tmp_path, "test", latency_runs=0, reestimate=100)
    assert torch.equal(trained.network.bn1.running_mean, before) and trained.guard == "clamp", (
        "the source is left alone"
    )
    assert result.removal["images_anew"] == results["images"] == 112
    assert result.removal["changed_predictions"] == results["changed_predictions"]
    assert result.removal["top1"] == pytest.approx(results["val_top1"])
    network = load_folded(tmp_path / "cifar_resnet8-folded.safetensors")
    plain = without_clamp(trained)
    images = next(validation_batches(trained, 16, torch.device("cpu")))[0]
    assert (network(images) - plain(images)).abs().max() > 1e-3, "other statistics"
    assert "estimating statistics anew on 112 training images" in (tmp_path / "cifar_resnet8-folded.md").read_text()
    assert script("export")(run, "--to", "folded", "--output", tmp_path / "x", "--keep-clamp", "--reestimate", 9) == 2
    assert "leave it or --keep-clamp out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--reestimate", 9), "--reestimate 9: is for a network with a clamp"),
        (("--keep-clamp",), "--keep-clamp: is for a network with a clamp"),
        (("--reestimate", -5), "--reestimate -5: must be a number of training images, or 0"),
    ],
)
def test_what_concerns_a_clamp_is_refused_without_one(given, words, batch_run, tmp_path, script, capsys):
    assert script("export")(batch_run, "--to", "onnx", "--output", tmp_path / "x", *given) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_the_whole_set_decides_whether_removal_is_free(copied, clamp_run, tmp_path):
    run = copied(clamp_run)
    results = json.loads((run / "results.json").read_text())

    def line(gone, limit=20, **changes):
        clamping = results["clamping"]
        clamping["without"]["val_top1"] = clamping["with"]["val_top1"] - gone
        (run / "results.json").write_text(json.dumps(results | changes))
        found = export(load_trained(run), ["folded"], tmp_path / "out", "test", limit=limit, latency_runs=0).removal
        return removal_line({**found, "top1": 0.45, "top1_with_clamp": 0.45})

    assert "on all 60 of the run. Better keep it, with --keep-clamp" in line(0.02)
    assert "on all 60 of the run: free" in line(0.0)
    assert "to 45.00% there: free" in line(0.02, limit=None), "nothing more is recorded than was compared"


def test_a_network_that_is_not_finite_without_its_clamp_keeps_it(copied, clamp_run, tmp_path, script, capsys):
    run = copied(clamp_run)
    path = run / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    for key in content["state_dict"]:
        if re.fullmatch(r"network\..*bn\d\.weight", key):
            content["state_dict"][key].fill_(1e30)  # which the clamps bring back to 2
    torch.save(content, path)
    for more in ((), ("--reestimate", 16)):
        assert script("export")(run, "--to", "torchscript", "--output", tmp_path / "new", *more) == 1
        told = capsys.readouterr().err
        assert "NaN or infinite without the clamp" in told and "with --keep-clamp" in told and told.count("\n") == 1
    assert "on statistics estimated anew" in told and not (tmp_path / "new").exists()
    assert script("export")(run, "--to", "torchscript", "--output", tmp_path / "new", "--keep-clamp") == 0


def test_a_run_that_ended_without_its_clamp_is_told_so(train_run, tmp_path, script, capsys):
    tiny = ("data=synthetic", "data.image_size=8", "data.num_train=32", "data.num_val=8", "recipe.batch_size=8")
    remedy = ("recipe.clamp_off_epochs=1", "recipe.reestimate_images=16")
    run = train_run("off", "experiment=quickstart", "recipe.epochs=2", "recipe.milestones=[]", *tiny, *remedy)
    trained = load_trained(run)
    assert trained.guard == "none" and trained.results["clamping"]["layers"] == 9
    assert trained.results["reestimated"]["images"] == 16
    result = export(trained, ["folded"], tmp_path, "test", latency_runs=0)
    assert result.removal is None and result.rows[0].agreement.within(1e-4)
    card = (tmp_path / "cifar_resnet8-folded.md").read_text()
    sides = {side: figures["val_top1"] for side, figures in trained.results["clamping"].items() if side in SIDES}
    assert "Activation clamp: none" in card
    assert f"| trained without the clamp in the last 1 epoch | {sides['without']:.2%} top-1 |" in card
    assert f"| with the clamp (5) put back | {sides['with']:.2%} top-1 |" in card
    for command in (("export", "--to", "onnx", "--output", tmp_path / "x", "--keep-clamp"), ("audit_clamping",)):
        assert script(command[0])(run, *command[1:]) == 2
        assert "recipe.clamp_off_epochs=1 took" in capsys.readouterr().err


def test_clamp_is_kept_where_asked_and_possible(clamp_run, tmp_path, script, capsys):
    assert script("export")(clamp_run, "--to", "torchscript", "--output", tmp_path, "--keep-clamp") == 0
    trained = load_trained(clamp_run)
    images = torch.randn(3, 1, 28, 28)
    network = FORMS["torchscript"].load(tmp_path / "cifar_resnet8-torchscript.torchscript", trained)
    torch.testing.assert_close(network(images), trained.network(images), atol=1e-4, rtol=0)
    assert "clamp: kept" in (tmp_path / "cifar_resnet8-torchscript.md").read_text()
    capsys.readouterr()
    assert script("export")(clamp_run, "--to", "folded", "--output", tmp_path / "new", "--keep-clamp") == 2
    assert "holds no clamp" in capsys.readouterr().err and not (tmp_path / "new").exists()
