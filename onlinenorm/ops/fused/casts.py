"""A torch.compile pass under autocast: weights are cast to 16 bits together, and their gradients back.

Inductor makes a kernel of each cast that a convolution reads, and of each that turns its weight's gradient into that of
the parameter: 104 small ones in ResNet-50. Two operators do the same, in a launch for some 64 tensors each.
"""

from collections import defaultdict
from operator import getitem

import torch
from torch import Tensor, fx

from onlinenorm.ops.fused.operators import fake, operator

aten = torch.ops.aten
_cast = torch.ops.prims.convert_element_type.default


@operator()
def cast_together(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Each tensor in another dtype, in its own memory order."""
    found = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(found, tensors)
    return found


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
