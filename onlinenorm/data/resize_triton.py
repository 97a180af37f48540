"""The GPU kernels of `resize`: weights of every crop's rows and columns, then all pixels of all crops.

The second kernel sums over both axes for each output pixel, with the first axis's sums rounded to 8 bits, in place of
writing a half-resized image: at ImageNet's sizes that doubles cheap integer work and saves two thirds of the traffic.
Crops are mirrored here and stay 8 bits: those equal the CPU's, and are a quarter of the bytes to copy into a captured
step, which normalises them itself (0.2 GB of the 70 GB that a step of ResNet-50 moves at a batch of 256).
"""

import torch
import triton
import triton.language as tl

from onlinenorm.data.resize import COLUMNS, PRECISION_BITS

_COLUMNS = tl.constexpr(len(COLUMNS))
_BITS = tl.constexpr(PRECISION_BITS)
_ONE = tl.constexpr(float(1 << PRECISION_BITS))
_HALF = tl.constexpr(1 << (PRECISION_BITS - 1))
_WHITE = tl.constexpr(255)


@triton.jit
def _window(at, source, scale, support):
    """centre, first input and number of inputs of output pixels."""
    centre = (at.to(tl.float64) + 0.5) * scale
    first = tl.maximum((centre - support + 0.5).to(tl.int32), 0)
    return centre, first, tl.minimum((centre + support + 0.5).to(tl.int32), source) - first


@triton.jit
def _weight(tap, centre, first, count, inverse):
    distance = tl.abs(((tap + first).to(tl.float64) - centre + 0.5) * inverse)
    return tl.where((distance < 1.0) & (tap < count), 1.0 - distance, 0.0)


@triton.jit
def _total(centre, first, count, inverse):
    """Sum of the weights of each output pixel, and the largest of them."""
    total = tl.zeros_like(centre)
    largest = tl.zeros_like(centre)
    for tap in range(tl.max(count, 0)):
        weight = _weight(tap, centre, first, count, inverse)
        total += weight
        largest = tl.maximum(largest, weight)
    return total, largest


@triton.jit(do_not_specialize=["taps"])
def weights_kernel(table, spans, weights, taps, crop_size, BLOCK: tl.constexpr):
    """One axis (0: x, 1: y) of one crop: spans (M, 2, 2, S) of first and count, weights (M, 2, K, S)."""
    crop = tl.program_id(0).to(tl.int64)
    axis = tl.program_id(1)
    row = table + crop * _COLUMNS + axis
    source = tl.load(row + 3).to(tl.int32)
    resized = tl.load(row + 5).to(tl.int32)
    begin = tl.load(row + 7).to(tl.int32)
    scale = source.to(tl.float64) / resized.to(tl.float64)
    support = tl.maximum(scale, 1.0)
    inverse = 1.0 / support
    lane = tl.arange(0, BLOCK)
    shift = tl.full((), 0, tl.int32)
    if tl.load(table + crop * _COLUMNS + 11) != 0:  # torch's precision: the largest weight fits into 16 bits
        highest = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, resized, BLOCK):
            at = tl.minimum(start + lane, resized - 1)
            centre, first, count = _window(at, source, scale, support)
            total, largest = _total(centre, first, count, inverse)
            highest = tl.maximum(highest, largest / total)
        largest = tl.max(highest, 0)
        for bit in tl.static_range(_BITS):
            shift += (0.5 + largest * (2 << bit) >= 32768.0).to(tl.int32)
    unit = _ONE / (1 << shift).to(tl.float64)
    span = spans + (crop * 2 + axis) * 2 * crop_size
    out = weights + (crop * 2 + axis) * taps * crop_size
    for start in range(0, crop_size, BLOCK):
        s = start + lane
        at = begin + s
        inside = (s < crop_size) & (at >= 0) & (at < resized)
        centre, first, count = _window(at, source, scale, support)
        count = tl.where(inside, count, 0)
        total, _ = _total(centre, first, count, inverse)
        total = tl.where(inside, total, 1.0)
        tl.store(span + s, first, mask=s < crop_size)
        tl.store(span + crop_size + s, count, mask=s < crop_size)
        for tap in range(tl.max(count, 0)):
            weight = _weight(tap, centre, first, count, inverse) / total
            tl.store(out + tap * crop_size + s, (0.5 + weight * unit).to(tl.int32) << shift, mask=inside)


@triton.jit
def _pixels(
    source, pitch, first_x, count_x, weights_x, first_y, count_y, weights_y, crop_size, VERTICAL_FIRST: tl.constexpr
):
    """Pixels of a tile of one channel; source: its first byte, weights_x and weights_y: of the tile's first tap."""
    if VERTICAL_FIRST:
        outer, inner = tl.max(count_x, 0), tl.max(count_y, 0)
    else:
        outer, inner = tl.max(count_y, 0), tl.max(count_x, 0)
    total = tl.full((first_y.shape[0], first_x.shape[0]), _HALF, tl.int32)
    for i in range(outer):
        partial = tl.full(total.shape, _HALF, tl.int32)
        for j in range(inner):
            if VERTICAL_FIRST:
                x, y = i, j
            else:
                x, y = j, i
            mask = (y < count_y)[:, None] & (x < count_x)[None, :]
            at = (first_y + y)[:, None] * pitch + (first_x + x)[None, :]
            pixel = tl.load(source + at, mask=mask, other=0).to(tl.int32)
            if VERTICAL_FIRST:
                weight = tl.load(weights_y + y * crop_size, mask=y < count_y, other=0)[:, None]
            else:
                weight = tl.load(weights_x + x * crop_size, mask=x < count_x, other=0)[None, :]
            partial += pixel * weight
        if VERTICAL_FIRST:
            weight = tl.load(weights_x + i * crop_size, mask=i < count_x, other=0)[None, :]
        else:
            weight = tl.load(weights_y + i * crop_size, mask=i < count_y, other=0)[:, None]
        total += tl.minimum(partial >> _BITS, _WHITE) * weight
    return tl.minimum(total >> _BITS, _WHITE)


@triton.jit(do_not_specialize=["taps"])
def crops_kernel(
    pixels, table, spans, weights, out, taps, crop_size, channels, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr
):
    """A tile of one crop, in every channel; out (M, S, S, channels)."""
    crop = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(crop_size, BLOCK_X)
    row = table + crop * _COLUMNS
    pitch = tl.load(row + 1).to(tl.int32)
    plane = tl.load(row + 2)
    mirrored = tl.load(row + 9) != 0
    vertical_first = tl.load(row + 10) != 0
    x = (tl.program_id(1) % tiles) * BLOCK_X + tl.arange(0, BLOCK_X)
    y = (tl.program_id(1) // tiles) * BLOCK_Y + tl.arange(0, BLOCK_Y)
    in_x, in_y = x < crop_size, y < crop_size
    column = tl.where(mirrored, crop_size - 1 - x, x)
    span_x = spans + crop * 4 * crop_size + column
    span_y = spans + (crop * 4 + 2) * crop_size + y
    first_x = tl.load(span_x, mask=in_x, other=0)
    count_x = tl.load(span_x + crop_size, mask=in_x, other=0)
    first_y = tl.load(span_y, mask=in_y, other=0)
    count_y = tl.load(span_y + crop_size, mask=in_y, other=0)
    weights_x = weights + crop * 2 * taps * crop_size + column
    weights_y = weights + (crop * 2 + 1) * taps * crop_size + y
    source = pixels + tl.load(row)
    at = (crop * crop_size + y)[:, None] * crop_size + x[None, :]
    for channel in range(channels):
        if vertical_first:
            value = _pixels(
                source, pitch, first_x, count_x, weights_x, first_y, count_y, weights_y, crop_size, VERTICAL_FIRST=True
            )
        else:
            value = _pixels(
                source, pitch, first_x, count_x, weights_x, first_y, count_y, weights_y, crop_size, VERTICAL_FIRST=False
            )
        tl.store(out + at * channels + channel, value.to(tl.uint8), mask=in_y[:, None] & in_x[None, :])
        source += plane


def launch(pixels_B: torch.Tensor, table_MC: torch.Tensor, taps: int, out_MCHW: torch.Tensor) -> None:
    """Writes the crops of a table to `out_MCHW`, channels_last."""
    crops, channels, size = out_MCHW.shape[:3]
    assert out_MCHW.is_contiguous(memory_format=torch.channels_last) and table_MC.is_contiguous()
    spans = torch.empty((crops, 2, 2, size), dtype=torch.int32, device=pixels_B.device)
    weights = torch.empty((crops, 2, taps, size), dtype=torch.int32, device=pixels_B.device)
    block_x, block_y = 32, 16
    tiles = triton.cdiv(size, block_x) * triton.cdiv(size, block_y)
    with torch.cuda.device_of(pixels_B):
        # no fused multiply-adds: the weights' bits are those of separate operations
        weights_kernel[crops, 2](table_MC, spans, weights, taps, size, BLOCK=128, num_warps=4, enable_fp_fusion=False)
        crops_kernel[crops, tiles](
            pixels_B, table_MC, spans, weights, out_MCHW, taps, size, channels, BLOCK_Y=block_y, BLOCK_X=block_x,
            num_warps=4,
        )  # fmt: skip
