import pytest
import torch
import torch.nn.functional as F
from torch import nn

from onlinenorm import models
from onlinenorm.models.cifar import ZeroPadShortcut
from onlinenorm.normalizers import OnlineNorm2d, group_norm, identity, layer_norm

DEPTHS = [8, 14, 20, 32, 56, 110]


def build(depth, normalizer=nn.BatchNorm2d, **options):
    return getattr(models, f"cifar_resnet{depth}")(normalizer, **options)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_depth_counts_the_layers_with_weights(depth, shortcut):
    with torch.device("meta"):
        model = build(depth, shortcut=shortcut)
    projections = 2 if shortcut == "B" else 0
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == depth - 1 + projections
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == depth - 1 + projections


@pytest.mark.parametrize("depth, millions", [(20, 0.27), (32, 0.46), (56, 0.85), (110, 1.7)])
def test_sizes_of_he_2015_table_6(depth, millions):
    with torch.device("meta"):
        model = build(depth, shortcut="A")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)


def test_resnet20_of_the_reference_code():
    model = build(20)
    assert sum(p.numel() for p in model.parameters()) == 272_474
    assert model.layer2[0].downsample[0].kernel_size == (1, 1)
    names = dict(model.named_parameters())
    assert {"conv1.weight", "bn1.bias", "layer1.2.bn2.weight", "layer3.0.downsample.1.weight", "fc.bias"} <= set(names)
    assert model.layer1[0].downsample is None


@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize("size, in_channels", [(28, 1), (32, 3)])
def test_stages_halve_the_resolution(size, in_channels, shortcut):
    model = build(8, in_channels=in_channels, shortcut=shortcut)
    seen = []
    for stage in (model.layer1, model.layer2, model.layer3):
        stage.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape[1:])))
    x = torch.randn(2, in_channels, size, size).to(memory_format=torch.channels_last)
    assert model(x).shape == (2, 10)
    assert seen == [(16, size, size), (32, size // 2, size // 2), (64, size // 4, size // 4)]


def test_zero_pad_shortcut_subsamples_and_appends_zeros():
    x = torch.randn(2, 3, 6, 6).to(memory_format=torch.channels_last)
    out = ZeroPadShortcut(2, 2)(x)
    assert torch.equal(out[:, :3], x[:, :, ::2, ::2])
    assert out.shape == (2, 5, 3, 3) and (out[:, 3:] == 0).all()
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert not list(ZeroPadShortcut(2, 2).parameters())


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_all_normalizers_start_from_the_same_weights(shortcut):
    states = []
    for normalizer in (nn.BatchNorm2d, OnlineNorm2d, layer_norm, lambda n: group_norm(n, 8), identity):
        torch.manual_seed(4)
        model = build(14, normalizer, shortcut=shortcut)
        states.append({n: m.weight for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))})
    for state in states[1:]:
        assert state.keys() == states[0].keys() and len(state) >= 14
        assert all(torch.equal(state[name], states[0][name]) for name in state)


def test_convolutions_start_as_kaiming_fan_out_and_gammas_at_one():
    torch.manual_seed(0)
    model = build(20)
    assert model.layer3[1].conv1.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    gammas = [m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(gammas) == 21 and all((gamma == 1).all() for gamma in gammas)
    zeroed = build(20, zero_init_last_gamma=True)
    assert (zeroed.layer2[1].bn2.weight == 0).all() and (zeroed.layer2[0].downsample[1].weight == 1).all()


@pytest.mark.parametrize("normalizer", [nn.BatchNorm2d, OnlineNorm2d])
def test_learns_a_handful_of_images(normalizer):
    torch.manual_seed(0)
    model = build(8, normalizer, num_classes=4, in_channels=1)
    images, labels = torch.randn(16, 1, 14, 14), torch.arange(16) % 4
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_traces_without_graph_breaks_and_computes_the_same():
    torch.manual_seed(0)
    plain, compiled = build(8, OnlineNorm2d), build(8, OnlineNorm2d)
    compiled.load_state_dict(plain.state_dict())
    compiled.compile(backend="eager", fullgraph=True)
    x = torch.randn(4, 3, 16, 16)
    outputs = [model(x) for model in (plain, compiled)]
    torch.testing.assert_close(*outputs)
    for out in outputs:
        out.square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=name)
    for (name, a), b in zip(plain.named_buffers(), compiled.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("depth", [2, 9, 18, 20.0, True])
def test_depths_that_do_not_exist(depth):
    with pytest.raises(ValueError, match=r"depth: .* is not 6n \+ 2"):
        models.cifar_resnet(depth, nn.BatchNorm2d)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"shortcut": "C"}, "shortcut: 'C' is not one of A, B"),
        ({"num_classes": True}, "num_classes: must be a whole number of at least 1, got True"),
        ({"in_channels": 0}, "in_channels: must be a whole number of at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        build(8, **options)
