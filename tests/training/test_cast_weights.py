"""Weights that a captured step casts together: which they are, and that every one gets what autocast would give it."""

import copy
import gc
import weakref

import pytest
import torch
from captured_runs import loss_of, stand_in
from torch import nn
from torch.overrides import TorchFunctionMode

from onlinenorm import models
from onlinenorm.errors import RunError
from onlinenorm.models.stem import StemConv2d
from onlinenorm.normalizers import OnlineNorm2d
from onlinenorm.training import cuda_graph
from onlinenorm.training.cuda_graph import CastWeights, GraphedStep, copy_together, like, weights_cast_by_layers

NETWORKS = {
    "resnet18": lambda: models.resnet18(OnlineNorm2d, num_classes=5),
    "resnet50": lambda: models.resnet50(nn.BatchNorm2d, num_classes=5),
    "cifar_resnet8": lambda: models.cifar_resnet8(OnlineNorm2d),
    "cifar_resnet8, shortcut B": lambda: models.cifar_resnet(8, OnlineNorm2d, shortcut="B"),
}


class Readers(TorchFunctionMode):
    """Counts which function reads which parameter."""

    def __init__(self, network):
        super().__init__()
        self.names = {id(parameter): name for name, parameter in network.named_parameters()}
        self.found = {}

    def __torch_function__(self, function, types, arguments=(), options=None):
        for value in (*arguments, *(options or {}).values()):
            if id(value) in self.names and callable(function) and getattr(function, "__name__", "") != "__get__":
                self.found.setdefault(self.names[id(value)], []).append(function)
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_that_say_so_have_layers_that_read_their_weights_alone_and_once(name):
    network = NETWORKS[name]().train()
    names = weights_cast_by_layers(network)
    layers = [layer for layer in network.modules() if type(layer) in (nn.Conv2d, nn.Linear)]
    assert len(names) == sum(len(list(layer.parameters())) for layer in layers) > 8
    with Readers(network) as readers:
        network(torch.randn(2, 3, 32, 32))
    assert names <= readers.found.keys()
    for each in names:
        (function,) = readers.found[each]
        assert function in (torch.conv2d, nn.functional.linear), each


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of weight_norm, which has a successor and is still used
def test_others_are_left_to_autocast():
    network = models.resnet18(OnlineNorm2d, num_classes=5)
    names = weights_cast_by_layers(network)
    assert type(network.conv1) is StemConv2d and "conv1.weight" not in names  # it pads and rearranges its weight
    assert {"fc.weight", "fc.bias"} <= names and not any("bn" in name or "downsample.1" in name for name in names)
    network.layer1[0].conv1.weight = network.layer1[1].conv1.weight  # now of two layers
    nn.utils.parametrizations.weight_norm(network.layer2[0].conv1)
    gone = {"layer1.0.conv1.weight", "layer1.1.conv1.weight", "layer2.0.conv1.weight"}
    assert names - weights_cast_by_layers(network) == gone and weights_cast_by_layers(network) < names
    for hook in (nn.utils.weight_norm, nn.utils.spectral_norm):  # which leave the layer's type
        hook(network.layer3[0].conv1)
        assert not any(name.startswith("layer3.0.conv1") for name in weights_cast_by_layers(network))
        network.layer3[0].conv1 = nn.Conv2d(3, 3, 1)
    assert not weights_cast_by_layers(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Linear(4, 4)))  # which says nothing
    network.layer1[0] = OwnBlock(64, 64, norm_layer=OnlineNorm2d)
    assert not any(name.startswith("layer1.0.") for name in weights_cast_by_layers(network))
    inherits = type("Own", (type(network),), {})
    network.__class__ = inherits  # whose forward may be another
    assert not weights_cast_by_layers(network)
    part = nn.Sequential(models.cifar_resnet8(OnlineNorm2d), nn.Linear(10, 4))
    assert {name.partition(".")[0] for name in weights_cast_by_layers(part)} == {"0"}


class OwnBlock(models.blocks.BasicBlock):
    """Its forward could read the weights of its layers."""


class Mixing(nn.Module):
    """A normalizer that computes with the weight of its layer in full precision, as autocast allows."""

    def __init__(self, num_features):
        super().__init__()
        self.weight, self.mix = nn.Parameter(torch.ones(num_features)), nn.Linear(num_features, num_features)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return x * self.mix(x.float().mean((2, 3)))[:, :, None, None]


def test_layers_within_a_normalizer_are_left_to_it():
    network = models.cifar_resnet8(Mixing)
    names = weights_cast_by_layers(network)
    assert "conv1.weight" in names and not any("mix" in name for name in names)


@pytest.mark.parametrize(
    "change",
    [
        lambda network: network.register_forward_hook(lambda model, inputs, output: output * model.fc.weight.norm()),
        lambda network: network.layer1.register_forward_pre_hook(lambda layer, inputs: None),
        lambda network: network.layer2[0].conv1.register_forward_hook(lambda layer, inputs, output: None),
        lambda network: network.fc.register_full_backward_hook(lambda layer, grad_in, grad_out: None),
        lambda network: setattr(network, "forward", network.forward),
        lambda network: setattr(network.layer1[0], "forward", network.layer1[0].forward),
    ],
)
def test_weights_that_hooks_may_read_are_left_to_autocast(change):
    network = models.cifar_resnet8(OnlineNorm2d)
    assert weights_cast_by_layers(network)
    change(network)
    assert not weights_cast_by_layers(network)


def test_weights_that_a_hook_of_all_modules_may_read_are_left_to_autocast():
    network = models.cifar_resnet8(OnlineNorm2d)
    handle = nn.modules.module.register_module_forward_pre_hook(lambda layer, inputs: None)
    try:
        assert not weights_cast_by_layers(network)
    finally:
        handle.remove()
    assert weights_cast_by_layers(network)


def test_copies_follow_the_weights_where_autocast_is_on():
    network = models.cifar_resnet8(OnlineNorm2d).to(memory_format=torch.channels_last)
    network.fc.weight.data = network.fc.weight.data.double()
    parameters = {name: p for name, p in network.named_parameters() if name != "conv1.weight"}  # which is frozen
    assert not CastWeights(network, parameters, "cpu").copies
    with torch.autocast("cpu", torch.bfloat16):
        cast = CastWeights(network, parameters, "cpu")
    assert cast.copies.keys() == weights_cast_by_layers(network) - {"conv1.weight", "fc.weight"}
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(1.0)
    cast.refresh()
    for name, value in cast.copies.items():
        assert value.stride() == parameters[name].stride() and torch.equal(value, parameters[name].bfloat16()), name


class Graph:
    """As a CUDA graph it keeps nothing of Python's alive."""

    def pool(self):
        return None

    def replay(self):
        pass


def test_what_graphs_read_and_write_lives_as_long_as_they_do(monkeypatch):
    made, original = [], CastWeights.__init__

    def initialise(self, *arguments):
        original(self, *arguments)
        made.extend(map(weakref.ref, self.copies.values()))

    monkeypatch.setattr(CastWeights, "__init__", initialise)
    monkeypatch.setattr(cuda_graph, "warm_up", lambda function, device: [function() for _ in range(2)])
    monkeypatch.setattr(cuda_graph, "capture", lambda function, stream, pool=None: (Graph(), function()))
    network = models.cifar_resnet8(OnlineNorm2d)
    step = GraphedStep(network, loss_of, (), torch.optim.SGD(network.parameters(), 0.1))
    with torch.autocast("cpu", torch.bfloat16):
        step(torch.randn(4, 3, 8, 8), torch.arange(4))
    gc.collect()
    assert len(made) > 8 and all(copy() is not None for copy in made)
    del step
    gc.collect()
    assert all(copy() is None for copy in made)


@pytest.mark.parametrize("before", [True, False])
def test_parameters_frozen_or_unfrozen_after_the_capture_are_told(monkeypatch, before):
    stand_in(monkeypatch)
    network = models.cifar_resnet8(OnlineNorm2d)
    network.conv1.weight.requires_grad_(before)
    step = GraphedStep(network, loss_of, (), torch.optim.SGD(network.parameters(), 0.1))
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    step.backward(step(images, labels))
    network.conv1.weight.requires_grad_(not before)
    with pytest.raises(RunError, match=r"frozen or unfrozen after .*trainer\.cuda_graph=false"):
        step(images, labels)


def test_gradients_are_laid_out_like_their_parameters():
    parameters = [torch.empty(4, 3, 2, 2).to(memory_format=torch.channels_last), torch.empty(3), torch.empty(2)]
    gradients = [torch.randn(4, 3, 2, 2), torch.randn(3).bfloat16(), torch.randn(2)]
    found = like(parameters, gradients)
    assert [(g.dtype, g.stride()) for g in found] == [(p.dtype, p.stride()) for p in parameters]
    assert all(torch.equal(a, b.float()) for a, b in zip(found, gradients, strict=True)) and found[2] is gradients[2]


def assorted(device="cpu"):
    """Gradients of a network's kinds, and memory like their parameters'."""
    rows = torch.channels_last
    gradients = [torch.randn(8, 4, 3, 3, device=device).to(torch.bfloat16, memory_format=rows) for _ in range(20)]
    gradients += [torch.randn(8, 4, 1, 1, device=device).bfloat16() for _ in range(20)]
    gradients += [torch.randn(8, 3, 7, 7, device=device), torch.randn(8, 4, 3, 3, device=device)]
    gradients += [
        torch.randn(8, device=device).bfloat16(),
        torch.randn(8, device=device),
        torch.zeros(0, device=device),
    ]
    targets = [torch.empty_like(gradient, dtype=torch.float32) for gradient in gradients]
    targets = [each.to(memory_format=rows) if each.dim() == 4 else each for each in targets]
    for place in range(20, 40):  # strides of one element: as of channels_last, and as they come
        targets[place] = torch.empty(8, 4, 1, 1, device=device).as_strided((8, 4, 1, 1), (4, 1, 4, 4))
        assert targets[place].stride() != gradients[place].stride()
    return targets, gradients


def test_lists_are_copied_in_lists_that_torch_takes_whole(monkeypatch):
    copy_list, calls = torch._foreach_copy_, []

    def recorded(targets, sources):
        calls.append(len(targets))
        pairs = list(zip(targets, sources, strict=True))
        assert len({(a.dtype, b.dtype, a.stride() == b.stride()) for a, b in pairs}) == 1
        copy_list(targets, sources)

    monkeypatch.setattr(torch, "_foreach_copy_", recorded)
    targets, gradients = assorted()
    copy_together(targets, gradients)
    assert all(torch.equal(a, b.float()) for a, b in zip(targets, gradients, strict=True))
    assert sorted(calls) == [2, 2, 41]
    copy_together([], [])


@pytest.mark.gpu
def test_lists_are_copied_in_a_few_kernels():
    targets, gradients = assorted("cuda")
    copy_together(targets, gradients)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        copy_together(targets, gradients)
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert 0 < len(kernels) <= 6, [event.name for event in kernels]
    assert all(torch.equal(a, b.float()) for a, b in zip(targets, gradients, strict=True))


@pytest.mark.parametrize("stem, dtype", [("conv7x7", torch.float16), ("space_to_depth_2x4", torch.bfloat16)])
def test_steps_have_the_bits_of_autocasts_own_casts(monkeypatch, dtype, stem):
    stand_in(monkeypatch)
    torch.manual_seed(0)
    network, found = models.resnet18(OnlineNorm2d, num_classes=5, stem=stem), []
    network.to(memory_format=torch.channels_last)
    for together in (False, True):
        twin = copy.deepcopy(network)
        twin.layers_alone_read_weights = together
        optimizer = torch.optim.SGD(twin.parameters(), 0.1, 0.9)
        assert bool(weights_cast_by_layers(twin)) == together
        step, generator = GraphedStep(twin, loss_of, (), optimizer), torch.Generator().manual_seed(1)
        for images in (4, 4, 3, 4):  # the third is not replayed
            x = torch.randn(images, 3, 32, 32, generator=generator)
            with torch.autocast("cpu", dtype):
                loss = step(x, torch.arange(images) % 5)
            step.backward(loss)
            step.step_optimizer()
            optimizer.zero_grad()
        assert all(value.dtype is torch.float32 for value in step._gradients)
        found.append([loss, *twin.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
