"""Encoded bytes and a planner in, uint8 RGB crops out; one function a decoder, the same geometry in all.

EXIF orientation is not applied (torchvision's ImageFolder does not either, and the published numbers were made so).
"""

import io
import warnings

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_image

from onlinenorm.data.transforms import Planner, cut_crops, follow_plan

_JPEG_START = b"\xff\xd8\xff"


def decode_pillow(data: bytes, planner: Planner) -> np.ndarray:
    """The reference for pixels: Pillow's decoder, RGB conversion and bilinear resize. crops x S x S x 3, uint8.

    No reduced-size decoding (draft mode, reducing_gap): it would be faster and change the pixels.
    """
    with Image.open(io.BytesIO(data)) as opened:
        opened.load()
        image = opened if opened.mode == "RGB" else opened.convert("RGB")  # converting RGB would copy it
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
    if not data.startswith(_JPEG_START):
        return decode_pillow(data, planner)
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        with warnings.catch_warnings():
            # torchvision 0.29 announces a move to TorchCodec at every call
            warnings.simplefilter("ignore", DeprecationWarning)
            image_CHW = decode_image(encoded, ImageReadMode.RGB)
    except RuntimeError:
        return decode_pillow(data, planner)
    return follow_plan(image_CHW, planner(image_CHW.shape[2], image_CHW.shape[1]))


DECODERS = {"pillow": decode_pillow, "torchvision": decode_torchvision}  # run in the workers
DEVICE_DECODERS = ("nvjpeg",)  # run on the GPU, see device_decode
