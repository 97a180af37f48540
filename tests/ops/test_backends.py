"""Laws that hold for the op whatever the backend, and agreement of the backends with the sample loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onlinenorm import OnlineNorm2d
from onlinenorm.ops.vectorized import linear_recurrence, moments

COMPENSATIONS = ("clamp", "layer_scaling", "none")
STATE = ("running_mean", "running_var", "control_u", "control_v")


def run(layer, batches, gradients, residuals=None, relu=False):
    """Outputs, input gradients and state of a training sequence."""
    outputs, grads = [], []
    for step, (x, g) in enumerate(zip(batches, gradients, strict=True)):
        x = x.clone().requires_grad_()
        y = layer(x, residual=None if residuals is None else residuals[step], relu=relu)
        y.backward(g)
        outputs.append(y.detach())
        grads.append(x.grad)
    named = {name: getattr(layer, name) for name in STATE} | {n: p.grad for n, p in layer.named_parameters()}
    return {"y": torch.cat(outputs), "grad_x": torch.cat(grads), **named}


def pair(backends, channels, seed, dtype=torch.float64, **arguments):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(channels, generator=generator, dtype=dtype) + 0.5
    bias = torch.randn(channels, generator=generator, dtype=dtype)
    layers = []
    for backend in backends:
        layer = OnlineNorm2d(channels, backend=backend, dtype=dtype, **arguments)
        layer.load_state_dict({"weight": weight, "bias": bias}, strict=False)
        layers.append(layer)
    return layers


def assert_same(actual, expected, tolerance):
    for name, value in expected.items():
        scale = value.abs().max().clamp(min=1e-12)
        assert ((actual[name] - value).abs().max() / scale) <= tolerance, name


@settings(max_examples=40)
@given(
    samples=st.integers(1, 9),
    channels=st.sampled_from([1, 2, 6]),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    error_compensation=st.sampled_from(COMPENSATIONS),
    alpha_fwd=st.floats(0.01, 0.999),
    alpha_bkw=st.floats(0.01, 0.999),
    group=st.sampled_from([None, 1, 2]),
    relu=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_torch_backend_equals_sample_loop(
    samples, channels, height, width, error_compensation, alpha_fwd, alpha_bkw, group, relu, seed
):
    group = None if group is not None and channels % group else group
    arguments = dict(
        error_compensation=error_compensation,
        alpha_fwd=alpha_fwd,
        alpha_bkw=alpha_bkw,
        clamp_value=1.5,
        layer_scaling_group_size=group,
    )
    generator = torch.Generator().manual_seed(seed)
    shape = (3, samples, channels, height, width)
    x = 3 * torch.randn(shape, generator=generator, dtype=torch.float64) - 2
    g, residual = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    loop, fast = pair(("reference", "torch"), channels, seed, **arguments)
    expected = run(loop, x, g, residual, relu)
    if error_compensation == "layer_scaling" and (group or channels) * height * width == 1:
        # A value over its own magnitude is its sign: gradients vanish, and what is left of them is rounding.
        expected = {name: expected[name] for name in ("y", "running_mean", "running_var")}
    assert_same(run(fast, x, g, residual, relu), expected, 1e-9)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("error_compensation", COMPENSATIONS)
def test_batches_are_only_a_way_to_cut_the_stream(backend, error_compensation):
    """One batch of 12 or batches of 5, 1 and 6: the same outputs, gradients and state."""
    whole, cut = pair((backend, backend), 4, 0, error_compensation=error_compensation)
    x, g = torch.randn(2, 12, 4, 3, 3, dtype=torch.float64) * 2 + 1
    expected = run(whole, [x], [g])
    assert_same(run(cut, x.split([5, 1, 6]), g.split([5, 1, 6])), expected, 1e-10)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_output_depends_on_earlier_samples_only(backend):
    first, second = pair((backend, backend), 3, 1)
    x = torch.randn(8, 3, 4, 4, dtype=torch.float64)
    changed = x.clone()
    changed[5:] += 10
    assert torch.equal(first(x)[:6][:5], second(changed)[:5])
    assert not torch.equal(first(x)[6:], second(changed)[6:])


@pytest.mark.parametrize("error_compensation", COMPENSATIONS)
def test_start_up_extremes_follow_the_loop(error_compensation):
    """First batches with mean squares of 1e5, constant channels and large means."""
    loop, fast = pair(("reference", "torch"), 4, 2, error_compensation=error_compensation)
    x = torch.randn(2, 32, 4, 5, 5, dtype=torch.float64)
    x[:, :, 0] *= 300
    x[:, :, 1] = 7
    x[:, :, 2] += 1000
    g = torch.randn_like(x)
    assert_same(run(fast, x, g), run(loop, x, g), 1e-8)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_values_stay_in_their_channel(backend, bad):
    (layer,) = pair((backend,), 3, 3)
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    x[2, 1, 0, 0] = bad
    x.requires_grad_()
    y = layer(x)
    y.backward(torch.ones_like(y))
    others = [0, 2]
    assert torch.isfinite(y[:, others]).all() and torch.isfinite(x.grad[:, others]).all()
    assert not torch.isfinite(layer.running_mean[1])
    assert torch.isfinite(y[:2]).all(), "earlier samples are not touched"
    assert torch.equal(torch.isfinite(y[2, 1]).flatten(), torch.tensor([bad == float("inf"), True, True, True]))
    for name in STATE:
        assert torch.isfinite(getattr(layer, name)[others]).all(), name


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradient_scale_is_only_a_unit(backend):
    """Gradients scaled by 8 with gradient_scale 1/8 move the same state and give gradients scaled by 8."""
    plain, scaled = pair((backend, backend), 3, 4)
    scaled.gradient_scale = 1 / 8
    x, g = torch.randn(2, 2, 6, 3, 4, 4, dtype=torch.float64)
    expected, actual = run(plain, x, g), run(scaled, x, 8 * g)
    for name in ("grad_x", "weight", "bias"):
        actual[name] = actual[name] / 8
    assert_same(actual, expected, 1e-12)


def test_tie_at_the_clamp_passes_no_gradient():
    for backend in ("reference", "torch"):
        layer = OnlineNorm2d(1, clamp_value=2.0, eps=1e-12, backend=backend, dtype=torch.float64)
        layer.running_var.fill_(1 - 1e-12)
        x = torch.tensor([2.0, -2.0, 1.0, 3.0], dtype=torch.float64).reshape(1, 1, 2, 2).requires_grad_()
        layer(x).backward(torch.ones(1, 1, 2, 2, dtype=torch.float64))
        assert torch.allclose(x.grad.flatten(), torch.tensor([0.0, 0, 1, 0], dtype=torch.float64), atol=1e-9)


def test_variance_keeps_its_digits_at_a_large_mean():
    x = 100 + 0.01 * torch.randn(4, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    _, var = moments(x)
    torch.testing.assert_close(var.double(), x.double().var((2, 3), correction=0), rtol=1e-3, atol=0)


@given(length=st.integers(1, 40), seed=st.integers(0, 2**31), constant=st.booleans())
@settings(max_examples=40)
def test_scan_equals_loop(length, seed, constant):
    """Coefficients of either sign, zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, length, 3, generator=generator, dtype=torch.float64)
    a[a.abs() < 0.2] = 0
    h = torch.randn(3, generator=generator, dtype=torch.float64)
    coefficient = 0.9 if constant else a
    before, last = linear_recurrence(coefficient, b, h)
    for n in range(length):
        torch.testing.assert_close(before[n], h)
        h = (0.9 if constant else a[n]) * h + b[n]
    torch.testing.assert_close(last, h)
