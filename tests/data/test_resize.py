"""Crops of many images at once have the bits of Pillow and of torch, from plain PyTorch and from the GPU kernels."""

import math
import os
import random
import sys

import numpy as np
import pytest
import torch
from PIL import Image

if not torch.cuda.is_available() and "triton" not in sys.modules:  # which the imports below may import
    os.environ.setdefault("TRITON_INTERPRET", "1")

from onlinenorm.data.randomness import uniforms
from onlinenorm.data.resize import axis_weights, crop_table, most_taps, resize_crops
from onlinenorm.data.transforms import DRAWS, PLANS, Plan, cut_crops, follow_plan, plan_rows, rows_of_plan

ON_GPU = torch.cuda.is_available()
WHOLE = ((0, 0, False),)
ARITHMETICS = ("pillow", "torch")
# (channels, height, width), plan
EDGES = [
    ((3, 1, 1), Plan(None, (1, 1), WHOLE, 8)),  # one pixel, black around it
    ((3, 1, 1), Plan(None, (9, 7), WHOLE, 8)),
    ((3, 5, 50), Plan(None, (8, 8), WHOLE, 8)),  # panoramas
    ((3, 50, 5), Plan(None, (8, 8), ((0, 0, True),), 8)),
    ((3, 20, 43), Plan(None, (8, 8), WHOLE, 8)),  # a fifth
    ((3, 5, 6), Plan(None, (31, 29), ((20, 21, True),), 8)),  # upscaling
    ((3, 20, 20), Plan((0, 0, 1, 1), (8, 8), WHOLE, 8)),  # boxes at the border
    ((3, 20, 20), Plan((13, 11, 7, 9), (8, 8), ((0, 0, True),), 8)),
    ((3, 20, 20), Plan((4, 5, 8, 8), (8, 8), WHOLE, 8)),  # nothing to resize
    ((3, 21, 17), Plan((4, 5, 8, 12), (8, 9), WHOLE, 8)),  # one axis alone
    ((3, 30, 12), Plan(None, (10, 11), ((-3, 5, True), (6, -7, False)), 8)),  # beyond the border, two crops
    ((3, 40, 12), Plan(None, (11, 12), WHOLE, 8)),  # height shrinks more: Pillow 13 begins with it
]
TENTH = (3, 80, 83), Plan(None, (8, 8), WHOLE, 8)  # half a minute in the interpreter


def drawn_cases(count, channels, crop_size, longest, seed):
    """Images of very unequal sizes with boxes, sizes and crops of all kinds."""
    draw = random.Random(seed)
    for _ in range(count):
        width, height = (max(1, round(math.exp(draw.uniform(0, math.log(longest))))) for _ in range(2))
        box = None
        if draw.random() < 0.6:
            w, h = draw.randint(1, width), draw.randint(1, height)
            box = draw.randint(0, width - w), draw.randint(0, height - h), w, h
        size = tuple(max(1, round(math.exp(draw.uniform(0, math.log(2 * crop_size))))) for _ in range(2))
        if size == (1, 1):
            continue  # torch 2.11 fails an assertion of its own there
        left, top = (draw.randint(1 - crop_size, side - 1) for side in size)
        yield (channels, height, width), Plan(box, size, ((left, top, draw.random() < 0.5),), crop_size)


def pillow_crops(image_CHW, plan):
    image = Image.fromarray(image_CHW.transpose(1, 2, 0) if len(image_CHW) == 3 else image_CHW[0])
    if plan.box is not None:
        left, top, width, height = plan.box
        image = image.crop((left, top, left + width, top + height))
    if image.size != plan.size:
        image = image.resize(plan.size, Image.Resampling.BILINEAR)
    return cut_crops(np.asarray(image).reshape(*plan.size[::-1], len(image_CHW)), plan)


def check(cases, arithmetic, device, resize=resize_crops):
    """Crops of all cases at once equal those of the CPU's resize, bit for bit."""
    numbers = np.random.default_rng(0)
    images = [np.ascontiguousarray(numbers.integers(0, 256, shape, dtype=np.uint8)) for shape, _ in cases]
    starts, rows, sizes, expected = [], [], [], []
    for (image, (shape, plan)), start in zip(
        zip(images, cases, strict=True), np.cumsum([0] + [image.size for image in images]).tolist(), strict=False
    ):
        crops = pillow_crops(image, plan) if arithmetic == "pillow" else follow_plan(torch.from_numpy(image), plan)
        expected.append(torch.from_numpy(crops).permute(0, 3, 1, 2))
        for row in rows_of_plan(plan):
            starts.append(start)
            rows.append(row)
            sizes.append(shape[:0:-1])
    table = crop_table(np.array(rows, dtype=np.int32), np.array(starts), np.array(sizes), arithmetic == "torch")
    pixels = torch.from_numpy(np.concatenate([image.ravel() for image in images])).to(device)
    size = cases[0][1].crop_size
    found = resize(pixels, torch.from_numpy(table).to(device), most_taps(table), size, cases[0][0][0])
    assert found.is_contiguous(memory_format=torch.channels_last) and found.dtype == torch.uint8
    for n, (crop, exact) in enumerate(zip(found.cpu(), torch.cat(expected), strict=True)):
        assert torch.equal(crop, exact), f"crop {n}: {rows[n]} of {sizes[n]}"


def interpreted(pixels_B, table_MC, taps, crop_size, channels):
    """The kernels in Triton's interpreter, over memory that holds noise."""
    from onlinenorm.data.resize_triton import launch

    out = torch.full((len(table_MC), crop_size, crop_size, channels), 77, dtype=torch.uint8).permute(0, 3, 1, 2)
    launch(pixels_B, table_MC, taps, out)
    return out


@pytest.fixture
def interpreter():
    pytest.importorskip("triton.language")
    from onlinenorm.data.resize_triton import crops_kernel

    if "Interpreted" not in type(crops_kernel).__name__:
        pytest.skip("Triton was imported without TRITON_INTERPRET=1")


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_edges_are_those_of_the_cpu(arithmetic):
    check([*EDGES, TENTH], arithmetic, "cpu")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_ragged_images_are_those_of_the_cpu(arithmetic, channels):
    check(list(drawn_cases(150, channels, 33, 400, 1)), arithmetic, "cpu")


@pytest.mark.parametrize(
    ("arithmetic", "tile"),
    [("pillow", {}), ("torch", {}), ("pillow", {"_ROWS": 3, "_WARP": 4})],  # the kernel of the tiles takes any weights
    ids=["pillow-shipped", "torch-shipped", "pillow-small"],
)
def test_kernels_give_the_same_bits(interpreter, arithmetic, tile, monkeypatch):
    for name, size in tile.items():
        monkeypatch.setattr(f"onlinenorm.data.resize_triton.{name}", size)
    check(EDGES, arithmetic, "cpu", interpreted)


@pytest.mark.parametrize("channels", [1, 3])
def test_kernels_give_the_same_bits_for_ragged_images(interpreter, channels):
    check(list(drawn_cases(8, channels, 19, 40, 2)), "pillow", "cpu", interpreted)


@pytest.mark.parametrize("plan", sorted(PLANS))
def test_plans_of_many_images_are_those_of_each(plan):
    sizes = np.exp(np.random.default_rng(0).uniform(0, 8, (2000, 2))).astype(np.int64)
    draws = uniforms(5, 3, np.arange(2000), DRAWS)
    for crop_size, padding in ((224, 0), (33, 3)):
        each = [PLANS[plan](w, h, crop_size, padding, d) for (w, h), d in zip(sizes.tolist(), draws, strict=True)]
        found = plan_rows(plan, sizes, crop_size, padding, draws)
        assert found.dtype == np.int32 and np.array_equal(found, [rows_of_plan(one) for one in each])


def test_weights_are_whole_and_complete():
    for of_torch in (False, True):
        for source, resized in ((1, 7), (500, 224), (224, 224), (9999, 31)):
            first, weights = axis_weights(source, resized, of_torch)
            assert (weights >= 0).all() and (first >= 0).all() and (first < source).all()
            off = (weights.sum(1) - 2**22).abs() / 2**22
            assert off.max() < weights.shape[1] * 2.0**-14


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("crop_size", [8, 33, 224])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_gpu_gives_the_same_bits(arithmetic, crop_size, channels):
    if channels == 3 and crop_size == 8:
        check([*EDGES, TENTH], arithmetic, "cuda")
    check(list(drawn_cases(200, channels, crop_size, 1500, 3)), arithmetic, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
def test_it_neither_waits_nor_hinders_a_capture():
    sizes = np.array([[50, 40], [31, 90]])
    pixels = torch.randint(0, 256, (3 * (50 * 40 + 31 * 90),), dtype=torch.uint8, device="cuda")

    def table(epoch):
        rows = plan_rows("random_resized_crop", sizes, 32, 0, uniforms(0, epoch, np.arange(2), DRAWS))[:, 0]
        return torch.from_numpy(crop_table(rows, np.array([0, 6000]), sizes, False)).cuda()

    first, second = table(0), table(1)
    expected = [resize_crops(pixels, rows, 9, 32, 3).clone() for rows in (first, second)]
    torch.cuda.synchronize()
    graph, static = torch.cuda.CUDAGraph(), first.clone()
    torch.cuda.set_sync_debug_mode("error")
    try:
        resize_crops(pixels, first, 9, 32, 3)
        with torch.cuda.graph(graph):
            captured = resize_crops(pixels, static, 9, 32, 3)
        graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(captured, expected[0])
    static.copy_(second)
    graph.replay()
    assert torch.equal(captured, expected[1]) and not torch.equal(*expected)
