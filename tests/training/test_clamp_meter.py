"""The figures of the clamp removal section."""

import csv

import pytest
import torch
from pytorch_lightning.strategies import SingleDeviceStrategy
from timm.layers import BatchNormAct2d
from torch import nn

from onlinenorm import OnlineNorm2d, convert
from onlinenorm.normalizers import OnlineNorm
from onlinenorm.training.clamping import ClampMeter, clamped_layers


def test_meter_counts_what_exceeds_the_clamp_and_leaves_the_layer_alone():
    layer = OnlineNorm2d(3, clamp_value=1.5)
    nn.init.constant_(layer.weight, 2.0)
    network = nn.Sequential(layer, OnlineNorm2d(3, error_compensation="layer_scaling")).eval()
    batches = [torch.randn(4, 3, 5, 5) for _ in range(2)]
    plain = [network(x) for x in batches]
    with ClampMeter(network) as meter:
        assert meter.layers == [layer] == clamped_layers(network)
        measured = [network(x) for x in batches]
    for first, second in zip(plain, measured, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    before_clamp = torch.stack(batches) * 2 / (1 + layer.eps) ** 0.5
    clamped, count, largest = meter.totals(SingleDeviceStrategy("cpu"))
    assert count == before_clamp.numel() and clamped == (before_clamp.abs() > 1.5).sum()
    torch.testing.assert_close(largest, before_clamp.abs().max().item(), rtol=1e-6, atol=0)
    assert layer.error_compensation == "clamp" and not layer._forward_hooks


class Shrinking(OnlineNorm2d):
    """Does something of its own before and after."""

    def forward(self, x, **options):
        return torch.tanh(super().forward(2 * x, **options))


class Caller(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x=x)


@pytest.mark.parametrize(
    "layer, scale",
    [
        (OnlineNorm2d(3), 1),
        (Shrinking(3), 2),
        (convert(nn.Sequential(BatchNormAct2d(3)))[0], 1),
        (Caller(OnlineNorm2d(3)), 1),
    ],
)
def test_what_reaches_the_clamp_is_measured_whatever_surrounds_it(layer, scale):
    x = -20 * torch.rand(4, 3, 8, 8)
    forward = OnlineNorm.forward
    with ClampMeter(layer.eval()) as meter:
        layer(x)
    assert OnlineNorm.forward is forward
    before_clamp = scale * x / (1 + 1e-5) ** 0.5
    assert meter.clamped == (before_clamp.abs() > 5).sum() and meter.count == x.numel()
    torch.testing.assert_close(float(meter.largest), float(before_clamp.abs().max()), rtol=1e-5, atol=0)


def test_residual_and_relu_are_left_out():
    layer = OnlineNorm2d(2, clamp_value=0.5).eval()
    x = torch.randn(2, 2, 3, 3)
    with ClampMeter(layer) as meter:
        layer(x, residual=torch.full_like(x, 100.0), relu=True)
    assert meter.largest < 10


def test_each_epoch_tells_what_its_validation_met_at_the_clamps(run, tmp_path):
    results = run(tmp_path, "normalizer.clamp_value=0.5", "data.val_batch_size=5")
    with open(tmp_path / "clamping.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"] and [row["step"] for row in rows] == ["4", "8", "12"]
    # fewer than 20 batches: all are metered, so the last row is what the final validation finds
    clamping = results["clamping"]
    assert float(rows[-1]["clamped_fraction"]) == pytest.approx(clamping["clamped_fraction"], rel=1e-12) and (
        clamping["clamped_fraction"] > 0.01
    )
    assert float(rows[-1]["max_abs_activation"]) == pytest.approx(clamping["max_abs_activation"], rel=1e-6)


def test_without_clamps_no_file(run, tmp_path):
    run(tmp_path, "normalizer=batch", "recipe.epochs=1", "recipe.milestones=[]")
    assert (tmp_path / "metrics.csv").exists() and not (tmp_path / "clamping.csv").exists()
