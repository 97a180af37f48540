import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from onlinenorm.data.decoders import decode_pillow
from onlinenorm.data.randomness import uniforms
from onlinenorm.data.transforms import (
    DRAWS,
    colour_shifts,
    cut_crops,
    plan_center_crop,
    plan_pad_crop,
    plan_random_resized_crop,
    plan_scale_jitter,
    plan_ten_crop,
    shift_and_mirror,
)


def png(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return image, stream.getvalue()


@pytest.mark.parametrize("size", [(50, 40), (40, 50), (33, 77), (28, 28), (301, 97)])
@pytest.mark.parametrize("crop", [16, 28, 224])
def test_center_crop_has_the_pixels_of_torchvision(size, crop):
    image, data = png(*size)
    expected = v2.CenterCrop(crop)(v2.Resize(round(crop * 256 / 224))(image))
    found = decode_pillow(data, lambda w, h: plan_center_crop(w, h, crop))
    np.testing.assert_array_equal(found[0], np.asarray(expected))


@pytest.mark.parametrize("size", [(50, 41), (41, 50), (64, 64)])
def test_ten_crop_has_the_pixels_and_order_of_torchvision(size):
    image, data = png(*size)
    expected = v2.TenCrop(28)(v2.Resize(32)(image))
    found = decode_pillow(data, lambda w, h: plan_ten_crop(w, h, 28))
    np.testing.assert_array_equal(found, np.stack([np.asarray(crop) for crop in expected]))


def test_random_resized_crop_has_the_pixels_of_torchvision_for_the_same_box():
    image, data = png(90, 70)
    for draws in uniforms(0, 0, np.arange(20), DRAWS):
        plan = plan_random_resized_crop(90, 70, 32, 0, draws)
        left, top, width, height = plan.box
        expected = v2.functional.resized_crop(image, top, left, height, width, [32, 32])
        if plan.crops[0][2]:
            expected = v2.functional.horizontal_flip(expected)
        np.testing.assert_array_equal(decode_pillow(data, lambda w, h, p=plan: p)[0], np.asarray(expected))


def test_random_resized_crop_boxes_are_distributed_as_torchvisions():
    size, n = (500, 375), 4000
    ours = np.array([plan_random_resized_crop(*size, 224, 0, d).box for d in uniforms(3, 0, np.arange(n), DRAWS)])
    image = torch.empty(3, size[1], size[0], dtype=torch.uint8)
    transform = v2.RandomResizedCrop(224)
    theirs = [transform.make_params([image]) for _ in range(n)]
    theirs = np.array([[p["left"], p["top"], p["width"], p["height"]] for p in theirs])
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= size).all()
    for values in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 2] / b[:, 3], lambda b: b[:, 0], lambda b: b[:, 1]):
        a, b = np.sort(values(ours)), np.sort(values(theirs))
        grid = np.concatenate([a, b])
        distance = np.abs(np.searchsorted(a, grid, "right") - np.searchsorted(b, grid, "right")).max() / n
        assert distance < 1.95 * math.sqrt(2 / n)  # Kolmogorov-Smirnov, p = 0.001


@pytest.mark.parametrize(("size", "box"), [((1000, 10), (493, 0, 13, 10)), ((10, 1000), (0, 493, 10, 13))])
def test_random_resized_crop_falls_back_to_the_centre(size, box):
    draws = uniforms(0, 0, np.arange(1), DRAWS)[0]
    draws[:10] = 0.99  # such areas fit into no box of an allowed ratio
    assert plan_random_resized_crop(*size, 224, 0, draws).box == box


def test_scale_jitter_spans_its_range():
    plans = [plan_scale_jitter(500, 375, 224, 0, d) for d in uniforms(0, 0, np.arange(3000), DRAWS)]
    shorter = [min(p.size) for p in plans]
    assert (min(shorter), max(shorter)) == (256, 480)
    assert all(0 <= left <= p.size[0] - 224 and 0 <= top <= p.size[1] - 224 for p in plans for left, top, _ in p.crops)
    assert 0.45 < np.mean([p.crops[0][2] for p in plans]) < 0.55
    half = [min(plan_scale_jitter(500, 375, 112, 0, d).size) for d in uniforms(0, 0, np.arange(3000), DRAWS)]
    assert (min(half), max(half)) == (128, 240)


@pytest.mark.parametrize("channels", [1, 3])
def test_batched_pad_crop_equals_the_plan_image_by_image(channels):
    images = np.random.default_rng(0).integers(1, 256, (64, channels, 12, 12), dtype=np.uint8)
    draws = uniforms(0, 1, np.arange(64), DRAWS)
    found = shift_and_mirror(torch.from_numpy(images), 3, draws).numpy()
    for image, row, result in zip(images, draws, found, strict=True):
        plan = plan_pad_crop(12, 12, 12, 3, row)
        assert plan.size == (12, 12)
        np.testing.assert_array_equal(cut_crops(image.transpose(1, 2, 0), plan)[0].transpose(2, 0, 1), result)
    assert (found == 0).any(), "the border is black"


def test_pad_crop_uses_all_shifts_and_both_mirrors():
    image = np.arange(1, 65, dtype=np.uint8).reshape(1, 1, 8, 8).repeat(3000, 0)
    found = shift_and_mirror(torch.from_numpy(image), 2, uniforms(0, 0, np.arange(3000), DRAWS)).numpy()
    counts = np.unique(found.reshape(3000, -1), axis=0, return_counts=True)[1]
    assert len(counts) == 5 * 5 * 2 and counts.min() > 25


def test_colour_shifts_have_the_covariance_of_alexnets_noise():
    shifts = colour_shifts(uniforms(0, 0, np.arange(50000), DRAWS))
    assert shifts.dtype == np.float32 and np.abs(shifts.mean(0)).max() < 5e-4
    vectors = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    expected = vectors @ np.diag((0.1 * np.array([0.2175, 0.0188, 0.0045])) ** 2) @ vectors.T
    np.testing.assert_allclose(np.cov(shifts.T), expected, rtol=0.05)
