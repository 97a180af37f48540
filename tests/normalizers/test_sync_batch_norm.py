"""BatchNorm over several processes on the CPU: what one process computes over the whole batch."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from onlinenorm.normalizers import SyncBatchNorm2d, synchronise_batch_norm


@pytest.fixture
def two_processes(monkeypatch):
    """As if another process held the same batch: each sum over processes is twice this one's."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.mul_(2))


@pytest.mark.parametrize("momentum, affine", [(0.3, True), (None, False)])
def test_equals_batch_norm_over_the_batch_of_all(two_processes, momentum, affine):
    layer = SyncBatchNorm2d(3, momentum=momentum, affine=affine).double()
    plain = nn.BatchNorm2d(3, momentum=momentum, affine=affine).double()
    for _ in range(2):
        x = torch.randn(4, 3, 5, 5, dtype=torch.float64) + 2
        own, whole = x.clone().requires_grad_(), torch.cat([x, x]).requires_grad_()
        layer(own).pow(3).sum().backward()
        plain(whole).pow(3).sum().backward()
        torch.testing.assert_close(own.grad, whole.grad[:4])
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value)


def test_half_precision_keeps_its_dtype(two_processes):
    x = torch.randn(4, 3, 5, 5).bfloat16()
    layer = SyncBatchNorm2d(3)
    assert layer(x).dtype == torch.bfloat16 and layer.running_mean.dtype == torch.float32


def test_half_precision_statistics_move_as_batch_norm_moves_its_own(two_processes):
    x = torch.randn(4, 3, 5, 5).bfloat16() + 2
    layer, plain = SyncBatchNorm2d(3).bfloat16(), nn.BatchNorm2d(3).bfloat16()
    whole = torch.cat([x, x])
    torch.testing.assert_close(layer(x), plain(whole)[:4], atol=0.02, rtol=0.016)  # a digit of bfloat16
    for name, value in plain.state_dict().items():
        assert layer.state_dict()[name].dtype == value.dtype
        torch.testing.assert_close(layer.state_dict()[name], value)


def test_replaces_layers_and_keeps_their_parameters():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4, momentum=0.3)), nn.GroupNorm(2, 4)).eval()
    plain, weight = copy.deepcopy(model), model[1][0].weight
    assert synchronise_batch_norm(model) is model
    assert isinstance(model[1][0], SyncBatchNorm2d) and model[1][0].weight is weight
    assert model[1][0].momentum == 0.3 and not model[1][0].training
    assert model.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(2, 3, 4, 4)
    for training in (False, True):  # alone: an ordinary BatchNorm
        torch.testing.assert_close(model.train(training)(x), plain.train(training)(x))
