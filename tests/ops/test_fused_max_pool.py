"""OnlineNorm, ReLU and max-pool in one kernel each way: against the sample loop in float64 and torch's pooling."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("triton")

from onlinenorm import OnlineNorm2d, models
from onlinenorm.models.blocks import norm_act_max_pool
from onlinenorm.ops.fused import max_pool, single_read, tiling
from onlinenorm.ops.spec import NormSpec

COMPENSATIONS = ("clamp", "layer_scaling", "none")
STATE = ("running_mean", "running_var", "control_u", "control_v")


class Pooled(nn.Module):
    """What the start of an ImageNet network does behind its first convolution."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.pool = norm, nn.MaxPool2d(3, 2, 1)

    def forward(self, x):
        return norm_act_max_pool(self.norm, x, self.pool)


def layer(error_compensation, channels, **options):
    torch.manual_seed(channels)
    norm = OnlineNorm2d(channels, 0.97, 0.9, error_compensation=error_compensation, clamp_value=1.5, **options)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(channels) + 0.5)
        norm.bias.copy_(torch.rand(channels) - 0.3)
        norm.weight[::7] *= -1  # where the largest input is the smallest output
    return norm


def draw(shape, dtype, seed, coarse=False):
    """Images; with ``coarse`` of five values, so that most windows hold equal ones."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.7 + 0.4
    return (x * 2).round().div(2).to(dtype) if coarse else x.to(dtype)


def steps(module, norm, images, grads, device):
    """Outputs, gradients and state of training steps over these images."""
    found = {}
    for n, (x, grad) in enumerate(zip(images, grads, strict=True)):
        x = x.to(device).contiguous(memory_format=torch.channels_last).detach().requires_grad_()
        y = module(x)
        y.backward(grad.to(y))
        found |= {f"y{n}": y, f"grad_x{n}": x.grad}
    found |= {name: getattr(norm, name) for name in (*STATE,)}
    found |= {f"grad_{name}": p.grad for name, p in norm.named_parameters()}
    return {name: value.detach().double().cpu() for name, value in found.items()}


def fused(norm):
    """The kernels themselves, without torch.compile and whatever the size of the images."""

    def run(x):
        state = norm.running_mean, norm.running_var, norm.control_u, norm.control_v
        return max_pool.OnlineNormMaxPool.apply(x, norm.weight, norm.bias, *state, norm.spec)

    return run


def distances(found, exact):
    return {name: ((found[name] - value).norm() / value.norm().clamp(min=1e-9)).item() for name, value in exact.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("error_compensation", COMPENSATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(5, 64, 112, 112), (9, 128, 28, 20), (3, 64, 2, 2), (7, 64, 6, 4), (2, 192, 50, 176)]
)
def test_kernels_agree_with_the_sample_loop(shape, dtype, error_compensation, coarse):
    images = [draw(shape, dtype, seed, coarse) for seed in range(3)]
    samples, channels, height, width = shape
    grads = [draw((samples, channels, height // 2, width // 2), dtype, 10 + seed) for seed in range(3)]
    norm = layer(error_compensation, channels).cuda()
    exact = layer(error_compensation, channels, backend="reference").double()
    eager = layer(error_compensation, channels, backend="torch").cuda()
    truth = steps(Pooled(exact), exact, [x.double() for x in images], [g.double() for g in grads], "cpu")
    ours = distances(steps(fused(norm), norm, images, grads, "cuda"), truth)
    theirs = distances(steps(Pooled(eager), eager, images, grads, "cuda"), truth)
    for name, distance in ours.items():
        assert distance <= 2 * theirs[name] + 2e-3, (name, distance, theirs[name])


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("error_compensation", COMPENSATIONS)
def test_values_that_are_not_finite_stay_where_torch_has_them(error_compensation, bad):
    x = draw((4, 64, 8, 8), torch.bfloat16, 0)
    x[2, 5, 3, 3], x[1, 7, 0, 0] = bad, bad
    norm = layer(error_compensation, 64, backend="fused").cuda()
    with torch.no_grad():
        norm.weight[5] = 0
    twin = copy.deepcopy(norm)
    x = x.cuda().contiguous(memory_format=torch.channels_last)
    found, expected = fused(norm)(x), F.max_pool2d(twin(x, relu=True), 3, 2, 1)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2, equal_nan=True)
    for name in STATE[:2]:
        torch.testing.assert_close(getattr(norm, name), getattr(twin, name), equal_nan=True)


def one_step(norm, x, grad, skip_grad):
    """All that both operators give, from copies of the layer's state."""
    weight, bias = norm.weight.detach(), norm.bias.detach()
    arguments = *norm.spec.as_arguments(), norm.spec.processes
    mean, var, u, v = (getattr(norm, name).clone() for name in STATE)
    y, tables, indices = max_pool.fused_max_pool_forward(x, weight, bias, mean, var, *arguments)
    of_grad = max_pool.fused_max_pool_backward(grad, skip_grad, x, weight, bias, tables, indices, u, v, *arguments)
    return [y, indices, mean, var, u, v, *of_grad]


@pytest.mark.gpu
def test_random_shapes_repeat_bit_for_bit_while_the_gpu_is_busy():
    rng, other_work = random.Random(0), torch.cuda.Stream()
    noise = torch.randn(2048, 2048, device="cuda")
    for trial in range(60):
        error_compensation, channels = COMPENSATIONS[trial % 3], 64 * rng.choice([1, 1, 2, 3])
        height, width = 2 * rng.randint(1, 60), 2 * rng.randint(1, 88)
        samples = rng.randint(1, max(1, min(200, 6_000_000 // (channels * height * width))))
        x, other = (draw((samples, channels, height, width), torch.bfloat16, seed) for seed in (trial, 100 + trial))
        x = x.cuda().contiguous(memory_format=torch.channels_last)
        grad, skip_grad = (
            F.max_pool2d(t, 2).cuda().contiguous(memory_format=torch.channels_last) for t in (x.cpu(), other)
        )
        norm = layer(error_compensation, channels).cuda()
        with torch.cuda.stream(other_work):
            for _ in range(5):
                noise = torch.mm(noise, noise).tanh_()

        tensors = norm, x, grad, skip_grad
        first = one_step(*tensors)
        assert all(torch.isfinite(t).all() for t in first)
        for _ in range(10):
            equal = [torch.equal(a, b) for a, b in zip(one_step(*tensors), first, strict=True)]
            assert all(equal), (x.shape, error_compensation)
        # Two gradients are added as torch adds them.
        added = one_step(norm, x, grad + skip_grad, None)
        for a, b in zip(added, first, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("error_compensation", COMPENSATIONS)
def test_graphs_replay_the_bits_of_uncaptured_steps(error_compensation):
    """Outputs, gradients and state, of a batch of other images at every step."""
    shape = (8, 64, 56, 56)
    batches = [[draw(size, torch.bfloat16, seed) for size in (shape, (8, 64, 28, 28))] for seed in range(5)]
    batches = [[t.cuda().contiguous(memory_format=torch.channels_last) for t in batch] for batch in batches]
    x, grad = (t.clone() for t in batches[0])
    x.requires_grad_()
    norm = layer(error_compensation, 64).cuda()
    twin = copy.deepcopy(norm)

    def step(norm):
        y = fused(norm)(x)
        return [y, *torch.autograd.grad(y, (x, norm.weight, norm.bias), grad)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(norm)
    torch.cuda.current_stream().wait_stream(side)
    step(twin)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(norm)
    for n, batch in enumerate(batches):
        with torch.no_grad():
            x.copy_(batch[0])
            grad.copy_(batch[1])
        graph.replay()
        expected = step(twin)
        for name, mine, other in zip(("y", "x", "weight", "bias"), captured, expected, strict=True):
            assert torch.equal(mine, other) and other.any(), (n, name)
        for name in STATE:
            assert torch.equal(getattr(norm, name), getattr(twin, name)), (n, name)


@pytest.mark.gpu
@pytest.mark.parametrize("error_compensation", COMPENSATIONS)
def test_compiled_networks_take_the_kernels_and_agree_with_eager_ones(error_compensation):
    torch.manual_seed(0)
    norm = layer(error_compensation, 64, backend="fused")
    network = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), Pooled(norm), TwoReaders()).cuda()
    network = network.to(memory_format=torch.channels_last)
    twin = copy.deepcopy(network)
    compiled = torch.compile(network, fullgraph=True)
    seen = []
    for seed in range(3):
        x = draw((4, 3, 56, 56), torch.float32, seed).cuda().contiguous(memory_format=torch.channels_last)
        for module in (compiled, twin):
            with torch.autocast("cuda", torch.bfloat16):
                module(x).square().mean().backward()
    for (name, parameter), other in zip(network.named_parameters(), twin.parameters(), strict=True):
        seen.append(((parameter.grad - other.grad).norm() / other.grad.norm(), name))
    assert max(seen)[0] < 3e-2, max(seen)
    for name in STATE[:2]:
        torch.testing.assert_close(getattr(norm, name), getattr(twin[1].norm, name), rtol=1e-3, atol=1e-4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        with torch.autocast("cuda", torch.bfloat16):
            compiled(x).square().mean().backward()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert sum(name.startswith("online_norm") for name in names) == 2 and not any("pool" in name for name in names)


class TwoReaders(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(64, 64, 1), nn.Conv2d(64, 64, 1)

    def forward(self, x):
        return self.left(x) * 0.3 + self.right(x)


def test_without_the_kernels_layers_follow_one_another():
    norm = layer("clamp", 4, backend="torch")
    twin = copy.deepcopy(norm)
    x = draw((3, 4, 8, 6), torch.float32, 0)
    y = norm(x, relu=True, max_pool=True)
    assert torch.equal(y, F.max_pool2d(twin(x, relu=True), 3, 2, 1))
    assert torch.equal(norm.running_var, twin.running_var)
    assert torch.equal(norm.eval()(x, relu=True, max_pool=True), F.max_pool2d(twin.eval()(x, relu=True), 3, 2, 1))


def test_hooks_on_the_pooling_of_eager_networks_are_called():
    module, called = Pooled(layer("clamp", 4, backend="torch")), []
    module.pool.register_forward_hook(lambda *_: called.append("pool"))
    module.norm.register_forward_hook(lambda _, __, y: called.append(tuple(y.shape)))
    module(draw((3, 4, 8, 6), torch.float32, 0))
    assert called == [(3, 4, 8, 6), "pool"]


@pytest.mark.parametrize("error_compensation", ["clamp", "layer_scaling"])
def test_everything_that_suits_fits_on_the_chip(error_compensation, monkeypatch):
    chip = 132, 232_448
    monkeypatch.setattr(single_read, "supports_device", lambda device: True)
    monkeypatch.setattr(single_read, "_chip", lambda device: chip)
    spec, rng, taken = NormSpec(error_compensation=error_compensation), random.Random(0), 0
    for _ in range(2000):
        shape = (rng.randint(1, 3), 64 * rng.randint(1, 4), rng.randint(1, 200), rng.randint(1, 200))
        x = torch.empty(shape, dtype=torch.bfloat16, device="meta").contiguous(memory_format=torch.channels_last)
        x = _OnAGpu(x)
        if not max_pool.supports(x, spec):
            continue
        taken += 1
        scaled = error_compensation == "layer_scaling"
        for direction in ("forward", "backward"):
            tuning = tiling.POOLED_TUNINGS[direction, scaled]
            values = {"RESIDUAL": 0, "RELU": 1, "SKIP_GRAD": 1, "SHORTCUT": 0}
            cut = tiling.Tiling.of_pooled(*shape[2:], direction == "forward", 1)
            assert tiling.shared_memory(direction, values, tuning, cut) <= chip[1], (shape, direction)
            ctas = chip[0] // (shape[1] // 64)
            assert not scaled or ctas * tuning.stages >= cut.tiles, shape
    assert taken > 100


class _OnAGpu:
    """A tensor as far as `supports` looks at it."""

    def __init__(self, x):
        self.shape, self.dtype, self.is_cuda, self.device = x.shape, x.dtype, True, torch.device("cuda", 0)
        self.element_size = x.element_size
        self.is_contiguous = x.is_contiguous


@pytest.mark.parametrize("size", [(2, 2), (6, 4), (28, 28), (112, 112), (10, 176)])
@pytest.mark.parametrize("halo", [False, True])
@pytest.mark.parametrize("most_rows", [1, 224, 448, 10_000])
def test_pooled_tiles_cover_every_pair_of_rows_once(size, halo, most_rows):
    height, width = size
    cut = tiling.Tiling.of_pooled(height, width, halo, most_rows)
    assert cut.tile_rows % (2 * width) == 0 and cut.box_rows == width <= tiling.BOX_ROWS
    assert (cut.tiles - 1) * cut.tile_rows < height * width <= cut.tiles * cut.tile_rows
    assert cut.boxes * cut.box_rows == cut.tile_rows + halo * width


@pytest.mark.parametrize("fuse", [True, False])
def test_compiled_networks_ask_the_normalizer_unless_told_not_to(fuse):
    calls = []

    class Norm(nn.BatchNorm2d):
        fuses_max_pool = fuses_residual = True

        def forward(self, x, residual=None, relu=False, max_pool=False):
            calls.append(max_pool)
            return F.max_pool2d(x, 3, 2, 1) if max_pool else x

    model = models.resnet18(Norm, fuse_max_pool=fuse)
    torch.compile(model, backend="eager")(torch.randn(2, 3, 32, 32))
    assert calls.count(True) == fuse and len(calls) == 20
