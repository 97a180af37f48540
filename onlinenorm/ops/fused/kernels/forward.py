"""Forward: reduce, scan, layer scale, apply."""

import triton
import triton.language as tl

from onlinenorm.ops.fused.kernels.shared import compose, finite, pair, parameters


@triton.jit
def moments_kernel(
    x_ptr, partial_ptr, pixels, channels, splits, rows, stride_n, stride_p, stride_c,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Mean and centred sum of squares of one slice of rows: shifted sums a lane, lanes merged around one centre."""
    program = tl.program_id(0).to(tl.int64)
    first = (program % splits).to(tl.int32) * rows
    last = min(first + rows, pixels)
    lane = tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < channels
    base_ptr = x_ptr + (program // splits) * stride_n + c.to(tl.int64)[None, :] * stride_c
    mask = ((first + lane) < last)[:, None] & in_c[None, :]
    shift = finite(
        tl.load(base_ptr + (first + lane).to(tl.int64)[:, None] * stride_p, mask=mask, other=0.0).to(tl.float32)
    )
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    square = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in tl.range(first, last, BLOCK_P, num_stages=STAGES):
        p = start + lane
        mask = (p < last)[:, None] & in_c[None, :]
        x = tl.load(base_ptr + p.to(tl.int64)[:, None] * stride_p, mask=mask, other=0.0).to(tl.float32)
        d = tl.where(mask, x - shift, 0.0)
        total += d
        square += d * d
    count = tl.maximum((last - first - lane + BLOCK_P - 1) // BLOCK_P, 0).to(tl.float32)[:, None]
    offset = total / tl.maximum(count, 1.0)
    centre = tl.sum(tl.where(lane[:, None] == 0, shift, 0.0), 0)
    drift = tl.where(count > 0, shift + offset - centre[None, :], 0.0)
    lift = tl.sum(count * drift, 0) / (last - first).to(tl.float32)
    apart = tl.where(count > 0, drift - lift[None, :], 0.0)
    scatter = tl.sum(square - total * offset + count * apart * apart, 0)
    index = 2 * (program * channels + c)
    tl.store(partial_ptr + index, centre + lift, mask=in_c)
    tl.store(partial_ptr + index + 1, scatter, mask=in_c)


@triton.jit
def _merge_moments(partial_ptr, n, c, live, channels, splits, rows, pixels):
    """Mean and centred sum of squares of sample n's channels from those of its slices."""
    centre = finite(tl.load(partial_ptr + 2 * (n * splits * channels + c), mask=live, other=0.0))
    total = tl.zeros_like(centre)
    scatter = tl.zeros_like(centre)
    for split in range(splits):
        count = min(rows, pixels - split * rows) * 1.0
        mean, square = pair(partial_ptr, (n * splits + split) * channels + c, live)
        total += count * (mean - centre)
        scatter += square + count * (mean - centre) * (mean - centre)
    offset = total / (pixels * 1.0)
    return centre + offset, tl.maximum(scatter - total * offset, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def merge_moments_kernel(partial_ptr, merged_ptr, channels, splits, rows, pixels, BLOCK_C: tl.constexpr):
    """One slice a sample in place of several."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < channels
    mean, scatter = _merge_moments(partial_ptr, n, c, in_c, channels, splits, rows, pixels)
    index = 2 * (n * channels + c)
    tl.store(merged_ptr + index, mean, mask=in_c)
    tl.store(merged_ptr + index + 1, scatter, mask=in_c)


@triton.jit
def forward_scan_kernel(
    partial_ptr, moments_ptr, state_ptr, mean_ptr, var_ptr, samples, channels, splits, rows, pixels, alpha,
    one_minus_alpha, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Run the statistics over the samples; writes both tables and moves the state past the batch.

    ``one_minus_alpha``, and ``k`` below, which is 1 - alpha_bkw, are rounded once, from float64.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < channels
    lane = tl.arange(0, BLOCK_N)[:, None]
    mean = tl.load(mean_ptr + c, mask=in_c, other=0.0)
    var = tl.load(var_ptr + c, mask=in_c, other=0.0)
    tl.store(state_ptr + 2 * c + 1, var, mask=in_c)
    c_row = c[None, :]
    for start in range(0, samples, BLOCK_N):
        n = (start + lane).to(tl.int64)
        live = (n < samples) & in_c[None, :]
        index = n * channels + c_row
        mu, scatter = _merge_moments(partial_ptr, n, c_row, live, channels, splits, rows, pixels)
        q = scatter / (pixels * 1.0)
        tl.store(moments_ptr + 2 * index, mu, mask=live)
        tl.store(moments_ptr + 2 * index + 1, q, mask=live)
        # m before each sample: scan over the sample before it, nothing for the first row.
        follows = live & (lane > 0)
        before, _ = _merge_moments(partial_ptr, n - 1, c_row, follows, channels, splits, rows, pixels)
        a, b = tl.associative_scan(
            (tl.where(follows, alpha, 1.0), tl.where(follows, one_minus_alpha * before, 0.0)), 0, compose
        )
        m = a * mean[None, :] + b
        tl.store(state_ptr + 2 * index, m, mask=live)
        # Variance after each sample, stored where the next sample finds it.
        d = mu - m
        a, b = tl.associative_scan(
            (tl.where(live, alpha, 1.0), tl.where(live, one_minus_alpha * (q + alpha * d * d), 0.0)), 0, compose
        )
        after = a * var[None, :] + b
        tl.store(state_ptr + 2 * (index + channels) + 1, after, mask=live & (n + 1 < samples))
        end = n == min(start + BLOCK_N, samples) - 1
        mean = tl.sum(tl.where(end, m + one_minus_alpha * d, 0.0), 0)
        var = tl.sum(tl.where(end, after, 0.0), 0)
    tl.store(mean_ptr + c, mean, mask=in_c)
    tl.store(var_ptr + c, var, mask=in_c)


@triton.jit
def layer_scale_kernel(
    moments_ptr, state_ptr, weight_ptr, bias_ptr, rzeta_ptr, channels, groups, group_size, state_stride, eps, scale_eps,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """1 / zeta of one (sample, group) from the moments of its channels."""
    n = (tl.program_id(0) // groups).to(tl.int64)
    group = tl.program_id(0) % groups
    total = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, group_size, BLOCK_C):
        lane = start + tl.arange(0, BLOCK_C)
        live = lane < group_size
        c = group * group_size + lane
        mu, q = pair(moments_ptr, n * channels + c, live)
        m, var = pair(state_ptr, n * state_stride + c, live)
        weight, bias = parameters(weight_ptr, bias_ptr, c, live)
        rstd = tl.rsqrt(var + eps)
        mean_w = weight * (mu - m) * rstd + bias
        square = mean_w * mean_w + weight * weight * q * rstd * rstd
        square = tl.where(tl.abs(mean_w) == float("inf"), float("inf"), square)  # of infinite pixels, q being NaN
        total += tl.where(live, square, 0.0)
    tl.store(rzeta_ptr + tl.program_id(0), tl.rsqrt(tl.sum(total, 0) / group_size + scale_eps))


@triton.jit
def apply_kernel(
    x_ptr, residual_ptr, y_ptr, state_ptr, weight_ptr, bias_ptr, rzeta_ptr,
    pixels, channels, groups, group_size, state_stride, stride_n, stride_p, stride_c, eps, clamp,
    RELU: tl.constexpr, CLAMP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """relu(compensate(affine((x - m) / s)) + residual) of one tile."""
    blocks = tl.cdiv(pixels, BLOCK_P)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    p = (tl.program_id(0) % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < channels
    mask = (p < pixels)[:, None] & in_c[None, :]
    offset = n * stride_n + p.to(tl.int64)[:, None] * stride_p + c.to(tl.int64)[None, :] * stride_c
    m, var = pair(state_ptr, n * state_stride + c, in_c)
    weight, bias = parameters(weight_ptr, bias_ptr, c, in_c)
    scale = weight * tl.rsqrt(var + eps)
    if rzeta_ptr is not None:
        rzeta = tl.load(rzeta_ptr + n * groups + c // group_size, mask=in_c, other=0.0)
        scale *= rzeta
        bias *= rzeta
    z = (tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32) - m[None, :]) * scale[None, :] + bias[None, :]
    if CLAMP:
        z = tl.minimum(z, clamp, propagate_nan=tl.PropagateNan.ALL)
        z = tl.maximum(z, -clamp, propagate_nan=tl.PropagateNan.ALL)
    if residual_ptr is not None:
        z += tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y_ptr + offset, z.to(y_ptr.dtype.element_ty), mask=mask)
