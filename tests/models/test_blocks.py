import operator
from functools import partial
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as hooks_of_all
from torch.nn.utils import parametrize, prune

from onlinenorm.models import cifar_resnet8, resnet18
from onlinenorm.models.blocks import BasicBlock, norm_act, norm_act_max_pool

ONE_FOR_ALL = nn.Identity()


class FusingBatchNorm(nn.BatchNorm2d):
    """BatchNorm with the fused call, which notes how it was called."""

    fuses_residual = True

    def __init__(self, num_features):
        super().__init__(num_features)
        self.calls = []

    def forward(self, x, residual=None, relu=False):
        self.calls.append((residual is not None, relu))
        out = super().forward(x)
        out = out if residual is None else out + residual
        return F.relu(out) if relu else out


class RandomlyStartedNorm(nn.BatchNorm2d):
    def __init__(self, num_features):
        super().__init__(num_features)
        nn.init.normal_(self.bias)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_one_call_equals_three_ops(with_residual, relu):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4)
    residual = torch.randn_like(x) if with_residual else None
    plain, fusing = nn.BatchNorm2d(3), FusingBatchNorm(3)
    expected = plain(x)
    expected = expected + residual if with_residual else expected
    expected = expected.clamp(min=0) if relu else expected
    torch.testing.assert_close(norm_act(nn.BatchNorm2d(3), x, residual, relu), expected, rtol=0, atol=0)
    torch.testing.assert_close(norm_act(fusing, x, residual, relu), expected, rtol=0, atol=0)
    assert fusing.calls == [(with_residual, relu)]


class Squashing(nn.Module):
    """Ends in an operation whose backward pass needs its own output."""

    def __init__(self, num_features, last=torch.tanh):
        super().__init__()
        self.norm, self.last = nn.BatchNorm2d(num_features), last

    def forward(self, x):
        return self.last(self.norm(x))


class SquashingBatchNorm(nn.BatchNorm2d):
    def forward(self, x):
        return torch.tanh(super().forward(x))


@pytest.mark.parametrize(
    "normalizer",
    [
        Squashing,
        SquashingBatchNorm,
        partial(Squashing, last=torch.sigmoid),
        partial(Squashing, last=partial(F.softmax, dim=1)),
        lambda num_features: _hooked(num_features, "forward"),
        lambda num_features: _hooked(num_features, "backward"),
        lambda num_features: _hooked(num_features, "backward pre"),
        lambda num_features: _squashing_forward(nn.BatchNorm2d(num_features)),
    ],
)
@pytest.mark.parametrize("build, size", [(resnet18, 64), (cifar_resnet8, 16)])
def test_norms_whose_backward_needs_their_output_train(build, size, normalizer):
    torch.manual_seed(0)
    model = build(normalizer, num_classes=2)
    model(torch.randn(2, 3, size, size)).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert gradients and all(gradient is not None and gradient.any() for gradient in gradients)


def test_output_of_torchs_norms_is_overwritten(monkeypatch):
    """The ReLU of BatchNorm's output takes no memory of its own."""
    outputs, batch_norm = [], F.batch_norm

    def kept(*arguments):
        outputs.append(batch_norm(*arguments))
        return outputs[-1]

    monkeypatch.setattr(F, "batch_norm", kept)
    out = norm_act(nn.BatchNorm2d(2), torch.randn(2, 2, 3, 3), torch.randn(2, 2, 3, 3))
    assert out.data_ptr() == outputs[0].data_ptr()


def _hooked(num_features, kind):
    norm = nn.BatchNorm2d(num_features)
    if kind == "forward":
        norm.register_forward_hook(lambda layer, inputs, output: torch.tanh(output))
    elif kind == "backward":
        norm.register_full_backward_hook(lambda layer, grad_in, grad_out: None)
    else:
        norm.register_full_backward_pre_hook(lambda layer, grad_out: None)
    return norm


def _squashing_forward(norm):
    forward = norm.forward
    norm.forward = lambda x: torch.tanh(forward(x))
    return norm


class Greek(nn.Module):
    parameter_roles: ClassVar = {"gamma": "norm_weight"}

    def __init__(self, num_features):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(num_features))

    def forward(self, x):
        return x * self.gamma.view(1, -1, 1, 1)


class Holding(nn.Module):
    parameter_roles: ClassVar = {"inner.gamma": "norm_weight"}

    def __init__(self, num_features):
        super().__init__()
        self.inner = Greek(num_features)

    def forward(self, x):
        return self.inner(x)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight

    def right_inverse(self, weight):
        return weight / 2


class Positive(nn.Module):
    def forward(self, weight):
        return weight.exp()

    def right_inverse(self, weight):
        return weight.log()


class OneWay(nn.Module):
    def forward(self, weight):
        return weight + 1


def _parametrised(num_features, by):
    return parametrize.register_parametrization(nn.BatchNorm2d(num_features), "weight", by())


@pytest.mark.parametrize(
    "normalizer, gamma", [(Greek, "gamma"), (Holding, "inner.gamma"), (partial(_parametrised, by=Doubled), "weight")]
)
def test_last_gammas_are_zeroed_by_their_role(normalizer, gamma):
    block = cifar_resnet8(normalizer, zero_init_last_gamma=True).layer1[0]
    assert not operator.attrgetter(gamma)(block.bn2).any() and operator.attrgetter(gamma)(block.bn1).all()


@pytest.mark.parametrize(
    "normalizer",
    [
        partial(nn.BatchNorm2d, affine=False),
        nn.Identity,
        partial(_parametrised, by=Positive),
        partial(_parametrised, by=OneWay),
    ],
)
def test_gammas_that_cannot_be_zero_are_refused(normalizer):
    with pytest.raises(ValueError, match=r"^zero_init_last_gamma: .* has no weight that can be set to 0"):
        cifar_resnet8(normalizer, zero_init_last_gamma=True)


@pytest.mark.parametrize("build, size", [(resnet18, 32), (cifar_resnet8, 16)])
def test_every_norm_site_offers_fusion(build, size):
    torch.manual_seed(0)
    model = build(FusingBatchNorm)
    model(torch.randn(2, 3, size, size))
    sites = {name: module for name, module in model.named_modules() if isinstance(module, FusingBatchNorm)}
    assert len(sites) == sum(isinstance(module, nn.Conv2d) for module in model.modules())
    for name, module in sites.items():
        shortcut, last_of_block = ".downsample." in name, name.startswith("layer") and name.endswith("bn2")
        assert module.calls == [(last_of_block, not shortcut)], name


def test_fused_and_plain_calls_give_the_same_network():
    torch.manual_seed(0)
    plain = cifar_resnet8(nn.BatchNorm2d)
    fusing = cifar_resnet8(FusingBatchNorm)
    fusing.load_state_dict(plain.state_dict())
    x = torch.randn(4, 3, 16, 16)
    outputs = [model(x) for model in (plain, fusing)]
    torch.testing.assert_close(*outputs, rtol=0, atol=0)
    for out in outputs:
        out.square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), fusing.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("build", [resnet18, cifar_resnet8])
@pytest.mark.parametrize(
    "normalizer, message",
    [
        ("batch", "normalizer: must be a callable num_features -> nn.Module, got 'batch'"),
        (nn.BatchNorm2d(64), "normalizer: BatchNorm2d is one built layer.*_partial_: true"),
        (lambda n: {"num_features": n}, r"normalizer: must return an nn\.Module, but called with .*\(dict\)"),
        (lambda n: partial(nn.BatchNorm2d, n), r"normalizer: must return an nn\.Module, but called with .*\(partial\)"),
        (lambda n: nn.BatchNorm2d, r"normalizer: must return an nn\.Module, but called with .*\(type\)"),
        (lambda n: ONE_FOR_ALL, "normalizer: returned the same Identity twice"),
    ],
)
def test_wrong_normalizers_are_named(build, normalizer, message):
    with pytest.raises(ValueError, match=message):
        build(normalizer)


def test_a_normalizer_that_draws_leaves_the_other_weights_alone():
    torch.manual_seed(0)
    expected = cifar_resnet8(nn.BatchNorm2d).state_dict()
    torch.manual_seed(0)
    actual = cifar_resnet8(RandomlyStartedNorm).state_dict()
    assert not torch.equal(actual["bn1.bias"], expected["bn1.bias"])
    for name in ("conv1.weight", "layer2.0.downsample.0.weight", "layer3.0.conv2.weight", "fc.weight", "fc.bias"):
        assert torch.equal(actual[name], expected[name]), name


class FusingAll(nn.BatchNorm2d):
    """BatchNorm with every fused call, which notes those that take other layers' places."""

    fuses_residual = fuses_max_pool = fuses_shortcut = True
    fused: ClassVar[list[str]] = []

    def forward(self, x, residual=None, relu=False, max_pool=False, shortcut=None):
        if max_pool or shortcut is not None:
            self.fused.append("max_pool" if max_pool else "shortcut")
        residual = residual if shortcut is None else shortcut.forward(residual)
        out = super().forward(x) if residual is None else super().forward(x) + residual
        out = F.relu(out) if relu else out
        return F.max_pool2d(out, 3, 2, 1) if max_pool else out


class Squashed(FusingAll):
    """Takes none of the calls that its base says it takes."""

    def forward(self, x):
        return torch.tanh(super().forward(x))


class StartAndBlock(nn.Module):
    """Where fused calls take other layers' places: an ImageNet network's first norm, and a block with a shortcut."""

    def __init__(self, normalizer=FusingAll):
        super().__init__()
        self.norm, self.pool = normalizer(4), nn.MaxPool2d(3, 2, 1)
        shortcut = nn.Sequential(nn.Conv2d(4, 8, 1, 2), normalizer(8))
        self.block = BasicBlock(4, 8, 2, shortcut, norm_layer=normalizer)
        self.block.fuse_shortcut = True

    def forward(self, x):
        return self.block(norm_act_max_pool(self.norm, x, self.pool))


def _in_both_ways(change, normalizer=FusingAll):
    """Output, gradients, what `change` notes and fused calls, of an eager network and of a compiled one."""
    results = []
    for compiles in (False, True):
        torch.manual_seed(0)
        torch._dynamo.reset()
        FusingAll.fused.clear()
        network, notes = StartAndBlock(normalizer), []
        change(network, lambda *_, notes=notes: notes.append([t.shape for t in _ if isinstance(t, torch.Tensor)]))
        if compiles:
            network.compile(backend="eager")
        out = network(torch.randn(2, 4, 12, 12, requires_grad=True))
        out.square().sum().backward()
        results.append((notes, [out, *(p.grad for p in network.parameters())], list(FusingAll.fused)))
    return results


def _agree(change, fused, normalizer=FusingAll):
    (eager_notes, expected, _), (notes, found, calls) = _in_both_ways(change, normalizer)
    torch.testing.assert_close(found, expected)
    assert notes == eager_notes and calls == fused
    return notes


def test_compiled_networks_fuse_layers_that_nothing_hangs_on():
    _agree(lambda network, note: network.block.conv1.register_forward_hook(note), ["max_pool", "shortcut"])


HOOKS = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")
# Dynamo itself looks for the .grad of what it hands on where it leaves a graph, as it does for a backward hook.
breaks_the_graph = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@breaks_the_graph
@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("place", ["norm", "pool", "block.downsample", "block.downsample.1", "block.bn2"])
def test_hooks_of_compiled_networks_are_called_as_of_eager_ones(place, kind):
    def change(network, note):
        getattr(network.get_submodule(place), f"register_{kind}")(note)

    assert _agree(change, ["max_pool"] if "block" in place else ["shortcut"])


@breaks_the_graph
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_of_all_modules_are_called_as_in_eager_networks(kind):
    handles = []

    def change(network, note):
        for handle in handles:
            handle.remove()
        handles[:] = [getattr(hooks_of_all, f"register_module_{kind}")(note)]

    try:
        assert _agree(change, [])
    finally:
        handles[0].remove()


@pytest.mark.parametrize(
    "change, fused",
    [
        (lambda network, _: _squashing_forward(network.block.downsample[1]), ["max_pool"]),
        (lambda network, _: setattr(network.pool, "forward", torch.tanh), ["shortcut"]),
        (lambda network, _: setattr(network.pool, "ceil_mode", True), ["shortcut"]),
        (lambda network, _: setattr(network, "pool", nn.Identity()), ["shortcut"]),
        (lambda network, _: network.block.downsample.append(nn.Tanh()), ["max_pool"]),
        (lambda network, _: prune.random_unstructured(network.block.downsample[1], "weight", 3), ["max_pool"]),
        (
            lambda network, _: parametrize.register_parametrization(network.block.downsample[1], "weight", Doubled()),
            ["max_pool"],
        ),
    ],
)
def test_layers_that_were_changed_are_not_fused_away(change, fused):
    _agree(change, fused)


def test_what_a_base_says_of_its_own_forward_is_not_asked_of_another():
    _agree(lambda *_: None, [], Squashed)
