"""Crops of many images of unequal sizes at once, resized with the bits of Pillow's or torch's antialiased bilinear.

Both resize 8-bit images along one axis after the other, rounding to 8 bits in between. An output pixel at r of n,
resized from m, is the rounded weighted mean of the inputs around c = (r + 0.5) m / n, with weights that fall linearly
to 0 at a distance of max(m / n, 1), normalised in float64 and rounded to fixed point: 22 bits in Pillow, in torch as
many as let the axis's largest weight fit into 16 bits. torch takes the horizontal axis first, and so does Pillow but
for some images that shrink vertically: those over 100 times as high as wide from version 12.2 on, and from 13 on those
that lose more than twice as many rows as columns.

Images lie one after another in one flat tensor, each C x H x W. `resize_crops` runs two GPU kernels a batch
(`resize_triton`), or this file's plain PyTorch, their reference, anywhere else.
"""

import functools
import importlib.util

import numpy as np
import PIL
import torch

PRECISION_BITS = 22  # 32 less 8 of a pixel and 2 for sums

# columns of a crop's row; `source` and `resized` are (width, height) before and after resizing
COLUMNS = ("start", "pitch", "plane", "source_x", "source_y", "resized_x", "resized_y", "left", "top", "mirrored",
           "vertical_first", "of_torch")  # fmt: skip

_PILLOW = tuple(map(int, PIL.__version__.split(".")[:2]))


def crop_table(
    plans_M9: np.ndarray, starts_M: np.ndarray, sizes_M2: np.ndarray, of_torch_M: np.ndarray | bool
) -> np.ndarray:
    """What `resize_crops` reads of each crop, int64, M x len(COLUMNS).

    Args:
        plans_M9: box (left, top, width, height; all -1: the image), size after resizing (width, height), the crop's
            left and top in that, and whether it is mirrored, as `transforms.plan_rows` gives them.
        starts_M: where the crop's image begins in the flat tensor, bytes.
        sizes_M2: width and height of that image, pixels.
        of_torch_M: whether to resize with torch's arithmetic in place of Pillow's.
    """
    plans_M9, (widths_M, heights_M) = plans_M9.astype(np.int64), sizes_M2.astype(np.int64).T
    box_M4, resized_M2 = plans_M9[:, :4], plans_M9[:, 4:6]
    left_M, top_M = np.maximum(box_M4[:, :2], 0).T
    source_M2 = np.where(box_M4[:, 2:] < 0, sizes_M2, box_M4[:, 2:])
    of_torch_M = np.broadcast_to(of_torch_M, len(source_M2))
    vertical_first_M = _pillow_takes_vertical_first(source_M2, resized_M2) & ~of_torch_M
    columns = (starts_M + top_M * widths_M + left_M, widths_M, widths_M * heights_M, *source_M2.T, *resized_M2.T,
               *plans_M9[:, 6:].T, vertical_first_M, of_torch_M)  # fmt: skip
    return np.stack(columns, axis=1).astype(np.int64)


def _pillow_takes_vertical_first(source_M2: np.ndarray, resized_M2: np.ndarray) -> np.ndarray:
    lost_M2 = source_M2 - resized_M2
    if _PILLOW >= (13, 0):
        first_M = lost_M2[:, 1] > 2 * lost_M2[:, 0]
    else:
        first_M = (source_M2[:, 1] > 100 * source_M2[:, 0]) & (_PILLOW >= (12, 2))
    return first_M & (lost_M2[:, 1] > 0)


def most_taps(table_MC: np.ndarray) -> int:
    """Inputs that one output pixel may be a mean of, along one axis, over all crops of the table."""
    scale_M2 = table_MC[:, 3:5] / table_MC[:, 5:7]
    return 2 * int(np.ceil(scale_M2.max(initial=1.0))) + 1


def resize_crops(
    pixels_B: torch.Tensor, table_MC: torch.Tensor, taps: int, crop_size: int, channels: int
) -> torch.Tensor:
    """The crops of a table: uint8, M x channels x crop_size x crop_size in channels_last; black beyond an image.

    Nothing waits for the device, and it can be captured into a CUDA graph.

    Args:
        pixels_B: uint8, the images one after another, each channels x height x width.
        table_MC: of `crop_table`, on the device of the pixels.
        taps: at least `most_taps` of the table.
        crop_size: width and height of the crops.
        channels: of the images.
    """
    assert pixels_B.dtype == torch.uint8 and pixels_B.dim() == 1 and table_MC.shape[1] == len(COLUMNS)
    out_MCHW = torch.empty(
        (len(table_MC), channels, crop_size, crop_size), dtype=torch.uint8, device=pixels_B.device,
        memory_format=torch.channels_last,
    )  # fmt: skip
    if len(table_MC) and pixels_B.is_cuda and _has_triton():
        from onlinenorm.data.resize_triton import launch

        launch(pixels_B, table_MC, taps, out_MCHW)
    else:
        for out_CHW, row in zip(out_MCHW, table_MC.tolist(), strict=True):
            out_CHW.copy_(_resize_crop(pixels_B, row, crop_size, channels))
    return out_MCHW


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _resize_crop(pixels_B: torch.Tensor, row: list[int], crop_size: int, channels: int):
    start, pitch, plane, *sizes, left, top, mirrored, vertical_first, of_torch = row
    x_CHW = pixels_B.as_strided((channels, sizes[1], sizes[0]), (plane, pitch, 1), start)
    passes = [(2, sizes[0], sizes[2], left), (1, sizes[1], sizes[3], top)]
    for dim, source, resized, begin in reversed(passes) if vertical_first else passes:
        first_R, weights_RK = axis_weights(source, resized, bool(of_torch))
        at_S = torch.arange(begin, begin + crop_size)
        inside_S = (at_S >= 0) & (at_S < resized)
        at_S = at_S.clamp(0, resized - 1)
        weights_SK = torch.where(inside_S[:, None], weights_RK[at_S], 0).to(x_CHW.device)
        taps_SK = (first_R[at_S, None] + torch.arange(weights_RK.shape[1])).clamp(max=source - 1).to(x_CHW.device)
        inputs = x_CHW.index_select(dim, taps_SK.flatten()).unflatten(dim, taps_SK.shape).to(torch.int32)
        weights = weights_SK if dim == 2 else weights_SK[..., None]
        total = (inputs * weights).sum(dim + 1, dtype=torch.int32) + (1 << (PRECISION_BITS - 1))
        x_CHW = (total >> PRECISION_BITS).clamp(max=255).to(torch.uint8)
    return x_CHW.flip(2) if mirrored else x_CHW


def axis_weights(source: int, resized: int, of_torch: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """For each of `resized` pixels along an axis the first of its inputs (R), and the inputs' weights (R x K).

    Weights are integers in units of 2**-PRECISION_BITS, 0 beyond a pixel's inputs. Every operation is the one of
    Pillow's and torch's C code, in its order, and float64 like there.
    """
    scale = source / resized
    support = max(scale, 1.0)
    centre_R = (torch.arange(resized, dtype=torch.float64) + 0.5) * scale
    first_R = (centre_R - support + 0.5).long().clamp(min=0)
    count_R = (centre_R + support + 0.5).long().clamp(max=source) - first_R
    taps_K = torch.arange(int(count_R.max()))
    distance_RK = (((first_R[:, None] + taps_K).double() - centre_R[:, None] + 0.5) * (1.0 / support)).abs()
    weights_RK = torch.where((distance_RK < 1.0) & (taps_K < count_R[:, None]), 1.0 - distance_RK, 0.0)
    total_R = torch.zeros_like(centre_R)
    for weight_R in weights_RK.T:  # one after another, as a sum in another order has other bits
        total_R += weight_R
    weights_RK /= total_R[:, None]
    bits = PRECISION_BITS
    if of_torch:
        largest = float(weights_RK.max())
        bits = sum(0.5 + largest * 2 ** (bit + 1) < 2**15 for bit in range(PRECISION_BITS))
    return first_R, (0.5 + weights_RK * 2**bits).int() << (PRECISION_BITS - bits)
