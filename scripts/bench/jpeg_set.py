"""A generated set of JPEG files with the sizes of ImageNet's, as class folders: input of the data benchmark.

Content has the amplitude spectrum of photographs (falling as frequency to the power -1.2) and quality 93, which gives
ImageNet's 0.59 bytes a pixel, so that decoders have its work to do.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

# (width, height) and how many of 40 images have it: mean 500 x 375, a tail of large ones, some upright
SIZES = (
    ((500, 375), 21), ((500, 333), 8), ((375, 500), 3), ((333, 500), 1), ((500, 400), 1), ((400, 300), 2),
    ((640, 480), 1), ((800, 600), 1), ((1024, 768), 1), ((250, 200), 1),
)  # fmt: skip
CLASSES = 8

_POWER, _CONTRAST, _QUALITY = 1.2, 50, 93
_CANVAS = 1152


def make_set(root: Path, unique: int, train: int, val: int) -> dict[str, float]:
    """root/{train,val}/CLASS/*.JPEG: `unique` files, linked until there are `train` and `val`; returns their means.

    What is there already is kept. Links are hard: every one is read as a file of its own, and the page cache holds them
    once, so that the disk is not what is measured.
    """
    pool_folder = root / "unique"
    pool_folder.mkdir(parents=True, exist_ok=True)
    numbers = [n for n in range(unique) if not (pool_folder / f"{n:05d}.JPEG").exists()]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as workers:
        list(workers.map(_write, [str(pool_folder)] * len(numbers), numbers, chunksize=16))
    for split, count in (("train", train), ("val", val)):
        for n in range(count):
            path = root / split / f"class{n % CLASSES}" / f"{n:06d}.JPEG"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                os.link(pool_folder / f"{n % unique:05d}.JPEG", path)
    files = [pool_folder / f"{n:05d}.JPEG" for n in range(unique)]
    sizes = np.array([_size(path) for path in files], dtype=float)
    return {
        "unique": unique,
        "train": train,
        "mean_width": round(float(sizes[:, 0].mean()), 1),
        "mean_height": round(float(sizes[:, 1].mean()), 1),
        "mean_bytes": round(float(np.mean([path.stat().st_size for path in files]))),
    }


def _size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def size_of(number: int) -> tuple[int, int]:
    """Width and height of image `number`; every 40 in a row have the shares of SIZES."""
    place = number * 17 % 40  # 17 and 40 have no common factor: sizes come mixed
    for size, share in SIZES:
        if place < share:
            return size
        place -= share
    raise AssertionError("shares sum to 40")


@lru_cache(2)
def _canvas(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(_CANVAS)[:, None], np.fft.rfftfreq(_CANVAS)[None])
    frequency[0, 0] = 1
    planes = [
        np.fft.irfft2(np.exp(2j * np.pi * rng.random(frequency.shape)) / frequency**_POWER, s=(_CANVAS, _CANVAS))
        for _ in range(4)
    ]
    grey, *colours = (plane / plane.std() for plane in planes)
    image_HWC = np.stack([grey + 0.4 * colour for colour in colours], axis=-1)
    return np.clip(128 + _CONTRAST * image_HWC / image_HWC.std(), 0, 255).astype(np.uint8)


def _write(folder: str, number: int) -> None:
    width, height = size_of(number)
    canvas_HWC = _canvas(number // 64)
    x, y = np.random.default_rng([7, number]).integers(0, (_CANVAS - width, _CANVAS - height))
    partial = Path(folder, f".{number}.partial")
    image = Image.fromarray(np.ascontiguousarray(canvas_HWC[y : y + height, x : x + width]))
    image.save(partial, "JPEG", quality=_QUALITY)
    partial.rename(Path(folder, f"{number:05d}.JPEG"))
