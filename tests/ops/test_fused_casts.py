"""The compile pass over casts: weights of convolutions are cast together, and so are their gradients, bit for bit."""

import copy
import itertools

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._inductor import config
from torch._inductor.decomposition import select_decomp_table

from onlinenorm.ops.fused import casts, nvrtc
from onlinenorm.ops.fused.casts import _cast, gather_casts
from onlinenorm.ops.fused.inductor_pass import FoldGradients

HALVES = (torch.bfloat16, torch.float16)


def test_cuda_compiles_without_a_gpu():
    if torch.version.cuda is None:
        pytest.skip("torch without CUDA carries no NVRTC")
    source = (casts.SOURCES / "casts.cu").read_text()
    for half, to_float in itertools.product((False, True), repeat=2):
        code = nvrtc.compile_source(source, "sm_90", casts.options(half, to_float))
        assert code[:4] == b"\x7fELF" and b"cast_tensors" in code


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


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_tensors_of_any_size_and_order_have_the_bits_of_torchs_casts(device, half):
    torch.manual_seed(0)
    sizes = [0, 1, 7, 8, 9, casts.EACH - 1, casts.EACH, casts.EACH + 9, 3 * casts.EACH] * 20  # more than a launch takes
    for source, target in ((torch.float32, half), (half, torch.float32)):
        tensors = [torch.randn(size, device=device).to(source) for size in sizes]
        weight = torch.randn((32, 16, 3, 3), device=device).to(source).contiguous(memory_format=torch.channels_last)
        odd = torch.randn(1001, device=device).to(source)[1:]  # not at 16 bytes
        tensors += [weight, weight.contiguous(), weight[:, :8], odd, odd[::2], odd[0].expand(5)]
        tensors[0] = torch.tensor([float("inf"), -float("inf"), 3e38, 1e-41, -0.0], device=device).to(source)
        found = casts.cast_together(tensors, target)
        for mine, tensor in zip(found, tensors, strict=True):
            expected = torch.empty_like(tensor, dtype=target).copy_(tensor)
            assert torch.equal(mine, expected) and mine.dtype == target and mine.stride() == expected.stride()


@pytest.mark.gpu
def test_inductor_takes_the_operators():
    """One kernel forward and one backward, of two steps each, in place of one a weight."""
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
    assert len(fewer) < len(apart) and fewer.count("cast_tensors") == 4
