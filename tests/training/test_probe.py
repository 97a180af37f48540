"""Normalizers and batches that cannot train, found before they do."""

from functools import partial

import pytest
import torch
from tests_training import TINY, load_train_module
from torch import nn

from onlinenorm.errors import ConfigError
from onlinenorm.training.config_check import build, check_config
from onlinenorm.training.probe import probe_batch, probe_normalizer

load_config = load_train_module().load_config


def probe(*overrides):
    config = load_config([*TINY, *overrides])
    check_config(config)
    normalizer = build(config, "normalizer")
    probe_normalizer(normalizer, config["normalizer"])
    probe_batch(config, normalizer, config["data"]["in_channels"], config["data"]["image_size"])


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["normalizer=batch", "normalizer.eps=-1"], "^normalizer.eps: -1 must be larger than 0"),
        (["normalizer=batch", "normalizer.eps=0"], "^normalizer.eps: 0"),
        (["normalizer=batch", "normalizer.eps=nan"], "^normalizer.eps: nan must be"),
        (["normalizer=instance", "normalizer.eps=-1e-5"], "^normalizer.eps: -1e-05 must be"),
        (["normalizer=group", "normalizer.eps=-1"], "^normalizer.eps: -1"),
        (["normalizer=layer", "normalizer.eps=-1"], "^normalizer.eps: -1"),
        (["normalizer=online_clamp", "normalizer.eps=-1"], "^normalizer.eps: -1"),
        (["normalizer=batch", "normalizer.momentum=7"], "^normalizer.momentum: 7 must be larger than 0 and at most 1"),
        (["normalizer=batch", "normalizer.momentum=-0.1"], "^normalizer.momentum: -0.1 must be"),
        (["normalizer=group", "normalizer.num_groups=0"], "^normalizer.num_groups: 0"),
        (
            ["normalizer=instance", "model=resnet18", "data.image_size=32"],
            "^normalizer: instance has a single .* of 32 pixels .* use a larger data.image_size, or another",
        ),
        (
            ["normalizer=batch", "model=resnet18", "data.image_size=32", "recipe.batch_size=1"],
            "^normalizer: batch has a single .* and a batch is one image; .*data.image_size or recipe.batch_size",
        ),
    ],
)
def test_what_cannot_train_is_told_with_its_key(overrides, message):
    with pytest.raises(ConfigError, match=message):
        probe(*overrides)


def test_a_batch_is_what_one_process_sends_through():
    small = ["normalizer=batch", "model=resnet18", "data.image_size=32", "recipe.batch_size=4"]
    probe(*small, "trainer.accumulate_grad_batches=2")
    with pytest.raises(ConfigError, match="a batch is one image"):
        probe(*small, "trainer.accumulate_grad_batches=4")
    with pytest.raises(ConfigError, match="a batch is one image"):
        probe(*small, "trainer.devices=4")
    probe(*small, "trainer.devices=4", "trainer.sync_batchnorm=true")


@pytest.mark.parametrize("choice", ["batch", "instance", "group", "layer", "none", "online_clamp"])
def test_what_trains_passes(choice):
    probe(f"normalizer={choice}", *(["normalizer.momentum=null"] if choice == "batch" else []))


def test_what_is_no_layer_is_told():
    node = {"_target_": "mine.Norm"}
    with pytest.raises(ConfigError, match=r"^normalizer._target_: mine.Norm makes a int and not a torch.nn.Module"):
        probe_normalizer(lambda num_features: num_features, node)
    with pytest.raises(ConfigError, match=r"^normalizer: mine.Norm could not be built"):
        probe_normalizer(lambda num_features: nn.BatchNorm2d(num_features, nonsense=1), node)


def test_a_layer_for_all_sites_is_none():
    shared = nn.Identity()
    with pytest.raises(ConfigError, match=r"^normalizer._target_: mine.norm makes the same layer at each call"):
        probe_normalizer(lambda num_features: shared, {"_target_": "mine.norm"})


def test_what_synchronising_would_replace_is_refused():
    """torch turns subclasses into SyncBatchNorm, and what they override is gone."""

    class Squashing(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).tanh()

    several = {"devices": 1, "num_nodes": 2, "sync_batchnorm": True}
    with pytest.raises(ConfigError, match=r"^trainer.sync_batchnorm: Squashing of mine.Squashing would be replaced"):
        probe_normalizer(Squashing, {"_target_": "mine.Squashing"}, several)
    for trainer in ({"devices": 1, "sync_batchnorm": True}, {"devices": 2}, None):
        probe_normalizer(Squashing, {"_target_": "mine.Squashing"}, trainer)
    probe_normalizer(nn.BatchNorm2d, {"_target_": "torch.nn.BatchNorm2d"}, several)


class Forgetting(nn.Module):
    """Keeps its statistics in a plain attribute, which no checkpoint holds."""

    def __init__(self, num_features, late=False):
        super().__init__()
        self.level, self.late = None if late else torch.zeros(num_features), late

    def forward(self, x):
        self.level = x.detach().mean((0, 2, 3))
        return x - self.level.view(1, -1, 1, 1)


class Watched(nn.Module):
    """Keeps the last images for somebody to look at."""

    def __init__(self, num_features):
        super().__init__()

    def forward(self, x):
        self.seen = x
        return x


class Shrinking(Watched):
    def forward(self, x):
        return x[:, :, ::2]


class Demanding(Watched):
    def forward(self, x):
        raise RuntimeError("needs a GPU")


@pytest.mark.parametrize(
    "factory, message",
    [
        (Forgetting, r"keeps the tensor level outside of its buffers.*self.register_buffer\("),
        (partial(Forgetting, late=True), "keeps the tensor level outside of its buffers"),
        (lambda num_features: nn.Sequential(Forgetting(num_features)), r"keeps the tensor 0\.level outside"),
        (Shrinking, r"makes \[3, 64, 4, 8\] of \[3, 64, 8, 8\]; it must keep the shape"),
    ],
)
def test_what_a_normalizer_of_ones_own_must_not_do(factory, message):
    with pytest.raises(ConfigError, match=rf"^normalizer._target_: own.Norm {message}"):
        probe_normalizer(factory, {"_target_": "own.Norm"})


@pytest.mark.parametrize("factory", [Watched, Demanding, nn.BatchNorm2d])
def test_what_it_may_do(factory):
    probe_normalizer(factory, {"_target_": "own.Norm"})


def test_arguments_that_a_layer_of_ones_own_refuses_are_told():
    def refuses(num_features):
        raise ValueError("eps cannot be that\nadvice to programmers")

    with pytest.raises(ConfigError, match=r"^normalizer: mine.Norm could not be built \(eps cannot be that\)$"):
        probe_normalizer(refuses, {"_target_": "mine.Norm"})
