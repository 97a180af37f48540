"""Backward: reduce, project, scan, apply."""

import triton
import triton.language as tl

from onlinenorm.ops.fused.kernels.shared import compose, is_finite, pair, parameters


@triton.jit
def _mask_gradient(g, w, out, clamp, RELU: tl.constexpr, RESIDUAL: tl.constexpr, CLAMP: tl.constexpr):
    """Gradients before the ReLU and before the clamp, from that of the output; w is recomputed, out is read."""
    if RELU:
        g = tl.where((out if RESIDUAL else w) <= 0, 0.0, g)
    inner = g
    if CLAMP:
        inner = tl.where(tl.abs(w) < clamp, g, 0.0)
    return g, inner


@triton.jit
def gradient_moments_kernel(
    g_ptr, skip_grad_ptr, x_ptr, out_ptr, partial_ptr, moments_ptr, state_ptr, weight_ptr, bias_ptr,
    pixels, channels, splits, rows, stride_n, stride_p, stride_c, eps, clamp,
    RELU: tl.constexpr, CLAMP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums of g and g y, or g (y - Y) where moments are given, over one slice of rows.

    g is the gradient behind ReLU and clamp.
    """
    program = tl.program_id(0).to(tl.int64)
    n = program // splits
    first = (program % splits).to(tl.int32) * rows
    last = min(first + rows, pixels)
    lane = tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < channels
    base = n * stride_n + c.to(tl.int64)[None, :] * stride_c
    m, var = pair(state_ptr, n * channels + c, in_c)
    weight, bias = parameters(weight_ptr, bias_ptr, c, in_c)
    rstd = tl.rsqrt(var + eps)
    centre = tl.zeros_like(m)
    if moments_ptr is not None:
        mu = tl.load(moments_ptr + 2 * (n * channels + c), mask=in_c, other=0.0)
        centre = (mu - m) * rstd
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    product = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in tl.range(first, last, BLOCK_P, num_stages=STAGES):
        p = start + lane
        mask = (p < last)[:, None] & in_c[None, :]
        offset = base + p.to(tl.int64)[:, None] * stride_p
        y = (tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32) - m[None, :]) * rstd[None, :]
        g = tl.load(g_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if skip_grad_ptr is not None:
            g += tl.load(skip_grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        out = y
        if out_ptr is not None:
            out = tl.load(out_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        _, g = _mask_gradient(g, y * weight[None, :] + bias[None, :], out, clamp, RELU, out_ptr is not None, CLAMP)
        total += g
        product += tl.where(mask, g * (y - centre[None, :]), 0.0)
    index = 2 * (program * channels + c)
    tl.store(partial_ptr + index, tl.sum(total, 0), mask=in_c)
    tl.store(partial_ptr + index + 1, tl.sum(product, 0), mask=in_c)


@triton.jit
def _merge_gradients(partial_ptr, n, c, live, channels, splits):
    """Sums of g and of its product, g y or g (y - Y), of sample n's channels."""
    total = tl.zeros_like(live.to(tl.float32))
    product = tl.zeros_like(total)
    for split in range(splits):
        g, part = pair(partial_ptr, (n * splits + split) * channels + c, live)
        total += g
        product += part
    return total, product


@triton.jit
def merge_gradients_kernel(partial_ptr, merged_ptr, channels, splits, BLOCK_C: tl.constexpr):
    """One slice a sample in place of several."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < channels
    total, product = _merge_gradients(partial_ptr, n, c, in_c, channels, splits)
    index = 2 * (n * channels + c)
    tl.store(merged_ptr + index, total, mask=in_c)
    tl.store(merged_ptr + index + 1, product, mask=in_c)


@triton.jit
def _mean_gradients(partial_ptr, n, c, live, channels, splits, pixels):
    """Mean g and mean of its product of sample n's channels."""
    total, product = _merge_gradients(partial_ptr, n, c, live, channels, splits)
    size = pixels * 1.0
    return total / size, product / size


@triton.jit
def _normalised_moments(moments_ptr, state_ptr, index, live, eps):
    """1 / s, and mean Y and variance V of y."""
    mu, q = pair(moments_ptr, index, live)
    m, var = pair(state_ptr, index, live)
    rstd = tl.rsqrt(tl.where(live, var, 1.0) + eps)
    return rstd, (mu - m) * rstd, q * rstd * rstd


@triton.jit
def project_kernel(
    partial_ptr, moments_ptr, state_ptr, weight_ptr, bias_ptr, rzeta_ptr, kappa_ptr, channels, groups, group_size,
    splits, pixels, eps, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """kappa = mean(g z) / zeta over one (sample, group): layer scaling's backward needs it before the scan."""
    n = (tl.program_id(0) // groups).to(tl.int64)
    group = tl.program_id(0) % groups
    total = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, group_size, BLOCK_C):
        lane = start + tl.arange(0, BLOCK_C)
        live = lane < group_size
        c = group * group_size + lane
        g, apart = _mean_gradients(partial_ptr, n, c, live, channels, splits, pixels)
        _, y, _ = _normalised_moments(moments_ptr, state_ptr, n * channels + c, live, eps)
        weight, bias = parameters(weight_ptr, bias_ptr, c, live)
        total += tl.where(live, weight * apart + (weight * y + bias) * g, 0.0)
    rzeta = tl.load(rzeta_ptr + tl.program_id(0))
    tl.store(kappa_ptr + tl.program_id(0), tl.sum(total, 0) / group_size * rzeta * rzeta)


@triton.jit
def _gradient_row(
    partial_ptr, moments_ptr, state_ptr, rzeta_ptr, kappa_ptr, weight, bias, n, c, live,
    channels, groups, group_size, splits, pixels, eps,
):  # fmt: skip
    """(1 / s, Y, Q, G, GY) of samples n, with G and GY behind the error compensation."""
    g, gy = _mean_gradients(partial_ptr, n, c, live, channels, splits, pixels)
    rstd, y, var = _normalised_moments(moments_ptr, state_ptr, n * channels + c, live, eps)
    if rzeta_ptr is not None:
        group = n * groups + c // group_size
        rzeta = tl.load(rzeta_ptr + group, mask=live, other=0.0)
        kappa = tl.load(kappa_ptr + group, mask=live, other=0.0)
        g = (g - kappa * (weight * y + bias)) * rzeta
        gy = y * g + (gy - kappa * weight * var) * rzeta
    return rstd, y, var + y * y, g, gy


@triton.jit
def _sum_of_all(x):
    return tl.sum(tl.sum(x, 1), 0)


@triton.jit
def backward_scan_kernel(
    partial_ptr, moments_ptr, state_ptr, rzeta_ptr, kappa_ptr, weight_ptr, bias_ptr, u_ptr, v_ptr,
    control_ptr, grad_weight_ptr, grad_bias_ptr, own_ptr,
    samples, rank, processes, channels, groups, group_size, splits, pixels, eps, alpha, k, scale, most_growth,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Run the controls over the samples; writes (B, D), the parameters' gradients, and moves u and v past the batch.

    The parameters' gradients are sums over this process's samples, every one of ``processes`` or those that ``own_ptr``
    marks. A block of samples whose composed maps would leave the range of the controls, or with a gradient that is not
    finite, is walked through sample by sample, as in ``reference``.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < channels
    lane = tl.arange(0, BLOCK_N)[:, None]
    weight_C, bias_C = parameters(weight_ptr, bias_ptr, c, in_c)
    weight, bias, c_row = weight_C[None, :], bias_C[None, :], c[None, :]
    u = tl.load(u_ptr + c, mask=in_c, other=0.0)
    v = tl.load(v_ptr + c, mask=in_c, other=0.0)
    grad_weight = tl.zeros_like(u)
    grad_bias = tl.zeros_like(u)
    for start in range(0, samples, BLOCK_N):
        n = (start + lane).to(tl.int64)
        live = (n < samples) & in_c[None, :]
        follows = live & (lane > 0)
        # v before each sample: scan over the sample before it, nothing for the first row.
        _, _, yy, _, gy = _gradient_row(
            partial_ptr, moments_ptr, state_ptr, rzeta_ptr, kappa_ptr, weight, bias, n - 1, c_row, follows,
            channels, groups, group_size, splits, pixels, eps,
        )  # fmt: skip
        a, b = tl.associative_scan(
            (tl.where(follows, 1 - k * yy, 1.0), tl.where(follows, scale * weight * gy, 0.0)), 0, compose
        )
        growth = tl.max(tl.sum(tl.log2(tl.maximum(tl.abs(tl.where(follows, 1 - k * yy, 1.0)), 1.0)), 0), 0)
        v_n = a * v[None, :] + b
        rstd, y, yy, g, gy = _gradient_row(
            partial_ptr, moments_ptr, state_ptr, rzeta_ptr, kappa_ptr, weight, bias, n, c_row, live,
            channels, groups, group_size, splits, pixels, eps,
        )  # fmt: skip
        # u after each sample, stored where the next sample finds it.
        a, b = tl.associative_scan(
            (tl.where(live, alpha, 1.0), tl.where(live, (scale * weight * g - k * v_n * y) * rstd, 0.0)), 0, compose
        )
        after = a * u[None, :] + b
        next_v = (1 - k * yy) * v_n + scale * weight * gy
        if own_ptr is None:
            counted = live & (n % processes == rank)
        else:
            counted = live & (tl.load(own_ptr + n, mask=n < samples, other=0) != 0)
        grad_weight += tl.sum(tl.where(counted, gy, 0.0), 0)
        grad_bias += tl.sum(tl.where(counted, g, 0.0), 0)
        last = min(start + BLOCK_N, samples)
        bad = _sum_of_all(tl.where(live & ~(is_finite(after) & is_finite(next_v)), 1.0, 0.0))
        if (growth <= most_growth) & (bad == 0):
            index = n * channels + c_row
            slope = -k * v_n / scale * rstd * rstd
            tl.store(control_ptr + 2 * index, slope, mask=live)
            tl.store(control_ptr + 2 * (index + channels) + 1, -k * after / scale, mask=live & (n + 1 < samples))
            tl.store(control_ptr + 2 * index + 1, -k * u[None, :] / scale, mask=live & (lane == 0))
            v = tl.sum(tl.where(n == last - 1, next_v, 0.0), 0)
            u = tl.sum(tl.where(n == last - 1, after, 0.0), 0)
        else:
            for i in range(start, last):
                one = (i + 0 * c).to(tl.int64)
                rstd_1, y_1, yy_1, g_1, gy_1 = _gradient_row(
                    partial_ptr, moments_ptr, state_ptr, rzeta_ptr, kappa_ptr, weight_C, bias_C, one, c, in_c,
                    channels, groups, group_size, splits, pixels, eps,
                )  # fmt: skip
                index_1 = 2 * (one * channels + c)
                tl.store(control_ptr + index_1, -k * v / scale * rstd_1 * rstd_1, mask=in_c)
                tl.store(control_ptr + index_1 + 1, -k * u / scale, mask=in_c)
                next_u = alpha * u + (scale * weight_C * g_1 - k * v * y_1) * rstd_1
                next_v_1 = (1 - k * yy_1) * v + scale * weight_C * gy_1
                moves = is_finite(next_u) & is_finite(next_v_1)
                u = tl.where(moves, next_u, u)
                v = tl.where(moves, next_v_1, v)
    tl.store(u_ptr + c, u, mask=in_c)
    tl.store(v_ptr + c, v, mask=in_c)
    tl.store(grad_weight_ptr + c, grad_weight * pixels, mask=in_c)
    tl.store(grad_bias_ptr + c, grad_bias * pixels, mask=in_c)


@triton.jit
def gradient_apply_kernel(
    g_ptr, skip_grad_ptr, x_ptr, out_ptr, grad_x_ptr, grad_residual_ptr, state_ptr, control_ptr, weight_ptr, bias_ptr,
    rzeta_ptr, kappa_ptr, pixels, channels, groups, group_size, stride_n, stride_p, stride_c, eps, clamp,
    RELU: tl.constexpr, CLAMP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_x = A g + B (x - m) + D of one tile, and the residual's gradient where asked for."""
    blocks = tl.cdiv(pixels, BLOCK_P)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    p = (tl.program_id(0) % blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < channels
    mask = (p < pixels)[:, None] & in_c[None, :]
    offset = n * stride_n + p.to(tl.int64)[:, None] * stride_p + c.to(tl.int64)[None, :] * stride_c
    m, var = pair(state_ptr, n * channels + c, in_c)
    slope, constant = pair(control_ptr, n * channels + c, in_c)
    weight, bias = parameters(weight_ptr, bias_ptr, c, in_c)
    rstd = tl.rsqrt(var + eps)
    gain = weight * rstd
    if rzeta_ptr is not None:
        rzeta = tl.load(rzeta_ptr + n * groups + c // group_size, mask=in_c, other=0.0)
        kappa = tl.load(kappa_ptr + n * groups + c // group_size, mask=in_c, other=0.0)
        slope -= gain * gain * rzeta * kappa
        gain *= rzeta
        constant -= gain * kappa * bias
    centred = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32) - m[None, :]
    g = tl.load(g_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if skip_grad_ptr is not None:
        g += tl.load(skip_grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    out = centred
    if out_ptr is not None:
        out = tl.load(out_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    w = centred * (weight * rstd)[None, :] + bias[None, :]
    outer, g = _mask_gradient(g, w, out, clamp, RELU, out_ptr is not None, CLAMP)
    grad_x = g * gain[None, :] + (centred * slope[None, :] + constant[None, :])
    tl.store(grad_x_ptr + offset, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    if grad_residual_ptr is not None:
        tl.store(grad_residual_ptr + offset, outer.to(grad_residual_ptr.dtype.element_ty), mask=mask)
