"""A torch.compile pass over the gradients that a norm's backward reads.

The output of a residual block has two readers, so autograd adds two gradients just before the norm that made it. The
backward operator reads both for less than the addition costs. A gradient in another memory order than the norm's input,
as global pooling leaves it, the operator would copy; asked for here, Inductor writes it in the right order from the
start. Inductor runs the pass on every graph; it changes nothing but what a ``fused_backward`` reads.
"""

from pathlib import Path

import torch
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files


class FoldGradientAdd(CustomGraphPass):
    """Replace fused_backward(a + b, None, ...) by fused_backward(a, b, ...), and order gradients as the input is."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        backward = torch.ops.onlinenorm.fused_backward.default
        for node in list(graph.nodes):
            if node.op != "call_function" or node.args[:1] != (backward,):
                continue
            grad = node.kwargs["grad"]
            if _is_plain_add(grad) and node.kwargs["extra"] is None and len(grad.users) == 1:
                _replace(node, dict(zip(("grad", "extra"), grad.args, strict=True)))
                graph.erase_node(grad)
            elif _is_last(node.kwargs["x"]) and not _is_last(grad):
                with graph.inserting_before(node):
                    ordered = graph.call_function(
                        torch.ops.aten.clone.default, (grad,), {"memory_format": torch.channels_last}
                    )
                ordered.meta["val"] = grad.meta["val"].clone(memory_format=torch.channels_last)
                _replace(node, {"grad": ordered})

    def uuid(self):
        # Part of the key of Inductor's cache on disk: none of its code expects other results of the operators.
        return get_hash_for_files((__file__, str(Path(__file__).with_name("operators.py"))))


def _replace(node: torch.fx.Node, arguments: dict[str, torch.fx.Node]) -> None:
    node.kwargs = {**node.kwargs, **arguments}
    if "eager_input_vals" in node.meta:  # Inductor's record of the arguments, from which it traces again
        args, kwargs = node.meta["eager_input_vals"]
        values = {name: argument.meta["val"] for name, argument in arguments.items()}
        node.meta["eager_input_vals"] = args, {**kwargs, **values}


def _is_last(node) -> bool:
    return node.meta["val"].is_contiguous(memory_format=torch.channels_last)


def _is_plain_add(node) -> bool:
    if node.target is not torch.ops.aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return False
    values = [value.meta.get("val") if isinstance(value, torch.fx.Node) else None for value in (node, *node.args)]
    if not all(isinstance(value, torch.Tensor) for value in values):
        return False
    total, *terms = values
    return all(term.shape == total.shape and term.dtype == total.dtype for term in terms)


def install() -> None:
    """Make it Inductor's custom pass, unless the process already has one of its own."""
    if config.post_grad_custom_pre_pass is None:
        config.post_grad_custom_pre_pass = FoldGradientAdd()
