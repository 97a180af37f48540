"""Roles of parameters follow from what owns them, and nothing is guessed."""

from typing import ClassVar

import pytest
import torch
from torch import nn

from onlinenorm.errors import ConfigError
from onlinenorm.models import cifar_resnet8
from onlinenorm.normalizers import OnlineNorm2d
from onlinenorm.training.probe import probe_normalizer
from onlinenorm.training.recipe import Recipe, parameter_groups
from onlinenorm.training.roles import make_normalizer, parameter_roles


class OwnNorm(nn.Module):
    """A normalizer of one's own whose parameters are called as torch's are."""

    def __init__(self, num_features):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, num_features, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, num_features, 1, 1))

    def forward(self, x):
        return x * self.weight + self.bias


class GreekNorm(nn.Module):
    def __init__(self, num_features):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(num_features))
        self.beta = nn.Parameter(torch.zeros(num_features))

    def forward(self, x):
        return x * self.gamma.view(1, -1, 1, 1) + self.beta.view(1, -1, 1, 1)


class ToldGreekNorm(GreekNorm):
    parameter_roles: ClassVar = {"gamma": "norm_weight", "beta": "norm_bias"}


class HoldingNorm(nn.Module):
    def __init__(self, num_features, held):
        super().__init__()
        self.inner = held(num_features)


class GatedBatchNorm(nn.BatchNorm2d):
    def __init__(self, num_features):
        super().__init__(num_features)
        self.gate = nn.Parameter(torch.zeros(num_features))


def factory(kind, **arguments):
    return lambda num_features: make_normalizer(kind, num_features, **arguments)


def roles(kind, **arguments):
    return parameter_roles(factory(kind, **arguments)(4))


NORM = {"weight": "norm_weight", "bias": "norm_bias"}


def test_a_foreign_normalizers_betas_are_exempt_as_batch_norms_are():
    recipe = Recipe(epochs=1, batch_size=1, decay_norm_bias=False)
    counts = [
        [len(group["params"]) for group in parameter_groups(cifar_resnet8(kind), recipe)]
        for kind in (nn.BatchNorm2d, factory(OwnNorm), factory(ToldGreekNorm))
    ]
    assert counts[0] == counts[1] == counts[2]


def test_inside_a_normalizer_weight_and_bias_of_one_value_a_channel_are_those_of_a_norm():
    for held in (nn.BatchNorm2d, OwnNorm, lambda n: nn.Conv2d(n, n, 1, groups=n)):
        assert roles(HoldingNorm, held=held) == {f"inner.{name}": role for name, role in NORM.items()}
    assert roles(OwnNorm) == roles(OnlineNorm2d) == roles(nn.InstanceNorm2d, affine=True) == NORM


@pytest.mark.parametrize(
    "kind, name",
    [
        (GreekNorm, "gamma"),
        (GatedBatchNorm, "gate"),
        (lambda num_features: HoldingNorm(num_features, GreekNorm), "inner.gamma"),
        (lambda num_features: HoldingNorm(num_features, lambda n: nn.Linear(n, n)), "inner.weight"),
        (lambda num_features: HoldingNorm(num_features, lambda n: nn.ParameterList([torch.ones(n)])), "inner.0"),
    ],
)
def test_a_parameter_of_unknown_role_is_refused_before_training(kind, name):
    role = "weight" if name == "inner.weight" else "norm_weight"
    with pytest.raises(
        ConfigError, match=rf"parameter {name} is not known; .*parameter_roles = .\"{name}\": \"{role}\""
    ):
        probe_normalizer(factory(kind), {"_target_": "own.Norm"})


def test_a_parameter_called_as_torchs_are_with_one_value_a_channel_is_one_of_a_norm():
    held = lambda n: nn.ParameterDict({"bias": torch.ones(n)})  # noqa: E731
    assert roles(HoldingNorm, held=held) == {"inner.bias": "norm_bias"}


def test_what_a_class_says_of_parameters_further_down_is_heard():
    class Told(HoldingNorm):
        parameter_roles: ClassVar = {"inner.gamma": "norm_weight", "inner.beta": "norm_bias"}

    assert roles(Told, held=GreekNorm) == {"inner.gamma": "norm_weight", "inner.beta": "norm_bias"}
    Told.parameter_roles = {"inner.gamma": "scale"}
    with pytest.raises(ConfigError, match=r"'scale' of inner\.gamma, which is not one of weight, bias, norm_weight"):
        roles(Told, held=GreekNorm)


def test_layers_of_ones_own_outside_of_normalizers():
    class Pool(nn.Conv2d):
        pass

    class Scaled(Pool):
        def __init__(self):
            super().__init__(2, 2, 1)
            self.scale = nn.Parameter(torch.ones(2))

    assert parameter_roles(nn.Sequential(Pool(2, 2, 1))) == {"0.weight": "weight", "0.bias": "bias"}
    found = parameter_roles(nn.Sequential(nn.LSTM(2, 2), nn.MultiheadAttention(2, 1, add_bias_kv=True)))
    assert {name for name, role in found.items() if role == "bias"} == {n for n in found if "bias" in n}
    for layer, name in ((Scaled(), "scale"), (OwnNorm(2), "weight"), (nn.ParameterList([torch.ones(2)]), "0")):
        with pytest.raises(ConfigError, match=f"its parameter (0\\.)?{name} is not known"):
            parameter_roles(nn.Sequential(layer))
    Scaled.parameter_roles = {"scale": "weight"}
    assert parameter_roles(Scaled()) == {"scale": "weight", "weight": "weight", "bias": "bias"}


def test_a_parameter_that_a_hook_replaces_is_what_it_stands_for():
    def hooked(num_features):
        norm = nn.utils.spectral_norm(nn.BatchNorm2d(num_features))
        return nn.utils.prune.l1_unstructured(norm, "bias", 0.5)

    assert roles(hooked) == {"weight_orig": "norm_weight", "bias_orig": "norm_bias"}


def test_torchs_own_classes_are_not_to_be_edited():
    norm = nn.BatchNorm2d(2)
    norm.gate = nn.Parameter(torch.ones(2))
    with pytest.raises(ConfigError, match=r"BatchNorm2d: .* gate is not known; derive a class of your own from it"):
        parameter_roles(norm)


@pytest.mark.parametrize("layer", [nn.LazyBatchNorm2d(), nn.LazyBatchNorm2d(affine=False), nn.LazyLinear(3)])
def test_lazy_layers_are_told_in_a_sentence(layer):
    told = "Lazy.*: has no shape before its first batch; use the layer that is built with its number of channels$"
    with pytest.raises(ConfigError, match=rf"^normalizer\._target_: torch.*{told}"):
        probe_normalizer(factory(lambda num_features: layer), {"_target_": "own.lazy"})


def test_a_parametrised_parameter_is_what_it_stands_for():
    class Twice(nn.Module):
        def forward(self, x):
            return 2 * x

    def doubled(num_features):
        return nn.utils.parametrize.register_parametrization(nn.BatchNorm2d(num_features), "weight", Twice())

    assert roles(doubled) == {"bias": "norm_bias", "parametrizations.weight.original": "norm_weight"}
    convolution = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 1))
    assert parameter_roles(convolution) == {
        "bias": "bias",
        "parametrizations.weight.original0": "weight",
        "parametrizations.weight.original1": "weight",
    }
