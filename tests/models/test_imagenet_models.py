import copy
import pickle
from functools import partial

import pytest
import torch
import torchvision
from torch import nn

from onlinenorm import models
from onlinenorm.normalizers import OnlineNorm2d, group_norm, identity, layer_norm

NORMALIZERS = {
    "batch": nn.BatchNorm2d,
    "group": group_norm,
    "layer": layer_norm,
    "instance": partial(nn.InstanceNorm2d, affine=True),
    "online": OnlineNorm2d,
    "none": identity,
}
PARAMETERS = {18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160, 152: 60_192_808}
NORM_LAYERS = {18: 20, 34: 36, 50: 53, 101: 104, 152: 155}


def build(depth, normalizer=nn.BatchNorm2d, **options):
    return getattr(models, f"resnet{depth}")(normalizer, **options)


def shapes(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors}


@pytest.mark.parametrize("depth", PARAMETERS)
def test_names_shapes_and_counts_are_torchvisions(depth):
    with torch.device("meta"):
        ours, theirs = build(depth), getattr(torchvision.models, f"resnet{depth}")()
    assert shapes(ours.state_dict().items()) == shapes(theirs.state_dict().items())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert sum(p.numel() for p in ours.parameters()) == PARAMETERS[depth]
    assert sum(isinstance(m, nn.BatchNorm2d) for m in ours.modules()) == NORM_LAYERS[depth]


def test_online_norm_changes_buffers_only():
    with torch.device("meta"):
        ours, theirs = build(50, OnlineNorm2d), torchvision.models.resnet50()
    assert shapes(ours.named_parameters()) == shapes(theirs.named_parameters())
    assert sum(isinstance(m, OnlineNorm2d) for m in ours.modules()) == 53
    here, there = set(ours.state_dict()), set(theirs.state_dict())
    assert {name.rsplit(".", 1)[1] for name in here - there} == {"control_u", "control_v"}
    assert {name.rsplit(".", 1)[1] for name in there - here} == {"num_batches_tracked"}


def test_same_seed_gives_torchvisions_weights():
    torch.manual_seed(3)
    theirs = torchvision.models.resnet18(num_classes=7).state_dict()
    torch.manual_seed(3)
    ours = build(18, num_classes=7).state_dict()
    assert len(theirs) > 100 and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("depth", [18, 50])
def test_with_batch_norm_it_computes_what_torchvision_computes(depth):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, f"resnet{depth}")(num_classes=5).double()
    ours = build(depth, num_classes=5).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    outputs = [model(x) for model in (ours, theirs)]
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    for out in outputs:
        out.square().sum().backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9, msg=name)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-12, atol=1e-12)


def test_all_normalizers_start_from_the_same_weights():
    drawn = {}
    for key, normalizer in NORMALIZERS.items():
        torch.manual_seed(11)
        model = build(18, normalizer, num_classes=10)
        drawn[key] = {
            f"{n}.weight": m.weight for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))
        }
        norms = [m for m in model.modules() if m.__class__.__name__.endswith(("Norm", "Norm2d"))]
        assert len(norms) == (0 if key == "none" else 20)
        assert all((m.weight == 1).all() and (m.bias == 0).all() for m in norms)
    for key, weights in drawn.items():
        assert weights.keys() == drawn["batch"].keys() and len(weights) == 21
        assert all(torch.equal(weights[name], drawn["batch"][name]) for name in weights), key


def test_a_normalizer_without_affine_parameters():
    model = build(18, partial(nn.BatchNorm2d, affine=False), num_classes=2)
    assert {name for name, _ in model.named_parameters() if "bn" in name} == set()
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 2)


def test_convolutions_start_as_kaiming_fan_out():
    torch.manual_seed(0)
    conv = build(18).layer4[0].conv2
    assert conv.weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)


def test_bottleneck_stride_moves_to_the_first_convolution():
    with torch.device("meta"):
        v15, v1 = build(50), build(50, bottleneck_stride="1x1")
    for name in ("layer2", "layer3", "layer4"):
        first, second = getattr(v1, name)[0], getattr(v1, name)[1]
        assert (first.conv1.stride, first.conv2.stride, first.downsample[0].stride) == ((2, 2), (1, 1), (2, 2))
        assert (second.conv1.stride, second.conv2.stride) == ((1, 1), (1, 1))
        first = getattr(v15, name)[0]
        assert (first.conv1.stride, first.conv2.stride) == ((1, 1), (2, 2))
    assert shapes(v1.state_dict().items()) == shapes(v15.state_dict().items())
    assert v1(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 1000)


@pytest.mark.parametrize("in_channels", [1, 4])
def test_other_image_channels_change_the_stem_only(in_channels):
    torch.manual_seed(0)
    model = build(18, in_channels=in_channels, num_classes=10)
    assert model.conv1.weight.shape == (64, in_channels, 7, 7)
    assert model.conv1.weight.std().item() == pytest.approx((2 / (64 * 49)) ** 0.5, rel=0.05)
    torch.manual_seed(0)
    assert torch.equal(model.layer1[0].conv1.weight, build(18, num_classes=10).layer1[0].conv1.weight)
    assert model.eval()(torch.randn(2, in_channels, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("depth, last", [(18, "bn2"), (50, "bn3")])
def test_zero_init_last_gamma(depth, last):
    model = build(depth, OnlineNorm2d, zero_init_last_gamma=True, num_classes=2)
    norms = {name: module for name, module in model.named_modules() if isinstance(module, OnlineNorm2d)}
    zeroed = {name for name, module in norms.items() if not module.weight.any()}
    assert zeroed == {name for name in norms if name.startswith("layer") and name.endswith(last)} != set()
    assert all((module.weight == 1).all() for name, module in norms.items() if name not in zeroed)


@pytest.mark.parametrize("normalizer", [identity, partial(nn.BatchNorm2d, affine=False)])
def test_zero_init_needs_a_gamma(normalizer):
    with pytest.raises(ValueError, match=r"zero_init_last_gamma: .* has no weight"):
        build(18, normalizer, zero_init_last_gamma=True)


@pytest.mark.parametrize("key", NORMALIZERS)
def test_trains_with_every_normalizer(key):
    torch.manual_seed(0)
    model = build(18, NORMALIZERS[key], num_classes=4).to(memory_format=torch.channels_last)
    out = model(torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last))
    out.logsumexp(1).sum().backward()
    assert out.shape == (2, 4)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_copies_are_independent_whatever_the_callable():
    model = build(18, lambda n: nn.BatchNorm2d(n, eps=1e-4), num_classes=2).eval()
    x = torch.randn(1, 3, 32, 32)
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
        with torch.no_grad():
            other.bn1.bias.add_(1)
        assert torch.equal(model(x), expected)


def test_compile_keeps_names_and_is_in_place():
    plain, compiled = build(18, num_classes=2), build(18, num_classes=2, compile=True)
    assert type(compiled) is type(plain)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    assert compiled._compiled_call_impl is not None
    assert plain._compiled_call_impl is None


@pytest.mark.parametrize(
    "depth, options, message",
    [
        (26, {}, "depth: 26 is not one of 18, 34, 50, 101, 152"),
        (50, {"bottleneck_stride": "2x2"}, "bottleneck_stride: '2x2' is not one of 3x3, 1x1"),
        (18, {"bottleneck_stride": "1x1"}, "bottleneck_stride: resnet18 has no bottleneck blocks"),
        (18, {"num_classes": 0}, "num_classes: must be a whole number of at least 1, got 0"),
        (18, {"in_channels": 1.0}, r"in_channels: must be a whole number of at least 1, got 1\.0"),
    ],
)
def test_wrong_arguments_are_named(depth, options, message):
    with pytest.raises(ValueError, match=message):
        models.resnet(depth, nn.BatchNorm2d, **options)
