"""Weight gradients on a stream beside: what is moved, what is kept alive for it, and that nothing else changes."""

import contextlib
import copy
import os
import sys

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
from torch._inductor.decomposition import select_decomp_table

from onlinenorm import OnlineNorm2d, models
from onlinenorm.ops.fused import side_stream
from onlinenorm.ops.fused.inductor_pass import FoldGradients
from onlinenorm.ops.fused.memset_nodes import listed

ASIDE = torch.ops.onlinenorm.convolution_backward.default


class Block(nn.Module):
    """Two convolutions and one past them, of which the first has a bias."""

    def __init__(self, width_in, width):
        super().__init__()
        self.first = nn.Conv2d(width_in, width, 1, bias=width_in == 3)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.side = nn.Conv2d(width_in, width, 1, bias=False)

    def forward(self, x):
        return torch.tanh(self.second(torch.tanh(self.first(x))) + self.side(x))


def with_inductors_casts(compile_backward):
    def compile_forward(module, _):
        return make_boxed_func(module.forward)

    return aot_autograd(fw_compiler=compile_forward, bw_compiler=compile_backward, decompositions=select_decomp_table())


def stepped(network, x, run):
    with torch.autocast(x.device.type, torch.bfloat16):
        loss = run(x).float().square().mean()
    loss.backward()
    return [parameter.grad for parameter in network.parameters()]


def test_casts_of_weights_begin_at_once_and_end_in_groups_in_order_of_use(monkeypatch):
    monkeypatch.setattr(side_stream, "_serves", lambda x: True)
    monkeypatch.setattr(side_stream, "GROUP", 4)
    network = nn.Sequential(Block(3, 8), Block(8, 8), Block(8, 16)).to(memory_format=torch.channels_last)
    twin, graphs = copy.deepcopy(network), []

    def compile_forward(module, _):
        side_stream.move_casts(module.graph)
        module.graph.lint()
        module.recompile()
        graphs.append(module.graph)
        return make_boxed_func(module.forward)

    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=compile_forward,
        bw_compiler=lambda module, _: make_boxed_func(module.forward),
        decompositions=select_decomp_table(),
    )
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    compiled = torch.compile(network, backend=backend)
    for mine, other in zip(stepped(network, x, compiled), stepped(twin, x, twin), strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-2, atol=2e-3)

    operators = torch.ops.onlinenorm
    (graph,) = graphs
    called = [node for node in graph.nodes if node.op == "call_function"]
    begun, *ended = (n for n in called if n.target in (operators.begin_casts.default, operators.end_casts.default))
    assert called[0] is begun and [len(node.args[1]) for node in ended] == [4, 4, 1]
    assert begun.args[0] == [weight for node in ended for weight in node.args[1]]
    convolutions = [node for node in called if node.target is torch.ops.aten.convolution.default]
    assert len(convolutions) == 9
    for position, node in enumerate(ended):
        assert not position or called.index(node) > called.index(convolutions[4 * position - 1])
        assert all(reader.args[1].args[0] is node for reader in convolutions[4 * position :][:4])


def test_convolutions_whose_weight_gradients_leave_the_graph_are_moved(monkeypatch):
    """All but the first block's first, which has a bias, and its side, whose input has no gradient."""
    monkeypatch.setattr(side_stream, "_serves", lambda x: True)
    network = nn.Sequential(Block(3, 8), Block(8, 8), Block(8, 16)).to(memory_format=torch.channels_last)
    twin, nodes = copy.deepcopy(network), []

    def compile_backward(module, _):
        side_stream.move_gradients(module.graph)
        module.graph.lint()
        module.recompile()
        nodes.extend(node for node in module.graph.nodes if node.target is ASIDE)
        return make_boxed_func(module.forward)

    torch._dynamo.reset()
    backend = with_inductors_casts(compile_backward)
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    ours, theirs = stepped(network, x, torch.compile(network, backend=backend)), stepped(twin, x, twin)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype == torch.float32 and mine.stride() == other.stride()
        torch.testing.assert_close(mine, other, rtol=2e-2, atol=2e-3)

    assert len(nodes) == 7
    *_, first, last, held = zip(*(node.args for node in nodes), strict=True)
    assert first == (True, *[False] * 6) and last == (*[False] * 6, True)
    given = [(node.args[0], node.args[1]) for node in nodes]
    for number, tensors in enumerate(held):
        waited_for = range(number - 2, number if number == 6 else number - 1)
        assert [tuple(tensors[i : i + 2]) for i in range(0, len(tensors), 3)] == [
            given[k] for k in waited_for if k >= 0
        ]


def test_weights_that_are_read_on_are_left_alone(monkeypatch):
    """A penalty on a gradient, a weight with two uses: the graph itself reads what the convolutions give."""
    monkeypatch.setattr(side_stream, "_serves", lambda x: True)
    conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    counts = []

    def compile_backward(module, _):
        side_stream.move_gradients(module.graph)
        counts.append(sum(node.target is ASIDE for node in module.graph.nodes))
        return make_boxed_func(module.forward)

    torch._dynamo.reset()
    backend = with_inductors_casts(compile_backward)
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    torch.compile(lambda x: conv(torch.tanh(conv(torch.tanh(conv(x))))), backend=backend)(x).sum().backward()
    assert counts == [0]


class Stream:
    """Notes what it is told, and by what name."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event}")

    def record_event(self):
        self.log.append("event")
        return f"event {self.log.count('event') - 1}"


@pytest.fixture
def log(monkeypatch):
    """Operators as in a capture, with streams that are noted: "main waits for event 0", "aside: gradient"."""
    lines, current = [], []
    main, aside = Stream("main", lines), Stream("aside", lines)
    current.append(main)

    @contextlib.contextmanager
    def stream(of):
        current.append(of)
        yield
        current.pop()

    real = side_stream._gradients

    def gradients(arguments, which):
        lines.append(f"{current[-1].name}: {['x'] * which[0] + ['weight'] * which[1]}")
        return real(arguments, which)

    monkeypatch.setattr(side_stream, "_gradients", gradients)
    side = side_stream._Side(aside)
    monkeypatch.setattr(side_stream, "_side_of", lambda tensor: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    return lines


def test_the_main_stream_waits_two_convolutions_later_and_at_last_for_all(log):
    x, grad = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    weight = torch.randn(4, 4, 3, 3)
    for number in range(4):
        held = [] if number < 2 else [grad]
        of_x, of_weight = torch.ops.onlinenorm.convolution_backward(
            grad, x, weight, [1, 1], [1, 1], [1, 1], 1, torch.float32, number == 0, number == 3, held
        )
        exact = torch.ops.aten.convolution_backward(
            grad, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]
        )
        assert torch.equal(of_x, exact[0]) and torch.equal(of_weight, exact[1])
    each = ["aside waits for main", "aside: ['weight']", "event", "main: ['x']"]
    assert log == [*each, *each, "main waits for event 0", *each, "main waits for event 2", "main: ['x', 'weight']"]


def test_casts_are_all_begun_beside_and_waited_for_group_by_group(log):
    weights = [torch.randn(3) for _ in range(5)]
    begun = torch.ops.onlinenorm.begin_casts(weights, torch.bfloat16, 2)
    for first in (0, 2, 4):
        group = weights[first : first + 2]
        values = torch.ops.onlinenorm.end_casts(begun, group, torch.bfloat16)
        assert all(torch.equal(value, weight.bfloat16()) for value, weight in zip(values, group, strict=True))
    assert log == ["aside waits for main", *["event"] * 3, *(f"main waits for event {n}" for n in range(3))]


@pytest.mark.gpu
def test_captured_steps_give_the_same_bits_beside_and_one_after_another(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    found = []
    for aside in (False, True):
        for name in ("casts_aside", "gradients_aside"):
            monkeypatch.setattr(FoldGradients, name, aside)
        torch._dynamo.reset()
        torch.manual_seed(0)
        network = models.resnet18(OnlineNorm2d, num_classes=10).cuda().to(memory_format=torch.channels_last)
        compiled = torch.compile(network, dynamic=False)
        x = torch.randn(16, 3, 64, 64, device="cuda").to(memory_format=torch.channels_last)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                network.zero_grad(set_to_none=True)
                stepped(network, x, compiled)
            network.zero_grad(set_to_none=True)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph, stream=side):
            grads = stepped(network, x, compiled)
        nodes = listed("cuGraphGetNodes", graph.raw_cuda_graph())
        behind = [listed("cuGraphNodeGetDependentNodes_v2", node, True) for node in nodes]
        assert (max(map(len, behind)) > 1) == aside  # else one after another
        graph.instantiate()
        steps = []
        for _ in range(5):
            graph.replay()
            steps.append([grad.clone() for grad in (*grads, *network.buffers())])
        found.append(steps)
    for one, other in zip(*found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
