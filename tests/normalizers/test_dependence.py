"""What the statistics of normalizers depend on, said by them and measured."""

import copy

import pytest
import torch
from torch import nn

from onlinenorm import OnlineNorm1d, OnlineNorm2d
from onlinenorm.cli.compose import group_options, load_config
from onlinenorm.normalizers import BatchRenorm2d, SyncBatchNorm2d, group_norm, identity, layer_norm
from onlinenorm.normalizers.dependence import ACCUMULATION, PROCESSES, statistics_depend_on
from onlinenorm.training.config_check import build

BOTH = {PROCESSES, ACCUMULATION}


@pytest.mark.parametrize(
    "layer, expected",
    [
        (nn.BatchNorm2d(4), BOTH),
        (nn.BatchNorm2d(4, track_running_stats=False), BOTH),
        (BatchRenorm2d(4), BOTH),
        (nn.SyncBatchNorm(4), {ACCUMULATION}),
        (OnlineNorm2d(4), set()),
        (OnlineNorm1d(4, statistics="local"), {PROCESSES}),
        (group_norm(4), set()),
        (layer_norm(4), set()),
        (identity(4), set()),
        (nn.InstanceNorm2d(4, affine=True), set()),
        (nn.InstanceNorm2d(4, track_running_stats=True), BOTH),
        (nn.Sequential(nn.GroupNorm(1, 4), nn.BatchNorm2d(4)), BOTH),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_normalizer_says_what_its_statistics_depend_on(layer, expected):
    assert statistics_depend_on(layer) == expected


def test_synchronised_batch_norm_does_not_depend_on_the_number_of_processes():
    assert statistics_depend_on(nn.BatchNorm2d(4), synchronised=True) == {ACCUMULATION}
    assert statistics_depend_on(SyncBatchNorm2d(4), synchronised=True) == {ACCUMULATION}
    assert statistics_depend_on(OnlineNorm2d(4, statistics="local"), synchronised=True) == {PROCESSES}


def test_a_layer_that_says_nothing_is_taken_to_depend_on_both():
    class Silent(nn.Module):
        pass

    class Says(Silent):
        statistics_depend_on = ()

    assert statistics_depend_on(Silent()) == BOTH and statistics_depend_on(Says()) == set()
    assert statistics_depend_on(nn.Sequential(Says(), Silent())) == BOTH


@pytest.mark.parametrize("name", group_options("normalizer"))
def test_what_is_said_is_what_happens_when_a_batch_is_taken_in_parts(name):
    """The layers of configs/normalizer: outputs and buffers after a whole batch, and after its halves one by one."""
    whole = build(load_config([f"normalizer={name}"]), "normalizer")(num_features=8).double()
    halves = copy.deepcopy(whole)
    x = 1 + torch.randn(8, 8, 3, 3, dtype=torch.float64)
    y, parts = whole(x), torch.cat([halves(part) for part in x.chunk(2)])
    same = torch.allclose(y, parts, atol=1e-9) and all(
        torch.allclose(a.double(), b.double(), atol=1e-9)
        for a, b in zip(whole.buffers(), halves.buffers(), strict=True)
    )
    assert same == (ACCUMULATION not in statistics_depend_on(whole))


def test_what_a_layer_says_covers_the_layers_in_it_and_is_one_of_two_words():
    class Silent(nn.Module):
        pass

    class Says(nn.Module):
        statistics_depend_on = (ACCUMULATION,)

        def __init__(self):
            super().__init__()
            self.inner = Silent()

    assert statistics_depend_on(Says()) == statistics_depend_on(nn.Sequential(Says())) == {ACCUMULATION}
    for wrong in ("processes", ("batch",)):
        Says.statistics_depend_on = wrong
        with pytest.raises(ValueError, match=r"Says.statistics_depend_on: .* is no tuple of 'processes' and"):
            statistics_depend_on(Says())
