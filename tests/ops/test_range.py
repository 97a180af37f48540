"""Values that leave the range of their type: gradients of a loss scale too large, and what lies between the steps."""

import copy
import os
import sys

import pytest
import torch

from onlinenorm import OnlineNorm2d
from onlinenorm.ops.vectorized import scan_control

STATE = ("running_mean", "running_var", "control_u", "control_v")
INFINITE = float("inf")


def fused_backend():
    if not torch.cuda.is_available():
        if "triton" not in sys.modules:
            os.environ.setdefault("TRITON_INTERPRET", "1")
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("Triton was imported without TRITON_INTERPRET=1")
    pytest.importorskip("triton")
    return "fused"


@pytest.fixture(params=["reference", "torch", "fused"])
def backend(request):
    return fused_backend() if request.param == "fused" else request.param


def layer_of(channels, backend, **arguments):
    layer = OnlineNorm2d(channels, backend=backend, **{"clamp_value": 1.5, **arguments})
    generator = torch.Generator().manual_seed(0)
    for value in (layer.weight.data, layer.bias.data, layer.control_u, layer.control_v):
        value.add_(0.1 * torch.randn(channels, generator=generator))
    return layer.to("cuda" if torch.cuda.is_available() else "cpu")


def train(layer, x, grad):
    """Output, gradients and state of one step, by name."""
    x = x.detach().to(layer.running_mean).requires_grad_()
    y = layer(x)
    y.backward(grad.to(y))
    found = {"y": y.detach(), "grad_x": x.grad, **{f"grad_{n}": p.grad for n, p in layer.named_parameters()}}
    return found | {name: getattr(layer, name).clone() for name in STATE}


def relative(ours, truth):
    return ((ours.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30)).item()


def assert_near_the_loop(backend, channels, x, grad, prepare=lambda layer: None, factor=20.0, floor=1e-5, **arguments):
    """Error against float64 at most ``factor`` times that of the loop in float32, plus ``floor``."""
    layers = [layer_of(channels, name, **arguments) for name in (backend, "reference")]
    for layer in layers:
        prepare(layer)
    truth = train(copy.deepcopy(layers[1]).double(), x, grad)
    ours, loop = (train(layer, x, grad) for layer in layers)
    for name, value in truth.items():
        assert relative(loop[name], value) < 1e-3, name
        assert relative(ours[name], value) <= factor * relative(loop[name], value) + floor, name


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, in Triton's interpreter
@pytest.mark.parametrize("at, bad", [(0, float("nan")), (3, float("nan")), (3, -INFINITE), (8, -INFINITE)])
@pytest.mark.parametrize("error_compensation", ["clamp", "layer_scaling"])
def test_a_gradient_that_is_not_finite_is_passed_on_and_moves_no_control(backend, error_compensation, at, bad):
    """As if the sample had been seen without a backward pass; with layer scaling in all channels, else in its own."""
    x, grad = torch.randn(2, 9, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    layer, twin = (layer_of(3, backend, error_compensation=error_compensation, clamp_value=50) for _ in range(2))
    spoilt = grad.clone()
    spoilt[at, 1, 0, 1] = bad
    found = train(layer, x, spoilt)
    parts = [part for part in (slice(0, at), slice(at + 1, 9)) if len(x[part])]
    if at == 0:
        twin(x[:1].to(layer.running_mean.device))
    expected = [train(twin, x[part], grad[part]) for part in parts[:1]]
    if at == 3:
        twin(x[at : at + 1].to(layer.running_mean.device))
        expected.append(train(twin, x[parts[1]], grad[parts[1]]))
    channels = slice(None) if error_compensation == "layer_scaling" else slice(1, 2)
    for name in ("control_u", "control_v"):
        assert found[name].isfinite().all()
        torch.testing.assert_close(found[name][channels], getattr(twin, name)[channels], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["grad_x"][parts[-1]][:, channels], expected[-1]["grad_x"][:, channels])
    assert not found["grad_x"][at, 1].isfinite().all()
    assert not found["grad_weight"][1].isfinite() and not found["grad_bias"][1].isfinite()


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy, in Triton's interpreter
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("gradient", [1e38, 3e38])
def test_an_update_that_overflows_is_left_out(backend, gradient):
    """Every gradient is finite; sums over pixels are not (3e38), or what the controls would become is not (1e38)."""
    x = torch.randn(6, 2, 2, 2, generator=torch.Generator().manual_seed(2))
    found = []
    for name in (backend, "reference"):
        layer = layer_of(2, name, error_compensation="none")
        layer.control_u.fill_(3e38)
        found.append(train(layer, x, torch.full_like(x, gradient)))
    ours, loop = found
    for name in ("control_u", "control_v"):
        assert ours[name].isfinite().all() and loop[name].isfinite().all()
        torch.testing.assert_close(ours[name], loop[name], rtol=1e-4, atol=0)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize(
    ("samples", "alpha_fwd", "alpha_bkw", "error_compensation"),
    [
        (128, 0.9995, 0.9, "clamp"),
        (64, 0.9999, 0.95, "clamp"),
        (9, 0.9, 0.01, "none"),
        (9, 0.9999, 0.9, "layer_scaling"),
    ],
)
def test_large_coefficients_of_the_controls_follow_the_loop(backend, samples, alpha_fwd, alpha_bkw, error_compensation):
    """A channel mean of 30 that is not known yet: 1 - k Q is -90 and more, while the clamp lets no gradient through."""
    x, grad = torch.randn(2, samples, 2, 3, 3, generator=torch.Generator().manual_seed(3))

    def start(layer):
        layer.control_u.zero_()
        layer.control_v.zero_()

    arguments = {"alpha_fwd": alpha_fwd, "alpha_bkw": alpha_bkw, "clamp_value": 5.0}
    arguments |= {"error_compensation": error_compensation}
    assert_near_the_loop(backend, 2, x + 30, grad, start, **arguments)


@pytest.mark.parametrize("scale", [1.0, 2.0**-24])
def test_the_scan_of_the_controls_equals_a_walk_whatever_the_coefficients(scale):
    """Products that overflow in front of nothing, coefficients of 0, sums that are not finite, one after the other."""
    generator = torch.Generator().manual_seed(4)
    for trial in range(60):
        samples, alpha = 1 + trial, 0.5 if trial % 2 else 0.99
        g, gy, y = torch.randn(3, samples, 5, generator=generator)
        yy = y.square() + 0.1
        yy[:, 1] = 1e9 * (torch.arange(samples) < samples // 2)
        gy[: samples // 2 + 1, 1] = 0
        yy[samples // 3, 2] = 1 / (1 - alpha)
        yy[:9, 2] *= 100
        gy[samples // 2, 3], g[samples - 1, 4] = INFINITE, float("nan")
        u, v = torch.zeros(2, 5)
        u[0], v[0] = torch.randn(2, generator=generator)
        expected, state = [], torch.stack([u, v]).double()
        for n in range(samples):
            expected.append(state)
            k, (a, b), one = 1 - alpha, state, (t[n].double() for t in (g, gy, y, yy))
            g_n, gy_n, y_n, yy_n = one
            after = torch.stack([alpha * a + scale * g_n - k * b * y_n, (1 - k * yy_n) * b + scale * gy_n])
            state = torch.where((after.isfinite() & (after.abs() < 3e38)).all(0), after, state)
        found = (
            torch.stack(scan_control(g, gy, y, yy - y.square(), torch.ones_like(y), u, v, alpha, scale, 1, "", []), 1)
            * scale
        )
        largest = torch.stack(expected).abs().amax((0, 1)).clamp(min=1e-12)
        assert ((found - torch.stack(expected)).abs() / largest).max() < 1e-3, trial
        assert ((torch.stack([u, v]) - state).abs() / largest).max() < 1e-3, trial


@pytest.mark.parametrize("group", [1, None])
@pytest.mark.parametrize("mean", [3, 10, 30])
def test_layer_scaling_of_nearly_constant_channels_keeps_its_digits(backend, mean, group):
    """Channels of deviation 0.01 whose bias takes their mean away, alone in a group or among others."""
    generator = torch.Generator().manual_seed(5)
    x, grad = torch.randn(2, 8, 4, 6, 6, generator=generator)
    x = mean + 1e-2 * x

    def cancel(layer):
        layer.weight.data.fill_(1)
        layer.bias.data.fill_(-mean)

    arguments = {"error_compensation": "layer_scaling", "layer_scaling_group_size": group, "alpha_fwd": 0.9999}
    assert_near_the_loop(backend, 4, x, grad, cancel, **arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("mean", [0, 30])
def test_captured_steps_of_the_torch_backend_equal_eager_ones(mean):
    """A capture cannot ask the device what the coefficients are."""
    x, grad = torch.randn(2, 64, 4, 4, 4, device="cuda")
    captured, eager = (layer_of(4, "torch", alpha_fwd=0.9995, alpha_bkw=0.9) for _ in range(2))
    x = (x + mean).requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for layer in (captured, eager):
            layer(x).backward(grad)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured(x).backward(grad)
    for _ in range(3):
        graph.replay()
        eager(x).backward(grad)
    for name in STATE:
        assert relative(getattr(captured, name), getattr(eager, name)) < 1e-4, name
