"""What auto stands for: fast on a GPU where it pays and is known to be right, as before on the CPU, kept by a run."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tests_training import TINY, outcome

from onlinenorm.arguments import flatten
from onlinenorm.cli.compose import load_config
from onlinenorm.data.nvjpeg_dataset import NvjpegDataset
from onlinenorm.errors import ConfigError
from onlinenorm.training import fast_path
from onlinenorm.training import preflight as preflight_module
from onlinenorm.training import run as run_module
from onlinenorm.training.config_check import AUTO_KEYS, check_config
from onlinenorm.training.fast_path import adopt, choose, with_values
from onlinenorm.training.preflight import preflight
from onlinenorm.training.recipe import Recipe
from onlinenorm.training.run_folder import changed_keys

sys.path.append(str(Path(__file__).parents[1] / "data"))
from image_folders import write_tree

# 40,000 epochs of 64 images of 224 px are 2.56 million
LONG = (
    "model=cifar_resnet8", "data=synthetic", "data.image_size=224", "data.num_train=64", "data.num_val=16",
    "recipe=cifar", "recipe.epochs=40000", "recipe.milestones=[]", "recipe.batch_size=16",
)  # fmt: skip
RECIPE = Recipe(epochs=1, batch_size=16)  # of which the data take the batch size and the views
FAST = {"model.compile": True, "trainer.cuda_graph": True, "data.decoder": "pillow", "data.on_device": True}


def chosen(*overrides, **trainer):
    """key -> value and reasons of the choice for overrides; `trainer` are settings as `resolve` would leave them."""
    config = load_config([*LONG, *overrides])
    check_config(config)
    settings = {"accelerator": "gpu", "devices": 1, "num_nodes": 1, **trainer}
    config = {**config, "trainer": {**config["trainer"], **settings}}
    choice = choose(config, lambda config: fast_path.open_data(config, RECIPE))
    assert choice.data.on_device == choice.config["data"]["on_device"]
    flat = flatten(choice.config)
    return {key: flat[key] for key in AUTO_KEYS}, choice


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 80 GB with all that a compiler needs, none of which is there."""
    properties = type("Properties", (), {"total_memory": 80 * 10**9})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(fast_path, "free_memory", lambda device: 70 * 10**9)
    monkeypatch.setattr(fast_path, "gpu_decodes", lambda device: True)
    monkeypatch.setattr(fast_path, "compiler_problem", lambda: "")
    return monkeypatch


def test_on_the_cpu_nothing_changes():
    values, choice = chosen(accelerator="cpu")
    assert values == AUTO_KEYS and set(choice.reasons.values()) == {"on the CPU"} and choice.fast == []


def test_all_is_on_where_a_long_run_has_a_gpu(gpu):
    values, choice = chosen()
    assert values == FAST and choice.reasons == {}
    assert choice.fast == ["model.compile", "trainer.cuda_graph", "data.on_device"]


def test_all_is_on_where_a_run_is_long_for_each_of_several_processes(gpu):
    values, choice = chosen("recipe.epochs=80000", devices=2)
    assert values == FAST and choice.reasons == {}


@pytest.mark.parametrize(
    "overrides, trainer, off, reason",
    [
        (["recipe.epochs=31000"], {}, ["model.compile"], "1,984,000 images of 224 px would not pay for it"),
        (["data.image_size=112"], {}, ["model.compile"], "2,560,000 images of 112 px would not pay for it"),
        (["recipe.epochs=24"], {}, ["model.compile", "trainer.cuda_graph"], "would not pay for it"),
        ([], {"deterministic": True}, ["model.compile"], "picks kernels by their time"),
        (["normalizer.backend=torch"], {}, ["model.compile"], "takes minutes to compile"),
        (["normalizer.backend=reference"], {}, ["model.compile", "trainer.cuda_graph"], "a loop over samples"),
        ([], {"devices": 2}, ["model.compile"], "1,280,000 images of 224 px a process would not pay for it"),
        (["recipe.epochs=160000"], {"devices": 2, "num_nodes": 2}, list(FAST)[:2], "2 machines, "),
    ],
)
def test_where_it_does_not_pay_or_was_never_seen_to_be_right_it_is_off(gpu, overrides, trainer, off, reason):
    values, choice = chosen(*overrides, **trainer)
    assert values == FAST | dict.fromkeys(off, False)
    assert list(choice.reasons) == off and all(reason in text for text in choice.reasons.values())


def test_collectives_of_other_libraries_are_not_captured(gpu, monkeypatch):
    monkeypatch.setenv("PL_TORCH_DISTRIBUTED_BACKEND", "gloo")
    values, choice = chosen("recipe.epochs=80000", devices=2)
    assert values == FAST | {"trainer.cuda_graph": False}
    assert "without NCCL" in choice.reasons["trainer.cuda_graph"]


def test_code_of_ones_own_is_neither_compiled_nor_captured(gpu):
    config = load_config([*LONG, "trainer=cpu"])
    config["trainer"] |= {"accelerator": "gpu", "devices": 1, "num_nodes": 1}
    config["normalizer"]["_target_"] = "mine.Norm"
    choice = choose(config, lambda config: fast_path.open_data(config, RECIPE))
    assert not choice.config["model"]["compile"] and not choice.config["trainer"]["cuda_graph"]
    assert choice.reasons["model.compile"] == choice.reasons["trainer.cuda_graph"]
    assert "normalizer is code of your own" in choice.reasons["model.compile"]


def test_a_set_that_does_not_fit_stays_out_of_the_gpus_memory(gpu, monkeypatch):
    monkeypatch.setattr(fast_path, "decoded_bytes", lambda sets: 21e9)
    values, choice = chosen()
    assert values == FAST | {"data.on_device": False}
    assert choice.reasons["data.on_device"] == "the set is larger than 25% of the GPU's 80 GB"
    monkeypatch.setattr(fast_path, "decoded_bytes", lambda sets: 19e9)
    assert chosen()[0] == FAST
    monkeypatch.setattr(fast_path, "free_memory", lambda device: 30 * 10**9)
    _, choice = chosen()
    assert choice.reasons["data.on_device"] == "19.0 GB decoded, and the GPU has 30.0 GB free"


def test_files_are_decoded_by_the_gpu_unless_it_holds_them_decoded(gpu, tmp_path):
    tree = [f"data.root={write_tree(tmp_path / 'set')}", "data=imagenet", "data.num_workers=0"]
    overrides = [word for word in tree if word.startswith("data")]
    settings = [word for word in LONG if not word.startswith("data.num_") and word != "data=synthetic"]

    def decoder(*more):
        config = load_config([*settings, *overrides, *more])
        config["trainer"] |= {"accelerator": "gpu", "devices": 1, "num_nodes": 1}
        choice = choose(config, lambda config: fast_path.open_data(config, RECIPE))
        assert isinstance(choice.data._sets[0], NvjpegDataset) == (choice.config["data"]["decoder"] == "nvjpeg")
        return choice.config["data"]["decoder"], choice.config["data"]["on_device"]

    assert decoder() == ("pillow", True)
    assert decoder("data.on_device=false") == ("nvjpeg", False)
    assert decoder("data.decoder=torchvision", "data.on_device=false") == ("torchvision", False)
    gpu.setattr(fast_path, "free_memory", lambda device: 0)
    assert decoder() == ("pillow", False), "as other runs on such a GPU, which was less busy"
    gpu.setattr(fast_path, "gpu_decodes", lambda device: False)
    assert decoder("data.on_device=false") == ("torchvision", False)
    gpu.setattr(fast_path, "decoded_bytes", lambda sets: 1e12)
    assert decoder() == ("torchvision", False)


def test_explicit_values_win(gpu):
    given = {"model.compile": "false", "trainer.cuda_graph": "false", "data.on_device": "false"}
    values, choice = chosen(*(f"{key}={value}" for key, value in given.items()))
    assert values == AUTO_KEYS and choice.fast == [] and choice.reasons == {}


@pytest.mark.parametrize(
    "lacking, message",
    [("triton", "triton is not installed"), ("gcc", "no C compiler"), ("Python.h", "headers are missing"),
     ("Volta", "older than Triton compiles for")],
)  # fmt: skip
def test_what_a_compiler_needs_is_looked_for(monkeypatch, tmp_path, lacking, message):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (6, 1) if lacking == "Volta" else (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "P100")
    monkeypatch.setattr(fast_path.importlib.util, "find_spec", lambda name: None if lacking == "triton" else name)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(fast_path.shutil, "which", lambda name: None if lacking == "gcc" else name)
    if lacking != "Python.h":
        (tmp_path / "Python.h").touch()
    monkeypatch.setattr(fast_path.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert message in fast_path.compiler_problem()
    (tmp_path / "Python.h").touch()
    if lacking == "Python.h":
        assert fast_path.compiler_problem() == ""


def test_values_are_checked_with_auto_among_them():
    with pytest.raises(ConfigError, match=r"^model.compile: 'yes' is not true or false or auto$"):
        check_config(load_config(["model.compile='yes'"]))
    with pytest.raises(ConfigError, match=r"^model.zero_init_last_gamma: 'auto' is not true or false$"):
        check_config(load_config(["model.zero_init_last_gamma=auto"]))


def test_a_run_keeps_what_was_chosen_at_its_start():
    config = load_config([*LONG])
    recorded = with_values(config, FAST)
    assert changed_keys(recorded, config) == [], "auto is whatever the run has"
    assert adopt(config, recorded) == recorded and adopt(config, None) == config
    anew = adopt(config, recorded, fast_path.ANEW)
    assert anew == with_values(recorded, {"data.on_device": "auto"}), "another machine may have no room"
    explicit = with_values(config, {"model.compile": False})
    assert changed_keys(recorded, explicit) == ["model.compile: True -> False"]
    assert adopt(explicit, recorded)["model"]["compile"] is False


def test_a_compiled_run_does_not_go_on_where_nothing_compiles(gpu, monkeypatch, tmp_path):
    config = with_values(load_config([*LONG]), {"model.compile": True, "trainer.accelerator": "gpu"})
    fast_path.check_compiles_here(config, tmp_path)
    monkeypatch.setattr(fast_path, "compiler_problem", lambda: "triton is not installed")
    with pytest.raises(ConfigError, match=r"^model.compile: the run in .* is compiled, and here triton is not inst"):
        fast_path.check_compiles_here(config, tmp_path)
    fast_path.check_compiles_here(with_values(config, {"model.compile": False}), tmp_path)


def test_what_former_runs_compiled_does_not_count(run, tmp_path):
    """Dynamo goes on without compiling after so many versions of the same code."""
    called = []

    def double(x):
        return x + x

    compiled = torch.compile(double, backend=lambda graph, _: called.append(1) or graph.forward)
    compiled(torch.ones(2))
    compiled(torch.ones(2))
    assert called == [1]
    run(tmp_path)
    compiled(torch.ones(2))
    assert called == [1, 1]


@pytest.mark.parametrize("before", ["auto", "explicit"])
def test_old_folders_and_explicit_ones_go_on(run, tmp_path, before):
    """A finished run is reprinted by either command, and an unfinished one continued."""
    given = {"auto": [], "explicit": [f"{key}={str(value).lower()}" for key, value in AUTO_KEYS.items()]}
    first = run(tmp_path / "run", *given[before])
    recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert {key: flatten(recorded)[key] for key in AUTO_KEYS} == AUTO_KEYS
    ended = outcome(tmp_path / "run")
    after = given["explicit" if before == "auto" else "auto"]
    assert run(tmp_path / "run", *after) == first
    (tmp_path / "run" / "results.json").unlink()
    run(tmp_path / "run", *after)
    assert outcome(tmp_path / "run") == ended


@pytest.mark.gpu
def test_a_run_on_a_gpu_is_fast_by_default_and_the_same(run, tmp_path):
    """40 epochs of 4 steps: captured and on the device, not compiled; the figures of the plain run."""
    shared = ["trainer=gpu", "trainer.precision=32-true", "recipe.epochs=40", "trainer.deterministic=true"]
    fast = run(tmp_path / "fast", *shared)
    flat = flatten(yaml.safe_load((tmp_path / "fast" / "config.yaml").read_text()))
    assert {key: flat[key] for key in AUTO_KEYS} == FAST | {"model.compile": False}
    plain = run(tmp_path / "plain", *shared, "trainer.cuda_graph=false", "data.on_device=false")
    assert fast["last"]["val_loss"] == pytest.approx(plain["last"]["val_loss"], rel=1e-3)
    assert run(tmp_path / "fast", *shared) == fast, "the same command reprints it"


@pytest.mark.gpu
def test_a_long_run_on_a_gpu_is_compiled_and_goes_on_without_a_compiler(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fast_path, "WORTH_COMPILING", 0)
    run(tmp_path / "compiled", "trainer=gpu")
    assert yaml.safe_load((tmp_path / "compiled" / "config.yaml").read_text())["model"]["compile"] is True
    assert capsys.readouterr().err == ""

    def refuse(*_, **__):
        raise RuntimeError("no code today")  # which torch wraps

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", refuse)
    torch.compiler.reset()
    run(tmp_path / "not", "trainer=gpu")
    said = capsys.readouterr().err
    assert "model.compile: auto chose true, which failed before the first step" in said and "no code today" in said
    assert yaml.safe_load((tmp_path / "not" / "config.yaml").read_text())["model"]["compile"] is False
    shutil.rmtree(tmp_path / "not")
    torch.compiler.reset()
    with pytest.raises(Exception, match="no code today"):
        run(tmp_path / "not", "trainer=gpu", "model.compile=true")


@pytest.mark.gpu
def test_this_gpu_compiles_and_decodes():
    assert fast_path.compiler_problem() == "" and fast_path.gpu_decodes(torch.device("cuda"))


def test_a_run_of_a_gpu_where_there_is_none(run, train_module, tmp_path, monkeypatch):
    """A finished one is reprinted; another says what it needs, and so does its check."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    first = run(tmp_path)
    recorded = yaml.safe_load((tmp_path / "config.yaml").read_text())
    recorded["trainer"] |= {"accelerator": "gpu", "precision": "bf16-mixed"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(with_values(recorded, FAST)))
    assert run(tmp_path, "trainer=auto") == first
    (tmp_path / "results.json").unlink()
    said = "^run_dir: the run in .* was started on a GPU, and torch finds none here"
    with pytest.raises(ConfigError, match=said):
        run(tmp_path, "trainer=auto")
    config = train_module.load_config([*TINY, f"run_dir={tmp_path}", "trainer=auto"])
    with pytest.raises(ConfigError, match=said):
        list(preflight(config, 0.1, None))


def test_the_check_of_a_compiled_run_says_what_its_start_would(run, train_module, tmp_path, monkeypatch):
    run(tmp_path)
    (tmp_path / "results.json").unlink()

    def refused(config, folder):
        raise ConfigError(f"{folder} is compiled")

    monkeypatch.setattr(preflight_module, "check_compiles_here", refused, raising=False)
    with pytest.raises(ConfigError, match="is compiled"):
        list(preflight(train_module.load_config([*TINY, f"run_dir={tmp_path}"]), 0.1, None))


@pytest.mark.parametrize(
    ("overrides", "queues"),
    [
        (["experiment=imagenette"], "32"),
        (["experiment=imagenette", "data.on_device=true"], None),
        (["experiment=imagenette", "data.decoder=pillow"], None),
        (["experiment=cifar10"], None),
        (["experiment=quickstart"], None),
    ],
)
def test_runs_that_decode_while_they_train_ask_for_more_work_queues(overrides, queues, tmp_path, monkeypatch):
    """Before anything starts CUDA, and not where MPS shares out the queues."""
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path / "none"))
    monkeypatch.setattr(run_module, "run_path", lambda config: sys.exit(os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")))
    with pytest.raises(SystemExit) as found:
        run_module.train(load_config(overrides))
    assert found.value.code == queues
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    with pytest.raises(SystemExit) as found:
        run_module.train(load_config(overrides))
    assert found.value.code is None
