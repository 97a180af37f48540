"""The compile pass over casts: weights of convolutions are cast together, and so are their gradients, bit for bit."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._inductor import config
from torch._inductor.decomposition import select_decomp_table

from onlinenorm.ops.fused.casts import _cast, gather_casts
from onlinenorm.ops.fused.inductor_pass import FoldGradients


def network():
    torch.manual_seed(0)
    convolutions = nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 1, bias=False), nn.Conv2d(16, 24, 3, 2, bias=False)
    layers = [module for conv in convolutions for module in (conv, nn.ReLU())]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(24 * 9, 5)).to(memory_format=torch.channels_last)


def gradients(module, device):
    """Of two steps under autocast, and the output of the last."""
    x = torch.randn((4, 8, 9, 9), generator=torch.Generator().manual_seed(1))
    x = x.to(device, memory_format=torch.channels_last)
    for _ in range(2):
        module.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            y = module(x)
        y.float().square().mean().backward()
    return [y, *(p.grad for p in module.parameters())]


def compiled(module, rewrite):
    """The module as Inductor sees it, every graph of it passed through ``rewrite``."""

    def compile_graph(graph_module, _):
        rewrite(graph_module.graph)
        graph_module.graph.lint()
        graph_module.recompile()
        return make_boxed_func(graph_module.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=compile_graph, bw_compiler=compile_graph, decompositions=select_decomp_table())
    return torch.compile(module, backend=backend, fullgraph=True)


def test_weights_and_their_gradients_are_cast_together_with_the_same_bits():
    counts = []

    def rewrite(graph):
        before = sum(node.target is _cast for node in graph.nodes)
        gather_casts(graph)
        after = sum(node.target is _cast for node in graph.nodes)
        together = [node for node in graph.nodes if node.target is torch.ops.onlinenorm.cast_together.default]
        counts.append((before - after, [len(node.args[0]) for node in together]))

    found = gradients(compiled(network(), rewrite), "cpu")
    expected = gradients(compiled(network(), lambda graph: None), "cpu")
    assert counts == [(3, [3]), (3, [3])]
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine, other) and mine.dtype == other.dtype and mine.stride() == other.stride()


def test_what_others_read_is_left_alone():
    """An image, a weight that is padded first, and a single weight."""

    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 8, 3, bias=False)

        def forward(self, x):
            return torch.conv2d(self.one(x), nn.functional.pad(self.two.weight, (1, 0, 1, 0)))

    seen = []

    def rewrite(graph):
        before = [str(node) for node in graph.nodes]
        gather_casts(graph)
        seen.append(before == [str(node) for node in graph.nodes])

    gradients(compiled(Padded(), rewrite), "cpu")
    assert seen == [True, True]


@pytest.mark.gpu
def test_inductor_takes_the_operators():
    """In kernels fewer by two less than the casts, with the same bits."""
    results = []
    for together in (False, True):
        torch._dynamo.reset()
        rewrite = FoldGradients()
        rewrite.casts_together = together
        with config.patch(post_grad_custom_pre_pass=rewrite):
            module = torch.compile(copy.deepcopy(network()).cuda(), fullgraph=True)
            found = gradients(module, "cuda")
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                gradients(module, "cuda")
                torch.cuda.synchronize()
        kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        results.append((found, kernels))
    (plain, apart), (ours, fewer) = results
    for mine, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-2, atol=1e-3)
    assert len(fewer) < len(apart) and any("multi_tensor" in name for name in fewer)
