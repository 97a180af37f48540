"""Encoded bytes and a planner in, uint8 RGB crops out; one function a decoder, the same geometry in all.

EXIF orientation is not applied (torchvision's ImageFolder does not either, and the published numbers were made so), but
to TIFF, by Pillow itself, and so under ImageFolder too.
"""

import contextlib
import io
import logging
import threading
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_image

from onlinenorm.data.missing import no_content
from onlinenorm.data.transforms import Planner, cut_crops, follow_plan

log = logging.getLogger(__name__)

LONGEST = 1000  # times its shorter side; the shorter one resized to 256 pixels, a longer image would take gigabytes
_JPEG_START = b"\xff\xd8\xff"
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # tags of TIFF

warnings_lock = threading.RLock()  # catch_warnings mixes up the filters of threads that use it at a time


def open_rgb(data: bytes) -> Image.Image:
    """An image file as 8-bit RGB, its first frame; 16-bit gray is scaled, where Pillow's own conversion makes it white.

    Raises ValueError for floating-point and 32-bit pixels, whose range is in no file, and for an image that `is_line`.
    """
    if cause := no_content(data):
        raise UnidentifiedImageError(f"it {cause}")
    try:
        opened = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise UnidentifiedImageError("it is none of the formats that Pillow reads, or damaged") from None
    with opened:
        if is_line(*opened.size):
            width, height = opened.size
            raise ValueError(f"its {width} x {height} pixels are a line: over {LONGEST:,} times as long as wide")
        opened.load()
        if opened.mode.startswith("I;16") or (opened.mode == "I" and opened.format in ("PNG", "PPM")):
            tags = getattr(opened, "tag_v2", {})
            white = 2 ** min(tags.get(_BITS_PER_SAMPLE, (16,))) - 1  # TIFF also has 12
            gray_HW = (np.asarray(opened).astype(np.uint32) * 255 + white // 2) // white
            if tags.get(_PHOTOMETRIC) == 0:  # white is 0, which Pillow heeds in 8 bits alone
                gray_HW = 255 - gray_HW
            return Image.fromarray(gray_HW.astype(np.uint8)).convert("RGB")
        if opened.mode in ("I", "F"):
            kind = "floating-point" if opened.mode == "F" else "32-bit"
            raise ValueError(f"its pixels are {kind} numbers of unknown range; save it with 8 or 16 bits")
        return opened if opened.mode == "RGB" else opened.convert("RGB")  # converting RGB would copy it


def is_line(width: int, height: int) -> bool:
    """Whether an image of this size is no picture but a line, over `LONGEST` times as long as wide."""
    return max(width, height) > LONGEST * min(width, height)


@contextlib.contextmanager
def named_warnings(handle: Callable[[str], None] = log.warning) -> Iterator[threading.local]:
    """Context in which warnings of decoders (damaged EXIF data) go to `handle`, after the thread's `.file`."""
    reading = threading.local()

    def show(message, *_, **__):
        handle(f"{getattr(reading, 'file', 'an image')}: {message}")

    with warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        yield reading


def decode_pillow(data: bytes, planner: Planner) -> np.ndarray:
    """The reference for pixels: Pillow's decoder, RGB conversion and bilinear resize. crops x S x S x 3, uint8.

    No reduced-size decoding (draft mode, reducing_gap): it would be faster and change the pixels.
    """
    image = open_rgb(data)
    plan = planner(*image.size)
    if plan.box is not None:
        left, top, width, height = plan.box
        # cropped first: resize(box=...) would let the filter reach pixels outside the box
        image = image.crop((left, top, left + width, top + height))
    if image.size != plan.size:
        image = image.resize(plan.size, Image.Resampling.BILINEAR)
    return cut_crops(np.asarray(image), plan)


def decode_torchvision(data: bytes, planner: Planner) -> np.ndarray:
    """torchvision's libjpeg-turbo and torch's uint8 resize; what is no JPEG or fails there goes to Pillow."""
    image_CHW = _read_jpeg(data)
    if image_CHW is None:
        return decode_pillow(data, planner)
    return follow_plan(image_CHW, planner(image_CHW.shape[2], image_CHW.shape[1]))


def _read_jpeg(data: bytes) -> torch.Tensor | None:
    if not data.startswith(_JPEG_START):
        return None
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        with warnings_lock, warnings.catch_warnings():
            # torchvision 0.29 announces a move to TorchCodec at every call
            warnings.simplefilter("ignore", DeprecationWarning)
            image_CHW = decode_image(encoded, ImageReadMode.RGB)
    except RuntimeError:
        return None
    return None if is_line(image_CHW.shape[2], image_CHW.shape[1]) else image_CHW


def decode_whole(data: bytes, decoder: str) -> tuple[torch.Tensor, bool]:
    """All of an image, 3 x H x W uint8, and whether `DECODERS[decoder]` resizes it by torch in place of Pillow."""
    image_CHW = _read_jpeg(data) if decoder == "torchvision" else None
    if image_CHW is not None:
        return image_CHW, True
    return torch.from_numpy(np.asarray(open_rgb(data)).transpose(2, 0, 1).copy()), False


DECODERS = {"pillow": decode_pillow, "torchvision": decode_torchvision}  # run in the workers
DEVICE_DECODERS = ("nvjpeg",)  # run on the GPU, see nvjpeg_loader
