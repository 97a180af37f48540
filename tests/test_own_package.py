"""A normalizer, a network and images of the user's own: trained, shown in the table, exported, without editing ours."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "training"))
sys.path.insert(0, str(Path(__file__).parent / "distributed"))
import own_package
import process_groups
from tests_training import TINY, load_train_module

from onlinenorm.deploy import DeployError, load_trained
from onlinenorm.errors import ConfigError
from onlinenorm.training.config_check import check_config
from onlinenorm.training.roles import parameter_roles

PACKAGE = "own_package_code"
ALLOWED = [f"{PACKAGE}.{name}" for name in ("Tanh", "Net", "Flowers")]
SHORT = [*TINY[5:], "recipe.epochs=1", "recipe.milestones=[]"]


def train(rank, folder, run, *overrides):
    """The results of a run with the files of `folder`, on one of its processes."""
    module = load_train_module()
    configs = own_package.write(Path(folder)) if rank == 0 else Path(folder) / "configs"
    sys.path.insert(0, folder) if folder not in sys.path else None
    return module.train(module.load_config([*overrides, f"run_dir={run}"], str(configs)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    own_package.write(folder)
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop(PACKAGE, None)


@pytest.fixture(scope="module")
def run(folder):
    """A finished run of all three."""
    run = folder / "runs" / "own" / "seed0"
    train(0, str(folder), str(run), "normalizer=own", "model=own", "data=flowers", *SHORT)
    return run


def load(root, name):
    spec = importlib.util.spec_from_file_location(f"{name}_of_own", root / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script(root, name, *arguments):
    return load(root, name).main([str(argument) for argument in arguments])


def test_all_three_train_from_files_in_a_folder(run):
    results = json.loads((run / "results.json").read_text())
    assert results["normalizer"] == "own" and results["scale"] == "flowers" and results["dataset"]["train_images"] == 70


def test_what_a_run_names_is_built_only_where_it_is_allowed(run, root, capsys):
    output = run / "exports"
    assert script(root, "export", run, "--to", "exported-program", "--output", output) == 2
    told = capsys.readouterr().err
    assert "is foreign and is refused" in told and f"--allow {PACKAGE}." in told and told.count("\n") == 1
    with pytest.raises(DeployError, match=r"(data|normalizer|model)._target_: .*is foreign"):
        load_trained(run, allowed=ALLOWED[:2])
    with pytest.raises(DeployError, match=r"normalizer._target_: .*is foreign"):
        load_trained(run, allowed=[PACKAGE, f"{PACKAGE}.", "own", *ALLOWED[1:]])


def test_allowed_it_is_exported_and_predicts(run, root, tmp_path, capsys):
    from PIL import Image

    allow = [word for name in ALLOWED for word in ("--allow", name)]
    assert script(root, "export", run, "--to", "exported-program", "--output", tmp_path, "--latency", 1, *allow) == 0
    for form in ("torchvision", "folded"):
        capsys.readouterr()
        assert script(root, "export", run, "--to", form, "--output", tmp_path, *allow) == 2
        assert f"{PACKAGE}.Net is your own; use" in capsys.readouterr().err
    Image.new("RGB", (9, 9)).save(tmp_path / "image.png")
    assert script(root, "predict", run, tmp_path / "image.png", *allow) == 0
    assert "class " in capsys.readouterr().out
    assert script(root, "audit_clamping", run, *allow) == 2
    assert "no clamps to audit (no OnlineNorm layers)" in capsys.readouterr().err


def test_a_row_and_a_label_of_its_own_in_the_table(run, root, tmp_path, capsys):
    assert script(root, "table1", run.parents[1], "--output", tmp_path / "table") == 0
    page = (tmp_path / "table" / "table1.md").read_text()
    assert "flowers, not ImageNet" in page and "| own" in page
    told = json.loads((tmp_path / "table" / "table1.json").read_text())
    assert told["scale"] == "flowers"


def test_parameters_are_decayed_as_those_of_a_norm(run):
    trained = load_trained(run, allowed=ALLOWED)
    for name, parameter in trained.network.named_parameters():
        parameter.requires_grad_(not name.endswith("scale"))
    roles = parameter_roles(trained.network)
    assert roles["body.1.weight"] == "norm_weight" and roles["body.1.bias"] == "norm_bias"
    assert roles["head.bias"] == "bias" and roles["body.0.weight"] == "weight"


def test_two_processes_report_the_network_of_the_checkpoint(folder):
    """Each has statistics of its own, in buffers, counts and a frozen parameter; all validate what is saved."""
    run = folder / "two"
    several = ("trainer.strategy=ddp", "trainer.devices=auto", "recipe.lr=0.5", "recipe.scaling=none")
    words = ("normalizer=own", "model=own", "data=flowers", *SHORT, *several)
    first, second = process_groups.run(2, train, str(folder), str(run), *words)
    assert first["last"] == second["last"]
    trained = load_trained(run, allowed=ALLOWED)
    assert trained.results is not None, "the weights of the checkpoint are those that were reported"
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    tables = content["local_statistics"]
    assert {name.rpartition(".")[2] for name in tables} == {"level", "steps", "scale"}
    images, labels = [], []
    trained.data.setup()
    for batch in trained.data.val_dataloader():
        batch = trained.data.on_after_batch_transfer(batch)
        images.append(batch[0])
        labels.append(batch[1])
    logits = trained.network(torch.cat(images))
    loss = torch.nn.functional.cross_entropy(logits.double(), torch.cat(labels))
    top1 = float((logits.argmax(1) == torch.cat(labels)).double().mean())
    results = json.loads((run / "results.json").read_text())["last"]
    assert results["val_loss"] == pytest.approx(float(loss), rel=1e-6)
    assert results["val_top1"] == pytest.approx(top1, abs=1e-12)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["model=wrong"], r"model._target_: .*WrongNet built with num_classes=7 makes \[16, 4, 3, 3\] of 16 images"),
        (["model=none"], r"model._target_: .*no_net makes a int and not a torch.nn.Module"),
        (["data=bars"], r"data._target_: .*Mislabelled.scale is 'a \| b'; it is a text of at most 40"),
        (
            ["data=flattered"],
            r"data._target_: .*Flattered.scale is 'imagenet', which published figures or margins are of",
        ),
        (["data=unlicensed"], r"data._target_: .*Unlicensed.licence is ''; say in a line how the images may be used"),
        (["data=unlabelled"], r"data._target_: .*Unlabelled has no scale; onlinenorm.data.ImageDataModule says"),
    ],
)
def test_what_cannot_train_is_told_before_it_does(folder, overrides, message):
    chosen = {"normalizer": "own", "model": "own", "data": "flowers"}
    chosen |= dict(override.split("=") for override in overrides)
    words = [f"{group}={name}" for group, name in chosen.items()]
    with pytest.raises(ConfigError, match=message):
        train(0, str(folder), str(folder / "never"), *words, *SHORT)
    assert not (folder / "never").exists()


def test_statistics_that_cannot_be_averaged_are_for_one_process(folder):
    from onlinenorm.training.config_check import build
    from onlinenorm.training.probe import probe_normalizer

    config = load_train_module().load_config(["normalizer=alone", *SHORT], str(folder / "configs"))
    check_config(config)
    probe_normalizer(build(config, "normalizer"), config["normalizer"])
    with pytest.raises(ConfigError, match=r"Alone says that its statistics cannot be averaged .*trainer.devices=1"):
        probe_normalizer(build(config, "normalizer"), config["normalizer"], {"devices": 2})
