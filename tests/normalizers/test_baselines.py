"""The baselines are what their names say."""

import pytest
import torch

from onlinenorm.normalizers import group_norm, identity, layer_norm


def test_group_norm_normalises_each_group():
    y = group_norm(64)(5 * torch.randn(2, 64, 3, 3) + 2)
    grouped = y.reshape(2, 32, -1)
    torch.testing.assert_close(grouped.mean(-1), torch.zeros(2, 32), atol=1e-5, rtol=0)
    torch.testing.assert_close(grouped.var(-1, correction=0), torch.ones(2, 32), atol=1e-3, rtol=0)


def test_group_norm_with_fewer_channels_than_groups():
    assert group_norm(16).num_groups == 16


def test_group_norm_names_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="num_groups: 32 must divide"):
        group_norm(48)


def test_layer_norm_takes_one_mean_a_sample():
    y = layer_norm(4)(torch.randn(3, 4, 5, 5) + 7)
    torch.testing.assert_close(y.mean((1, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    assert layer_norm(4).weight.shape == (4,)


def test_identity_changes_nothing():
    x = torch.randn(2, 3)
    assert identity(3)(x) is x
