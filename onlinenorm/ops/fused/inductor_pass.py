"""A torch.compile pass over the gradients that a norm's backward reads.

The output of a residual block has two readers, so autograd adds two gradients just before the norm that made it. The
backward operator reads both for less than the addition costs. Global pooling sends the same gradient to all pixels of a
channel; the operator spreads the one value itself, into memory that it uses again.

Inductor has one place for such a pass in a process (``config.post_grad_custom_pre_pass``), and runs it on every graph;
this one changes nothing but what a norm's backward reads. torch.compile puts it there when it traces the first training
pass of a layer on these kernels, whoever called it, and the log says so; neither an import nor a layer that is not
compiled does. A program that has a pass of its own keeps it; as a subclass of ``FoldGradients`` that calls
``super().__call__(graph)`` it does both. A torch whose Inductor has no such place, or keeps what the pass needs under
other names, compiles layers without it, and the log names what is missing.
"""

import functools
import importlib
import itertools
import logging
from pathlib import Path

import torch

try:
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
except ImportError:  # which `install` tells
    CustomGraphPass = object  # type: ignore[assignment, misc]

logger = logging.getLogger(__name__)

aten = torch.ops.aten

# What the pass uses of torch that torch does not promise to keep.
PRIVATE = {
    "torch._inductor.config": ("post_grad_custom_pre_pass",),
    "torch._inductor.custom_graph_pass": ("CustomGraphPass", "get_hash_for_files"),
    "torch._inductor.lowering": ("lowerings", "make_fallback", "tag_to_layout_constraint"),
    "torch._library.utils": ("get_layout_constraint_tag",),
}


class FoldGradients(CustomGraphPass):
    """Replace fused_backward(a + b, None, ...) by fused_backward(a, b, ...), and what is spread by what it spreads."""

    enabled = True  # else gradients are added and spread before it

    def __call__(self, graph: torch.fx.Graph) -> None:
        _declare_operators()
        if not self.enabled:
            return
        backward = torch.ops.onlinenorm.fused_backward.default
        others = (
            torch.ops.onlinenorm.fused_max_pool_backward.default,
            torch.ops.onlinenorm.fused_shortcut_backward.default,
        )
        for node in list(graph.nodes):
            if node.op != "call_function" or not node.args or node.args[0] not in (backward, *others):
                continue
            grad = node.kwargs["grad"]
            if _is_plain_add(grad) and node.kwargs["skip_grad"] is None and len(grad.users) == 1:
                _replace(node, dict(zip(("grad", "skip_grad"), grad.args, strict=True)))
                graph.erase_node(grad)
            elif node.args[0] is backward and (spread := _spread(grad)) is not None and len(grad.users) == 1:
                if grad.target is not aten.expand.default:
                    value, factor = spread.meta["val"], grad.args[1]
                    with graph.inserting_before(node):
                        spread = graph.call_function(grad.target, (spread, factor))
                    spread.meta["val"] = grad.target(value, factor)
                _replace(node, {"grad": spread})
                graph.erase_node(grad)

    def uuid(self):
        # Part of the key of Inductor's cache on disk: none of its code expects other results of the operators.
        names = "max_pool.py", "operators.py", "shortcut.py", "single_read.py"
        results = [str(Path(__file__).with_name(name)) for name in names]
        return get_hash_for_files((__file__, *results), extra=f"enabled={self.enabled}")


@functools.cache
def _inductor_has_a_place() -> bool:
    """Whether this torch has all of `PRIVATE`; a warning names the first that it lacks."""
    for module, names in PRIVATE.items():
        for name in names:
            try:
                getattr(importlib.import_module(module), name)
            except (ImportError, AttributeError):
                logger.warning(
                    "torch.compile: torch %s has no %s.%s, so OnlineNorm's layers are compiled without the pass that "
                    "saves their backward reading and writing gradients, which is slower; a newer onlinenorm, or an "
                    "older torch, has it",
                    *(torch.__version__, module, name),
                )
                return False
    return True


def _declare_operators() -> None:
    """Tell Inductor that our operators are called as they are.

    It would find out at the first call of each, but torch 2.11 writes down the call's arguments then, with all that
    they are computed from: for the last gradient of a deep network that takes for ever.
    """
    if not _inductor_has_a_place():
        return
    from torch._inductor.lowering import lowerings, make_fallback, tag_to_layout_constraint
    from torch._library.utils import get_layout_constraint_tag

    both = itertools.product(("fused_max_pool", "fused_shortcut"), ("forward", "backward"))
    for name in map("_".join, both):
        operator = getattr(torch.ops.onlinenorm, name).default
        if operator not in lowerings:
            make_fallback(operator, tag_to_layout_constraint(get_layout_constraint_tag(operator, with_default=True)))


def _replace(node: torch.fx.Node, arguments: dict[str, torch.fx.Node]) -> None:
    node.kwargs = {**node.kwargs, **arguments}
    if "eager_input_vals" in node.meta:  # Inductor's record of the arguments, from which it traces again
        args, kwargs = node.meta["eager_input_vals"]
        values = {name: argument.meta["val"] for name, argument in arguments.items()}
        node.meta["eager_input_vals"] = args, {**kwargs, **values}


def _spread(node: torch.fx.Node) -> torch.fx.Node | None:
    """The (N, C, 1, 1) of which ``node`` is a copy for every pixel, up to a factor."""
    source = node.args[0] if node.target in (aten.div.Scalar, aten.mul.Scalar) else node
    if not isinstance(source, torch.fx.Node) or source.target is not aten.expand.default:
        return None
    spread = source.args[0]
    if not isinstance(spread, torch.fx.Node):
        return None
    value, (samples, channels, *_) = spread.meta.get("val"), node.meta["val"].shape
    return spread if isinstance(value, torch.Tensor) and value.shape == (samples, channels, 1, 1) else None


def _is_plain_add(node) -> bool:
    if node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return False
    values = [value.meta.get("val") if isinstance(value, torch.fx.Node) else None for value in (node, *node.args)]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return len(tensors) == 3 and all(t.shape == tensors[0].shape and t.dtype == tensors[0].dtype for t in tensors)


@torch.compiler.assume_constant_result
def install() -> bool:
    """Make it Inductor's custom pass, unless there is no place or another pass has it; returns whether it is.

    While torch.compile traces, this runs at once and leaves nothing in the graph.
    """
    if not _inductor_has_a_place():
        return False
    from torch._inductor import config

    present = config.post_grad_custom_pre_pass
    if present is None:
        config.post_grad_custom_pre_pass = FoldGradients()
        logger.info("torch.compile: OnlineNorm's FoldGradients is now Inductor's post_grad_custom_pre_pass")
    elif not isinstance(present, FoldGradients):
        _warn_of_another(type(present).__name__)
        return False
    return True


@functools.cache
def _warn_of_another(name: str) -> None:
    logger.warning(
        "torch.compile: Inductor's post_grad_custom_pre_pass is %s already, so OnlineNorm's backward reads gradients "
        "that are added first, which is slower; make that pass a subclass of %s.FoldGradients",
        *(name, __name__),
    )
