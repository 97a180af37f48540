"""Geometry and colour of augmentation: pure functions of an image's size and its random numbers.

A `Plan` says what to do with a decoded image: cut `box` out, resize to `size`, cut `crops` of `crop_size` (black
beyond the border), mirror some. Every decoder follows the same plan, so boxes and flips can't differ between decoders.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from onlinenorm.data.prefetch import to_device
from onlinenorm.data.randomness import normals

AUGMENTATIONS = ("random_resized_crop", "scale_jitter", "pad_crop", "none")
EVALUATIONS = ("center_crop", "ten_crop")

# columns of an image's row of uniform numbers; a purpose keeps its columns whatever the augmentation
DRAWS = 30
_AREA, _RATIO, _TOP, _LEFT, _FLIP, _SHORT, _COLOUR = 0, 10, 20, 21, 22, 23, 24

# columns that a plan reads, where those are few
DRAWS_OF = {"pad_crop": (_TOP, _LEFT, _FLIP), "none": (), "center_crop": (), "ten_crop": ()}

_AREA_RANGE = (0.08, 1.0)
_RATIO_RANGE = (3.0 / 4.0, 4.0 / 3.0)
_SHORT_RANGE = (256, 480)  # of a 224 px crop, He et al. 2015

# Principal components of ImageNet's RGB values in [0, 1] and their eigenvalues (AlexNet's colour augmentation)
_PCA_VECTORS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
_PCA_VALUES = np.array([0.2175, 0.0188, 0.0045])
_PCA_SIGMA = 0.1


class Plan(NamedTuple):
    """What to do with one decoded image; lengths in pixels.

    box: (left, top, width, height) of the source, or None for all of it. size: (width, height) after resizing.
    crops: (left, top, mirrored) in the resized image. crop_size: width and height of each crop.
    """

    box: tuple[int, int, int, int] | None
    size: tuple[int, int]
    crops: tuple[tuple[int, int, bool], ...]
    crop_size: int


Planner = Callable[[int, int], Plan]


def shorter_side(width: int, height: int, short: int) -> tuple[int, int]:
    """(width, height) with the shorter side resized to `short` and the ratio kept, rounded as torchvision does."""
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short


def _centred(size: tuple[int, int], crop: int) -> tuple[int, int]:
    return round((size[0] - crop) / 2.0), round((size[1] - crop) / 2.0)


def _below(bound: int, uniform: float) -> int:
    return int(uniform * bound)


def plan_random_resized_crop(width: int, height: int, crop_size: int, padding: int, draws: np.ndarray) -> Plan:
    """A box of 8-100 % of the area, ratio 3/4-4/3 (log-uniform; 10 tries, else centred), resized; mirrored or not."""
    log_ratio = math.log(_RATIO_RANGE[0]), math.log(_RATIO_RANGE[1])
    mirrored = bool(draws[_FLIP] < 0.5)
    for t in range(10):
        area = width * height * (_AREA_RANGE[0] + (_AREA_RANGE[1] - _AREA_RANGE[0]) * draws[_AREA + t])
        ratio = math.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * draws[_RATIO + t])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            box = _below(width - w + 1, draws[_LEFT]), _below(height - h + 1, draws[_TOP]), w, h
            break
    else:
        w, h = width, height
        if width / height < _RATIO_RANGE[0]:
            h = round(w / _RATIO_RANGE[0])
        elif width / height > _RATIO_RANGE[1]:
            w = round(h * _RATIO_RANGE[1])
        box = (width - w) // 2, (height - h) // 2, w, h
    return Plan(box, (crop_size, crop_size), ((0, 0, mirrored),), crop_size)


def plan_scale_jitter(width: int, height: int, crop_size: int, padding: int, draws: np.ndarray) -> Plan:
    """Shorter side uniform over the whole numbers [256, 480] (x crop_size / 224), a random crop, mirrored or not."""
    low, high = (round(s * crop_size / 224) for s in _SHORT_RANGE)
    size = shorter_side(width, height, low + _below(high - low + 1, draws[_SHORT]))
    left, top = _below(size[0] - crop_size + 1, draws[_LEFT]), _below(size[1] - crop_size + 1, draws[_TOP])
    return Plan(None, size, ((left, top, bool(draws[_FLIP] < 0.5)),), crop_size)


def plan_pad_crop(width: int, height: int, crop_size: int, padding: int, draws: np.ndarray) -> Plan:
    """Shorter side resized to crop_size, the centred crop moved by up to `padding` each way, mirrored or not."""
    size = shorter_side(width, height, crop_size)
    left, top = _centred(size, crop_size)
    dx, dy = (_below(2 * padding + 1, draws[column]) - padding for column in (_LEFT, _TOP))
    return Plan(None, size, ((left + dx, top + dy, bool(draws[_FLIP] < 0.5)),), crop_size)


def plan_center_crop(
    width: int, height: int, crop_size: int, padding: int = 0, draws: np.ndarray | None = None
) -> Plan:
    """Shorter side resized to 256 (times crop_size / 224), the centred crop; nothing is random."""
    size = shorter_side(width, height, round(crop_size * 256 / 224))
    return Plan(None, size, ((*_centred(size, crop_size), False),), crop_size)


def plan_ten_crop(width: int, height: int, crop_size: int, padding: int = 0, draws: np.ndarray | None = None) -> Plan:
    """Four corners and centre after `plan_center_crop`'s resize, then the same five of the mirrored image."""
    w, h = size = shorter_side(width, height, round(crop_size * 256 / 224))
    right, bottom = w - crop_size, h - crop_size
    five = [(0, 0), (right, 0), (0, bottom), (right, bottom), _centred(size, crop_size)]
    # a crop at `left` of the mirrored image is the mirrored crop at `right - left` of the image itself
    crops = [(left, top, False) for left, top in five] + [(right - left, top, True) for left, top in five]
    return Plan(None, size, tuple(crops), crop_size)


PLANS = {
    "random_resized_crop": plan_random_resized_crop,
    "scale_jitter": plan_scale_jitter,
    "pad_crop": plan_pad_crop,
    "none": plan_center_crop,
    "center_crop": plan_center_crop,
    "ten_crop": plan_ten_crop,
}


def rows_of_plan(plan: Plan) -> list[list[int]]:
    """A plan as numbers, nine a crop: box (all -1 for None), size, the crop's left, top and mirrored."""
    return [[*(plan.box or (-1, -1, -1, -1)), *plan.size, *map(int, crop)] for crop in plan.crops]


def plan_rows(plan: str, sizes_N2: np.ndarray, crop_size: int, padding: int, draws_NK: np.ndarray) -> np.ndarray:
    """`rows_of_plan` of `PLANS[plan]` for many images of `sizes_N2` (width, height) at once: int32, N x crops x 9."""
    sizes_N2 = sizes_N2.astype(np.int64)
    place_N2, mirrored_N1 = draws_NK[:, [_LEFT, _TOP]], draws_NK[:, [_FLIP]] < 0.5
    crops: list[tuple[np.ndarray, Any]]  # places, and whether mirrored
    if plan == "random_resized_crop":
        boxes_N4 = _draw_boxes(sizes_N2, draws_NK)
        resized_N2 = np.full_like(sizes_N2, crop_size)
        crops = [(np.zeros_like(sizes_N2), mirrored_N1)]
    else:
        boxes_N4 = np.full((len(sizes_N2), 4), -1)
        short: int | np.ndarray = crop_size if plan == "pad_crop" else round(crop_size * 256 / 224)
        if plan == "scale_jitter":
            low, high = (round(s * crop_size / 224) for s in _SHORT_RANGE)
            short = low + (draws_NK[:, [_SHORT]] * (high - low + 1)).astype(np.int64)
        shorter_N1 = sizes_N2.min(axis=1, keepdims=True)
        resized_N2 = (short * sizes_N2 / shorter_N1).astype(np.int64)
        spare_N2 = resized_N2 - crop_size
        centred_N2 = np.rint(spare_N2 / 2.0).astype(np.int64)
        if plan == "scale_jitter":
            crops = [((place_N2 * (spare_N2 + 1)).astype(np.int64), mirrored_N1)]
        elif plan == "pad_crop":
            crops = [(centred_N2 + (place_N2 * (2 * padding + 1)).astype(np.int64) - padding, mirrored_N1)]
        elif plan == "ten_crop":
            five = [spare_N2 * corner for corner in ((0, 0), (1, 0), (0, 1), (1, 1))] + [centred_N2]
            crops = [(at_N2, False) for at_N2 in five]
            crops += [(np.stack([spare_N2[:, 0] - at_N2[:, 0], at_N2[:, 1]], axis=1), True) for at_N2 in five]
        else:
            crops = [(centred_N2, False)]
    rows = [
        np.concatenate([boxes_N4, resized_N2, at_N2, np.broadcast_to(mirrored, at_N2[:, :1].shape)], axis=1)
        for at_N2, mirrored in crops
    ]
    return np.stack(rows, axis=1).astype(np.int32)


def _draw_boxes(sizes_N2: np.ndarray, draws_NK: np.ndarray) -> np.ndarray:
    """The boxes of `plan_random_resized_crop`: left, top, width, height."""
    log_low, log_high = math.log(_RATIO_RANGE[0]), math.log(_RATIO_RANGE[1])
    inside_N2 = _fit_ratio(sizes_N2)
    left_top_N2 = (sizes_N2 - inside_N2) // 2
    left = np.arange(len(sizes_N2))  # images without a box so far
    for t in range(10):
        draws, bounds_M2 = draws_NK[left], sizes_N2[left]
        area_M = bounds_M2.prod(axis=1) * (_AREA_RANGE[0] + (_AREA_RANGE[1] - _AREA_RANGE[0]) * draws[:, _AREA + t])
        # math.exp, as numpy's differs from it in the last bit
        exponents = (log_low + (log_high - log_low) * draws[:, _RATIO + t]).tolist()
        ratio_M = np.array([math.exp(exponent) for exponent in exponents])
        box_M2 = np.rint(np.sqrt(np.stack([area_M * ratio_M, area_M / ratio_M], axis=1))).astype(np.int64)
        fits_M = ((box_M2 > 0) & (box_M2 <= bounds_M2)).all(axis=1)
        place_M2 = (draws[:, [_LEFT, _TOP]] * (bounds_M2 - box_M2 + 1)).astype(np.int64)
        inside_N2[left[fits_M]], left_top_N2[left[fits_M]] = box_M2[fits_M], place_M2[fits_M]
        left = left[~fits_M]
        if not len(left):
            break
    return np.concatenate([left_top_N2, inside_N2], axis=1)


def _fit_ratio(sizes_N2: np.ndarray) -> np.ndarray:
    """The largest boxes whose ratio is in range."""
    width_N, height_N = sizes_N2.T
    ratio_N = width_N / height_N
    height = np.where(ratio_N < _RATIO_RANGE[0], np.rint(width_N / _RATIO_RANGE[0]), height_N)
    width = np.where(ratio_N > _RATIO_RANGE[1], np.rint(height_N * _RATIO_RANGE[1]), width_N)
    return np.stack([width, height], axis=1).astype(np.int64)


def cut_crops(image_HWC: np.ndarray, plan: Plan) -> np.ndarray:
    """The plan's crops of an image that has been resized already: uint8, crops x crop_size x crop_size x C."""
    height, width, channels = image_HWC.shape
    s = plan.crop_size
    out_KHWC = np.zeros((len(plan.crops), s, s, channels), dtype=np.uint8)
    for out_HWC, (left, top, mirrored) in zip(out_KHWC, plan.crops, strict=True):
        x0, x1, y0, y1 = max(left, 0), min(left + s, width), max(top, 0), min(top + s, height)
        out_HWC[y0 - top : y1 - top, x0 - left : x1 - left] = image_HWC[y0:y1, x0:x1]
        if mirrored:
            out_HWC[:] = torch.from_numpy(out_HWC).flip(1).numpy()  # numpy's reversed copy takes ten times as long
    return out_KHWC


def follow_plan(image_CHW: torch.Tensor, plan: Plan) -> np.ndarray:
    """Follows a plan on a decoded uint8 tensor, with antialiased bilinear resizing: crops x H x W x C, uint8."""
    if plan.box is not None:
        left, top, width, height = plan.box
        image_CHW = image_CHW[:, top : top + height, left : left + width]
    if (image_CHW.shape[2], image_CHW.shape[1]) != plan.size:
        image_CHW = torch.nn.functional.interpolate(
            image_CHW[None], size=plan.size[::-1], mode="bilinear", antialias=True
        )[0]
    return cut_crops(image_CHW.permute(1, 2, 0).numpy(), plan)


def shift_and_mirror(images_NCHW: torch.Tensor, padding: int, draws_NK: np.ndarray) -> torch.Tensor:
    """`plan_pad_crop` for a whole batch of equal images at once, on their device."""
    n, c, h, w = images_NCHW.shape
    device = images_NCHW.device
    scales = np.array([2 * padding + 1, 2 * padding + 1, 2.0])
    moves_N3 = torch.from_numpy((draws_NK[:, [_TOP, _LEFT, _FLIP]] * scales).astype(np.int64))
    top_N1, left_N1, straight_N1 = to_device(moves_N3, device).split(1, dim=1)  # straight: 0 where it is mirrored
    across_W = torch.arange(w, device=device)
    columns_NW = left_N1 + torch.where(straight_N1 == 0, w - 1 - across_W, across_W)
    rows_NH = top_N1 + torch.arange(h, device=device)
    # flat indices into each image's padded plane, shared by its channels
    flat_NHW = rows_NH[:, :, None] * (w + 2 * padding) + columns_NW[:, None, :]
    planes_NCP = torch.nn.functional.pad(images_NCHW, (padding,) * 4).flatten(2)
    return planes_NCP.gather(2, flat_NHW.view(n, 1, h * w).expand(n, c, h * w)).view(n, c, h, w)


def colour_shifts(draws_NK: np.ndarray) -> np.ndarray:
    """AlexNet's colour noise: for each image one RGB offset in units of [0, 1], N x 3, float32.

    offset = V (a * lambda), a ~ N(0, 0.1), with V, lambda the principal components of ImageNet's RGB values
    (Krizhevsky et al. 2012, section 4.1).
    """
    alphas_N3 = _PCA_SIGMA * normals(draws_NK[:, _COLOUR : _COLOUR + 6])
    return ((alphas_N3 * _PCA_VALUES) @ _PCA_VECTORS.T).astype(np.float32)
