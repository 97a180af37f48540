"""Normalizers and batches that cannot train, found before they do."""

import contextlib
from functools import partial

import numpy as np
import pytest
import torch
from tests_training import TINY, load_train_module
from torch import nn

from onlinenorm.cli.compose import group_options
from onlinenorm.errors import ConfigError
from onlinenorm.normalizers import BatchRenorm2d, OnlineNorm2d, identity
from onlinenorm.normalizers.settings import check_clamp_value
from onlinenorm.training.config_check import build, check_config
from onlinenorm.training.preflight import preflight
from onlinenorm.training.probe import probe_batch, probe_normalizer, probe_settings
from onlinenorm.training.roles import make_normalizer

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
    with pytest.raises(
        ConfigError, match=r"^normalizer\._target_: mine.Norm could not be built \(TypeError: .*nonsense"
    ):
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


class Stateful(nn.Module):
    """Divides by a moving root mean square, kept as the subclass says, in `level`."""

    def __init__(self, num_features):
        super().__init__()
        self.keep(torch.ones(1, num_features, 1, 1))

    def keep(self, level):
        self.register_buffer("level", level)

    def forward(self, x):
        if self.training:
            self.level.lerp_(x.detach().square().mean((0, 2, 3), keepdim=True), 0.1)
        return x * self.level.rsqrt()


class Unsaved(Stateful):
    def keep(self, level):
        self.register_buffer("level", level, persistent=False)


class Listed(Stateful):
    def keep(self, level):
        self.levels = [level]

    @property
    def level(self):
        return self.levels[0]


class Counting(Stateful):
    """Warms up over steps that only Python counts, which shows where it trains on."""

    steps = 0

    def forward(self, x):
        self.steps += self.training
        return super().forward(x) * (min(self.steps / 10, 1) if self.training else 1)


class Number(Watched):
    level = 1.0

    def forward(self, x):
        if self.training:
            self.level = 0.9 * self.level + 0.1 * float(x.square().mean())
        return x * self.level**-0.5


class Growing(Stateful):
    def forward(self, x):
        self.keep(torch.ones(1, x.shape[1], *x.shape[2:]))
        return x


class Noisy(Stateful):
    def forward(self, x):
        return super().forward(x) * (1 + 0.1 * torch.rand_like(x) + 0.1 * float(np.random.rand()) * self.training)


class Fused(Stateful):
    fuses_residual = True

    def forward(self, x, residual=None, relu=False):
        y = super().forward(x)
        y = y if residual is None else y + residual
        return y.relu() if relu else y


class Halved(Fused):
    fuses_residual = True

    def forward(self, x, residual=None, relu=False):
        return super().forward(x, None if residual is None else residual / 2, relu)


def says(base=Stateful, **declared):
    return type("Says", (base,), declared)


LOST = r"once its state_dict\(\) is loaded into a new layer: .* Keep NAME in buffers that are saved"


@pytest.mark.parametrize(
    "factory, message",
    [
        (Unsaved, f"evaluates otherwise {LOST.replace('NAME', 'level')}"),
        (Listed, f"evaluates otherwise {LOST.replace('NAME', 'levels')}"),
        (Number, f"evaluates otherwise {LOST.replace('NAME', 'level')}"),
        (Counting, f"trains on otherwise {LOST.replace('NAME', 'steps')}"),
        (lambda num_features: nn.Sequential(Unsaved(num_features)), LOST.replace("NAME", r"0\.level")),
        (Growing, r"does not take its own state_dict\(\) \(RuntimeError: "),
        (says(forward=lambda self, x: self.gamm * x), r"fails with a batch \(AttributeError: .* 'gamm'"),
        (says(keep=lambda self, level: {}["k"]), r"could not be built \(KeyError: 'k'"),
        (says(__init__=lambda self, num_features: self.keep(torch.ones(2))), r"could not be built \(AttributeError: "),
        (says(fuses_residual=True), r"says fuses_residual and fails \(TypeError: .*'residual'"),
        (Halved, r"says fuses_residual, and layer\(x, residual=r, relu=True\) is not"),
        (says(statistics="golbal"), "says statistics = 'golbal', which is not one of"),
        (says(statistics_depend_on=3), "3 is no tuple of 'processes'"),
        (says(parameter_roles=["gamma"]), r"parameter_roles is \['gamma'\]; it maps names"),
        (says(parameter_roles={"betta": "bias"}), "parameter_roles names 'betta', which it does not have"),
    ],
)
def test_what_a_batch_or_its_own_state_shows_of_a_normalizer_of_ones_own(factory, message):
    with pytest.raises(ConfigError, match=rf"^normalizer._target_: .*{message}"):
        probe_normalizer(factory, {"_target_": "own.Norm"})


def test_what_fails_where_it_trains_is_told():
    with pytest.raises(ConfigError, match=r"own.Norm fails with a batch \(RuntimeError: needs a GPU\)$"):
        probe_normalizer(Demanding, {"_target_": "own.Norm"}, {"accelerator": "cpu", "devices": 1})


@pytest.mark.parametrize(
    "factory",
    [Watched, Demanding, nn.BatchNorm2d, partial(nn.BatchNorm2d, momentum=None), Stateful, Noisy, Fused, OnlineNorm2d,
     BatchRenorm2d, says(parameter_roles={"gamma": "norm_weight"}, gamma=None)],
)  # fmt: skip
def test_what_it_may_do(factory):
    probe_normalizer(factory, {"_target_": "own.Norm"})


@pytest.mark.parametrize("choice", group_options("normalizer"))
def test_ours_keep_to_it(choice):
    config = load_config([f"normalizer={choice}"])
    probe_normalizer(build(config, "normalizer"), config["normalizer"] | {"_target_": "own.Norm"})


class Net(nn.Module):
    """A network of one's own: `made` says what it does with the factory, `called` whether with the layer."""

    def __init__(self, normalizer, num_classes, in_channels, made, called):
        super().__init__()
        self.norm = made(normalizer)
        self.called, self.head = called, nn.Conv2d(in_channels, num_classes, 1)

    def forward(self, x):
        x = self.norm(x) if self.called else x
        return self.head(x).mean((2, 3))


@pytest.mark.parametrize(
    "made, called, message",
    [
        (lambda normalizer: normalizer(3), True, None),
        (lambda normalizer: nn.BatchNorm2d(3), True, "holds no layer of the normalizer, and its run would be reported"),
        (lambda normalizer: [normalizer(3)], False, "holds no layer of the normalizer"),
        (lambda normalizer: normalizer(3), False, r"calls no layer of the normalizer in forward\(\)"),
        (lambda normalizer: Stateful(3), True, "holds no layer of the normalizer"),
        (lambda normalizer: says(gain=nn.Parameter(torch.ones(3)))(3), True, "holds no layer"),
        (lambda normalizer: {}["k"], True, r"could not be built \(KeyError: 'k'"),
        (lambda normalizer: normalizer, True, r"holds no layer of the normalizer"),
    ],
)
@pytest.mark.parametrize("choice", ["batch", "none", "online_clamp"])
def test_a_network_of_ones_own_has_the_normalizer_in_it(monkeypatch, made, called, message, choice):
    config = load_config([*TINY, f"normalizer={choice}"])
    config["model"] = {"_target_": "own.Net"}
    network = partial(Net, made=made, called=called)
    monkeypatch.setattr("onlinenorm.training.config_check.locate", lambda path, name: network)
    factory = partial(
        make_normalizer, {"batch": nn.BatchNorm2d, "none": identity, "online_clamp": OnlineNorm2d}[choice]
    )
    if message is None:
        probe_batch(config, factory, 3, 8)
        return
    with pytest.raises(ConfigError, match=rf"^model\._target_: own.Net {message}"):
        probe_batch(config, factory, 3, 8)


def test_arguments_that_a_layer_of_ones_own_refuses_are_told():
    def refuses(num_features):
        raise ValueError("eps cannot be that\nadvice to programmers")

    with pytest.raises(ConfigError, match=r"mine.Norm could not be built \(ValueError: eps cannot be that\)$"):
        probe_normalizer(refuses, {"_target_": "mine.Norm"})


@pytest.mark.parametrize("epochs, refused", [(13, False), (14, True), (2000, True)])
def test_a_clamp_is_not_raised_out_of_its_range(tmp_path, epochs, refused):
    """5 * 2^13 = 40960 is below 65504, float16's largest; before the first epoch, in a sweep and in a pre-flight."""
    words = ["recipe.epochs=3000", f"recipe.clamp_raise_epochs={epochs}", f"run_dir={tmp_path}"]
    config = load_config([*TINY, *words])
    said = pytest.raises(ConfigError, match=r"^recipe.clamp_raise_epochs: .* the clamp value 5 .* use at most 13")
    with said if refused else contextlib.nullcontext():
        probe_settings(config)
    if refused:
        with pytest.raises(ConfigError, match=r"^recipe.clamp_raise_epochs: "):
            list(preflight(config, 0.1, None))
        with pytest.raises(ConfigError, match=r"^recipe.clamp_raise_epochs: "):
            load_train_module().train(config)
        assert not (tmp_path / "metrics.csv").exists()
    probe_settings(load_config([*TINY, *words, "normalizer=batch"]))


def test_a_clamp_value_is_one_that_activations_hold():
    for value in ("1e39", "65504"):
        with pytest.raises(ConfigError, match=r"^normalizer.clamp_value: .* < 65504"):
            probe(f"normalizer.clamp_value={value}")
    probe("normalizer.clamp_value=65000")
    assert torch.zeros(1, dtype=torch.float16).clamp(max=check_clamp_value(65000)) == 0
