"""The same run on any number of processes: weights, statistics, losses, validation."""

import json

import process_groups
import pytest
import torch
from distributed_runs import THIRTY_STEPS, agree, curve, distance, train

NORMALIZERS = {
    "online_clamp": ("normalizer=online_clamp", "normalizer.clamp_value=2"),
    "online_layer_scaling": ("normalizer=online_layer_scaling",),
    "batch": ("normalizer=batch", "trainer.sync_batchnorm=true"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """finished(processes, *overrides) -> folder of a 30-step run; made once."""
    folders = {}

    def call(processes, *overrides):
        key = (processes, *overrides)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("run")
            several = ("trainer.strategy=ddp", "trainer.devices=auto") if processes > 1 else ()
            process_groups.run(processes, train, str(folders[key]), *THIRTY_STEPS, *several, *overrides)
        return folders[key]

    return call


@pytest.mark.parametrize(
    "processes, normalizer",
    [
        *((2, normalizer) for normalizer in NORMALIZERS),
        *(pytest.param(4, normalizer, marks=pytest.mark.slow) for normalizer in NORMALIZERS),
    ],
)
def test_float64_weights_and_statistics(finished, normalizer, processes):
    overrides = ("trainer.precision=64-true", *NORMALIZERS[normalizer])
    one, several = finished(1, *overrides), finished(processes, *overrides)
    found = distance(several, one)
    print(f"{normalizer}, {processes} processes, float64, 30 steps: largest relative difference {found:.1e}")
    assert found <= 1e-9
    columns = "train_loss", "train_top1", "val_loss", "val_top1", "val_top5"
    torch.testing.assert_close(curve(several, *columns), curve(one, *columns), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "normalizer",
    ["online_clamp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("online_layer_scaling", "batch"))],
)
def test_float32_loss_curve(finished, normalizer):
    # small steps: with large ones two runs of one process part by more, too, after a change of the last bit
    one, two = (finished(processes, "recipe.lr=0.002", *NORMALIZERS[normalizer]) for processes in (1, 2))
    found = float((curve(two, "train_loss", "val_loss") - curve(one, "train_loss", "val_loss")).abs().max())
    print(f"{normalizer}, 2 processes, float32: largest difference of a loss {found:.1e}")
    assert found <= 1e-4


def test_local_statistics_are_one_network_when_validated(finished):
    """Each process has its own stream, yet all agree on the figures, and the checkpoint holds the streams' mean."""
    folder = finished(2, "normalizer=online_clamp", "normalizer.statistics=local")
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    name = "network.bn1.running_mean"
    assert last["local_statistics"][name].shape == (2, 16)
    torch.testing.assert_close(last["state_dict"][name], last["local_statistics"][name].mean(0))
    results = json.loads((folder / "results.json").read_text())
    assert results["clamping"]["with"]["val_loss"] == pytest.approx(results["last"]["val_loss"], abs=1e-12)
    assert distance(folder, finished(1, "normalizer=online_clamp")) > 1e-4, "another run than with global statistics"


def test_unreadable_images_are_those_of_all_processes():
    assert process_groups.run(2, agree, 0.2) == [["train/shared", "val/0", "val/1"]] * 2


def test_the_limit_of_unreadable_images_is_one_for_all_processes():
    found = process_groups.finish(process_groups.start(2, agree, 0.15))
    assert [error[0] for _, error in found] == ["UnreadableImageError"] * 2
    assert "2 of 10 images in val/ cannot be decoded" in found[0][1][1]
