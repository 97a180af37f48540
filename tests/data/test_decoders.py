import io

import numpy as np
import pytest
from image_folders import write_image
from PIL import Image

from onlinenorm.data.decoders import DECODERS, decode_pillow, decode_torchvision
from onlinenorm.data.randomness import uniforms
from onlinenorm.data.transforms import DRAWS, plan_center_crop, plan_random_resized_crop, plan_scale_jitter

KINDS = {
    "rgb": ("RGB", "JPEG", {"quality": 95}),
    "gray": ("L", "JPEG", {}),
    "cmyk": ("CMYK", "JPEG", {}),
    "progressive": ("RGB", "JPEG", {"progressive": True}),
    "png": ("RGB", "PNG", {}),
    "png_gray": ("L", "PNG", {}),
    "png_alpha": ("RGBA", "PNG", {}),
}


@pytest.fixture(params=KINDS)
def encoded(request, tmp_path):
    mode, kind, options = KINDS[request.param]
    # ImageNet holds PNG and CMYK files under the name .JPEG
    return write_image(tmp_path / "image.JPEG", 1, (190, 130), mode, format=kind, **options).read_bytes()


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_kind_becomes_rgb(encoded, decoder):
    crops = DECODERS[decoder](encoded, lambda w, h: plan_center_crop(w, h, 32))
    assert crops.shape == (1, 32, 32, 3) and crops.dtype == np.uint8
    expected = Image.open(io.BytesIO(encoded)).convert("RGB").resize((10, 10), Image.Resampling.BOX)
    assert np.abs(crops.mean((0, 1, 2)) - np.asarray(expected).mean((0, 1))).max() < 25


def test_decoders_agree_on_validation_images(encoded):
    pillow, torchvision = (
        DECODERS[d](encoded, lambda w, h: plan_center_crop(w, h, 64)).astype(int) for d in ("pillow", "torchvision")
    )
    assert np.abs(pillow - torchvision).mean() < 0.5 and np.abs(pillow - torchvision).max() <= 3


@pytest.mark.parametrize("plan", [plan_random_resized_crop, plan_scale_jitter])
def test_boxes_and_mirrors_are_those_of_pillow(encoded, plan):
    for draws in uniforms(0, 0, np.arange(8), DRAWS):
        pillow, torchvision = (
            decode(encoded, lambda w, h, d=draws: plan(w, h, 48, 0, d)).astype(int)
            for decode in (decode_pillow, decode_torchvision)
        )
        assert np.abs(pillow - torchvision).mean() < 0.7


@pytest.mark.parametrize("decoder", DECODERS)
def test_orientation_tags_are_not_applied(tmp_path, decoder):
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = write_image(tmp_path / "a.jpg", 3, (64, 64)).read_bytes()
    tagged = write_image(tmp_path / "b.jpg", 3, (64, 64), exif=exif).read_bytes()
    a, b = (DECODERS[decoder](data, lambda w, h: plan_center_crop(w, h, 56)) for data in (plain, tagged))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("damage", ["empty", "half", "noise", "png_half"])
def test_damaged_files_raise(tmp_path, decoder, damage):
    good = write_image(tmp_path / "a.jpg", 3, (64, 64), format="PNG" if damage == "png_half" else "JPEG").read_bytes()
    data = {"empty": b"", "noise": b"\xff\xd8\xff" + bytes(range(256)) * 4}.get(damage, good[: len(good) // 2])
    with pytest.raises((OSError, SyntaxError, ValueError)):
        DECODERS[decoder](data, lambda w, h: plan_center_crop(w, h, 32))
