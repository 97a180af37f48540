"""What hangs on a layer stays there through a conversion, or the conversion is refused and changes nothing."""

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from onlinenorm import OnlineNorm2d, convert
from onlinenorm.normalizers import BatchRenorm2d, SyncBatchNorm2d, synchronise_batch_norm

KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


class Named(nn.BatchNorm2d):
    """Only built differently."""

    def __init__(self, features, tag):
        super().__init__(features, eps=1e-3)
        self.tag = tag

    def extra_repr(self):
        return self.tag


class Frozen(nn.BatchNorm2d):
    def train(self, mode=True):
        return super().train(False)


class Helpful(nn.BatchNorm2d):
    def fold(self):
        return self.weight * self.running_var.rsqrt()


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


class Network(nn.Module):
    """Refers to its layer in a module list, a plain list and an attribute of another object."""

    def __init__(self, norm):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(2, 4, 1), norm)
        self.norms = [norm]

    def forward(self, x):
        return self.norms[0](self.layers[0](x))


def test_references_hooks_and_attributes_stay():
    norm = nn.BatchNorm2d(4)
    network = Network(norm)
    weight, optimizer = norm.weight, torch.optim.SGD(network.parameters(), 0.1)
    calls = []
    handles = [
        norm.register_forward_pre_hook(lambda m, a: calls.append(("before", type(m)))),
        norm.register_forward_hook(lambda m, a, y: calls.append(("after", type(m)))),
        norm.register_full_backward_hook(lambda m, a, g: calls.append(("backward", type(m)))),
        norm.register_full_backward_pre_hook(lambda m, g: calls.append(("before backward", type(m)))),
        norm.register_state_dict_post_hook(lambda m, state, prefix, metadata: calls.append(("state", type(m)))),
    ]
    norm.qconfig, norm.note = "int8", {"anything": 1}
    for to, cls in (("online", OnlineNorm2d), ("batch", nn.BatchNorm2d)):
        assert convert(network, to=to) is network
        assert network.layers[1] is norm is network.norms[0] and type(norm) is cls and norm.weight is weight
        assert norm.qconfig == "int8" and norm.note == {"anything": 1}
        calls.clear()
        optimizer.zero_grad()
        network(torch.randn(3, 2, 2, 2)).square().sum().backward()
        network.state_dict()
        assert calls == [(name, cls) for name in ("before", "after", "before backward", "backward", "state")]
        before = weight.clone()
        optimizer.step()
        assert not torch.equal(weight, before)
    for handle in handles:
        handle.remove()
    assert not any(getattr(norm, kind) for kind in KINDS)


def test_training_and_requires_grad_of_each_layer_stay():
    network = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2, momentum=None), nn.BatchNorm1d(2, affine=False))
    network[0].eval()
    network[1].bias.requires_grad_(False)
    for to in ("online", "batch"):
        convert(network, to=to)
        assert [layer.training for layer in network] == [False, True, True] and network.training
        assert network[1].weight.requires_grad and not network[1].bias.requires_grad
    assert network[1].momentum is None and type(network[2]) is nn.BatchNorm1d
    frozen = convert(network)[0]
    frozen(torch.randn(4, 2, 3, 3)).sum().backward()
    assert not frozen.running_mean.any()


def test_a_subclass_that_is_only_built_differently_comes_back():
    norm = Named(4, "stem")
    assert type(convert(norm)) is OnlineNorm2d and norm.tag == "stem" and norm.eps == 1e-3
    assert type(convert(norm, to="batch")) is Named and "stem" in repr(norm)


def pruned():
    return prune.random_unstructured(nn.BatchNorm2d(4), "weight", 0.5)


def parametrised():
    norm = nn.BatchNorm2d(4)
    parametrize.register_parametrization(norm, "weight", Doubled())
    return norm


def with_attribute(cls, name):
    norm = cls(4)
    setattr(norm, name, lambda *a: norm)
    return norm


def not_updated():
    norm = nn.BatchNorm2d(4)
    norm.track_running_stats = False
    return norm


def with_buffer(cls):
    norm = cls(4)
    norm.register_buffer("calls", torch.zeros(()))
    return norm


def with_observer():
    """As prepare_qat leaves it."""
    norm = nn.BatchNorm2d(4)
    norm.activation_post_process = nn.Identity()
    return norm


def compiled(cls):
    norm = cls(4)
    norm.compile(backend="eager")
    return norm


def synchronised_with_activation():
    return convert_sync_batchnorm(BatchNormAct2d(4))


class Louder(OnlineNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


TO_ONLINE = {
    "a frozen one": (lambda: Frozen(4), "Frozen has no counterpart: it is a BatchNorm2d with its own train, "),
    "one with a method": (lambda: Helpful(4), "Helpful has no counterpart: .* own fold"),
    "ours": (
        lambda: BatchRenorm2d(4),
        "BatchRenorm2d has no counterpart: it is a BatchNorm2d with its own forward, wh",
    ),
    "pruned": (pruned, r"holds weight_mask, weight_orig beside .*prune\.remove"),
    "parametrised": (parametrised, "holds parametrizations beside"),
    "weight norm": (lambda: parametrizations.weight_norm(nn.BatchNorm2d(4), dim=None), "holds parametrizations"),
    "frozen by an attribute": (lambda: with_attribute(nn.BatchNorm2d, "train"), "has an own train set on it"),
    "another forward": (lambda: with_attribute(nn.BatchNorm2d, "forward"), "has an own forward set on it"),
    "not updated": (not_updated, "BatchNorm with track_running_stats=False .* keeps those it has"),
    "a buffer": (lambda: with_buffer(nn.BatchNorm2d), "holds calls beside"),
    "with an observer": (with_observer, "holds activation_post_process beside .* convert first, then attach"),
    "compiled": (lambda: compiled(nn.BatchNorm2d), r"is compiled by its own compile\(\), .* convert first"),
    "timm's synchronised": (synchronised_with_activation, "SyncBatchNormAct has no counterpart: .* its own forward"),
}
TO_BATCH = {
    "a subclass": (lambda: Louder(4), "Louder has no counterpart: it is a OnlineNorm2d with its own forward"),
    "another forward": (lambda: with_attribute(OnlineNorm2d, "forward"), "has an own forward set on it"),
    "a buffer": (lambda: with_buffer(OnlineNorm2d), "holds calls beside"),
    "compiled": (lambda: compiled(OnlineNorm2d), r"is compiled by its own compile\(\), .* convert first"),
}


@pytest.mark.parametrize(
    ("to", "build", "words"),
    [("online", *case) for case in TO_ONLINE.values()] + [("batch", *case) for case in TO_BATCH.values()],
    ids=[*TO_ONLINE, *(f"back, {name}" for name in TO_BATCH)],
)
def test_what_would_be_lost_is_refused_by_name_and_nothing_changes(to, build, words):
    plain = nn.BatchNorm2d if to == "online" else OnlineNorm2d
    network = nn.ModuleDict({"first": plain(4), "second": build(), "third": plain(4)})
    classes, states = [type(m) for m in network.modules()], [dict(vars(m)) for m in network.modules()]
    with pytest.raises(ValueError, match=f"^second: {words}"):
        convert(network, to=to)
    assert [type(m) for m in network.modules()] == classes
    assert all(vars(m).items() >= state.items() for m, state in zip(network.modules(), states, strict=True))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_a_partly_scripted_network_is_refused():
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)))
    network = nn.ModuleDict({"free": nn.BatchNorm2d(4), "trunk": scripted})
    with pytest.raises(
        ValueError, match=r"^trunk\.1: is a BatchNorm2d compiled by torch.jit, .* before torch.jit.script"
    ):
        convert(network)
    assert type(network["free"]) is nn.BatchNorm2d
    traced = torch.jit.trace(OnlineNorm2d(4).eval(), torch.zeros(2, 4, 3, 3))
    with pytest.raises(ValueError, match=r"^0: is a OnlineNorm2d compiled by torch.jit"):
        convert(nn.Sequential(traced), to="batch")


@pytest.mark.parametrize("kind", ["SGD", "Adam", "Adagrad", "NAdam"])
def test_optimizers_go_on_from_half_precision_and_back(kind):
    """Their state follows the dtype of parameters, with its values."""
    network = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)).bfloat16()
    optimizer = getattr(torch.optim, kind)(network.parameters(), lr=0.1, **{"momentum": 0.9} if kind == "SGD" else {})

    def step():
        for parameter in network.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    step()
    weight = network[1].weight
    before = {key: torch.as_tensor(value).clone() for key, value in optimizer.state[weight].items()}
    for to, dtype in (("online", torch.float32), ("batch", torch.bfloat16)):
        convert(network, to=to)
        kept = optimizer.state[weight]
        assert any(value.dtype == dtype for value in kept.values())
        if to == "online":
            assert all(torch.equal(torch.as_tensor(value), before[key].to(value.dtype)) for key, value in kept.items())
        step()
        assert weight.dtype == dtype
    assert optimizer.state[network[0].weight].keys() == before.keys()


def test_tied_parameters_stay_tied_in_half_precision():
    network = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4)).half()
    network[1].weight = network[0].weight
    network[1].running_mean = network[0].running_mean
    weight = network[0].weight
    for to, dtype in (("online", torch.float32), ("batch", torch.float16)):
        convert(network, to=to)
        assert network[0].weight is network[1].weight is weight and weight.dtype == dtype
        assert network[0].running_mean is network[1].running_mean


def test_a_parameter_in_half_precision_tied_to_another_layer_is_refused():
    network = nn.Sequential(nn.BatchNorm2d(4), nn.GroupNorm(2, 4)).half()
    network[1].weight = network[0].weight
    with pytest.raises(ValueError, match=r"^0: shares a parameter in torch.float16 with 1.weight.*float\(\)"):
        convert(network)
    assert type(network[0]) is nn.BatchNorm2d and network[0].weight.dtype == torch.float16
    convert(network.float())
    assert network[1].weight is network[0].weight


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3), (5, 4, 3, 2), (5, 4, 3, 2, 2)])
def test_sync_batch_norm_of_every_dimension(shape):
    plain = nn.Sequential({2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)](4))
    nn.init.normal_(plain[0].running_mean)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    x = torch.randn(shape)
    converted = convert(synchronised, error_compensation="none")
    assert converted[0].statistics == "global"
    torch.testing.assert_close(converted.eval()(x), plain.eval()(x))
    assert converted.train()(x).shape == shape


def test_synchronised_layers_keep_what_hangs_on_them():
    norm, calls = nn.BatchNorm2d(4), []
    network = Network(norm)
    norm.register_forward_hook(lambda m, a, y: calls.append(type(m)))
    norm.qconfig = "int8"
    assert synchronise_batch_norm(network) is network
    assert network.norms[0] is norm is network.layers[1] and type(norm) is SyncBatchNorm2d and norm.qconfig == "int8"
    network(torch.randn(2, 2, 3, 3))
    assert calls == [SyncBatchNorm2d]
    assert type(convert(network).norms[0]) is OnlineNorm2d
    assert type(convert(network, to="batch").norms[0]) is SyncBatchNorm2d
    mixed = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match=r"^1: BatchNorm1d cannot"):
        synchronise_batch_norm(mixed)
    assert type(mixed[0]) is nn.BatchNorm2d
