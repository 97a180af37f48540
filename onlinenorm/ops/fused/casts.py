"""A torch.compile pass under autocast: weights are cast to 16 bits together, and their gradients back.

Inductor makes a kernel of each cast that a convolution reads, and of each that turns its weight's gradient into that of
the parameter: 104 small ones in ResNet-50. Two operators do the same, in a launch for TENSORS tensors each.
"""

import ctypes
import functools
from collections import defaultdict
from operator import getitem

import torch
from torch import Tensor, fx

from onlinenorm.ops.fused.cubin_cache import cubin
from onlinenorm.ops.fused.nvrtc import Kernel, architecture
from onlinenorm.ops.fused.operators import fake, operator
from onlinenorm.ops.fused.single_read import SOURCES, supports_device

aten = torch.ops.aten
_cast = torch.ops.prims.convert_element_type.default

TENSORS = 128  # a launch; its parameters may take 4 KB
THREADS = 256
EACH = 8 * THREADS * 4  # values that a CTA casts: eight a thread, four times
HALVES = (torch.bfloat16, torch.float16)


class Cast(ctypes.Structure):
    """One tensor; same order as in casts.cu."""

    _fields_ = ("source", ctypes.c_void_p), ("target", ctypes.c_void_p), ("size", ctypes.c_int), ("end", ctypes.c_int)


class Params(ctypes.Structure):
    """The kernel's argument."""

    _fields_ = ("casts", Cast * TENSORS), ("count", ctypes.c_int)


@operator()
def cast_together(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Each tensor in another dtype, in its own memory order."""
    found = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    served = []
    for source, target in zip(tensors, found, strict=True):
        if _kernel_serves(source, target, tensors[0]):
            served.append((source, target))
        else:
            target.copy_(source)
    for first in range(0, len(served), TENSORS):
        _launch(served[first : first + TENSORS])
    return found


def _kernel_serves(source: Tensor, target: Tensor, first: Tensor) -> bool:
    """Whether one launch serves it together with the first: the same dtypes and memory order, on the same GPU."""
    return (
        source.is_cuda
        and (source.device, source.dtype) == (first.device, first.dtype)
        and {source.dtype, target.dtype} in ({torch.float32, half} for half in HALVES)
        and source.stride() == target.stride()
        and 0 < source.numel() < 2**31
        and supports_device(source.device.index)
    )


def _launch(pairs: list[tuple[Tensor, Tensor]]) -> None:
    params, end = Params(count=len(pairs)), 0
    for place, (source, target) in zip(params.casts, pairs, strict=False):
        end += -(-source.numel() // EACH)
        place.source, place.target = source.data_ptr(), target.data_ptr()
        place.size, place.end = source.numel(), end
    source, target = pairs[0]
    with torch.cuda.device_of(source):
        stream = torch._C._cuda_getCurrentRawStream(source.device.index)
        half, to_float = torch.float16 in (source.dtype, target.dtype), target.dtype == torch.float32
        kernel = _kernel(source.device.index, half, to_float)
        kernel.launch(end, THREADS, 0, stream, params, False)


@functools.cache
def _kernel(device: int, half: bool, to_float: bool) -> Kernel:
    target = architecture(*torch.cuda.get_device_capability(device))
    assert target is not None, "`supports_device` is False for a device that NVRTC does not know"
    return Kernel(cubin((SOURCES / "casts.cu").read_text(), target, options(half, to_float)), "cast_tensors")


def options(half: bool, to_float: bool) -> tuple[str, ...]:
    """How the kernel is compiled for float16 or bfloat16, to float or from it."""
    values = {"HALF": half, "TO_FLOAT": to_float, "TENSORS": TENSORS, "THREADS": THREADS, "EACH": EACH}
    return "--std=c++17", *(f"-D{name}={int(value)}" for name, value in values.items())


@fake(cast_together)
def _(tensors, dtype):
    return [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]


def gather_casts(graph: fx.Graph) -> None:
    """Put one ``cast_together`` in place of the casts of weights, and one in place of those of their gradients."""
    nodes = list(graph.nodes)
    output = next(node for node in reversed(nodes) if node.op == "output")
    weights, gradients = defaultdict(list), defaultdict(list)
    for node in nodes:
        if node.target is not _cast or not isinstance(node.args[0], fx.Node):
            continue
        source, dtype = node.args
        kind = source.meta["val"].dtype, dtype
        if source.op == "placeholder" and _is_a_weight(node, output):
            weights[kind].append(node)
        elif _is_a_gradient(source) and set(node.users) == {output}:
            gradients[kind].append(node)
    replaced = []
    for kinds, first in ((weights, next(node for node in nodes if node.op != "placeholder")), (gradients, output)):
        for (_, dtype), casts in kinds.items():
            if len(casts) > 1:
                _replace(graph, casts, dtype, first)
                replaced += casts
    for node in replaced:
        graph.erase_node(node)


def _is_a_weight(node: fx.Node, output: fx.Node) -> bool:
    """Whether convolutions take it as their kernel, and nothing else but backward reads it."""
    places = {aten.convolution.default: 1, aten.convolution_backward.default: 2}
    users = [user for user in node.users if user is not output]
    return bool(users) and all(user.target in places and user.args[places[user.target]] is node for user in users)


def _is_a_gradient(node: fx.Node) -> bool:
    source = node.args[0] if node.target is getitem else None
    return isinstance(source, fx.Node) and (source.target, node.args[1]) == (aten.convolution_backward.default, 1)


def _replace(graph: fx.Graph, casts: list[fx.Node], dtype: torch.dtype, before: fx.Node) -> None:
    sources = [node.args[0] for node in casts]
    with graph.inserting_before(before):
        together = graph.call_function(torch.ops.onlinenorm.cast_together.default, (sources, dtype))
        together.meta["val"] = [node.meta["val"] for node in casts]
        for position, cast in enumerate(casts):
            own = graph.call_function(getitem, (together, position))
            own.meta["val"] = cast.meta["val"]
            cast.replace_all_uses_with(own)
