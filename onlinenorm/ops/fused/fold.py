"""A torch.compile pass: hand both branches' gradients to the norm's backward instead of adding them first.

The output of a residual block has two readers, so autograd adds two gradients just before the norm that made it. The
backward operator reads both for less than the addition costs. Inductor runs the pass on every graph; it changes
nothing but additions that only a ``fused_backward`` reads.
"""

import torch
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files


class FoldGradientAdd(CustomGraphPass):
    """Replace fused_backward(a + b, None, ...) by fused_backward(a, b, ...)."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        backward = torch.ops.onlinenorm.fused_backward.default
        for node in graph.nodes:
            if node.op != "call_function" or node.args[:1] != (backward,):
                continue
            add = node.kwargs["grad"]
            if _is_plain_add(add) and node.kwargs["extra"] is None and len(add.users) == 1:
                terms = dict(zip(("grad", "extra"), add.args, strict=True))
                node.kwargs = {**node.kwargs, **terms}
                if "eager_input_vals" in node.meta:  # Inductor's record of the arguments, from which it traces again
                    args, kwargs = node.meta["eager_input_vals"]
                    values = {name: term.meta["val"] for name, term in terms.items()}
                    node.meta["eager_input_vals"] = args, {**kwargs, **values}
                graph.erase_node(add)

    def uuid(self):
        return get_hash_for_files((__file__,))


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
