"""A torch.compile pass: casts of weights, and their gradients, on a stream beside that of the other kernels of a graph.

A forward pass waits for a weight's cast only where a convolution reads it, a backward pass for no weight's gradient.
Their kernels (casts; workspace, product, sum of parts) are small and leave multiprocessors idle, at small batches above
all. In a CUDA graph they run beside the others here: casts ahead of them, in groups in the order of use; gradients
while the next layers' backward does. What these read stays where it is until the main stream has waited for them, LAG
convolutions later; the last convolution waits for all. Outside a capture, and where Inductor makes the graphs, kernels
follow one another. The same kernels on the same values give the same bits.
"""

from dataclasses import dataclass, field
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from onlinenorm.ops.fused.nvrtc import create_stream
from onlinenorm.ops.fused.operators import fake, operator
from onlinenorm.ops.fused.workspace import inductor_makes_graphs_on

aten = torch.ops.aten
_cast = torch.ops.prims.convert_element_type.default

LAG = 2  # convolutions whose weight gradients may be under way
GROUP = 8  # casts that are waited for together


@dataclass
class _Side:
    """A stream of our own, and what it has been given in this pass."""

    stream: torch.cuda.Stream
    casts: list[tuple[list[Tensor], torch.cuda.Event]] = field(default_factory=list)  # group by group
    gradients: list[torch.cuda.Event] = field(default_factory=list)  # behind each convolution


_sides: dict[int, _Side] = {}  # of a device


def _side_of(tensor: Tensor) -> _Side | None:
    """What is beside the current stream of the tensor's device; None where kernels follow one another."""
    if not (tensor.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    if inductor_makes_graphs_on(tensor.device, torch.cuda.current_stream().cuda_stream):
        return None
    if tensor.device.index not in _sides:
        stream = torch.cuda.ExternalStream(create_stream(), device=tensor.device)
        _sides[tensor.device.index] = _Side(stream)
    return _sides[tensor.device.index]


@operator()
def begin_casts(weights: list[Tensor], dtype: torch.dtype, group: int) -> Tensor:
    """Casts of all weights begin, ``group`` by group; what comes back holds nothing, and is for ``end_casts``."""
    with torch.cuda.device_of(weights[0]):
        if (side := _side_of(weights[0])) is not None:
            side.casts.clear()
            side.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side.stream):
                for first in range(0, len(weights), group):
                    values = [weight.to(dtype) for weight in weights[first : first + group]]
                    side.casts.append((values, side.stream.record_event()))
        return weights[0].new_empty(0)


@fake(begin_casts)
def _(weights, *_):
    return weights[0].new_empty(0)


@operator()
def end_casts(begun: Tensor, weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The next group's weights in ``dtype``."""
    with torch.cuda.device_of(weights[0]):
        if (side := _side_of(weights[0])) is None:
            return [weight.to(dtype) for weight in weights]
        values, event = side.casts.pop(0)
        torch.cuda.current_stream().wait_event(event)
        return values


@fake(end_casts)
def _(begun, weights, dtype):
    return [weight.to(dtype) for weight in weights]


@operator()
def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    dtype: torch.dtype,
    first: bool,
    last: bool,
    held: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """Gradients of x and, in ``dtype``, of weight, which is for the end of the graph alone: wait for ``last``.

    ``held`` is what the convolution LAG ago was given and gave, or for ``last`` all since: it lives, and comes first.
    """
    arguments: tuple[Any, ...] = (grad, x, weight, stride, padding, dilation, groups)
    with torch.cuda.device_of(grad):
        if (side := _side_of(grad)) is None:
            return _one_after_another(arguments, dtype)
        main = torch.cuda.current_stream()
        if first:
            side.gradients.clear()
        if last:
            main.wait_event(side.gradients[-1])
            return _one_after_another(arguments, dtype)
        if held:
            main.wait_event(side.gradients[-LAG])
        side.stream.wait_stream(main)
        with torch.cuda.stream(side.stream):
            of_weight = _gradients(arguments, [False, True, False])[1].to(dtype)
            side.gradients.append(side.stream.record_event())
        return _gradients(arguments, [True, False, False])[0], of_weight


@fake(convolution_backward)
def _(grad, x, weight, stride, padding, dilation, groups, dtype, *_):
    return _one_after_another((grad, x, weight, stride, padding, dilation, groups), dtype)


def _one_after_another(arguments: tuple[Any, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    of_x, of_weight, _ = _gradients(arguments, [True, True, False])
    return of_x, of_weight.to(dtype)


def _gradients(arguments: tuple[Any, ...], which: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    grad, x, weight, stride, padding, dilation, groups = arguments
    return aten.convolution_backward.default(
        grad, x, weight, None, stride, padding, dilation, False, [0] * len(stride), groups, which
    )


def move_casts(graph: fx.Graph) -> None:
    """Have the casts of weights that convolutions read begin at once, and end in groups where the first is read."""
    nodes = list(graph.nodes)
    order = {node: number for number, node in enumerate(nodes)}
    casts = [node for node in nodes if _is_a_weights_cast(node) and _serves(node.args[0].meta["val"])]
    if len(casts) < 2 or len({(node.args[1], node.args[0].meta["val"].dtype) for node in casts}) > 1:
        return
    casts.sort(key=lambda node: min(order[user] for user in node.users))
    dtype = casts[0].args[1]
    operators = torch.ops.onlinenorm
    with graph.inserting_before(next(node for node in nodes if node.op != "placeholder")):
        weights = [node.args[0] for node in casts]
        begun = graph.call_function(operators.begin_casts.default, (weights, dtype, GROUP))
        begun.meta["val"] = weights[0].meta["val"].new_empty(0)
    for first in range(0, len(casts), GROUP):
        group = casts[first : first + GROUP]
        with graph.inserting_before(min((user for node in group for user in node.users), key=order.__getitem__)):
            arguments = (begun, [node.args[0] for node in group], dtype)
            ended = graph.call_function(operators.end_casts.default, arguments)
            ended.meta["val"] = [node.meta["val"] for node in group]
            for position, node in enumerate(group):
                value = graph.call_function(getitem, (ended, position))
                value.meta["val"] = node.meta["val"]
                node.replace_all_uses_with(value)
        begun = value  # one group after another
    for node in casts:
        graph.erase_node(node)


def _is_a_weights_cast(node: Any) -> bool:
    """Whether it casts an argument of the graph that convolutions take as kernel, and else only backward reads."""
    if node.target is not _cast or node.args[0].op != "placeholder":
        return False
    users = [user for user in node.users if user.op != "output"]
    return bool(users) and all(user.target is aten.convolution.default and user.args[1] is node for user in users)


def move_gradients(graph: fx.Graph) -> None:
    """Have all convolutions' backward passes whose weight gradients leave the graph be that of this module."""
    found = [(node, end) for node in graph.nodes if (end := _end_of_weight_gradient(node)) is not None]
    if len(found) < 2:
        return
    given: list[tuple[Any, ...]] = []
    node: Any  # its arguments are nodes and numbers
    for number, (node, end) in enumerate(found):
        grad, x, weight, _, stride, padding, dilation, _, _, groups, _ = node.args
        last = number == len(found) - 1
        until = number if last else number - LAG + 1
        held = [tensor for tensors in given[max(number - LAG, 0) : until] for tensor in tensors]
        value = end.meta["val"]
        with graph.inserting_before(node):
            ours = graph.call_function(
                torch.ops.onlinenorm.convolution_backward.default,
                (grad, x, weight, stride, padding, dilation, groups, value.dtype, number == 0, last, held),
            )
            of_x, of_weight = (graph.call_function(getitem, (ours, position)) for position in range(2))
        old = next(user for user in node.users if user.args[1] == 0)
        ours.meta["val"] = old.meta["val"], value
        of_x.meta["val"], of_weight.meta["val"] = ours.meta["val"]
        old.replace_all_uses_with(of_x)
        end.replace_all_uses_with(of_weight)
        given.append((grad, x, of_weight))
        for dead in (old, end, *[user for user in node.users if user not in (old, end)], node):
            graph.erase_node(dead)


def _end_of_weight_gradient(node: Any) -> fx.Node | None:
    """What a graph returns as a convolution's weight gradient, cast or not; None: other nodes, and what is read on."""
    if node.target is not aten.convolution_backward.default or not _is_plain(node):
        return None
    parts = {user.args[1]: user for user in node.users}
    if set(parts) != {0, 1} or len(node.users) != 2:
        return None
    end = parts[1]
    if len(end.users) == 1 and (cast := next(iter(end.users))).target is _cast:
        end = cast
    return end if all(user.op == "output" for user in end.users) else None


def _is_plain(node: Any) -> bool:
    """Of fixed sizes, with a gradient of x and of weight alone, on a device where `_serves`."""
    *_, transposed, output_padding, _, mask = node.args
    values = [argument.meta["val"] for argument in node.args[:3]]
    fixed = all(isinstance(size, int) for value in values for size in value.shape)
    usual = mask == [True, True, False] and not transposed and not any(output_padding)
    return usual and fixed and _serves(values[0])


def _serves(x: Tensor) -> bool:
    return x.device.type == "cuda"
