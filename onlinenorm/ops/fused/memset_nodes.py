"""Memsets of a captured CUDA graph as kernels.

cuDNN clears a counter of four bytes ahead of many convolutions. As a node of its own kind it holds up its neighbours:
5.6 us from the kernel before to the kernel behind, in a profile of ResNet-50 on an H200, where a kernel of that size
takes less than two.
"""

import ctypes
import functools
import logging

import torch

from onlinenorm.ops.fused.cubin_cache import cubin
from onlinenorm.ops.fused.nvrtc import Kernel, architecture, call_driver, driver_has
from onlinenorm.text import first_line

logger = logging.getLogger(__name__)

enabled = True  # else all stay memsets
MEMSET = 2  # CU_GRAPH_NODE_TYPE_MEMSET
MOST_BYTES = 4096  # larger ones are left to the driver
THREADS = 128
SOURCE = """
extern "C" __global__ void fill(unsigned char* to, unsigned long long count, unsigned value, unsigned size) {
    for (unsigned long long i = threadIdx.x; i < count; i += blockDim.x) {
        if (size == 4) reinterpret_cast<unsigned*>(to)[i] = value;
        else if (size == 2) reinterpret_cast<unsigned short*>(to)[i] = value;
        else to[i] = value;
    }
}
"""


class _Memset(ctypes.Structure):
    """CUDA_MEMSET_NODE_PARAMS."""

    _fields_ = (
        ("to", ctypes.c_uint64),
        ("pitch", ctypes.c_size_t),
        ("value", ctypes.c_uint),
        ("element_size", ctypes.c_uint),
        ("width", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
    )


class _KernelNode(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2: function; grid, CTA and shared memory; arguments."""

    _fields_ = (
        ("function", ctypes.c_void_p),
        ("shape", ctypes.c_uint * 7),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("rest", ctypes.c_void_p * 3),
    )


def as_kernels(graph: torch.cuda.CUDAGraph) -> int:
    """Put a kernel in place of each small memset of a graph; returns how many.

    Where the driver is older than CUDA 12.3, NVRTC does not know the device, or either refuses (a node of a graph that
    allocates memory cannot be taken out), memsets stay as they are.

    Args:
        graph: captured on the current device with ``keep_graph=True``, and not instantiated yet.
    """
    if not enabled:
        return 0
    device = torch.cuda.current_device()
    if torch.version.cuda is None or not driver_has("cuGraphAddDependencies_v2") or _architecture(device) is None:
        return 0
    try:
        return _replace_all(graph.raw_cuda_graph(), device)
    except RuntimeError as error:
        logger.info("memsets stay in a captured graph: %s", first_line(error))
        return 0


def _replace_all(graph: int, device: int) -> int:
    replaced = 0
    for node in listed("cuGraphGetNodes", graph):
        kind, memset = ctypes.c_int(), _Memset()
        call_driver("cuGraphNodeGetType", ctypes.c_void_p(node), ctypes.byref(kind))
        if kind.value != MEMSET:
            continue
        call_driver("cuGraphMemsetNodeGetParams", ctypes.c_void_p(node), ctypes.byref(memset))
        if memset.height == 1 and memset.width * memset.element_size <= MOST_BYTES:
            _replace(graph, node, memset, _fill(device))
            replaced += 1
    return replaced


def _replace(graph: int, node: int, memset: _Memset, fill: Kernel) -> None:
    before = listed("cuGraphNodeGetDependencies_v2", node, True)
    behind = listed("cuGraphNodeGetDependentNodes_v2", node, True)
    values = (
        ctypes.c_uint64(memset.to),
        ctypes.c_uint64(memset.width),
        ctypes.c_uint(memset.value),
        ctypes.c_uint(memset.element_size),
    )
    arguments = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
    kernel = _KernelNode(fill.function, (1, 1, 1, THREADS, 1, 1, 0), arguments)
    made = ctypes.c_void_p()
    call_driver(
        "cuGraphAddKernelNode_v2",
        *(ctypes.byref(made), ctypes.c_void_p(graph), _array(before), ctypes.c_size_t(len(before))),
        ctypes.byref(kernel),
    )
    if behind:
        made_each = _array([made.value or 0] * len(behind))
        call_driver(
            "cuGraphAddDependencies_v2",
            *(ctypes.c_void_p(graph), made_each, _array(behind), None, ctypes.c_size_t(len(behind))),
        )
    call_driver("cuGraphDestroyNode", ctypes.c_void_p(node))


def _architecture(device: int) -> str | None:
    return architecture(*torch.cuda.get_device_capability(device))


@functools.cache
def _fill(device: int) -> Kernel:
    target = _architecture(device)
    assert target is not None  # as_kernels has asked
    return Kernel(cubin(SOURCE, target, ()), "fill")


def _array(nodes: list[int]) -> ctypes.Array:
    return (ctypes.c_void_p * len(nodes))(*nodes)


def listed(question: str, of: int, edges: bool = False) -> list[int]:
    """Nodes that a function of the driver lists, asked for their number first; with ``edges`` it tells of edges too."""
    count = ctypes.c_size_t()
    for _ in range(2):
        room = (ctypes.c_void_p * count.value)() if count.value else None
        data = ((ctypes.c_ubyte * 8 * count.value)() if count.value else None,) * edges
        call_driver(question, ctypes.c_void_p(of), room, *data, ctypes.byref(count))
        if count.value == 0:
            return []
    return [node or 0 for node in room or ()]
