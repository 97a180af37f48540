"""Backward: reduce, project, scan, apply."""

import triton
import triton.language as tl

from onlinenorm.ops.fused.kernels.shared import compose, pair, parameters


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
    g_ptr, extra_ptr, x_ptr, out_ptr, partial_ptr, state_ptr, weight_ptr, bias_ptr,
    pixels, channels, splits, rows, stride_n, stride_p, stride_c, eps, clamp,
    RELU: tl.constexpr, CLAMP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums of g and g y over one slice of rows, g being the gradient behind ReLU and clamp."""
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
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    product = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in tl.range(first, last, BLOCK_P, num_stages=STAGES):
        p = start + lane
        mask = (p < last)[:, None] & in_c[None, :]
        offset = base + p.to(tl.int64)[:, None] * stride_p
        y = (tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32) - m[None, :]) * rstd[None, :]
        g = tl.load(g_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if extra_ptr is not None:
            g += tl.load(extra_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        out = y
        if out_ptr is not None:
            out = tl.load(out_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        _, g = _mask_gradient(g, y * weight[None, :] + bias[None, :], out, clamp, RELU, out_ptr is not None, CLAMP)
        total += g
        product += tl.where(mask, g * y, 0.0)
    index = 2 * (program * channels + c)
    tl.store(partial_ptr + index, tl.sum(total, 0), mask=in_c)
    tl.store(partial_ptr + index + 1, tl.sum(product, 0), mask=in_c)


@triton.jit
def _merge_gradients(partial_ptr, n, c, live, channels, splits, pixels):
    """Mean g and mean g y of sample n's channels."""
    total = tl.zeros_like(live.to(tl.float32))
    product = tl.zeros_like(total)
    for split in range(splits):
        g, gy = pair(partial_ptr, (n * splits + split) * channels + c, live)
        total += g
        product += gy
    size = pixels * 1.0
    return total / size, product / size


@triton.jit
def project_kernel(
    partial_ptr, weight_ptr, bias_ptr, rzeta_ptr, kappa_ptr, channels, groups, group_size, splits, pixels,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """kappa = mean(g z) / zeta over one (sample, group): layer scaling's backward needs it before the scan."""
    n = (tl.program_id(0) // groups).to(tl.int64)
    group = tl.program_id(0) % groups
    total = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, group_size, BLOCK_C):
        lane = start + tl.arange(0, BLOCK_C)
        live = lane < group_size
        c = group * group_size + lane
        g, gy = _merge_gradients(partial_ptr, n, c, live, channels, splits, pixels)
        weight, bias = parameters(weight_ptr, bias_ptr, c, live)
        total += tl.where(live, weight * gy + bias * g, 0.0)
    rzeta = tl.load(rzeta_ptr + tl.program_id(0))
    tl.store(kappa_ptr + tl.program_id(0), tl.sum(total, 0) / group_size * rzeta * rzeta)


@triton.jit
def _gradient_row(
    partial_ptr, moments_ptr, state_ptr, rzeta_ptr, kappa_ptr, weight, bias, n, c, live,
    channels, groups, group_size, splits, pixels, eps,
):  # fmt: skip
    """(1 / s, Y, Q, G, GY) of samples n, with G and GY behind the guard."""
    g, gy = _merge_gradients(partial_ptr, n, c, live, channels, splits, pixels)
    mu, q = pair(moments_ptr, n * channels + c, live)
    m, var = pair(state_ptr, n * channels + c, live)
    rstd = tl.rsqrt(tl.where(live, var, 1.0) + eps)
    y = (mu - m) * rstd
    yy = q * rstd * rstd + y * y
    if rzeta_ptr is not None:
        group = n * groups + c // group_size
        rzeta = tl.load(rzeta_ptr + group, mask=live, other=0.0)
        kappa = tl.load(kappa_ptr + group, mask=live, other=0.0)
        g = (g - kappa * (weight * y + bias)) * rzeta
        gy = (gy - kappa * (weight * yy + bias * y)) * rzeta
    return rstd, y, yy, g, gy


@triton.jit
def backward_scan_kernel(
    partial_ptr, moments_ptr, state_ptr, rzeta_ptr, kappa_ptr, weight_ptr, bias_ptr, u_ptr, v_ptr,
    control_ptr, grad_weight_ptr, grad_bias_ptr,
    samples, first_own, own, channels, groups, group_size, splits, pixels, eps, alpha, k, scale,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Run the controls over the samples; writes (B, D), the parameters' gradients, and moves u and v past the batch.

    The parameters' gradients are sums over samples first_own ... first_own + own - 1, those of this process.
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
        slope = -k * v_n / scale * rstd * rstd
        index = n * channels + c_row
        if rzeta_ptr is not None:
            group = n * groups + c_row // group_size
            rzeta = tl.load(rzeta_ptr + group, mask=live, other=0.0)
            slope -= weight * weight * rzeta * tl.load(kappa_ptr + group, mask=live, other=0.0) * rstd * rstd
        tl.store(control_ptr + 2 * index, slope, mask=live)
        tl.store(control_ptr + 2 * (index + channels) + 1, -k * after / scale, mask=live & (n + 1 < samples))
        tl.store(control_ptr + 2 * index + 1, -k * u[None, :] / scale, mask=live & (lane == 0))
        counted = live & (n >= first_own) & (n < first_own + own)
        grad_weight += tl.sum(tl.where(counted, gy, 0.0), 0)
        grad_bias += tl.sum(tl.where(counted, g, 0.0), 0)
        end = n == min(start + BLOCK_N, samples) - 1
        v = tl.sum(tl.where(end, (1 - k * yy) * v_n + scale * weight * gy, 0.0), 0)
        u = tl.sum(tl.where(end, after, 0.0), 0)
    tl.store(u_ptr + c, u, mask=in_c)
    tl.store(v_ptr + c, v, mask=in_c)
    tl.store(grad_weight_ptr + c, grad_weight * pixels, mask=in_c)
    tl.store(grad_bias_ptr + c, grad_bias * pixels, mask=in_c)


@triton.jit
def gradient_apply_kernel(
    g_ptr, extra_ptr, x_ptr, out_ptr, grad_x_ptr, grad_residual_ptr, state_ptr, control_ptr, weight_ptr, bias_ptr,
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
        gain *= rzeta
        constant -= gain * kappa * bias
    centred = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32) - m[None, :]
    g = tl.load(g_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if extra_ptr is not None:
        g += tl.load(extra_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    out = centred
    if out_ptr is not None:
        out = tl.load(out_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    w = centred * (weight * rstd)[None, :] + bias[None, :]
    outer, g = _mask_gradient(g, w, out, clamp, RELU, out_ptr is not None, CLAMP)
    grad_x = g * gain[None, :] + (centred * slope[None, :] + constant[None, :])
    tl.store(grad_x_ptr + offset, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    if grad_residual_ptr is not None:
        tl.store(grad_residual_ptr + offset, outer.to(grad_residual_ptr.dtype.element_ty), mask=mask)
