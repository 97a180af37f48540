"""Clamp removal turns an OnlineNorm network in eval mode into a BatchNorm network."""

import pytest
import torch
from torch import nn

from onlinenorm import OnlineNorm1d, OnlineNorm2d, remove_clamping


def test_every_clamped_layer_is_changed_and_counted():
    model = nn.Sequential(
        OnlineNorm2d(3), nn.Sequential(OnlineNorm1d(2)), OnlineNorm2d(3, error_compensation="layer_scaling")
    )
    assert remove_clamping(model) == 2
    assert [model[0].error_compensation, model[1][0].error_compensation] == ["none", "none"]
    assert model[2].error_compensation == "layer_scaling"


def test_nothing_to_remove_warns():
    with pytest.warns(UserWarning, match="no clamped OnlineNorm layer"):
        assert remove_clamping(nn.BatchNorm2d(3)) == 0


def test_unclamped_layer_in_eval_is_batch_norm():
    online, batch = OnlineNorm2d(3, clamp_value=0.5), nn.BatchNorm2d(3)
    for _ in range(3):
        x = (3 * torch.randn(8, 3, 4, 4) + 1).requires_grad_()
        online(x).square().sum().backward()
    batch.load_state_dict(online.state_dict(), strict=False)
    x = torch.randn(8, 3, 4, 4)
    online.eval()
    batch.eval()
    assert not torch.allclose(online(x), batch(x))
    remove_clamping(online)
    torch.testing.assert_close(online(x), batch(x))
