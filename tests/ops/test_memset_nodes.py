"""Memsets of a captured graph as kernels: the driver's graph is one of this file, but for a test on a GPU."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from onlinenorm.ops.fused import memset_nodes, nvrtc
from onlinenorm.training import cuda_graph

KERNEL, MEMSET = 0, 2


class Graph:
    """As much of the driver as is asked: nodes with a kind, what a memset sets, edges, and kernels that were added."""

    def __init__(self, nodes, edges, memsets):
        self.nodes, self.edges, self.memsets, self.added = dict(nodes), set(edges), memsets, {}

    def _list(self, found, room, count):
        if room is not None:
            room[:] = found
        count._obj.value = len(found)
        return 0

    def cuGraphGetNodes(self, graph, room, count):
        return self._list(sorted(self.nodes), room, count)

    def cuGraphNodeGetType(self, node, kind):
        kind._obj.value = self.nodes[node.value]
        return 0

    def cuGraphMemsetNodeGetParams(self, node, memset):
        for name, value in self.memsets[node.value].items():
            setattr(memset._obj, name, value)
        return 0

    def cuGraphNodeGetDependencies_v2(self, node, room, edges, count):
        return self._list(sorted(a for a, b in self.edges if b == node.value), room, count)

    def cuGraphNodeGetDependentNodes_v2(self, node, room, edges, count):
        return self._list(sorted(b for a, b in self.edges if a == node.value), room, count)

    def cuGraphAddKernelNode_v2(self, made, graph, before, count, kernel):
        made._obj.value = number = max(self.nodes) + 1
        self.nodes[number] = KERNEL
        self.edges |= {(before[i], number) for i in range(count.value)}
        kinds = ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint, ctypes.c_uint
        pairs = zip(kinds, kernel._obj.arguments[:4], strict=True)
        self.added[number] = kernel._obj.function, [kind.from_address(address).value for kind, address in pairs]
        return 0

    def cuGraphAddDependencies_v2(self, graph, first, second, edges, count):
        self.edges |= {(first[i], second[i]) for i in range(count.value)}
        return 0

    def cuGraphDestroyNode(self, node):
        del self.nodes[node.value]
        self.edges = {edge for edge in self.edges if node.value not in edge}
        return 0


def test_drivers_that_are_too_old_keep_their_memsets(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(memset_nodes, "_architecture", lambda device: "sm_90")
    monkeypatch.setattr(nvrtc, "_driver", lambda: SimpleNamespace(cuGraphGetNodes=None))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert memset_nodes.as_kernels(SimpleNamespace(raw_cuda_graph=pytest.fail)) == 0


def test_small_memsets_become_kernels_between_the_same_neighbours(monkeypatch):
    nodes = {1: KERNEL, 2: MEMSET, 3: KERNEL, 4: KERNEL, 5: MEMSET, 6: MEMSET, 7: MEMSET}
    of = {"value": 0, "element_size": 4, "width": 1, "height": 1}
    memsets = {
        2: {**of, "to": 2**40},
        5: {**of, "to": 5, "width": 2000},  # larger
        6: {**of, "to": 6, "height": 2},
        7: {**of, "to": 7, "element_size": 1, "width": 9, "value": 255},  # without neighbours
    }
    graph = Graph(nodes, {(1, 2), (4, 2), (2, 3), (2, 5), (5, 6)}, memsets)
    monkeypatch.setattr(nvrtc, "_driver", lambda: graph)
    monkeypatch.setattr(memset_nodes, "_fill", lambda device: SimpleNamespace(function=77))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    architecture = None
    monkeypatch.setattr(memset_nodes, "_architecture", lambda device: architecture)
    captured = SimpleNamespace(raw_cuda_graph=lambda: 123)
    assert memset_nodes.as_kernels(captured) == 0  # NVRTC does not know the device
    architecture = "sm_90"
    assert memset_nodes.as_kernels(captured) == 2
    assert graph.nodes == {1: KERNEL, 3: KERNEL, 4: KERNEL, 5: MEMSET, 6: MEMSET, 8: KERNEL, 9: KERNEL}
    assert graph.edges == {(1, 8), (4, 8), (8, 3), (8, 5), (5, 6)}
    assert graph.added == {8: (77, [2**40, 1, 0, 4]), 9: (77, [7, 9, 255, 1])}


def test_where_the_driver_refuses_memsets_stay(monkeypatch):
    """As it does for nodes of a graph that allocates memory."""
    graph = Graph({1: MEMSET}, set(), {1: {"value": 0, "element_size": 4, "width": 1, "height": 1, "to": 8}})
    graph.cuGraphDestroyNode = lambda node: 801
    graph.cuGetErrorString = lambda status, text: 0
    monkeypatch.setattr(nvrtc, "_driver", lambda: graph)
    monkeypatch.setattr(memset_nodes, "_fill", lambda device: SimpleNamespace(function=77))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(memset_nodes, "_architecture", lambda device: "sm_90")
    assert memset_nodes.as_kernels(SimpleNamespace(raw_cuda_graph=lambda: 123)) == 0
    assert graph.nodes == {1: MEMSET, 2: KERNEL}  # both set the same bytes


def test_the_kernel_compiles_without_a_gpu():
    if torch.version.cuda is None:
        pytest.skip("torch without CUDA carries no NVRTC")
    assert b"fill" in nvrtc.compile_source(memset_nodes.SOURCE, "sm_90", ())


def clear(tensor, stream):
    place, count = ctypes.c_uint64(tensor.data_ptr()), ctypes.c_size_t(tensor.numel())
    nvrtc.call_driver("cuMemsetD32Async", place, ctypes.c_uint(0), count, ctypes.c_void_p(stream.cuda_stream))


@pytest.mark.gpu
def test_a_captured_step_has_no_small_memsets_and_does_what_it_did():
    x, stream = torch.ones(257, device="cuda"), torch.cuda.Stream()

    def step():
        y = x + x
        clear(y[:3], stream)
        z = y + x
        clear(z[1:2], stream)
        return z

    graph, z = cuda_graph.capture(step, stream)
    kinds = []
    for node in memset_nodes.listed("cuGraphGetNodes", graph.raw_cuda_graph()):
        kind = ctypes.c_int()
        nvrtc.call_driver("cuGraphNodeGetType", ctypes.c_void_p(node), ctypes.byref(kind))
        kinds.append(kind.value)
    assert kinds == [KERNEL] * 4
    for k in (1, 4):
        x.fill_(k)
        graph.replay()
        expected = torch.full_like(x, 3 * k)
        expected[:3] = k
        expected[1] = 0
        assert torch.equal(z, expected)
