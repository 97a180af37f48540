"""The norms of a block's end and of its shortcut in one kernel each way: against the sample loop in float64."""

import copy
import os
import random
import sys
from functools import partial

import pytest
import torch
from torch import nn

if not torch.cuda.is_available():
    if "triton" not in sys.modules:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton was imported without TRITON_INTERPRET=1", allow_module_level=True)

from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from onlinenorm import OnlineNorm2d, models
from onlinenorm.errors import ArgumentError
from onlinenorm.models.blocks import Bottleneck
from onlinenorm.ops.fused import shortcut, single_read
from onlinenorm.ops.fused.inductor_pass import FoldGradients
from onlinenorm.ops.fused.tiling import Tuning

COMPENSATIONS = ("clamp", "layer_scaling", "none")
STATE = ("running_mean", "running_var", "control_u", "control_v")


@pytest.fixture
def one_kernel(monkeypatch):
    """Backward too, also where the table says that it does not pay."""
    usual, other = single_read.shortcut_tuning_for, Tuning(128, stages=2, chunk=8, rows=400)
    monkeypatch.setattr(single_read, "shortcut_tuning_for", lambda *site: usual(*site) or other)


class Tail(nn.Module):
    """What the end of a residual block with a projection does."""

    def __init__(self, channels, error_compensation, **options):
        super().__init__()
        torch.manual_seed(channels)
        constants = {"error_compensation": error_compensation, "clamp_value": 1.5, **options}
        self.last, self.side = (OnlineNorm2d(channels, 0.97, 0.9, **constants) for _ in range(2))
        with torch.no_grad():
            for norm in (self.last, self.side):
                norm.weight.copy_(torch.rand(channels) + 0.5)
                norm.bias.copy_(torch.rand(channels) - 0.3)
                norm.weight[::7] *= -1
                norm.running_mean.copy_(torch.randn(channels) * 0.1)
                norm.running_var.copy_(torch.rand(channels) + 0.5)
                norm.control_u.copy_(torch.randn(channels) * 1e-3)
                norm.control_v.copy_(torch.randn(channels) * 1e-3)

    def forward(self, x, shortcut_x):
        return self.last(x, residual=shortcut_x, relu=True, shortcut=self.side)


class TwoCalls(Tail):
    def forward(self, x, shortcut_x):
        return self.last(x, residual=self.side(shortcut_x), relu=True)


def as_two_calls(tail):
    """The same layers, called one after the other."""
    twin = copy.deepcopy(tail)
    twin.__class__ = TwoCalls
    return twin


def draw(shape, dtype, seed):
    """Inputs of both layers and a gradient, channels_last."""
    drawn = torch.randn((3, *shape), generator=torch.Generator().manual_seed(seed))
    found = 0.7 * drawn[0] + 0.4, 2 * drawn[1] - 1, drawn[2]
    return [t.to(dtype).contiguous(memory_format=torch.channels_last) for t in found]


def steps(tail, shape, dtype, device, seeds=3):
    """Outputs, gradients and state of training steps, in the layers' own precision if that is float64."""
    found, exact = {}, tail.last.running_mean.dtype == torch.float64
    for seed in range(seeds):
        x, y, grad = (t.to(device, torch.float64 if exact else dtype) for t in draw(shape, dtype, seed))
        x, y = x.requires_grad_(), y.requires_grad_()
        out = tail(x, y)
        out.backward(grad)
        found |= {f"out{seed}": out, f"grad_x{seed}": x.grad, f"grad_shortcut_x{seed}": y.grad}
    found |= {f"grad_{name}": p.grad for name, p in tail.named_parameters()} | dict(tail.named_buffers())
    return {name: value.detach().double().cpu() for name, value in found.items()}


def distances(found, exact):
    return {name: ((found[name] - value).norm() / value.norm().clamp(min=1e-9)).item() for name, value in exact.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("error_compensation", COMPENSATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [(6, 256, 56, 56), (9, 512, 28, 28), (17, 1024, 14, 14), (37, 2048, 7, 7), (300, 64, 3, 3), (3, 192, 40, 31),
     (1, 64, 1, 1), (2, 64, 112, 112)],
)  # fmt: skip
def test_kernels_agree_with_the_sample_loop(shape, dtype, error_compensation, one_kernel):
    agrees(shape, dtype, error_compensation)


@pytest.mark.gpu
@pytest.mark.parametrize("error_compensation", COMPENSATIONS)
def test_backward_of_two_kernels_agrees_with_the_sample_loop(error_compensation):
    agrees((17, 1024, 14, 14), torch.bfloat16, error_compensation)


def agrees(shape, dtype, error_compensation):
    tail = Tail(shape[1], error_compensation, backend="fused").cuda()
    x = draw(shape, dtype, 0)[0].cuda()
    assert shortcut.supports(x, x, tail.last.spec)
    exact = as_two_calls(Tail(shape[1], error_compensation, backend="reference").double())
    eager = as_two_calls(Tail(shape[1], error_compensation, backend="torch").cuda())
    truth = steps(exact, shape, dtype, "cpu")
    ours = distances(steps(tail, shape, dtype, "cuda"), truth)
    theirs = distances(steps(eager, shape, dtype, "cuda"), truth)
    for name, distance in ours.items():
        assert distance <= 2 * theirs[name] + 2e-3, (name, distance, theirs[name])


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", [3, 14, 56])
@pytest.mark.parametrize("error_compensation", ["clamp", "layer_scaling"])
def test_values_that_are_not_finite_stay_where_two_calls_have_them(bad, side, error_compensation, one_kernel):
    tail = Tail(64, error_compensation, backend="fused").cuda()
    twin = as_two_calls(tail)
    x, y, grad = (t.cuda() for t in draw((6, 64, side, side), torch.bfloat16, 0))
    x[2, 5, 0, 0], y[3, 7, 1, 1], grad[4, 9, 2, 2] = bad, bad, bad
    x, y = x.requires_grad_(), y.requires_grad_()
    found, expected = [], []
    for layers, results in ((tail, found), (twin, expected)):
        out = layers(x, y)
        inputs = [x, y, *layers.parameters()]
        results += [out, *torch.autograd.grad(out, inputs, grad), *layers.buffers()]
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine.isfinite(), other.isfinite())
        finite = other.isfinite()
        mine, other = mine[finite].double(), other[finite].double()
        # Two calls round the shortcut's output, which moves a few values across the edge of the ReLU.
        assert (mine - other).norm() <= 0.1 * other.norm() + 1e-6


def one_step(tail, x, y, grad, skip_grad):
    """All that both operators give, from copies of the layers' states."""
    layers = [[t.detach() for t in (n.weight, n.bias)] for n in (tail.last, tail.side)]
    states = [[getattr(n, name).clone() for name in STATE] for n in (tail.last, tail.side)]
    constants = tail.last.spec.as_arguments()
    statistics, controls = ([state[k : k + 2] for state in states] for k in (0, 2))
    out, tables, mask = shortcut.fused_shortcut_forward(
        x, y, *layers[0], *statistics[0], *layers[1], *statistics[1], *constants
    )
    gradients = shortcut.fused_shortcut_backward(
        grad, skip_grad, x, y, *layers[0], *layers[1], tables, mask, *controls[0], *controls[1], *constants
    )
    return [out, mask, *states[0], *states[1], *gradients]


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
def test_random_shapes_repeat_bit_for_bit_while_the_gpu_is_busy(seed, one_kernel):
    rng, other_work = random.Random(seed), torch.cuda.Stream()
    noise, taken = torch.randn(2048, 2048, device="cuda"), 0
    for trial in range(30 * seed, 30 * seed + 30):
        channels, side = 64 * rng.choice([1, 2, 4, 16]), rng.choice([1, 2, 3, 7, 8, 14, 15, 28, 31, 56])
        samples = rng.randint(1, max(1, min(300, 4_000_000 // (channels * side * side))))
        dtype, shape = rng.choice([torch.bfloat16, torch.float16]), (samples, channels, side, side)
        tail = Tail(channels, COMPENSATIONS[trial % 3], backend="fused").cuda()
        x, y, grad = (t.cuda() for t in draw(shape, dtype, trial))
        if not shortcut.supports(x, y, tail.last.spec):  # larger than the chip, with layer scaling
            assert tail.last.error_compensation == "layer_scaling" and x[0].nbytes > 2**20
            continue
        taken += 1
        skip_grad = draw(shape, dtype, 1000 + trial)[2].cuda() if trial % 2 else None
        with torch.cuda.stream(other_work):
            for _ in range(5):
                noise = torch.mm(noise, noise).tanh_()
        first = one_step(tail, x, y, grad, skip_grad)
        for _ in range(15):
            again = one_step(tail, x, y, grad, skip_grad)
            assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True)), (shape, trial % 3)
        if skip_grad is not None:  # two gradients are added as torch adds them
            added = one_step(tail, x, y, grad + skip_grad, None)
            for mine, other in zip(first[2:], added[2:], strict=True):
                assert (mine.double() - other.double()).norm() <= 1e-2 * other.double().norm() + 1e-6, shape
    assert taken > 25


@pytest.mark.gpu
def test_graphs_replay_what_eager_steps_give():
    tail = Tail(256, "clamp", backend="fused").cuda()
    alone = copy.deepcopy(tail)
    x, y, grad = (t.cuda() for t in draw((8, 256, 28, 28), torch.bfloat16, 0))
    x, y = x.requires_grad_(), y.requires_grad_()

    def step(layers):
        layers(x, y).backward(grad)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(tail)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(tail)
    for _ in range(4):
        graph.replay()
        step(tail)
    for _ in range(1 + 2 * 4):
        step(alone)
    for name, value in alone.named_buffers():
        assert torch.equal(dict(tail.named_buffers())[name], value), name


@pytest.mark.gpu
@pytest.mark.parametrize("error_compensation", COMPENSATIONS)
def test_compiled_blocks_take_the_kernels_and_agree_with_eager_ones(error_compensation):
    torch.manual_seed(0)
    network = Blocks(partial(OnlineNorm2d, backend="fused", error_compensation=error_compensation)).cuda()
    network = network.to(memory_format=torch.channels_last)
    twin, compiled = copy.deepcopy(network), torch.compile(network, fullgraph=True)
    for seed in range(3):
        x = draw((8, 64, 28, 28), torch.float32, seed)[0].cuda()
        for module in (compiled, twin):
            with torch.autocast("cuda", torch.bfloat16):
                module(x).square().mean().backward()
    for (name, value), other in zip(network.named_buffers(), twin.buffers(), strict=True):
        if "running" in name:
            torch.testing.assert_close(value, other, rtol=1e-2, atol=1e-3, msg=name)
    far = [
        (((p.grad - q.grad).norm() / q.grad.norm()).item(), name)
        for (name, p), q in zip(network.named_parameters(), twin.parameters(), strict=True)
    ]
    assert max(far)[0] < 0.15, max(far)  # rounding moves values across the edges of masks; exactness: see above
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        with torch.autocast("cuda", torch.bfloat16):
            compiled(x).square().mean().backward()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert sum(name.startswith("online_norm") for name in names) == 2 * 6  # of seven layers


class Blocks(nn.Module):
    """A block with a projection, and one without that makes two readers of its output."""

    def __init__(self, normalizer, fuse=True):
        super().__init__()
        projection = nn.Sequential(nn.Conv2d(64, 256, 1, bias=False), normalizer(256))
        self.first = Bottleneck(64, 64, downsample=projection, norm_layer=normalizer)
        self.second = Bottleneck(256, 64, norm_layer=normalizer)
        self.first.fuse_shortcut = fuse

    def forward(self, x):
        return self.second(self.first(x))


@pytest.mark.parametrize("backend", ["fused", "torch", "reference"])
@pytest.mark.parametrize("error_compensation", COMPENSATIONS)
def test_without_the_kernels_layers_follow_one_another(backend, error_compensation):
    device = "cuda" if backend == "fused" and torch.cuda.is_available() else "cpu"  # Triton interprets without a GPU
    tail = Tail(8, error_compensation, backend=backend).to(device)
    twin = as_two_calls(tail)
    ours, theirs = (steps(layers, (3, 8, 4, 5), torch.float32, device) for layers in (tail, twin))
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    x, y, _ = (t.to(device) for t in draw((3, 8, 4, 5), torch.float32, 7))
    assert torch.equal(tail.eval()(x, y), twin.eval()(x, y))


def test_layers_that_are_not_alike_follow_one_another(monkeypatch):
    tail = Tail(8, "clamp", backend="fused")
    x = draw((3, 8, 4, 5), torch.float32, 0)[0]
    assert tail.last._takes(tail.side, x)
    for other in (
        OnlineNorm2d(8, 0.98, 0.9, clamp_value=1.5, backend="fused"),
        OnlineNorm2d(8, 0.97, 0.9, clamp_value=1.5, backend="torch"),
        copy.deepcopy(tail.side).eval(),
        nn.BatchNorm2d(8),
    ):
        assert not tail.last._takes(other, x)
    with pytest.raises(ArgumentError, match="no residual"):
        tail.last(x, relu=True, shortcut=tail.side)


class Doubling(OnlineNorm2d):
    """Does not say that it fuses."""

    def forward(self, x, **options):
        return 2 * super().forward(x, **options)


def doubled(norm):
    norm.__class__ = Doubling


def replaced(norm):
    forward = norm.forward
    norm.forward = lambda x: 2 * forward(x)


@pytest.mark.parametrize(
    "change",
    [
        lambda norm: norm.register_forward_pre_hook(lambda layer, inputs: (2 * inputs[0],)),
        lambda norm: norm.register_forward_hook(lambda layer, inputs, output: 2 * output),
        lambda norm: norm.register_full_backward_hook(lambda layer, grad_in, grad_out: (2 * grad_in[0],)),
        replaced,
        doubled,
    ],
)
def test_a_layer_that_a_residual_passes_is_called_where_its_call_is_more_than_the_kernel(change):
    device = "cuda" if torch.cuda.is_available() else "cpu"  # Triton interprets without a GPU
    tail = Tail(8, "clamp", backend="fused").to(device)
    twin = as_two_calls(tail)
    for layers in (tail, twin):
        change(layers.side)
        if type(layers.side) is Doubling:
            doubled(layers.last)  # of one class
    ours, theirs = (steps(layers, (3, 8, 4, 5), torch.float32, device) for layers in (tail, twin))
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def launched(monkeypatch):
    """Where the kernels serve but are not there: notes what they would be given, and has all tensors as they are."""
    calls = []
    monkeypatch.setattr(single_read, "supports", lambda *_, **__: True)
    monkeypatch.setattr(single_read, "_launch", lambda direction, inputs, flags, *_, **t: calls.append((inputs, flags)))
    return calls


def test_backward_is_a_kernel_of_each_layer_where_one_for_both_does_not_pay(monkeypatch):
    calls = launched(monkeypatch)
    x, y, grad = draw((2, 64, 14, 14), torch.bfloat16, 0)
    found = one_step(Tail(64, "clamp"), x, y, grad, grad)
    (_, forward), (inputs, last), (of_shortcut, side) = calls
    assert forward == ("RELU", "RESIDUAL", "SHORTCUT")
    assert last == ("RELU", "RESIDUAL", "SKIP_GRAD") and inputs[1].data_ptr() == x.data_ptr()
    assert side == () and of_shortcut[1].data_ptr() == y.data_ptr() and len(of_shortcut) == 2
    assert [t.shape for t in found[-6:]] == [x.shape, y.shape, *[(64,)] * 4]


def test_compiled_blocks_call_the_operators_with_both_gradients(monkeypatch):
    calls, nodes = launched(monkeypatch), []

    def compile_backward(module, _):
        FoldGradients()(module.graph)
        module.recompile()
        operator = torch.ops.onlinenorm.fused_shortcut_backward.default
        nodes.extend(node for node in module.graph.nodes if node.args[:1] == (operator,))
        return make_boxed_func(module.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=lambda module, _: make_boxed_func(module.forward), bw_compiler=compile_backward)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # Triton interprets without a GPU
    network = Blocks(partial(OnlineNorm2d, backend="fused")).to(device, torch.bfloat16)
    network = network.to(memory_format=torch.channels_last)
    for norm in network.modules():
        if isinstance(norm, OnlineNorm2d):
            norm.float()
    compiled = torch.compile(network, backend=backend, fullgraph=True)
    x = draw((2, 64, 5, 5), torch.bfloat16, 0)[0].to(device)
    compiled(x).sum().backward()
    (node,) = nodes
    assert node.kwargs["skip_grad"] is not None
    of_shortcut = [(inputs, flags) for inputs, flags in calls if "SHORTCUT" in flags]
    assert [len(inputs) for inputs, _ in of_shortcut] == [2, 4] and len(calls) == 2 * 6
    assert of_shortcut[1][1] == ("RELU", "RESIDUAL", "SHORTCUT", "SKIP_GRAD")
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("options", [{}, {"fuse_shortcut": False}], ids=["by default", "told not to"])
def test_compiled_networks_ask_the_normalizer_unless_told_not_to(options):
    calls = []

    class Norm(nn.BatchNorm2d):
        fuses_shortcut = fuses_residual = True

        def forward(self, x, residual=None, relu=False, shortcut=None):
            calls.append(shortcut)
            return x

    model = models.resnet18(Norm, **options)
    torch.compile(model, backend="eager")(torch.randn(2, 3, 32, 32))
    fused = 0 if options else 3
    assert sum(norm is not None for norm in calls) == fused and len(calls) == 20 - fused
