"""What a run says before it trains: at once, on which machine, how fast and why not faster."""

import dataclasses
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import get_args

import pytest
from image_folders import write_tree
from tests_training import ROOT, TINY
from torch import nn

from onlinenorm import provenance
from onlinenorm.cli.compose import load_config
from onlinenorm.data import ImageNet, Synthetic, decoded, workers
from onlinenorm.errors import ConfigError, DataError, Diverged
from onlinenorm.normalizers import BatchRenorm2d, OnlineNorm2d, SyncBatchNorm2d
from onlinenorm.training import fast_path
from onlinenorm.training import run as run_module
from onlinenorm.training.fast_path import open_data, with_values
from onlinenorm.training.final_validation import NONE_TO_ESTIMATE
from onlinenorm.training.opening import announce, details, notes
from onlinenorm.training.optimizations import Optimization
from onlinenorm.training.recipe import Recipe

DATA = SimpleNamespace(
    train_images=64, on_unreadable="raise", device_fraction=1.0, keep_decoded=False, num_workers=0, on_device=False
)
RECIPE = Recipe(epochs=3, batch_size=16, lr=0.1, base_batch_size=16)


def lines(*overrides, reasons=None, **values):
    config = with_values(load_config([*TINY, *overrides]), {key.replace("__", "."): v for key, v in values.items()})
    config["trainer"] |= {"devices": 1, "num_nodes": 1, "precision": "bf16-mixed"}
    config = with_values(config, {"data.decoder": "pillow"})
    return details(config, open_data(config, RECIPE), RECIPE, reasons or {})


def test_the_first_lines_come_before_torch_is_loaded(tmp_path):
    code = (
        "import sys, train\n"
        "from onlinenorm.cli.compose import load_config\n"
        "train.announce(load_config(sys.argv[1:]))\n"
        "print({name for name in ('torch', 'pytorch_lightning', 'torchvision') if name in sys.modules})\n"
    )
    words = [*TINY, f"run_dir={tmp_path / 'run'}", "trainer.checkpoint_every_n_steps=2000"]
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        f"{tmp_path / 'run'}: new run: normalizer=online_clamp model=cifar_resnet8 data=synthetic recipe=cifar "
        "trainer=cpu experiment=default seed=0",
        "  3 epochs in batches of 16; saves at the end of each epoch, every 2,000 steps and when asked to stop "
        "(Ctrl-C, SIGTERM, SIGUSR1)",
        "set()",
    ]


def test_fresh_continued_and_finished(tmp_path, capsys, monkeypatch):
    config = load_config([*TINY, f"run_dir={tmp_path}"])
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "previous.ckpt").touch()
    announce(config)
    assert capsys.readouterr().out.startswith(f"{tmp_path}: continues: ")
    (tmp_path / "results.json").touch()
    announce(config)
    assert capsys.readouterr().out == ""
    (tmp_path / "results.json").unlink()
    monkeypatch.setenv("LOCAL_RANK", "1")
    announce(config)
    assert capsys.readouterr().out == "", "the first process says it"


def test_a_run_says_where_it_continues(run, tmp_path, capsys):
    run(tmp_path)
    out = capsys.readouterr().out
    assert "  learning rate 0.00163546, times 0.1 after epoch 2, momentum 0.986916; 4 steps an epoch\n" in out
    assert "70 training and 21 validation images of 10 classes at 8 px, from memory\n" in out and "continues" not in out
    assert all(map(str.strip, out.splitlines())), "no empty line"
    (tmp_path / "results.json").unlink()
    run(tmp_path)
    place = "trained for 3 epochs, and yet to be validated once more"
    assert f"  continues from {tmp_path}/checkpoints/last.ckpt: {place}\n" in (out := capsys.readouterr().out)
    assert all(map(str.strip, out.splitlines())), "no empty line"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(provenance, "device_name", lambda on_gpu: "H200" if on_gpu else "EPYC")


def test_on_a_gpu_what_is_off_has_its_reason(gpu):
    on = {"trainer__accelerator": "gpu", "model__compile": True, "trainer__cuda_graph": True, "data__on_device": True}
    assert lines(**on)[0] == "  on H200, bf16-mixed, compiled, as CUDA graphs"
    assert lines(**on)[1].endswith("at 8 px, on the device")
    off = on | {"model__compile": False, "trainer__cuda_graph": False}
    reasons = {"model.compile": "there is no C compiler"}
    assert lines(reasons=reasons, **off)[0] == (
        "  on H200, bf16-mixed, not compiled (there is no C compiler), not as CUDA graphs"
    )
    cpu = dict.fromkeys(["model__compile", "trainer__cuda_graph", "data__on_device"], False)
    reasons = dict.fromkeys(fast_path.AUTO_KEYS, "on the CPU")
    assert lines(reasons=reasons, **cpu)[0] == "  on EPYC, bf16-mixed", "where nobody expects it, nothing is said"


@pytest.mark.parametrize(
    "layer, accumulate, noted",
    [
        (BatchRenorm2d(4), 1, True),
        (BatchRenorm2d(4, warmup_steps=12), 1, True),
        (BatchRenorm2d(4, warmup_steps=12), 2, False),
        (BatchRenorm2d(4, warmup_steps=11), 1, False),
        (nn.BatchNorm2d(4), 1, False),
    ],
)
def test_a_warm_up_that_outlasts_the_run_is_told(layer, accumulate, noted):
    """Three epochs of 64 images in batches of 16."""
    config = {"trainer": {"accumulate_grad_batches": accumulate}}
    said = notes(nn.Sequential(layer, layer), config, DATA, RECIPE)
    assert len(said) == noted and all("BatchRenorm2d's warm-up of" in note and "run of 12" in note for note in said)


@pytest.mark.parametrize(
    "layer, changes, said",
    [
        (OnlineNorm2d(4), {"clamp_off_epochs": 1, "reestimate_images": 64}, []),
        (
            nn.BatchNorm2d(4),
            {"clamp_raise_epochs": 1, "removal_every_epoch": True, "reestimate_images": 64},
            [
                "recipe.clamp_raise_epochs, recipe.removal_every_epoch: without effect, as no layer of the network "
                "clamps"
            ],
        ),
        (BatchRenorm2d(4, warmup_steps=0), {"reestimate_images": 64}, []),
        (SyncBatchNorm2d(4), {"reestimate_images": 64}, []),
        (
            nn.GroupNorm(1, 4),
            {"reestimate_images": 64},
            [f"recipe.reestimate_images: without effect, as {NONE_TO_ESTIMATE}"],
        ),
        (nn.GroupNorm(1, 4), {"warmup_lr": 0.1}, ["recipe.warmup_lr: without effect, as recipe.warmup_epochs is 0"]),
        (nn.GroupNorm(1, 4), {"warmup_lr": 0.1, "warmup_epochs": 1}, []),
        (
            nn.GroupNorm(1, 4),
            {"warmup_lr": 99, "warmup_epochs": 1},
            [
                "recipe.warmup_epochs, recipe.warmup_lr: without effect, as the warm-up would start at 99, above the "
                "full learning rate 0.1"
            ],
        ),
    ],
)
def test_settings_without_effect_are_told(layer, changes, said):
    config = {"trainer": {"accumulate_grad_batches": 1}}
    recipe = dataclasses.replace(RECIPE, **changes)
    assert notes(nn.Sequential(layer), config, DATA, recipe) == said


@pytest.mark.parametrize(
    "guard, changes, said",
    [
        ("clamp", {"clamp_value": 3}, []),
        ("none", {"clamp_value": 5.0}, []),
        ("none", {"clamp_value": 3}, ["normalizer.clamp_value: without effect, as error_compensation=none"]),
        (
            "layer_scaling",
            {"clamp_value": 3, "layer_scaling_eps": 1e-3},
            ["normalizer.clamp_value: without effect, as error_compensation=layer_scaling"],
        ),
        (
            "clamp",
            {"layer_scaling_group_size": 2},
            ["normalizer.layer_scaling_group_size: without effect, as error_compensation=clamp"],
        ),
    ],
)
def test_arguments_of_a_layer_without_effect_are_told(guard, changes, said):
    node = load_config([*TINY, *(f"normalizer.{key}={value}" for key, value in changes.items())])["normalizer"]
    config = {"trainer": {"accumulate_grad_batches": 1}, "normalizer": node}
    network = nn.Sequential(OnlineNorm2d(4, error_compensation=guard, **changes))
    assert notes(network, config, DATA, RECIPE) == said


@pytest.mark.parametrize(
    "accelerator, fast, said",
    [
        ("cpu", False, ["trainer.disabled_optimizations: without effect, as this run is on the CPU"]),
        (
            "gpu",
            False,
            [
                "trainer.disabled_optimizations: cast_weights, memset_kernels without effect, as trainer.cuda_graph is "
                "false",
                "trainer.disabled_optimizations: fold_gradients without effect, as model.compile is false",
            ],
        ),
        ("gpu", True, []),
    ],
)
def test_disabled_optimizations_of_what_is_off_anyway_are_told(accelerator, fast, said):
    names = list(get_args(Optimization))
    trainer = {"accelerator": accelerator, "cuda_graph": fast, "disabled_optimizations": names}
    config = {"trainer": {"accumulate_grad_batches": 1, **trainer}, "model": {"compile": fast}}
    assert notes(nn.Sequential(), config, DATA, RECIPE) == said
    config["trainer"]["disabled_optimizations"] = []
    assert notes(nn.Sequential(), config, DATA, RECIPE) == []


def test_leaving_out_images_is_of_sets_read_file_by_file(tmp_path):
    config = {"trainer": {"accumulate_grad_batches": 1}}
    data = Synthetic(num_train=64, num_val=8, on_unreadable="skip")
    said = ["data.on_unreadable: without effect, as these images are all in memory from the start"]
    assert notes(nn.Sequential(), config, data, RECIPE) == said
    data = ImageNet(root=str(write_tree(tmp_path)), on_unreadable="skip")
    assert notes(nn.Sequential(), config, data, RECIPE) == []


def test_keys_of_other_decoders_and_of_images_not_kept_are_told():
    config = {"trainer": {"accumulate_grad_batches": 1}}
    data = Synthetic(num_train=64, num_val=8, decoder="torchvision", device_fraction=0.5, keep_decoded=True)
    assert notes(nn.Sequential(), config, data, RECIPE) == [
        "data.device_fraction: without effect, as data.decoder is torchvision",
        "data.keep_decoded: without effect, as data.on_device is false",
    ]
    data = Synthetic(num_train=64, num_val=8, decoder="nvjpeg", device_fraction=0.5, keep_decoded=True, on_device=True)
    assert notes(nn.Sequential(), config, data, RECIPE) == []


@pytest.mark.parametrize(
    "asked, devices, told",
    [
        (None, 8, ""),
        (3, 1, ""),
        (
            4,
            1,
            "data.num_workers: 4 loader workers share 3 cores, which seldom makes them faster; null takes as ",
        ),
        (2, 2, "data.num_workers: 4 loader workers, 2 of each of 2 processes, share 3 cores, which seldom makes them "),
    ],
)
def test_more_workers_than_cores_are_told(monkeypatch, asked, devices, told):
    monkeypatch.setattr(workers, "cores", lambda: 3)
    config = {"trainer": {"accumulate_grad_batches": 1, "devices": devices}}
    data = Synthetic(num_train=64, num_val=8, num_workers=asked)
    assert [note[: len(told)] for note in notes(nn.Sequential(), config, data, RECIPE)] == [told] * bool(told)


def test_torch_does_not_tell_it_too_at_each_start(run, tmp_path, capfd, monkeypatch, recwarn):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    run(tmp_path, "data.num_workers=2", "recipe.epochs=1", "recipe.milestones=[]")
    assert not [warning for warning in recwarn if "worker" in str(warning.message)]
    told = [line for line in capfd.readouterr().out.splitlines() if "worker" in line]
    assert len(told) == 1 and told[0].startswith("  data.num_workers: 2 loader workers share 1 core, ")


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["recipe.batch_size=512"], r"^recipe\.batch_size: 512 exceeds"),
        (["data.on_device=true"], r"^data\.on_device: the 91 decoded images of .* take about .* has 0\.0 GB free; use"),
        (["data.num_workers=1"], r"^data\.num_workers: 1 loader workers hold up to .* /dev/shm has 0\.0 MB free; "),
        (["trainer.log_every_n_steps=0"], r"^trainer\.log_every_n_steps: 0 must be at least 1"),
    ],
)
def test_what_is_refused_is_not_told_of_first(run, tmp_path, capsys, monkeypatch, overrides, message):
    monkeypatch.setattr(decoded, "free_memory", lambda device: 0)
    monkeypatch.setattr(workers.os, "statvfs", lambda path: SimpleNamespace(f_bavail=0, f_frsize=1))
    with pytest.raises((ConfigError, DataError), match=message):
        run(tmp_path / "run", *overrides)
    assert len(capsys.readouterr().out.splitlines()) == 2, "what is announced"
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_on_the_cpu_nothing_lies_on_the_device(gpu):
    assert lines(data__on_device=True)[1].endswith("at 8 px, from memory")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({}, "learning rate 0.1, momentum"),
        ({"milestones": [2]}, "learning rate 0.1, times 0.1 after epoch 2, momentum"),
        (
            {"epochs": 9, "warmup_epochs": 2, "warmup_lr": 0.02, "milestones": [4, 6]},
            "learning rate 0.1 after 2 epochs of warm-up from 0.02, times 0.1 after epochs 4, 6, momentum",
        ),
        (
            {"warmup_epochs": 1, "schedule": "cosine"},
            "learning rate 0.1 after 1 epoch of warm-up from 0, falling to 0 as a cosine, momentum",
        ),
        ({"schedule": "plateau"}, "learning rate 0.1, times 0.1 when validation stops improving, momentum"),
        (
            {"label_smoothing": 0.1},
            "learning rate 0.1, momentum 0.9; label smoothing 0.1 in the train loss alone; 4",
        ),
    ],
)
def test_what_becomes_of_the_learning_rate_is_said(changes, said):
    config = load_config([*TINY])
    config["trainer"] |= {"devices": 1, "num_nodes": 1}
    config = with_values(config, {"data.decoder": "pillow", "data.on_device": False})
    recipe = dataclasses.replace(RECIPE, **changes)
    assert details(config, open_data(config, recipe), recipe, {})[-1].startswith(f"  {said}")


def test_one_epoch_is_one(tmp_path, capsys):
    announce(load_config([*TINY, "recipe.epochs=1", "recipe.milestones=[]", f"run_dir={tmp_path}"]))
    assert "  1 epoch in batches of 16;" in capsys.readouterr().out


@pytest.mark.parametrize("hint", [[], ["W&B: kept offline"]])
def test_a_run_that_fails_says_where_its_curves_are_kept(run, tmp_path, capsys, monkeypatch, hint):
    def fails(*_):
        raise Diverged("NaN")

    monkeypatch.setattr(run_module, "_run", fails)
    monkeypatch.setattr(run_module.loggers, "upload_hint", lambda folder: hint)
    with pytest.raises(Diverged):
        run(tmp_path)
    assert capsys.readouterr().out.splitlines()[2:] == hint, "after what is announced"
