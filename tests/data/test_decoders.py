import io
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from image_folders import write_image
from PIL import Image

from onlinenorm.data.decoders import (
    DECODERS,
    decode_pillow,
    decode_torchvision,
    decode_whole,
    named_warnings,
    open_rgb,
)
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


def test_tiff_is_turned_by_its_orientation_as_pillow_does(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    sizes = [
        open_rgb(write_image(tmp_path / f"a.{kind}", 3, (60, 50), exif=exif).read_bytes()).size
        for kind in ("jpg", "png", "webp", "tif")
    ]
    assert sizes == [(60, 50)] * 3 + [(50, 60)]


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [(1, 2001), (2001, 1)])
def test_a_line_is_unreadable_and_is_not_resized(tmp_path, decoder, kind, size):
    data = write_image(tmp_path / "line", 3, size, format=kind).read_bytes()
    with pytest.raises(ValueError, match=rf"its {size[0]} x {size[1]} pixels are a line: over 1,000 times as long"):
        DECODERS[decoder](data, lambda w, h: pytest.fail("a plan is made"))
    with pytest.raises(ValueError, match="are a line"):
        decode_whole(data, decoder)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("damage", ["empty", "half", "noise", "png_half"])
def test_damaged_files_raise(tmp_path, decoder, damage):
    good = write_image(tmp_path / "a.jpg", 3, (64, 64), format="PNG" if damage == "png_half" else "JPEG").read_bytes()
    data = {"empty": b"", "noise": b"\xff\xd8\xff" + bytes(range(256)) * 4}.get(damage, good[: len(good) // 2])
    with pytest.raises((OSError, SyntaxError, ValueError)):
        DECODERS[decoder](data, lambda w, h: plan_center_crop(w, h, 32))


@pytest.mark.parametrize("kind, options", [("PNG", {}), ("TIFF", {}), ("TIFF", {"tiffinfo": {262: 0}}), ("PPM", {})])
@pytest.mark.parametrize("decoder", DECODERS)
def test_16_bit_gray_is_scaled(decoder, kind, options):
    gray_HW = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    content = io.BytesIO()
    Image.fromarray(65535 - gray_HW if options else gray_HW).save(content, kind, **options)  # 262: 0 is white
    crops = DECODERS[decoder](content.getvalue(), lambda w, h: plan_center_crop(w, h, 56))
    expected = (gray_HW / 257).round().astype(np.uint8)
    near = np.asarray(Image.fromarray(expected).resize((64, 64)))[4:-4, 4:-4]
    assert np.abs(crops[0].astype(int) - near[..., None].astype(int)).max() <= 1
    assert 90 < crops.mean() < 165 and crops.std() > 40


def test_12_bit_gray_is_scaled():
    # rows of two pixels, 12 bits each: black and white
    entries = [(256, 64), (257, 64), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 64), (279, 64 * 96)]
    pixels = bytes([0x00, 0x0F, 0xFF]) * 32 * 64
    head = b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    data = head + struct.pack("<H", len(entries)) + table + bytes(4)
    assert np.unique(np.asarray(open_rgb(data))).tolist() == [0, 255]


def test_threads_do_not_mix_up_the_filters_of_warnings(tmp_path):
    data = write_image(tmp_path / "a.jpg", 3, (64, 64)).read_bytes()

    def decode(n):
        with named_warnings() as reading:
            reading.file = n
            return decode_torchvision(data, lambda w, h: plan_center_crop(w, h, 32))

    before = list(warnings.filters), warnings.showwarning
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(decode, range(200)))
    assert (list(warnings.filters), warnings.showwarning) == before


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(("dtype", "kind"), [(np.float32, "floating-point"), (np.int32, "32-bit")])
def test_pixels_of_unknown_range_are_refused(decoder, dtype, kind):
    content = io.BytesIO()
    Image.fromarray(np.ones((64, 64), dtype)).save(content, "TIFF")
    with pytest.raises(ValueError, match=f"its pixels are {kind} numbers of unknown range"):
        DECODERS[decoder](content.getvalue(), lambda w, h: plan_center_crop(w, h, 56))


@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [("1", "PNG", {}), ("LA", "PNG", {}), ("P", "PNG", {"transparency": 3}), ("P", "GIF", {}), ("CMYK", "TIFF", {})],
)
def test_rare_modes_keep_their_brightness(mode, kind, options):
    half = Image.fromarray(np.repeat([[0] * 32, [255] * 32], 32, axis=1).astype(np.uint8).reshape(2, -1)[:, :64])
    picture = half.resize((64, 64), Image.Resampling.NEAREST).convert("RGB" if mode in ("CMYK", "P") else "L")
    content = io.BytesIO()
    picture.convert(mode).save(content, kind, **options)
    crops = decode_pillow(content.getvalue(), lambda w, h: plan_center_crop(w, h, 64))
    assert abs(crops.mean() - np.asarray(picture).mean()) < 2


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    ("content", "told"), [(b"", "it is empty"), (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull")]
)
def test_a_file_without_its_content_is_told(decoder, content, told):
    with pytest.raises(OSError, match=told):
        DECODERS[decoder](content, lambda w, h: plan_center_crop(w, h, 64))


@pytest.mark.parametrize("decoder", DECODERS)
def test_what_is_no_image_is_told_without_an_address(decoder):
    with pytest.raises(OSError, match="none of the formats that Pillow reads") as told:
        DECODERS[decoder](b"no image", lambda w, h: plan_center_crop(w, h, 56))
    assert "BytesIO" not in str(told.value)


def test_warnings_carry_the_name_of_the_file(caplog):
    with named_warnings() as reading:
        reading.file = "train/ant/0.JPEG"
        warnings.warn("Corrupt EXIF data", stacklevel=1)
        reading.file = "train/ant/1.JPEG"
        warnings.warn("Corrupt EXIF data", stacklevel=1)
    assert [record.message for record in caplog.records] == [
        "train/ant/0.JPEG: Corrupt EXIF data", "train/ant/1.JPEG: Corrupt EXIF data"
    ]  # fmt: skip
