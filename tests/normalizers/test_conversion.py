"""BatchNorm to OnlineNorm and back, in other people's networks."""

import copy
import pickle
from functools import partial

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from onlinenorm import OnlineNorm1d, OnlineNorm2d, convert, remove_clamping
from onlinenorm.normalizers.conversion import OnlineNormAct2d

NETWORKS = {
    "resnet18": partial(torchvision.models.resnet18, num_classes=7),
    "resnet50": partial(torchvision.models.resnet50, num_classes=7),
    "mobilenet_v3": partial(torchvision.models.mobilenet_v3_small, num_classes=7),
    "efficientnet": partial(torchvision.models.efficientnet_b0, num_classes=7),
    "densenet": partial(torchvision.models.DenseNet, block_config=(2, 2, 2, 2), num_classes=7),
    "timm_resnet18": partial(timm.create_model, "resnet18", num_classes=7),
    "timm_mobilenetv3": partial(timm.create_model, "mobilenetv3_small_050", num_classes=7),
    "timm_regnet": partial(timm.create_model, "regnety_002", num_classes=7),
}


def as_if_trained(model: nn.Module) -> nn.Module:
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            nn.init.normal_(layer.running_mean, std=0.1)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.1)
            layer.num_batches_tracked.fill_(3)
    return model.eval()


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_there_and_back(name):
    network = as_if_trained(NETWORKS[name]())
    images = torch.randn(2, 3, 48, 48)
    classes = [type(layer) for layer in batch_norms(network)]
    state = {key: value.clone() for key, value in network.state_dict().items()}
    with torch.no_grad():
        expected = network(images)
        assert convert(network, error_compensation="none") is network
        assert not batch_norms(network)
        assert sum(isinstance(m, OnlineNorm2d) for m in network.modules()) == len(classes)
        torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)
        convert(network, to="batch")
        torch.testing.assert_close(network(images), expected, rtol=0, atol=1e-6)
    assert [type(layer) for layer in batch_norms(network)] == classes
    assert state.keys() == network.state_dict().keys()
    for key, value in network.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_default_guard_goes_and_comes_without_a_trace():
    network = as_if_trained(torchvision.models.resnet18(num_classes=4))
    images = 30 * torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = network(images)
        assert not torch.allclose(convert(network)(images), before)  # the clamp acts on such images
        assert torch.equal(convert(network, to="batch")(images), before)


def test_stock_torchvision_loads_what_was_trained_with_clamps():
    """The lines of README.md: convert, train, remove_clamping, convert back."""
    network = convert(torchvision.models.resnet18(num_classes=4)).train()
    network(torch.randn(4, 3, 32, 32)).square().mean().backward()
    remove_clamping(network)
    images, stock = torch.randn(2, 3, 32, 32), torchvision.models.resnet18(num_classes=4).eval()
    with torch.no_grad():
        before = network.eval()(images)
        stock.load_state_dict(convert(network, "batch").state_dict())
        torch.testing.assert_close(stock(images), before, atol=1e-5, rtol=1e-5)


def test_converted_network_trains():
    network = convert(NETWORKS["timm_mobilenetv3"]()).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    layer = next(m for m in network.modules() if isinstance(m, OnlineNormAct2d))
    for _ in range(2):
        loss = network(torch.randn(4, 3, 32, 32)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.isfinite(loss)
    assert layer.control_u.any() and layer.running_mean.any()


def test_parameters_stay_the_same_objects():
    network = torchvision.models.resnet18()
    network.bn1.weight.requires_grad_(False)
    weight, bias = network.bn1.weight, network.bn1.bias
    names = [name for name, _ in network.named_parameters()]
    convert(network, alpha_fwd=0.99, clamp_value=3.0)
    assert network.bn1.weight is weight and network.bn1.bias is bias
    assert not network.bn1.weight.requires_grad and network.bn1.bias.requires_grad
    assert [name for name, _ in network.named_parameters()] == names
    assert network.bn1.alpha_fwd == 0.99 and network.bn1.clamp_value == 3.0
    assert not network.bn1.control_u.any() and not network.bn1.control_v.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_device_and_flags_are_kept(dtype):
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=1e-3, momentum=0.03)).to(dtype)
    network = network.to(memory_format=torch.channels_last)
    network[1].eval()
    network[1].weight.requires_grad_(False)
    nn.init.normal_(network[1].running_mean)
    mean = network[1].running_mean.clone()
    convert(network, error_compensation="none")
    online = network[1]
    assert online.running_mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert network.training and not online.training and online.eps == 1e-3
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8).to(dtype).contiguous(memory_format=torch.channels_last)
    out = network(x)
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    convert(network, to="batch")
    batch = network[1]
    assert type(batch) is nn.BatchNorm2d and batch.momentum == 0.03 and not batch.training
    assert {t.dtype for t in (batch.weight, batch.bias, batch.running_mean, batch.running_var)} == {dtype}
    assert not batch.weight.requires_grad and batch.bias.requires_grad
    assert torch.equal(batch.running_mean, mean)


def test_meta_device_is_kept():
    with torch.device("meta"):
        network = nn.Sequential(nn.BatchNorm2d(4))
    for to in ("online", "batch"):
        convert(network, to=to)
        devices = [value.device.type for value in network.state_dict().values()]
        assert len(devices) > 3 and set(devices) == {"meta"}


def test_one_dimensional_layers_single_layers_and_layers_without_affine():
    x = torch.randn(5, 6)
    batch = nn.BatchNorm1d(6, affine=False).eval()
    online = convert(batch, error_compensation="none")
    assert isinstance(online, OnlineNorm1d) and online.weight is None
    torch.testing.assert_close(online(x), batch(x))
    back = convert(online, to="batch", momentum=0.5)
    assert type(back) is nn.BatchNorm1d and back.momentum == 0.5 and not back.affine


def test_a_layer_used_twice_stays_one_layer():
    shared = nn.BatchNorm2d(3)
    network = nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared))
    convert(network)
    assert network[0] is network[2][0] and isinstance(network[0], OnlineNorm2d)


def test_own_networks_fuse_after_conversion(monkeypatch):
    from onlinenorm.models import cifar_resnet8

    network = as_if_trained(cifar_resnet8(nn.BatchNorm2d))
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = network(images)
        torch.testing.assert_close(convert(network, error_compensation="none")(images), expected, rtol=1e-4, atol=1e-5)


def test_converted_networks_copy_and_pickle():
    network = convert(NETWORKS["timm_mobilenetv3"]())
    twin = pickle.loads(pickle.dumps(copy.deepcopy(network)))
    assert [type(m) for m in convert(twin, to="batch").modules()] == [
        type(m) for m in convert(network, to="batch").modules()
    ]


def test_sync_batch_norm_becomes_a_global_stream():
    network = nn.Sequential(nn.SyncBatchNorm(4))
    assert convert(network)[0].statistics == "global"
    assert type(convert(network, to="batch")[0]) is nn.BatchNorm2d


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.BatchNorm2d(4, track_running_stats=False), "1: .*track_running_stats=True"),
        (nn.BatchNorm3d(4), "1: BatchNorm3d has no counterpart"),
        (nn.LazyBatchNorm2d(), "1: is a lazy layer.*one batch"),
        (Doubled(4), "1: Doubled has no counterpart"),
    ],
)
def test_what_cannot_be_replaced_is_named_and_nothing_changes(layer, words):
    network = nn.Sequential(nn.BatchNorm2d(4), layer)
    with pytest.raises(ValueError, match=words):
        convert(network)
    assert type(network[0]) is nn.BatchNorm2d


def test_layer_scaling_cannot_become_batch_norm():
    network = nn.Sequential(OnlineNorm2d(4), OnlineNorm2d(4, error_compensation="layer_scaling"))
    with pytest.raises(ValueError, match=r"1: layer scaling .*all channels"):
        convert(network, to="batch")
    assert isinstance(network[0], OnlineNorm2d)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"to": "onlin"}, "did you mean 'online'|did you mean online"),
        ({"eps": 1e-3}, "eps: is no argument"),
        ({"momentum": 0.1}, "momentum: is no argument"),
        ({"to": "batch", "alpha_fwd": 0.9}, "alpha_fwd: is no argument"),
        ({"alpha": 0.9}, "alpha.*arguments of a conversion"),
        ({"alpha_fwd": 2}, "alpha_fwd: 2"),
    ],
)
def test_wrong_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        convert(nn.Sequential(nn.BatchNorm2d(4)), **arguments)


@pytest.mark.parametrize("to", ["online", "batch"])
def test_nothing_to_replace_warns(to):
    with pytest.warns(UserWarning, match="changed nothing"):
        convert(nn.Sequential(nn.ReLU()), to=to)
