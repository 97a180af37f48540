"""What kernels of both directions use."""

import triton
import triton.language as tl


@triton.jit
def compose(a1, b1, a2, b2):
    """The map h -> a2 (a1 h + b1) + b2 as a pair."""
    return a1 * a2, a2 * b1 + b2


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def finite(x):
    return tl.where(is_finite(x), x, 0.0)


@triton.jit
def parameters(weight_ptr, bias_ptr, c, in_c):
    """weight and bias of channels c; None stands for 1 and 0."""
    if weight_ptr is None:
        weight = tl.full(c.shape, 1.0, tl.float32)
    else:
        weight = tl.load(weight_ptr + c, mask=in_c, other=0.0).to(tl.float32)
    if bias_ptr is None:
        bias = tl.full(c.shape, 0.0, tl.float32)
    else:
        bias = tl.load(bias_ptr + c, mask=in_c, other=0.0).to(tl.float32)
    return weight, bias


@triton.jit
def pair(table_ptr, index, mask):
    return tl.load(table_ptr + 2 * index, mask=mask, other=0.0), tl.load(
        table_ptr + 2 * index + 1, mask=mask, other=0.0
    )
