"""Exports compute what the trained network does, or are not there."""

import dataclasses
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchvision
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from onlinenorm.deploy import FORMS, DeployError, load_folded, load_trained
from onlinenorm.deploy.export import export, page
from onlinenorm.deploy.forms import fold, prepare, stock_network, stock_state
from onlinenorm.deploy.images import validation_batches
from onlinenorm.deploy.predict import read_image
from onlinenorm.deploy.verification import Agreement, latency_ms
from onlinenorm.errors import VerificationError
from onlinenorm.models import cifar_resnet8
from onlinenorm.normalizers import OnlineNorm, remove_clamping


@pytest.fixture(scope="session")
def exported(clamp_run, script, tmp_path_factory):
    """Folder with every form of the clamped network."""
    folder = tmp_path_factory.mktemp("exports") / "new"
    assert script("export")(clamp_run, "--to", "all", "--output", folder, "--latency", 3) == 0
    return folder


@pytest.fixture(scope="session")
def truth(clamp_run):
    """(validation images, logits of the network without clamp)."""
    trained = load_trained(clamp_run)
    images = torch.cat([images for images, _, _ in validation_batches(trained, None, torch.device("cpu"))])
    assert remove_clamping(trained.network) == 9
    return images, trained.network(images)


def test_every_form_is_there_with_its_card_and_nothing_else(exported):
    suffixes = {"torchvision": ".safetensors", "folded": ".safetensors", "onnx": ".onnx", "torchscript": ".torchscript",
                "exported-program": ".pt2"}  # fmt: skip
    files = {f"cifar_resnet8-{name}{suffix}" for name, suffix in suffixes.items()}
    cards = {f"cifar_resnet8-{name}.md" for name in suffixes}
    assert {path.name for path in exported.iterdir()} == files | cards | {"exports.json", "exports.md"}


def check(logits, truth):
    assert (logits - truth[1]).abs().max() < 1e-4
    assert torch.equal(logits.argmax(1), truth[1].argmax(1))


def test_torchvision_form_loads_strictly_into_the_batch_norm_twin(exported, truth):
    twin = cifar_resnet8(nn.BatchNorm2d, in_channels=1).eval()
    twin.load_state_dict(load_file(exported / "cifar_resnet8-torchvision.safetensors"), strict=True)
    check(twin(truth[0]), truth)


def test_folded_form_has_no_normalizers(exported, truth):
    network = load_folded(exported / "cifar_resnet8-folded.safetensors")
    assert any(isinstance(m, nn.Conv2d) for m in network.modules())
    assert not any(isinstance(m, nn.BatchNorm2d | OnlineNorm) for m in network.modules())
    check(network(truth[0]), truth)


def test_onnx_form_takes_batches_of_any_size(exported, truth):
    path = exported / "cifar_resnet8-onnx.onnx"
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert model.opset_import[0].version >= 18
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for count in (1, 3, 60):
        (logits,) = session.run(["logits"], {"images": truth[0][:count].numpy()})
        np.testing.assert_allclose(logits, truth[1][:count].numpy(), atol=1e-4)


def test_exported_program_takes_batches_of_any_size(exported, truth):
    network = torch.export.load(exported / "cifar_resnet8-exported-program.pt2").module()
    check(network(truth[0]), truth)
    assert network(truth[0][:1]).shape == (1, 10)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_torchscript_form(exported, truth):
    check(torch.jit.load(exported / "cifar_resnet8-torchscript.torchscript")(truth[0]), truth)


def test_card_says_what_it_is_and_how_it_was_made(exported, clamp_run):
    card = (exported / "cifar_resnet8-torchvision.md").read_text()
    results = json.loads((clamp_run / "results.json").read_text())
    for part in (
        f"{results['clamping']['with']['val_top1']:.2%}",
        f"{results['clamping']['without']['val_loss']:.4f}",
        results["dataset"]["fingerprint"],
        results["parameters_sha256"],
        "Removing the clamp changed",
        "--to all",
        "commit",
        "MIT",
        "Apache-2.0",
        "mean [0.286]",
        "cifar_resnet8(torch.nn.BatchNorm2d, shortcut='B', num_classes=10, in_channels=1)",
    ):
        assert part in card, part
    assert "prefer exported-program" in (exported / "cifar_resnet8-torchscript.md").read_text()


def test_table_has_sizes_latencies_and_agreement(exported, clamp_run):
    facts = json.loads((exported / "exports.json").read_text())
    assert [row["form"] for row in facts["rows"]] == list(FORMS)
    for row in facts["rows"]:
        assert row["max_logit_difference"] < 1e-4 and row["changed_predictions"] == 0 and row["images"] == 60
        assert row["bytes"] == (exported / row["file"]).stat().st_size and row["milliseconds"] > 0
    removal, recorded = facts["clamp_removal"], json.loads((clamp_run / "results.json").read_text())["clamping"]
    assert removal["max_logit_difference"] > 1e-2  # the clamps of this network do act
    sides = [recorded[side]["val_top1"] for side in ("with", "without")]
    assert [removal["top1_with_clamp"], removal["top1"]] == pytest.approx(sides)
    assert facts["hardware"] and facts["made_with"]["commit"] and facts["source_milliseconds"] > 0


def test_pages_are_what_their_figures_give(exported, root):
    recorded = sorted((root / "results" / "exports").iterdir())
    assert len(recorded) == 2
    for folder in (exported, *recorded):
        content = json.loads((folder / "exports.json").read_text())
        assert (folder / "exports.md").read_text() == page(content), folder
        assert len(content["rows"]) == len(FORMS) and content["rows"][2]["file"], folder


@pytest.mark.parametrize("form", ["torchvision", "folded"])
def test_layer_scaling_is_refused_with_the_reason(form, scaling_run, tmp_path, script, capsys):
    assert script("export")(scaling_run, "--to", form, "--output", tmp_path / "new") == 2
    error = capsys.readouterr().err
    assert "all channels of a sample" in error and "onnx" in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_layer_scaling_is_held_by_the_other_forms(scaling_run, tmp_path, script, capsys):
    """Forms that cannot be made are an exit code; the others are there."""
    assert script("export")(scaling_run, "--to", "all", "--output", tmp_path, "--latency", "0") == 1
    assert "export.py: not made: torchvision, folded; the reasons" in capsys.readouterr().err
    facts, trained = json.loads((tmp_path / "exports.json").read_text()), load_trained(scaling_run)
    assert facts["clamp_removal"] is None
    images = 3 * torch.randn(3, 1, 28, 28)
    for row in facts["rows"]:
        if row["form"] in ("torchvision", "folded"):
            assert "file" not in row and "all channels" in row["reason"]
            continue
        assert row["max_logit_difference"] < 1e-4 and row["changed_predictions"] == 0 and row["images"] == 60
        network = FORMS[row["form"]].load(tmp_path / row["file"], trained)
        torch.testing.assert_close(network(images), trained.network(images), atol=1e-4, rtol=0)
    assert {path.stem.partition("-")[2] for path in tmp_path.glob("cifar*")} == set(FORMS) - {"torchvision", "folded"}


def test_batch_norm_networks_are_exported_too(batch_run, tmp_path):
    result = export(load_trained(batch_run), ["torchvision", "folded"], tmp_path, "test", latency_runs=0)
    assert [row.form for row in result.rows] == ["torchvision", "folded"]
    assert all(row.agreement.within(1e-4) for row in result.rows)


def test_normalizers_without_running_statistics_cannot_be_folded(train_run, tmp_path):
    tiny = ("data=synthetic", "data.image_size=8", "data.num_train=8", "data.num_val=4", "recipe.batch_size=8")
    common = ("experiment=quickstart", "recipe.epochs=1", "recipe.milestones=[]", "normalizer=group")
    trained = load_trained(train_run("group", *common, *tiny))
    for form in ("torchvision", "folded"):
        with pytest.raises(DeployError, match="group_norm has no running statistics"):
            export(trained, [form], tmp_path / "new", "test")
    assert not (tmp_path / "new").exists()


def test_resnet50_trained_a_few_steps_is_torchvisions(train_run, tmp_path):
    shrink = ("data.image_size=32", "data.num_train=16", "data.num_val=8", "recipe.batch_size=8", "recipe.epochs=1")
    run = train_run("resnet50", "experiment=table1", "data=synthetic", "trainer=cpu", "recipe.milestones=[]",
                    "recipe.augmentation=none", *shrink)  # fmt: skip
    trained = load_trained(run)
    result = export(trained, ["torchvision"], tmp_path, "test", latency_runs=0)
    assert result.rows[0].agreement.within(1e-4)
    stock = torchvision.models.resnet50(num_classes=10)
    stock.load_state_dict(load_file(tmp_path / "resnet50-torchvision.safetensors"), strict=True)
    assert remove_clamping(trained.network) == 53
    images = torch.cat([images for images, _, _ in validation_batches(trained, None, torch.device("cpu"))])
    with torch.no_grad():
        torch.testing.assert_close(stock.eval()(images), trained.network(images), atol=1e-4, rtol=0)
    assert "torchvision.models.resnet50(num_classes=10)" in (tmp_path / "resnet50-torchvision.md").read_text()


@pytest.mark.parametrize("by", [1e-3, float("nan")])
def test_an_export_that_computes_something_else_is_not_written(by, clamp_run, tmp_path, script, capsys, monkeypatch):
    right = FORMS["torchvision"]

    def write(network, trained, path):
        network.fc.bias += by
        right.write(network, trained, path)

    monkeypatch.setitem(FORMS, "torchvision", dataclasses.replace(right, write=write))
    assert script("export")(clamp_run, "--to", "torchvision", "--output", tmp_path / "a" / "b") == 1
    printed = capsys.readouterr()
    assert "does not compute what the network does" in printed.err and printed.err.count("\n") == 1
    assert not (tmp_path / "a").exists()


def test_an_exporter_that_fails_is_named(clamp_run, tmp_path, script, capsys, monkeypatch):
    def write(network, trained, path):
        path.write_bytes(b"half")
        raise RuntimeError("no space\nleft on device")

    monkeypatch.setitem(FORMS, "folded", dataclasses.replace(FORMS["folded"], write=write))
    assert script("export")(clamp_run, "--to", "folded", "--output", tmp_path / "new") == 2
    assert "--to folded: could not be made (RuntimeError: no space" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr("onlinenorm.deploy.export.shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    assert script("export")(clamp_run, "--to", "all", "--output", tmp_path / "new") == 2
    assert re.search(r"/new: could not be written \(.*No space left.*\); free some space", capsys.readouterr().err)
    assert not (tmp_path / "new").exists()


def test_a_refused_export_leaves_earlier_files_alone(clamp_run, tmp_path, script):
    main = script("export")
    assert main(clamp_run, "--to", "folded", "--output", tmp_path, "--latency", 0) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(clamp_run, "--to", "folded", "--output", tmp_path, "--tolerance", 0) == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--images", 0), "--images 0: must be at least 1"),
        (("--tolerance", -1), "--tolerance -1.0: must be at least 0"),
        (("--tolerance", "nan"), "--tolerance nan"),
    ],
)
def test_wrong_arguments(arguments, words, clamp_run, tmp_path, script, capsys):
    assert script("export")(clamp_run, "--to", "folded", "--output", tmp_path / "new", *arguments) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_output_that_is_a_file_and_missing_data(clamp_run, copied, tmp_path, script, capsys):
    (tmp_path / "file").write_text("mine")
    assert script("export")(clamp_run, "--to", "folded", "--output", tmp_path / "file") == 2
    assert "cannot be written to" in capsys.readouterr().err and (tmp_path / "file").read_text() == "mine"
    folder = copied(clamp_run)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["data"] |= {"_target_": "onlinenorm.data.ImageNet", "in_channels": 3, "root": "/nowhere"}
    del config["data"]["embedded"]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert script("export")(folder, "--to", "folded", "--output", tmp_path / "new") == 1
    assert "/nowhere does not exist" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_state_takes_up_another_eps_and_missing_affine():
    class Source:
        network, num_classes, in_channels = cifar_resnet8(nn.BatchNorm2d), 10, 3

        def build_network(self, normalizer):
            return cifar_resnet8(normalizer)

    network = cifar_resnet8(lambda c: nn.BatchNorm2d(c, eps=1e-2, affine=c != 16)).eval()
    stock = stock_network(Source())
    stock.load_state_dict(stock_state(network, stock), strict=True)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(stock.eval()(images), network(images))


def test_folding_needs_a_convolution_before_each_norm():
    with pytest.raises(DeployError, match="1 follows no convolution"):
        fold(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)).eval())


def test_preparing_leaves_the_source_alone(clamp_run):
    trained = load_trained(clamp_run)
    state = {key: value.clone() for key, value in trained.network.state_dict().items()}
    for form in FORMS.values():
        prepare(trained, form)
    assert trained.guard == "clamp"
    assert all(torch.equal(value, state[key]) for key, value in trained.network.state_dict().items())


def test_agreement_keeps_what_is_not_a_number():
    agreement, logits = Agreement(), torch.tensor([[1.0, 0.0]])
    agreement.add(logits, logits * float("nan"), torch.tensor([0]))
    agreement.add(logits, logits, torch.tensor([0]))
    assert not agreement.within(1e9)
    assert not Agreement().within(1.0)  # nothing was compared


def test_latency_is_a_median_of_calls():
    calls = []
    assert latency_ms(lambda images: calls.append(images), torch.zeros(1), 8) >= 0
    assert len(calls) == 10


@pytest.mark.parametrize("shape", [(60, 40), (31, 47), (28, 28), (20, 90)])
def test_the_card_turns_a_photograph_into_the_input(exported, clamp_run, tmp_path, monkeypatch, shape):
    card = (exported / "cifar_resnet8-onnx.md").read_text()
    program = card.split("as the validation images were prepared:\n\n```python\n")[1].split("```")[0]
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg", quality=95)
    monkeypatch.chdir(tmp_path)
    exec(program, found := {})
    trained = load_trained(clamp_run)
    image = read_image(tmp_path / "photo.jpg", trained)[None]
    expected, _, _ = trained.data.on_after_batch_transfer((image, torch.zeros(1), torch.zeros(1)))
    torch.testing.assert_close(found["images"], expected, atol=1e-6, rtol=1e-5)
    assert "T-shirt/top" in card and "Classes, in the order of the logits" in card


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_the_cards_run_as_pasted(exported, tmp_path, monkeypatch):
    """Their blocks one after the other; that of weights in a Python of its own, where nothing has been imported."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(tmp_path / "photo.jpg")
    for file in exported.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)
    logits = []
    for name in FORMS:
        blocks = (exported / f"cifar_resnet8-{name}.md").read_text().split("```python\n")[1:]
        program = "".join(block.partition("```")[0] for block in blocks)
        if name == "torchvision":
            program += "torch.save(logits.detach(), 'logits.pt')\n"
            subprocess.run([sys.executable, "-c", program], check=True)
            logits.append(torch.load("logits.pt", weights_only=True))
        else:
            exec(program, found := {})
            logits.append(torch.as_tensor(found["logits"]))
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], atol=1e-4, rtol=0)


def test_a_network_less_accurate_than_its_run_is_refused(copied, batch_run, tmp_path):
    """As one is that keeps statistics outside of its checkpoint; images of another folder are not compared."""
    run = copied(batch_run)
    results = json.loads((run / "results.json").read_text())

    def exported(**changes):
        (run / "results.json").write_text(json.dumps(results | changes))
        return export(load_trained(run), ["exported-program"], tmp_path / "out", "test", latency_runs=0).rows

    better = {"last": results["last"] | {"val_top1": results["last"]["val_top1"] + 0.28}}
    with pytest.raises(
        VerificationError, match=r"last.ckpt: refused, .* top-1 on 60 images of the run, and results.js"
    ):
        exported(**better)
    assert not list((tmp_path / "out").glob("*"))
    assert exported(**better, dataset=results["dataset"] | {"fingerprint": "of others"})
