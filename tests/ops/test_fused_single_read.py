"""Single-read CUDA kernels on the GPU: races, against two passes and against float64."""

import copy
import itertools
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("triton")

from onlinenorm import OnlineNorm2d
from onlinenorm.ops.fused import single_read, two_pass
from onlinenorm.ops.spec import NormSpec


@pytest.mark.gpu
def test_a_new_thread_compiles_and_launches():
    """As the autograd engine's do, whose first call of CUDA may be one of these kernels."""
    x = torch.randn(4, 64, 5, 5, device="cuda").bfloat16().contiguous(memory_format=torch.channels_last)
    layer = OnlineNorm2d(64, backend="fused", device="cuda")
    twin = copy.deepcopy(layer)
    expected = twin(x)
    single_read._plan.cache_clear()
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(layer, x).result(), expected)


def one_step(path, tensors, weight, bias, state, residual, relu, skip_grad, spec, **arguments):
    x, r, grad, other = tensors
    mean, var, u, v = (t.clone() for t in state)
    y, tables, mask_or_rzeta = path.forward(x, r if residual else None, weight, bias, mean, var, spec, relu)
    both = grad, other if skip_grad else None
    if path is single_read:
        found = path.backward(*both, x, mask_or_rzeta, weight, bias, tables, u, v, spec, relu, **arguments)
    else:
        out = y if residual and relu else None
        found = path.backward(*both, x, out, weight, bias, tables, mask_or_rzeta, u, v, spec, relu, residual and relu)
    names = "grad_x", "grad_residual", "grad_weight", "grad_bias"
    return {
        "y": y, "states": tables[-1][: len(x)].reshape(len(x), -1), "mean": mean, "var": var, "u": u, "v": v,
        **{name: t for name, t in zip(names, found, strict=True) if t is not None},
    }  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(5))
def test_random_shapes_agree_with_two_passes_while_the_gpu_is_busy(seed):
    """Races: random shapes and variants, each repeated bit for bit, with other work on another stream."""
    device, generator, rng = torch.device("cuda"), torch.Generator("cuda").manual_seed(seed), random.Random(seed)
    other_work, noise = torch.cuda.Stream(), torch.randn(2048, 2048, device=device)
    variants = list(itertools.product([False, True], [False, True], [False, True], ["clamp", "none", "layer_scaling"]))
    for trial in range(30 * seed, 30 * seed + 30):
        residual, relu, skip_grad, error_compensation = variants[trial % len(variants)]
        channels, side = 64 * rng.choice([1, 2, 4, 16]), rng.choice([1, 2, 3, 7, 8, 14, 15, 28, 31, 56])
        samples = rng.randint(1, max(1, min(300, 4_000_000 // (channels * side * side))))
        dtype = rng.choice([torch.bfloat16, torch.float16])
        shape = (4, samples, channels, side, side)
        drawn = torch.randn(shape, device=device, generator=generator).to(dtype)
        tensors = [t.contiguous(memory_format=torch.channels_last) for t in (1.5 * drawn[0] - 0.5, *drawn[1:])]
        weight, bias = torch.rand((2, channels), device=device, generator=generator)
        state = [t.contiguous() for t in torch.rand((4, channels), device=device, generator=generator) * 0.1 + 0.05]
        spec = NormSpec(error_compensation=error_compensation)
        arguments = tensors, weight + 0.5, bias, state, residual, relu, skip_grad, spec
        with torch.cuda.stream(other_work):
            for _ in range(5):
                noise = torch.mm(noise, noise).tanh_()
        first = one_step(single_read, *arguments)
        for repeat in range(20):
            # In every other, the gradient of the residual takes the memory of that of the output.
            inputs = [tensors[0], tensors[1], tensors[2].clone(), tensors[3]] if repeat % 2 else tensors
            again = one_step(single_read, inputs, *arguments[1:], overwrite=repeat % 2 == 1)
            for name, value in first.items():
                assert torch.equal(again[name], value), (shape, arguments[4:7], name)
        if trial % 5 == 0:  # Triton specialises on sizes: compiling it for all would take minutes
            for name, value in one_step(two_pass, *arguments).items():
                distance = (first[name].double() - value.double()).norm() / value.double().norm().clamp(min=1e-9)
                # Rounding moves a few values across the edge of a mask.
                assert distance < 2e-2, (shape, arguments[4:7], name, distance.item())


def three_backends(channels, **arguments):
    """Equal layers: fused, PyTorch's in the same precision, PyTorch's in float64."""
    fused = OnlineNorm2d(channels, backend="fused", device="cuda", **arguments)
    for value in (fused.weight.data, fused.control_u, fused.control_v):
        value.add_(0.1 * torch.randn_like(value))
    eager, exact = copy.deepcopy(fused), copy.deepcopy(fused).double()
    eager.backend = exact.backend = "torch"
    return fused, eager, exact


def run(layer, x, residual, grad, relu, repeats=3):
    """Outputs, gradients and state of steps on the same input, by name; inputs in the layer's precision."""
    dtype = torch.float64 if layer.running_mean.dtype == torch.float64 else x.dtype
    x, grad = x.detach().to(dtype).requires_grad_(), grad.to(dtype)
    residual = None if residual is None else residual.detach().to(dtype).requires_grad_()
    found = {}
    for step in range(repeats):
        x.grad = None
        y = layer(x, residual=residual, relu=relu)
        y.backward(grad)
        found |= {f"y{step}": y.detach(), f"grad_x{step}": x.grad}
    if residual is not None:
        found["grad_residual"] = residual.grad
    found |= {name: p.grad for name, p in layer.named_parameters()}
    return found | {name: value.clone() for name, value in layer.named_buffers()}


def assert_as_near_as_eager(fused, eager, exact, *inputs):
    ours, theirs, truth = (run(layer, *inputs) for layer in (fused, eager, exact))
    for name, value in truth.items():
        size = value.norm().clamp(min=1e-6)
        mine, allowed = ((found[name].double() - value).norm() / size for found in (ours, theirs))
        # Rounding of inputs moves a few values across the edge of a mask.
        assert mine <= 2 * allowed + 2e-2, (tuple(inputs[0].shape), inputs[-1], name, mine.item(), allowed.item())


@pytest.mark.gpu
def test_thousands_of_random_shapes_against_float64():
    torch.manual_seed(0)
    rng = random.Random(1)
    for _ in range(2000):
        channels, height, width = 64 * rng.choice([1, 1, 2, 3, 4, 8]), rng.randint(1, 60), rng.randint(1, 60)
        samples = rng.randint(1, max(1, min(200, 2_000_000 // (channels * height * width))))
        shape, dtype = (samples, channels, height, width), rng.choice([torch.bfloat16, torch.float16])
        draw = (torch.randn(shape, device="cuda") for _ in range(3))
        x, residual, grad = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in draw)
        error_compensation, alpha = rng.choice(["clamp", "none", "layer_scaling"]), rng.choice([0.9, 0.999, 0.9999])
        layers = three_backends(channels, error_compensation=error_compensation, clamp_value=1.5, alpha_fwd=alpha)
        assert single_read.supports(x, layers[0].spec) or (
            error_compensation == "layer_scaling" and x[0].nbytes > 2**21
        )
        assert_as_near_as_eager(*layers, x, residual if rng.random() < 0.5 else None, grad, rng.random() < 0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("error_compensation", ["clamp", "none", "layer_scaling"])
def test_start_up_extremes_large_means_and_constant_channels(error_compensation):
    """mean(y^2) of 10^4 to 10^5 on the first batch, channel means of 1000, new and known, no variance at all."""
    torch.manual_seed(0)
    x, residual, grad = torch.randn((3, 12, 64, 14, 14), device="cuda")
    x[:, 0] *= 300
    x[:, 1] += 1000
    x[:, 2] = 7
    x[:, 3] += 1000
    inputs = [t.bfloat16().contiguous(memory_format=torch.channels_last) for t in (x, residual, grad)]
    layers = three_backends(64, error_compensation=error_compensation)
    for layer in layers:
        layer.running_mean[3] = 1000
    assert_as_near_as_eager(*layers, *inputs, True)


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", [3, 14, 56])
@pytest.mark.parametrize("error_compensation", ["clamp", "layer_scaling"])
def test_bad_values_are_where_the_sample_loops_are(bad, side, error_compensation):
    """What is not finite is so where the sample loop's is, and nowhere else; nothing waits for ever.

    With layer scaling that is a whole sample, and its channel from then on.
    """
    torch.manual_seed(0)
    x, residual, grad = torch.randn((3, 6, 64, side, side), device="cuda").bfloat16()
    x[2, 5, 0, 0] = bad
    inputs = [t.contiguous(memory_format=torch.channels_last) for t in (x, residual, grad)]
    fused, loop, _ = three_backends(64, error_compensation=error_compensation)
    loop.backend = "reference"
    ours, theirs = (run(layer, *inputs, True) for layer in (fused, loop))
    for name, value in theirs.items():
        assert torch.equal(ours[name].isfinite(), value.isfinite()), name


def relative(ours, theirs):
    return ((ours.double() - theirs).norm() / theirs.norm().clamp(min=1e-6)).item()


@pytest.mark.gpu
@pytest.mark.parametrize("error_compensation", ["clamp", "none", "layer_scaling"])
@pytest.mark.parametrize("alpha", [0.9, 0.99999, 1 - 1e-7])
def test_controls_keep_their_digits_however_slowly_the_statistics_move(alpha, error_compensation):
    """At a channel mean of 50, where the state before and after a sample tells little of its moments."""
    torch.manual_seed(0)
    x, grad = torch.randn((2, 70, 64, 14, 14), device="cuda")
    inputs = [t.bfloat16().contiguous(memory_format=torch.channels_last) for t in (x + 50, grad)]
    fused, _, exact = three_backends(64, error_compensation=error_compensation, clamp_value=1.5, alpha_fwd=alpha)
    for layer in (fused, exact):
        layer.running_mean.fill_(49.5)
    assert single_read.supports(inputs[0], fused.spec)
    ours, truth = (run(layer, inputs[0], None, inputs[1], False) for layer in (fused, exact))
    for name in ("running_mean", "running_var", "control_u", "control_v", "weight", "bias"):
        assert relative(ours[name], truth[name]) < 5e-3, name  # few values change sides of the clamp


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), 3e38])
@pytest.mark.parametrize(("samples", "side"), [(70, 7), (21, 14), (6, 56)])
@pytest.mark.parametrize("error_compensation", ["clamp", "layer_scaling"])
def test_gradients_that_are_not_finite_are_passed_on_and_move_no_control(samples, side, error_compensation, bad):
    """First, inner and last sample; the sums of several values of 3e38 overflow."""
    torch.manual_seed(0)
    x, residual, grad = torch.randn((3, samples, 64, side, side), device="cuda").bfloat16()
    for sample, channel in ((0, 7), (samples // 2, 7), (samples // 2, 9), (samples - 1, 11)):
        grad[sample, channel] = bad
    inputs = [t.contiguous(memory_format=torch.channels_last) for t in (x, residual, grad)]
    fused, loop, _ = three_backends(64, error_compensation=error_compensation)
    loop.backend = "reference"
    ours, theirs = (run(layer, *inputs, False) for layer in (fused, loop))
    for name, value in theirs.items():
        finite = value.isfinite()
        assert torch.equal(ours[name].isfinite(), finite), name
        assert name not in ("control_u", "control_v") or finite.all()
        assert relative(ours[name][finite], value[finite].double()) < 2e-2, name
    assert not theirs["bias"].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("error_compensation", ["clamp", "layer_scaling"])
def test_the_workspace_survives_capture_beside_eager_launches_and_other_streams(error_compensation):
    """Regions of the workspace: a graph replayed between eager steps gives what eager steps alone give, bit for bit."""
    torch.manual_seed(0)
    x, _, grad = torch.randn((3, 40, 256, 14, 14), device="cuda").bfloat16()
    x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    mixed = OnlineNorm2d(256, backend="fused", device="cuda", error_compensation=error_compensation)
    alone = copy.deepcopy(mixed)
    x.requires_grad_()

    def step(layer):
        layer(x, relu=True).backward(grad)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(mixed)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            step(mixed)
    for _ in range(4):
        graph.replay()
        step(mixed)
    for _ in range(1 + 4 * 4):
        step(alone)
    for name, value in alone.named_buffers():
        assert torch.equal(dict(mixed.named_buffers())[name], value), name


@pytest.mark.gpu
def test_launches_that_need_the_whole_gpu_take_turns():
    """Layer scaling on three streams at once, among clamps and other work: all end, and give what they give alone."""
    torch.manual_seed(0)
    noise, streams = torch.randn(2048, 2048, device="cuda"), [torch.cuda.Stream() for _ in range(4)]
    sites = [(32, 64, 56), (32, 256, 28), (32, 1024, 14), (32, 2048, 7)]
    inputs = [torch.randn(shape + shape[-1:], device="cuda").bfloat16() for shape in sites]
    inputs = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
    compensations = ("layer_scaling", "layer_scaling", "layer_scaling", "clamp")

    def trained(layers, repeats=5):
        for _ in range(repeats):
            for layer, x in zip(layers, inputs, strict=True):
                layer(x, relu=True).backward(x)

    layers = [
        [OnlineNorm2d(c, backend="fused", device="cuda", error_compensation=g) for _, c, _ in sites]
        for g in compensations
    ]
    alone = copy.deepcopy(layers)
    for column in alone:
        trained(column)
    torch.cuda.synchronize()
    for _ in range(5):
        for stream, column in zip(streams, layers, strict=True):
            with torch.cuda.stream(stream):
                trained(column, repeats=1)
        noise = torch.mm(noise, noise).tanh_()
    torch.cuda.synchronize()
    for column, twins in zip(layers, alone, strict=True):
        for layer, twin in zip(column, twins, strict=True):
            for name, value in twin.state_dict().items():
                assert torch.equal(layer.state_dict()[name], value), name
            assert torch.equal(layer.weight.grad, twin.weight.grad)
