"""Batch Renormalization against its equations, written plainly in float64."""

import copy
import pickle

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.optim.swa_utils import update_bn

from onlinenorm.normalizers import BatchRenorm1d, BatchRenorm2d

EPS, MOMENTUM = 1e-3, 0.1
SCHEDULE = {"warmup_steps": 2, "r_max_steps": 6, "d_max_steps": 4}
MEAN, SPREAD = [-2.3, 0.0, 0.8], [0.5, 2.0, 1.0]


def batches(count, shape=(6, 3, 4, 5), dtype=torch.float64, seed=0):
    """Batches whose channels are off centre, and whose statistics wander so far that limits matter."""
    generator = torch.Generator().manual_seed(seed)
    view = (1, -1, *[1] * (len(shape) - 2))
    mean, spread = (torch.tensor(values, dtype=torch.float64).view(view) for values in (MEAN, SPREAD))
    for step in range(count):
        z = torch.randn(shape, generator=generator, dtype=torch.float64)
        yield (mean + 0.4 * step + spread * (1 + step % 3) * z).to(dtype)


class Reference:
    """Algorithm 1 of the paper, with its schedule, in float64; sigma itself is what it averages."""

    def __init__(self, channels, r_max, d_max, weight, bias):
        self.mean, self.sigma = torch.zeros(channels).double(), torch.ones(channels).double().add(EPS).sqrt()
        self.r_max, self.d_max, self.steps = r_max, d_max, 0
        self.weight, self.bias = weight.detach().double().requires_grad_(), bias.detach().double().requires_grad_()

    def limits(self):
        if self.steps < 2:
            return 1.0, 0.0
        r_max = min(1 + (self.r_max - 1) * (self.steps - 2) / 4, self.r_max)
        return r_max, min(self.d_max * (self.steps - 2) / 2, self.d_max)

    def __call__(self, x):
        x_CM = x.transpose(0, 1).flatten(1)
        mean_B = x_CM.mean(1)
        sigma_B = ((x_CM - mean_B[:, None]).square().mean(1) + EPS).sqrt()
        r_max, d_max = self.limits()
        r = (sigma_B / self.sigma).detach().clamp(1 / r_max, r_max)
        d = ((mean_B - self.mean) / self.sigma).detach().clamp(-d_max, d_max)
        self.mean = self.mean + MOMENTUM * (mean_B.detach() - self.mean)
        self.sigma = self.sigma + MOMENTUM * (sigma_B.detach() - self.sigma)
        self.steps += 1
        a, b = self.weight, self.bias
        shape = (1, -1, *[1] * (x.dim() - 2))
        mean_B, sigma_B, r, d, a, b = (value.view(shape) for value in (mean_B, sigma_B, r, d, a, b))
        return ((x - mean_B) / sigma_B * r + d) * a + b


def layer_and_reference(kind=BatchRenorm2d, r_max=1.5, d_max=0.7, dtype=torch.float64):
    layer = kind(3, r_max, d_max, **SCHEDULE, eps=EPS, momentum=MOMENTUM, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, 1.5, -1.0]))
        layer.bias.copy_(torch.tensor([0.3, 0.0, -2.0]))
    return layer, Reference(3, r_max, d_max, layer.weight, layer.bias)


def compare(layer, reference, x, forward=None, tolerance=1e-10):
    """One training step of both: output, gradients and statistics."""
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    layer.zero_grad()
    reference.weight.grad = reference.bias.grad = None
    y, expected = (layer if forward is None else forward)(ours), reference(theirs)
    direction = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).reshape(x.shape).sin()
    (expected * direction).sum().backward()
    (y * direction.to(y.dtype)).sum().backward()
    pairs = {
        "y": (y, expected),
        "dx": (ours.grad, theirs.grad),
        "dweight": (layer.weight.grad, reference.weight.grad),
        "dbias": (layer.bias.grad, reference.bias.grad),
        "running_mean": (layer.running_mean, reference.mean),
        "sigma": ((layer.running_var + EPS).sqrt(), reference.sigma),
    }
    for name, (value, right) in pairs.items():
        atol = tolerance * max(1.0, float(right.detach().abs().max()))
        torch.testing.assert_close(value.double(), right, atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert int(layer.num_batches_tracked) == reference.steps


@pytest.mark.parametrize(
    "kind, shape",
    [(BatchRenorm2d, (6, 3, 4, 5)), (BatchRenorm2d, (2, 3, 1, 1)), (BatchRenorm1d, (7, 3)), (BatchRenorm1d, (4, 3, 5))],
)
def test_every_step_of_the_schedule_is_the_papers(kind, shape):
    layer, reference = layer_and_reference(kind)
    clipped = []
    for x in batches(9, shape):
        clipped.append([float(limit) for limit in layer.limits()])
        compare(layer, reference, x)
    assert clipped == [[1, 0], [1, 0], *([1 + s / 8, min(s * 0.35, 0.7)] for s in range(4)), *[[1.5, 0.7]] * 3]


def test_float32_is_as_close_as_its_digits_allow():
    layer, reference = layer_and_reference(dtype=torch.float32)
    for x in batches(8, dtype=torch.float32):
        compare(layer, reference, x.contiguous(memory_format=torch.channels_last), tolerance=5e-6)


def test_gradients_are_those_with_r_and_d_held_fixed():
    layer, _ = layer_and_reference()
    for x in batches(7):
        layer(x)
    start = copy.deepcopy(layer.state_dict())
    x = next(batches(1, (3, 3, 2, 2), seed=5)).requires_grad_()
    mean, var = x.detach().mean((0, 2, 3)), x.detach().var((0, 2, 3), correction=0)
    sigma = (layer.running_var + EPS).sqrt()
    r = ((var + EPS).sqrt() / sigma).clamp(1 / 1.5, 1.5)
    d = ((mean - layer.running_mean) / sigma).clamp(-0.7, 0.7)
    assert (r == 1.5).any() or (r == 1 / 1.5).any() or (d.abs() == 0.7).any()

    def fixed(x):  # whose numerical derivative is what autograd of the layer must give
        y = nn.functional.batch_norm(x, None, None, training=True, eps=EPS)
        view = (1, -1, 1, 1)
        return (y * r.view(view) + d.view(view)) * layer.weight.view(view) + layer.bias.view(view)

    assert torch.autograd.gradcheck(fixed, (x,))
    direction = torch.randn(x.shape, dtype=torch.float64)
    (expected,) = torch.autograd.grad((fixed(x) * direction).sum(), x)
    layer.load_state_dict(start)
    torch.testing.assert_close(torch.autograd.grad((layer(x) * direction).sum(), x)[0], expected)


def test_with_limits_of_1_and_0_it_is_batch_norm():
    layer = BatchRenorm2d(3, 1.0, 0.0, eps=EPS, momentum=MOMENTUM, dtype=torch.float64)
    batch = nn.BatchNorm2d(3, eps=EPS, momentum=MOMENTUM, dtype=torch.float64)
    for x in batches(5):
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = layer(ours), batch(theirs)
        assert torch.equal(y, expected)
        y.square().mul(x).sum().backward(), expected.square().mul(x).sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad)
        torch.testing.assert_close(layer.running_mean, batch.running_mean)
    assert layer.state_dict().keys() == batch.state_dict().keys()


def test_unclipped_it_trains_as_it_evaluates():
    layer = BatchRenorm2d(3, 1e6, 1e6, 0, 0, 0, momentum=MOMENTUM, dtype=torch.float64)
    for x in batches(4):
        expected = copy.deepcopy(layer).eval()(x)
        torch.testing.assert_close(layer(x), expected)


def test_evaluation_leaves_state_alone_and_is_batch_norms():
    layer, _ = layer_and_reference()
    for x in batches(6):
        layer(x)
    batch = nn.BatchNorm2d(3, eps=EPS, dtype=torch.float64).eval()
    batch.load_state_dict(layer.state_dict())
    before = copy.deepcopy(layer.state_dict())
    assert torch.equal(layer.eval()(x), batch(x))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_the_schedule_follows_the_papers_from_momentum():
    layer = BatchRenorm2d(1)
    assert (layer.warmup_steps, layer.r_max_steps, layer.d_max_steps) == (5_000, 40_000, 25_000)
    expected = {0: (1, 0), 5_000: (1, 0), 15_000: (1 + 2 * 10 / 35, 2.5), 25_000: (1 + 2 * 20 / 35, 5), 40_000: (3, 5)}
    for steps, limits in expected.items():
        layer.num_batches_tracked.fill_(steps)
        assert [float(limit) for limit in layer.limits()] == pytest.approx(limits), steps
    faster = BatchRenorm2d(1, momentum=0.1)
    assert (faster.warmup_steps, faster.r_max_steps, faster.d_max_steps) == (500, 4_000, 2_500)
    late = BatchRenorm2d(1, warmup_steps=50_000)
    assert (late.r_max_steps, late.d_max_steps) == (50_000, 50_000)


def test_it_goes_on_exactly_from_a_state_dict_a_copy_and_a_pickle():
    layer, _ = layer_and_reference(dtype=torch.float32)
    first, second = list(batches(4, dtype=torch.float32)), list(batches(4, dtype=torch.float32, seed=1))
    for x in first:
        layer(x)
    loaded, _ = layer_and_reference(dtype=torch.float32)
    loaded.load_state_dict(layer.state_dict())
    others = [loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    for x in second:
        expected = layer(x)
        assert all(torch.equal(other(x), expected) for other in others)
    for other in others:
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_goes_through_statistics_in_float32(dtype):
    layer, reference = layer_and_reference(dtype=torch.float32)
    layer.to(dtype)
    assert {tensor.dtype for tensor in layer.state_dict().values()} == {torch.float32, torch.int64}
    for x in batches(5, dtype=dtype):
        y = layer(x)
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), reference(x.double()), atol=0.05, rtol=0.02)
        torch.testing.assert_close(layer.running_mean.double(), reference.mean, atol=1e-5, rtol=1e-5)
    assert layer.eval()(x).dtype == dtype


def test_compiled_in_one_graph_it_is_the_same_over_the_whole_schedule():
    torch._dynamo.reset()
    layer, reference = layer_and_reference(dtype=torch.float32)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for x in batches(8, dtype=torch.float32):
        compare(layer, reference, x, compiled, tolerance=5e-6)
    assert counter.frame_count == 1, "limits are read from a tensor and not compiled in"


def test_a_single_value_a_channel_is_batch_norms_error_and_moves_nothing():
    layer = BatchRenorm1d(3)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        layer(torch.randn(1, 3))
    assert int(layer.num_batches_tracked) == 0 and torch.equal(layer.running_mean, torch.zeros(3))
    with pytest.raises(ValueError, match="expected 4D input"):
        BatchRenorm2d(3)(torch.randn(2, 3))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"r_max": 0.5}, "r_max: 0.5 must be a number of at least 1"),
        ({"d_max": -1}, "d_max: -1 must be a number of at least 0"),
        ({"momentum": None}, "momentum: None must be a number with 0 < momentum <= 1"),
        ({"eps": 0}, "eps: 0 must be a number with 0 < eps$"),
        ({"eps": -1.0}, "eps: -1.0 must be a number with 0 < eps$"),
        ({"eps": "a"}, "eps: 'a' must be a number with 0 < eps$"),
        ({"eps": float("inf")}, "eps: inf must be a number with 0 < eps$"),
        ({"momentum": float("nan")}, "momentum: nan must be a number with 0 < momentum <= 1"),
        ({"num_features": 0}, "num_features: 0 is not a whole number 1 or larger"),
        ({"num_features": 4.0}, "num_features: 4.0 is not a whole number 1 or larger"),
        ({"warmup_steps": -1}, "warmup_steps: -1 is not a whole number 0 or larger"),
        ({"warmup_steps": 10, "r_max_steps": 5}, "r_max_steps: 5 is not a whole number 10 or larger"),
        ({"d_max_steps": 100}, "d_max_steps: 100 is not a whole number 5000 or larger"),
    ],
)
def test_wrong_arguments_are_told(arguments, message):
    with pytest.raises(ValueError, match=message):
        BatchRenorm2d(**({"num_features": 4} | arguments))


def test_checkpointing_is_told_and_a_layer_without_affine_has_no_parameters():
    layer = BatchRenorm2d(3, affine=False)
    assert not list(layer.parameters()) and layer(next(batches(1, dtype=torch.float32))).shape == (6, 3, 4, 5)
    x = next(batches(1, dtype=torch.float32)).requires_grad_()
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    with pytest.raises(RuntimeError, match="activation checkpointing repeats"):
        y.sum().backward()


@pytest.mark.parametrize("warmup_steps", [0, 2])  # limits open at once, and in the middle
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torchs_update_bn_estimates_its_statistics_anew(warmup_steps, dtype):
    network = nn.Sequential(
        *(BatchRenorm2d(3, **{**SCHEDULE, "warmup_steps": warmup_steps}, eps=EPS, dtype=dtype) for _ in "ab")
    )
    for x in batches(4, dtype=dtype, seed=1):
        network(x)
    seen = list(batches(5, dtype=dtype))
    update_bn(seen, network)
    for layer in network:
        sigma = [(x.var((0, 2, 3), correction=0) + EPS).sqrt() for x in seen]
        torch.testing.assert_close(layer.running_mean, torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0))
        torch.testing.assert_close(layer.running_var, torch.stack(sigma).mean(0).square() - EPS)
        seen = [nn.functional.batch_norm(x, None, None, training=True, eps=EPS) for x in seen]
        assert layer.momentum == 0.01
