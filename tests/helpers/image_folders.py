"""Tiny class folders of JPEG files for the tests."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_image(path: Path, seed: int, size: tuple[int, int] = (50, 40), mode: str = "RGB", **options) -> Path:
    """A smooth random picture, so that JPEG keeps it nearly as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = len(Image.new(mode, (1, 1)).getbands())
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, bands), dtype=np.uint8)
    image = Image.fromarray(coarse[..., 0] if bands == 1 else coarse, mode=mode)
    image.resize(size, Image.Resampling.BICUBIC).save(path, **options)
    return path


def write_tree(root: Path, classes=("ant", "bee", "cat"), train=5, val=2, size=(50, 40)) -> Path:
    """root/{train,val}/CLASS/NUMBER.JPEG."""
    for split, count in (("train", train), ("val", val)):
        for c, name in enumerate(classes):
            for k in range(count):
                write_image(root / split / name / f"{k}.JPEG", 1000 * c + k + (split == "val") * 500, size)
    return root
