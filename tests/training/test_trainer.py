"""What "auto" stands for, what a machine lacks, and the callbacks of a run."""

import math

import pytest
import torch
from tests_training import scaled_by
from torch import nn

from onlinenorm.errors import ConfigError
from onlinenorm.normalizers import SyncBatchNorm2d
from onlinenorm.training import checkpoint, precision, trainer
from onlinenorm.training.epoch_log import COLUMNS, EpochLog, to_csv
from onlinenorm.training.interruption import StopSignals
from onlinenorm.training.launch import Launch
from onlinenorm.training.progress import epoch_line
from onlinenorm.training.trainer import SyncedBatchNorm, build_trainer, quiet_lightning, resolve


@pytest.fixture
def gpus(monkeypatch):
    def pretend(count, bf16=True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bf16)

    return pretend


def test_auto_follows_the_machine(gpus):
    gpus(0)
    found = resolve({"accelerator": "auto", "precision": "auto"})
    assert (found["accelerator"], found["precision"], found["strategy"]) == ("cpu", "32-true", "auto")
    gpus(4)
    found = resolve({"accelerator": "auto", "precision": "auto", "devices": "auto"})
    assert (found["accelerator"], found["precision"], found["devices"], found["strategy"]) == (
        "gpu",
        "bf16-mixed",
        4,
        "ddp",
    )
    gpus(1, bf16=False)
    assert resolve({"accelerator": "gpu", "precision": "auto"})["precision"] == "32-true"
    names = ["fold_gradients", "cast_weights", "fold_gradients"]
    found = resolve({"disabled_optimizations": names})["disabled_optimizations"]
    assert found == ["cast_weights", "fold_gradients"], "a set, whose order makes no other run"


def test_what_is_not_there_is_said(gpus, monkeypatch):
    gpus(0)
    with pytest.raises(ConfigError, match=r"trainer.accelerator: a GPU is asked for .* trainer=cpu"):
        resolve({"accelerator": "gpu"})
    with pytest.raises(ConfigError, match=r"use trainer=cpu trainer.cuda_graph=false, or see"):
        resolve({"accelerator": "gpu", "cuda_graph": True})
    way_out = r"use trainer=ddp trainer.accelerator=cpu trainer.precision=32-true, or see"
    with pytest.raises(ConfigError, match=way_out):
        resolve({"accelerator": "gpu", "devices": 2})
    gpus(2)
    with pytest.raises(ConfigError, match=r"trainer.devices: 3 asked for, this machine has 2 GPU"):
        resolve({"accelerator": "gpu", "devices": 3})
    with pytest.raises(ConfigError, match=r"trainer.devices: 0 is not a whole number of at least 1"):
        resolve({"accelerator": "cpu", "devices": 0})
    monkeypatch.setattr(trainer, "launched", lambda: Launch("srun", 4, 1))
    with pytest.raises(ConfigError, match=r"trainer.devices: srun has started 4 .* sees 2 GPU.*--gpus-per-node"):
        resolve({"accelerator": "gpu", "devices": "auto"})


@pytest.mark.parametrize("overrides", [[], ["trainer.accumulate_grad_batches=2", "normalizer=batch"]])
def test_half_precision_scales_the_loss_on_the_cpu_too(run, tmp_path, monkeypatch, overrides):
    """An overflow at first halves the scale until there is none; controls follow every change of it."""
    factors = []
    monkeypatch.setattr(precision, "rescale_controls", lambda network, factor: factors.append(float(factor)))
    monkeypatch.setattr(precision.ScaledHalf, "__init__", scaled_by(2.0**20, growth_interval=2))
    results = run(tmp_path, "trainer.precision=16-mixed", *overrides)
    end = checkpoint.read(tmp_path / "checkpoints" / "last.ckpt")["ScaledHalf"]["scale"]
    assert {0.5, 2.0} <= set(factors) and math.prod(factors) == end / 2.0**20
    assert math.isfinite(results["last"]["val_loss"])


@pytest.mark.parametrize(
    "key", ["num_nodes", "accumulate_grad_batches", "log_every_n_steps", "checkpoint_every_n_steps"]
)
def test_counts_start_at_one(tmp_path, key):
    with pytest.raises(ValueError, match=f"^{key}: 0 must be at least 1"), quiet_lightning():
        build_trainer(1, tmp_path, EpochLog(tmp_path / "metrics.csv"), StopSignals(), [], **{key: 0})


def row(epoch, rate):
    return {key: 0.5 for key in COLUMNS} | {"epoch": epoch, "images_per_second": rate}


def test_rows_keep_full_precision():
    value = math.pi / 7
    line = to_csv([row(1, 10) | {"val_loss": value}]).splitlines()[1]
    assert float(line.split(",")[COLUMNS.index("val_loss")]) == value


def test_rate_leaves_out_the_first_epoch(tmp_path):
    log = EpochLog(tmp_path / "metrics.csv")
    assert log.images_per_second == 0
    log.rows = [row(1, 10)]
    assert log.images_per_second == 10
    log.rows += [row(2, 100), row(3, 300)]
    assert log.images_per_second == pytest.approx(2 / (1 / 100 + 1 / 300)), "images over seconds, not a mean of rates"


def test_lines_for_people():
    line = epoch_line(row(2, 1234.5), 10, 75.0)
    assert line.startswith("epoch 2/10  train loss 0.500  top-1 50.0%") and "1,234 images/s  1 min 15 s left" in line


class FrozenBatchNorm(nn.BatchNorm2d):
    def train(self, mode=True):
        return super().train(False)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_batch_norms_of_ones_own_are_not_replaced_without_a_word(on_gpu):
    layers = nn.Sequential(nn.BatchNorm2d(2), nn.Sequential(FrozenBatchNorm(2)))
    with pytest.raises(ConfigError, match=r"^trainer.sync_batchnorm: 1.0: FrozenBatchNorm cannot .* leave it false"):
        SyncedBatchNorm(on_gpu).apply(layers)
    assert type(layers[0]) is nn.BatchNorm2d and type(layers[1][0]) is FrozenBatchNorm
    synchronised = SyncedBatchNorm(on_gpu).apply(nn.Sequential(nn.BatchNorm2d(2)))
    assert type(synchronised[0]) is (nn.SyncBatchNorm if on_gpu else SyncBatchNorm2d)
