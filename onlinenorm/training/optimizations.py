"""Optimizations of training steps on a GPU that have no keys of their own: any can be turned off, to find a fault.

Results with and without each are the same up to rounding.
"""

from collections.abc import Collection
from importlib.util import find_spec
from typing import Literal

from onlinenorm.training.cuda_graph import CastWeights

Optimization = Literal["cast_weights", "memset_kernels", "programmatic_launch", "fold_gradients"]


def disable(names: Collection[Optimization]) -> None:
    """Turns these off and all others on, for what this process compiles, captures and launches from now on.

    Args:
        names: "cast_weights": captured steps cast all weights, and their gradients, in a few kernels (`CastWeights`).
            "memset_kernels": captured steps clear little memory by kernels (`memset_nodes`). "programmatic_launch":
            norm kernels begin before the kernel in front of them has ended (`nvrtc.Kernel`). "fold_gradients": in
            compiled networks a norm's backward adds and spreads gradients itself (`inductor_pass.FoldGradients`).
    """
    CastWeights.enabled = "cast_weights" not in names
    if find_spec("triton"):  # which comes with the package of the kernels; not on every platform
        from onlinenorm.ops.fused import inductor_pass, memset_nodes, nvrtc

        memset_nodes.enabled = "memset_kernels" not in names
        nvrtc.Kernel.starts_early = "programmatic_launch" not in names
        inductor_pass.FoldGradients.enabled = "fold_gradients" not in names
