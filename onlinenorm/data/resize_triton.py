"""The GPU kernels of `resize`: weights of every crop's rows and columns, then all pixels of all crops.

A warp of the second kernel makes 32 columns of some rows of a crop, in all channels. It walks down the image's rows,
sums each over the columns' inputs, rounds to 8 bits, and adds that to the crop's rows above and below: those whose
centres the image's row lies between are all that it is an input of, where the image shrinks. So it is summed once, and
nothing half-resized is written. Crops are mirrored here and stay 8 bits: those equal the CPU's, and are a quarter of
the bytes to copy into a captured step, which normalises them itself (0.2 GB of the 70 GB that a step of ResNet-50 moves
at a batch of 256).
"""

import torch
import triton
import triton.language as tl

from onlinenorm.data.resize import COLUMNS, PRECISION_BITS

_WARP, _ROWS = 32, 16  # columns and rows of a crop that a warp makes: 132 us a batch on an H200, with 32 rows 161
_COLUMNS = tl.constexpr(len(COLUMNS))
_BITS = tl.constexpr(PRECISION_BITS)
_ONE = tl.constexpr(float(1 << PRECISION_BITS))
_HALF = tl.constexpr(1 << (PRECISION_BITS - 1))
_WHITE = tl.constexpr(255)
_GROUP = tl.constexpr(4)  # inputs at once where there are many


@triton.jit
def _window(at, source, scale, support):
    """centre, first input and number of inputs of output pixels."""
    centre = (at.to(tl.float64) + 0.5) * scale
    first = tl.maximum((centre - support + 0.5).to(tl.int32), 0)
    return centre, first, tl.minimum((centre + support + 0.5).to(tl.int32), source) - first


@triton.jit
def _weight(tap, centre, first, count, inverse):
    distance = tl.abs(((tap + first).to(tl.float64) - centre + 0.5) * inverse)
    return tl.where((distance < 1.0) & (tap >= 0) & (tap < count), 1.0 - distance, 0.0)


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


@triton.jit
def _fixed(weight, total, unit, shift):
    return (0.5 + weight / total * unit).to(tl.int32) << shift


@triton.jit
def _pair(low, high):
    """Two numbers of at least 0 that are loaded together."""
    return (high.to(tl.int64) << 32) | low.to(tl.int64)


@triton.jit
def _window_inside(at, source, resized, scale, support, inverse):
    """`_window` and the sum of its weights; no inputs, and a sum of 1, of what is not in the resized image."""
    inside = (at >= 0) & (at < resized)
    centre, first, count = _window(at, source, scale, support)
    first, count = tl.where(inside, first, 0), tl.where(inside, count, 0)
    total, _ = _total(centre, first, count, inverse)
    return centre, first, count, tl.where(inside, total, 1.0)


@triton.jit(do_not_specialize=["taps"])
def weights_kernel(table, columns, weights, segments, pairs, taps, crop_size, BLOCK: tl.constexpr):
    """Columns of one crop, or its rows.

    Columns: the first input of each and how many it has, `columns` (M, 2, S), and `weights` (M, K, S).

    Rows: those of the image in segments, each between the centres of a row of the crop and the next, from the row
    before the crop's first. `segments` (M, S + 1): where one begins and how many rows it has. `pairs` (M, S + 1, K):
    their weights in both rows of the crop. Where the image does not shrink, a segment is all inputs of the upper row,
    with no weight in the lower.
    """
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
    for start in range(0, crop_size + axis, BLOCK):
        s = start + lane
        at = begin + s - axis
        centre, first, count, total = _window_inside(at, source, resized, scale, support, inverse)
        if axis == 0:
            inside = s < crop_size
            tl.store(columns + crop * 2 * crop_size + s, first, mask=inside)
            tl.store(columns + (crop * 2 + 1) * crop_size + s, count, mask=inside)
            for tap in range(tl.max(count, 0)):
                weight = _fixed(_weight(tap, centre, first, count, inverse), total, unit, shift)
                tl.store(weights + (crop * taps + tap) * crop_size + s, weight, mask=inside & (tap < count))
        else:
            inside = s <= crop_size
            below, first_below, count_below, total_below = _window_inside(
                at + 1, source, resized, scale, support, inverse
            )
            segment, stop = first, first + count
            if resized < source:
                segment = tl.where(count > 0, (centre + 0.5).to(tl.int32), first_below)
                stop = tl.where(count_below > 0, (below + 0.5).to(tl.int32), stop)
            else:
                count_below = tl.zeros_like(count)
            length = tl.maximum(stop - segment, 0)
            entry = crop * (crop_size + 1) + s
            tl.store(segments + entry, _pair(segment, length), mask=inside)
            for tap in range(tl.max(length, 0)):
                here, there = segment + tap - first, segment + tap - first_below
                weight = _fixed(_weight(here, centre, first, count, inverse), total, unit, shift)
                other = _fixed(_weight(there, below, first_below, count_below, inverse), total_below, unit, shift)
                tl.store(pairs + entry * taps + tap, _pair(weight, other), mask=inside & (tap < length))


@triton.jit
def _zeros(like, CHANNELS: tl.constexpr):
    """A sum a channel, to which a half is added so that cutting bits off rounds it."""
    sums = tl.tuple(())
    for _ in tl.static_range(CHANNELS):
        sums += (tl.full(like.shape, _HALF, tl.int32),)
    return sums


@triton.jit
def _add(sums, values, weight, CHANNELS: tl.constexpr):
    added = tl.tuple(())
    for channel in tl.static_range(CHANNELS):
        added += (sums[channel] + values[channel] * weight,)
    return added


@triton.jit
def _pixels(at, plane, mask, CHANNELS: tl.constexpr):
    values = tl.tuple(())
    for channel in tl.static_range(CHANNELS):
        values += (tl.load(at + channel * plane, mask=mask).to(tl.int32),)
    return values


@triton.jit
def _rounded(sums, CHANNELS: tl.constexpr):
    values = tl.tuple(())
    for channel in tl.static_range(CHANNELS):
        values += (tl.minimum(sums[channel] >> _BITS, _WHITE),)
    return values


@triton.jit
def _store(out, values, mask, CHANNELS: tl.constexpr):
    for channel in tl.static_range(CHANNELS):
        tl.store(out + channel, values[channel].to(tl.uint8), mask=mask)


@triton.jit
def _tap_weight(weights, tap, count, crop_size):
    """Weights of the columns' inputs number `tap`, 0 where a column has none there."""
    there = tap.to(tl.uint32) < count.to(tl.uint32)
    return tl.load(weights + tap * crop_size, mask=there, other=0)


@triton.jit
def _horizontal_first(strip, top, bottom, crop_size, TAPS: tl.constexpr, CHANNELS: tl.constexpr):
    """Rows `top` to `bottom` of a strip whose columns have TAPS inputs at most; 0: any number."""
    pixels, pitch, plane, weights, before, count, longest, segments, pairs, taps, out, mask = strip
    loaded = tl.tuple(())
    for tap in tl.static_range(TAPS):
        loaded += (_tap_weight(weights, tap - before, count, crop_size),)
    above = _zeros(count, CHANNELS)
    following = tl.load(segments + top)
    for y in range(top - 1, bottom):
        segment = following
        following = tl.load(segments + tl.minimum(y + 2, bottom))  # ahead of its use
        below = _zeros(count, CHANNELS)
        row = pixels + segment.to(tl.int32) * pitch
        pair = pairs + (y + 1) * taps
        for _ in range((segment >> 32).to(tl.int32)):
            sums = _zeros(count, CHANNELS)
            for tap in tl.static_range(TAPS):
                sums = _add(sums, _pixels(row + tap, plane, None, CHANNELS), loaded[tap], CHANNELS)
            if TAPS == 0:
                for first in range(0, longest, _GROUP):
                    for tap in tl.static_range(_GROUP):
                        weight = _tap_weight(weights, first + tap - before, count, crop_size)
                        values = _pixels(row + first + tap, plane, first + tap < longest, CHANNELS)
                        sums = _add(sums, values, weight, CHANNELS)
            values = _rounded(sums, CHANNELS)
            both = tl.load(pair)
            above = _add(above, values, both.to(tl.int32), CHANNELS)
            below = _add(below, values, (both >> 32).to(tl.int32), CHANNELS)
            row += pitch
            pair += 1
        _store(out + y * crop_size * CHANNELS, _rounded(above, CHANNELS), mask & (y >= top), CHANNELS)
        above = below


@triton.jit
def _vertical_first(strip, top, bottom, crop_size, CHANNELS: tl.constexpr):
    pixels, pitch, plane, weights, before, count, longest, segments, pairs, taps, out, mask = strip
    for y in range(top, bottom):
        totals = _zeros(count, CHANNELS)
        for tap in range(longest):
            sums = _zeros(count, CHANNELS)
            for after in tl.static_range(2):  # the centre of row y
                segment = tl.load(segments + y + after)
                row = pixels + segment.to(tl.int32) * pitch + tap
                pair = pairs + (y + after) * taps
                for _ in range((segment >> 32).to(tl.int32)):
                    weight = (tl.load(pair) >> (0 if after else 32)).to(tl.int32)
                    sums = _add(sums, _pixels(row, plane, None, CHANNELS), weight, CHANNELS)
                    row += pitch
                    pair += 1
            weight = _tap_weight(weights, tap - before, count, crop_size)
            totals = _add(totals, _rounded(sums, CHANNELS), weight, CHANNELS)
        _store(out + y * crop_size * CHANNELS, _rounded(totals, CHANNELS), mask, CHANNELS)


@triton.jit(do_not_specialize=["taps"])
def crops_kernel(
    pixels, table, columns, weights, segments, pairs, out, taps, crop_size, CHANNELS: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """ROWS x WIDTH pixels of one crop, in every channel; out (M, S, S, CHANNELS)."""
    strips = tl.cdiv(crop_size, WIDTH)
    tiles = strips * tl.cdiv(crop_size, ROWS)
    crop = (tl.program_id(0) // tiles).to(tl.int64)  # an image's tiles run at about the same time: they share its lines
    tile = tl.program_id(0) % tiles
    entry = table + crop * _COLUMNS
    pitch = tl.load(entry + 1).to(tl.int32)
    x = (tile % strips) * WIDTH + tl.arange(0, WIDTH)
    mask = x < crop_size
    column = tl.where(tl.load(entry + 9) != 0, crop_size - 1 - x, x)
    first = tl.load(columns + crop * 2 * crop_size + column, mask=mask, other=0)
    count = tl.load(columns + (crop * 2 + 1) * crop_size + column, mask=mask, other=0)
    longest = tl.max(count, 0)
    begin = tl.minimum(first, tl.load(entry + 3).to(tl.int32) - longest)  # so that all have so many inputs in the box
    strip = (
        pixels + tl.load(entry) + begin, pitch, tl.load(entry + 2), weights + crop * taps * crop_size + column,
        first - begin, count, longest, segments + crop * (crop_size + 1), pairs + crop * (crop_size + 1) * taps,
        taps, out + (crop * crop_size * crop_size + x) * CHANNELS, mask,
    )  # fmt: skip
    top = (tile // strips) * ROWS
    bottom = tl.minimum(top + ROWS, crop_size)
    if tl.load(entry + 10) != 0:
        _vertical_first(strip, top, bottom, crop_size, CHANNELS)
    elif longest == 2:
        _horizontal_first(strip, top, bottom, crop_size, 2, CHANNELS)
    elif longest == 3:
        _horizontal_first(strip, top, bottom, crop_size, 3, CHANNELS)
    elif longest == 4:
        _horizontal_first(strip, top, bottom, crop_size, 4, CHANNELS)
    elif longest == 5:
        _horizontal_first(strip, top, bottom, crop_size, 5, CHANNELS)
    else:
        _horizontal_first(strip, top, bottom, crop_size, 0, CHANNELS)


def launch(pixels_B: torch.Tensor, table_MC: torch.Tensor, taps: int, out_MCHW: torch.Tensor) -> None:
    """Writes the crops of a table to `out_MCHW`, channels_last."""
    crops, channels, size = out_MCHW.shape[:3]
    assert out_MCHW.is_contiguous(memory_format=torch.channels_last) and table_MC.is_contiguous()
    device = pixels_B.device
    columns = torch.empty((crops, 2, size), dtype=torch.int32, device=device)
    weights = torch.empty((crops, taps, size), dtype=torch.int32, device=device)
    segments = torch.empty((crops, size + 1), dtype=torch.int64, device=device)
    pairs = torch.empty((crops, size + 1, taps), dtype=torch.int64, device=device)
    tiles = triton.cdiv(size, _WARP) * triton.cdiv(size, _ROWS)
    with torch.cuda.device_of(pixels_B):
        # no fused multiply-adds: the weights' bits are those of separate operations
        weights_kernel[crops, 2](
            table_MC, columns, weights, segments, pairs, taps, size, BLOCK=128, num_warps=4, enable_fp_fusion=False
        )
        crops_kernel[(crops * tiles,)](
            pixels_B, table_MC, columns, weights, segments, pairs, out_MCHW, taps, size, CHANNELS=channels, ROWS=_ROWS,
            WIDTH=_WARP, num_warps=1,
        )  # fmt: skip
