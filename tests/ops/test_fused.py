"""Fused kernels against the float64 sample loop: on the GPU, or on the CPU through Triton's interpreter."""

import copy
import itertools
import os
import pickle
import sys
from functools import partial

import pytest
import torch
from torch import nn

from onlinenorm import OnlineNorm2d, models

if not torch.cuda.is_available():
    if "triton" not in sys.modules:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton was imported without TRITON_INTERPRET=1", allow_module_level=True)

from onlinenorm.ops.fused import operators, single_read
from onlinenorm.ops.fused.kernels.forward import apply_kernel
from onlinenorm.ops.spec import NormSpec

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu" and "Interpreted" not in type(apply_kernel).__name__:
    pytest.skip("Triton was imported without TRITON_INTERPRET=1", allow_module_level=True)

STATE = ("running_mean", "running_var", "control_u", "control_v")
LAYOUTS = {"last": torch.channels_last, "first": torch.contiguous_format}
REAL = [
    (3, 64, 112, 112), (9, 64, 56, 56), (5, 256, 28, 28), (33, 64, 7, 7), (7, 2048, 7, 7), (3, 100, 13, 11),
    (1, 64, 14, 14), (40, 128, 1, 1),
]  # fmt: skip
SHAPES = [(1, 1, 1, 1), (3, 5, 7, 6), (2, 17, 1, 9), (5, 33, 4, 2)]


def layer_of(channels, backend, dtype=torch.float32, seed=0, **arguments):
    generator = torch.Generator().manual_seed(seed)
    layer = OnlineNorm2d(channels, backend=backend, dtype=dtype, **{"clamp_value": 1.5, **arguments})
    drawn = {
        "weight": torch.rand(channels, generator=generator) + 0.5,
        "bias": 0.5 * torch.randn(channels, generator=generator),
        "control_u": 0.01 * torch.randn(channels, generator=generator),
        "control_v": 0.01 * torch.randn(channels, generator=generator),
    }
    if not arguments.get("affine", True):
        drawn = {name: value for name, value in drawn.items() if name in STATE}
    layer.load_state_dict(drawn, strict=False)
    return layer.to(DEVICE)


def batches(shape, dtype, layout="last", steps=3, seed=0):
    """Offset data rounded to ``dtype``: (x, residual, gradient) a step."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x, residual, grad = torch.randn((3, *shape), generator=generator).unbind()
        yield tuple(
            t.to(DEVICE, dtype).contiguous(memory_format=LAYOUTS[layout]) for t in (0.5 * x - 2.3, residual, grad)
        )


def train(layer, steps, residual=True, relu=True, dtype=None):
    """Every output, gradient and buffer of some training steps, by name."""
    found = {}
    for i, (x, r, grad) in enumerate(steps):
        x, r, grad = (t.to(dtype or t.dtype) for t in (x, r, grad))
        x, r = x.detach().requires_grad_(), r.detach().requires_grad_()
        y = layer(x, residual=r if residual else None, relu=relu)
        y.backward(grad)
        assert y.dtype == x.dtype and y.stride() == x.stride()
        found |= {f"y{i}": y.detach(), f"grad_x{i}": x.grad}
        if residual:
            found[f"grad_residual{i}"] = r.grad
    found |= {name: getattr(layer, name).clone() for name in STATE}
    return found | {f"grad_{name}": p.grad for name, p in layer.named_parameters()}


def error(found, truth):
    scale = truth.double().abs().max().clamp(min=1e-6)
    return ((found.double() - truth.double()).abs().max() / scale).item()


def clear_of_edges(steps, exact, residual, relu, width=1e-3):
    """The steps, without values so near an edge of clamp or ReLU that rounding would choose the side."""
    exact, free = (copy.deepcopy(exact) for _ in range(2))
    exact.backend, free.backend, free.error_compensation = "torch", "torch", "none"
    with torch.enable_grad():  # so that the statistics move from step to step
        for x, r, grad in steps:
            near = torch.zeros_like(x, dtype=torch.bool)
            if exact.error_compensation == "clamp":
                near |= (free(x.double()).abs() - exact.clamp_value).abs() < width
            if relu:
                near |= exact(x.double(), residual=r.double() if residual else None).abs() < width
            yield x + 0.05 * near, r + 0.05 * near, grad


def assert_near_reference(shape, dtype, layout="last", residual=True, relu=True, atol=None, data=None, **arguments):
    """Error against float64 at most twice that of the PyTorch backend in the same dtype, plus atol."""
    atol = atol or {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    fused, eager = (layer_of(shape[1], backend, **arguments) for backend in ("fused", "torch"))
    exact = layer_of(shape[1], "reference", **arguments).double()
    steps = list(data or clear_of_edges(batches(shape, dtype, layout), exact, residual, relu))
    ours, theirs = (train(layer, steps, residual, relu) for layer in (fused, eager))
    truth = train(exact, steps, residual, relu, torch.float64)
    assert ours.keys() == truth.keys()
    for name, value in truth.items():
        assert error(ours[name], value) <= 2 * error(theirs[name], value) + atol, name


@pytest.mark.parametrize("error_compensation", ["clamp", "layer_scaling", "none"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training_follows_the_sample_loop(shape, error_compensation):
    assert_near_reference(shape, torch.float32, error_compensation=error_compensation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(dtype):
    assert_near_reference((3, 5, 7, 6), dtype)


@pytest.mark.parametrize(("residual", "relu"), [(False, False), (False, True), (True, False)])
def test_residual_and_relu_are_optional(residual, relu):
    assert_near_reference((3, 5, 5, 3), torch.float32, "first", residual, relu)


def test_layer_scaling_in_groups_and_without_affine():
    assert_near_reference((3, 6, 3, 2), torch.float32, error_compensation="layer_scaling", layer_scaling_group_size=2)
    assert_near_reference((3, 6, 3, 2), torch.float32, affine=False)


def test_large_means_constant_channels_and_start_up_extremes():
    (x, *rest), *_ = batches((6, 4, 4, 4), torch.float32, steps=1)
    x[:, 0] += 1000
    x[:, 1] = 7
    x[:, 2] *= 600
    assert_near_reference(x.shape, torch.float32, data=[(x, *rest)], atol=2e-4)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, in Triton's interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("error_compensation", ["clamp", "layer_scaling"])
@pytest.mark.parametrize("backend", ["fused", "torch"])
def test_bad_values_are_where_the_loop_has_them(backend, error_compensation, bad):
    """In their channel with clamping, in their sample and in what follows it with layer scaling."""
    (x, r, grad), *_ = batches((4, 3, 2, 2), torch.float32, steps=1)
    x[2, 1, 0, 0] = bad
    layers = (layer_of(3, name, error_compensation=error_compensation) for name in (backend, "reference"))
    ours, loop = (train(layer, [(x, r, grad)]) for layer in layers)
    for name, value in loop.items():
        assert torch.equal(ours[name].isfinite(), value.isfinite()), name


def test_same_bits_twice():
    first, second = (train(layer_of(5, "fused"), batches((3, 5, 7, 6), torch.float32)) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(second[name], value), name


def test_gradient_scale_is_the_unit_of_the_controls():
    """Gradients k times as large with 1 / k as scale: the same controls, and k times the gradients."""
    steps = list(batches((3, 5, 4, 4), torch.float32))
    plain, scaled = layer_of(5, "fused"), layer_of(5, "fused")
    scaled.gradient_scale = 1 / 64
    expected = train(plain, steps)
    found = train(scaled, [(x, r, 64 * grad) for x, r, grad in steps])
    for name in STATE:
        assert error(found[name], expected[name]) < 1e-5, name
    assert error(found["grad_x2"] / 64, expected["grad_x2"]) < 1e-5


def test_gradients_of_any_stride():
    layers = [layer_of(5, backend) for backend in ("fused", "torch")]
    (x, *_), *_ = batches((3, 5, 4, 6), torch.float32, "first", steps=1)
    found = []
    for layer in layers:
        leaf = x.detach().requires_grad_()
        layer(leaf[:, :, ::2, ::3]).sum((2, 3)).square().sum().backward()
        found.append(leaf.grad)
    assert error(*found) < 1e-5


@pytest.mark.parametrize("offset", [0, 1])
def test_what_backward_needs_may_come_back_in_another_order_or_place(offset):
    """Offloading packs what is saved as it likes; here channels first, and at an odd address."""

    def unpack(packed):
        room = packed.new_empty(packed.numel() + offset)[offset:]
        return room.view(packed.shape).copy_(packed)

    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    found = []
    for unpacked in (lambda packed: packed, unpack):
        (x, r, grad), *_ = batches((4, 64, 3, 3), dtype, steps=1)
        layer, x = layer_of(64, "fused"), x.requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpacked):
            y = layer(x, residual=r, relu=True)
        y.backward(grad)
        found.append([x.grad, *(p.grad for p in layer.parameters()), layer.control_u, layer.control_v])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_of_gradients_are_refused():
    (x, *_), *_ = batches((3, 5, 4, 4), torch.float32, steps=1)
    y = layer_of(5, "fused")(x.requires_grad_())
    (once,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        once.sum().backward()


@pytest.mark.gpu
def test_reduce_overhead_of_inductor_equals_eager():
    """Its graphs own their memory; the workspace must neither stay in it nor be lost."""
    torch.manual_seed(0)
    eager = Blocks("fused", 64).to(DEVICE, memory_format=torch.channels_last)
    model = copy.deepcopy(eager)
    torch._dynamo.reset()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    x = torch.randn(4, 3, 6, 6, device=DEVICE).to(memory_format=torch.channels_last)
    for _ in range(5):
        for run in (eager, compiled):
            torch.compiler.cudagraph_mark_step_begin()
            model.zero_grad(set_to_none=True)  # they lie in memory that the graphs write again
            eager.zero_grad(set_to_none=True)
            with torch.autocast(DEVICE.type, torch.bfloat16):
                loss = run(x).square().sum()
            loss.backward()
    for name, value in eager.named_buffers():
        assert error(dict(model.named_buffers())[name], value) <= 3e-2, name


@pytest.mark.parametrize("error_compensation", ["clamp", "layer_scaling"])
def test_evaluation_is_the_torch_backends_and_moves_nothing(error_compensation):
    layers = [layer_of(5, backend, error_compensation=error_compensation).eval() for backend in ("fused", "torch")]
    (x, r, _), *_ = batches((3, 5, 4, 6), torch.float32, steps=1)
    with torch.no_grad():
        outputs = [layer(x, residual=r, relu=True) for layer in layers]
    assert error(*outputs) < 1e-5
    for name in STATE:
        assert torch.equal(getattr(layers[0], name), getattr(layer_of(5, "fused"), name)), name


def test_backends_hand_over_state_and_copies_are_independent():
    steps = list(batches((3, 5, 4, 4), torch.float32))
    whole = layer_of(5, "torch")
    expected = train(whole, steps)
    first = layer_of(5, "fused")
    train(first, steps[:1])
    untouched = {name: value.clone() for name, value in first.state_dict().items()}
    second = pickle.loads(pickle.dumps(copy.deepcopy(first)))
    train(second, steps[1:])
    for name in STATE:
        assert error(getattr(second, name), expected[name]) < 1e-5, name
    for name, value in first.state_dict().items():
        assert torch.equal(value, untouched[name]), name


class Blocks(nn.Module):
    """Two residual additions, so that gradients meet in front of a norm."""

    def __init__(self, backend, channels=8):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else channels, channels, 3, padding=1) for i in range(3))
        self.norms = nn.ModuleList(OnlineNorm2d(channels, backend=backend) for _ in range(3))

    def forward(self, x):
        x = self.norms[0](self.convs[0](x), relu=True)
        for conv, norm in zip(self.convs[1:], self.norms[1:], strict=True):
            x = norm(conv(x), residual=x, relu=True)
        return x.mean((2, 3))


def assert_compiled_equals_eager(compiler, channels, dtype, tolerance):
    torch.manual_seed(0)
    eager = Blocks("fused", channels).to(DEVICE, memory_format=torch.channels_last)
    model = copy.deepcopy(eager)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(4, 3, 6, 6, generator=generator).to(DEVICE, memory_format=torch.channels_last)
        for run in (eager, compiled):
            with torch.autocast(DEVICE.type, dtype, enabled=dtype is not torch.float32):
                loss = run(x).square().sum()
            loss.backward()
    ours, theirs = dict(model.named_buffers()), dict(eager.named_buffers())
    ours |= {name: p.grad for name, p in model.named_parameters()}
    theirs |= {name: p.grad for name, p in eager.named_parameters()}
    for name, value in theirs.items():
        assert error(ours[name], value) <= tolerance, name


def test_compiled_without_graph_breaks_equals_eager():
    assert_compiled_equals_eager("aot_eager", 8, torch.float32, 1e-4)


def test_resnet50_is_one_graph():
    """Training of the whole network traced, nothing run: the compiler hands out zeros."""
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        (outputs,) = graph.graph.output_node().args
        return lambda *_: [torch.zeros_like(node.meta["example_value"], device=DEVICE) for node in outputs]

    network = models.resnet50(partial(OnlineNorm2d, backend="fused")).to(DEVICE, memory_format=torch.channels_last)
    torch._dynamo.reset()
    x = torch.zeros(2, 3, 64, 64, device=DEVICE).to(memory_format=torch.channels_last)
    assert torch.compile(network.train(), backend=compiler, fullgraph=True)(x).shape == (2, 1000)
    (graph,) = graphs
    calls = [node.target for part in graph.modules() if hasattr(part, "graph") for node in part.graph.nodes]
    for operator in (operators.fused_forward, operators.fused_backward):
        assert calls.count(operator) == 53


@pytest.mark.parametrize("error_compensation", ["clamp", "layer_scaling"])
def test_operators_keep_what_their_schemas_and_fakes_promise(error_compensation):
    """On a GPU the single-read path too, where it takes the tensor."""
    x, residual, grad = next(batches((3, 64, 5, 5), torch.bfloat16 if DEVICE.type == "cuda" else torch.float32))
    spec = NormSpec(error_compensation=error_compensation)
    once, parameters = single_read.supports(x, spec), (torch.ones(64, device=DEVICE), torch.zeros(64, device=DEVICE))
    mean, var, u, v = (torch.full((64,), float(k == 1), device=DEVICE) for k in range(4))
    state, constants = (mean, var), spec.as_arguments()
    inputs = (x, residual, *parameters, *state, once, True, *constants, 1)
    y, tables, mask_or_rzeta = operators.fused_forward(x, residual, *parameters, mean.clone(), var.clone(), *inputs[6:])
    out = None if once else y
    back = (grad, None, x, out, *parameters, tables, mask_or_rzeta, u, v, True, once, True, *constants, 1)
    evaluated = (x, residual, *parameters, *state, True, *constants)
    checks = ("test_schema", "test_faketensor")
    for operator, arguments in (("forward", inputs), ("backward", back), ("evaluate", evaluated)):
        overload = getattr(operators, f"fused_{operator}")
        assert set(torch.library.opcheck(overload, arguments, test_utils=checks).values()) == {"SUCCESS"}


@pytest.mark.gpu
def test_inductor_with_folded_additions_equals_eager(monkeypatch):
    from onlinenorm.ops.fused import inductor_pass

    plain, folds = inductor_pass._is_plain_add, []

    def counted(node):
        folds.append(plain(node))
        return folds[-1]

    monkeypatch.setattr(inductor_pass, "_is_plain_add", counted)
    assert_compiled_equals_eager("inductor", 64, torch.bfloat16, 3e-2)
    assert sum(folds) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("shape", REAL, ids=str)
def test_real_shapes_on_the_gpu(shape, layout, dtype):
    """Stem, tail, between, ragged, one sample, one pixel; residual and ReLU take turns, as compiling is slow."""
    turns = itertools.cycle([(True, True), (False, True), (True, False), (False, False)])
    turns = itertools.islice(turns, REAL.index(shape) + 2 * list(LAYOUTS).index(layout), None)
    for error_compensation, (residual, relu) in zip(("clamp", "layer_scaling", "none"), turns, strict=False):
        assert_near_reference(shape, dtype, layout, residual, relu, error_compensation=error_compensation)


@pytest.mark.gpu
def test_state_survives_graph_capture_and_replay():
    for dtype in (torch.float32, torch.bfloat16):
        captured, eager = layer_of(64, "fused"), layer_of(64, "fused")
        (x, _, grad), *_ = batches((6, 64, 14, 14), dtype, steps=1)
        x.requires_grad_()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            captured(x, relu=True).backward(grad)
            eager(x, relu=True).backward(grad)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured(x, relu=True).backward(grad)
        for _ in range(3):
            graph.replay()
            eager(x, relu=True).backward(grad)
        for name in STATE:
            assert torch.equal(getattr(captured, name), getattr(eager, name)), name


@pytest.mark.gpu
def test_second_gpu():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    steps = list(batches((6, 64, 14, 14), torch.bfloat16))
    moved = [tuple(t.to("cuda:1") for t in step) for step in steps]
    here, there = train(layer_of(64, "fused"), steps), train(layer_of(64, "fused").to("cuda:1"), moved)
    for name, value in here.items():
        assert torch.equal(there[name].to(value.device), value), name
