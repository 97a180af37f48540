"""Classes of image files, seen as the network's validation images were."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from onlinenorm.data import DataError, ImageNet
from onlinenorm.data.decoders import DECODERS, named_warnings, open_rgb
from onlinenorm.data.index import EXTENSIONS, is_image
from onlinenorm.data.transforms import Plan, cut_crops, plan_center_crop, shorter_side
from onlinenorm.deploy.source import Trained, elsewhere
from onlinenorm.errors import DeployError
from onlinenorm.training.accuracy import full_precision, ranked


@dataclass
class Prediction:
    """The most likely classes of one file, as (label, class name, probability), or why it could not be read."""

    file: Path
    classes: list[tuple[int, str, float]]
    error: str = ""

    def as_dict(self) -> dict:
        if self.error:
            return {"file": str(self.file), "error": self.error}
        keys = ("label", "class", "probability")
        return {"file": str(self.file), "predictions": [dict(zip(keys, row, strict=True)) for row in self.classes]}


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Files as given, and of each folder the images below it, sorted. Raises DeployError for a folder without any."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            images = sorted(p for p in path.rglob("*") if is_image(str(p.relative_to(path))) and p.is_file())
            if not images:
                raise DeployError(f"{path}: holds no images ({', '.join(EXTENSIONS)})")
            files += images
        else:
            files.append(path)
    return files


def class_names(trained: Trained) -> tuple[list[str], str]:
    """(names in label order, "" or why they are but numbers: the dataset that knows them is not here)."""
    try:
        names = trained.data.class_names
    except DataError as error:
        return [f"class {label}" for label in range(trained.num_classes)], str(elsewhere(error))
    if len(names) != trained.num_classes:
        raise DeployError(f"the dataset has {len(names)} classes and the network {trained.num_classes}")
    return list(names), ""


def read_image(file: Path, trained: Trained) -> torch.Tensor:
    """A file as the dataset yields its images: uint8, C x H x W. Raises whatever the file system or the decoder does.

    Class folders: ImageNet's validation crop, by the decoder of the run's validation images. Sets in memory have images
    of one size: the shorter side is resized to it and the centre cut out, in gray where the set is gray.
    """
    data = trained.data
    encoded = file.read_bytes()
    if isinstance(data, ImageNet):
        crops_KHWC = DECODERS[data.val_decoder](encoded, partial(plan_center_crop, crop_size=data.image_size))
        return torch.from_numpy(crops_KHWC[0]).permute(2, 0, 1)
    channels = len(data.mean_std[0])
    if channels not in (1, 3):
        raise DeployError(f"image files have 1 or 3 channels and the network's images {channels}")
    size = data.native_size
    image = open_rgb(encoded)
    if channels == 1:
        image = image.convert("L")
    width, height = shorter_side(*image.size, size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    crop = round((width - size) / 2), round((height - size) / 2), False
    pixels_HWC = np.asarray(image).reshape(height, width, channels)
    return torch.from_numpy(cut_crops(pixels_HWC, Plan(None, (width, height), (crop,), size))[0]).permute(2, 0, 1)


@torch.no_grad()
def predict(
    trained: Trained,
    files: Iterable[Path],
    names: Sequence[str],
    device: torch.device,
    top: int = 5,
    batch_size: int = 32,
) -> Iterator[Prediction]:
    """A `Prediction` for each file, in order; a file that cannot be read gets an error and does not stop the others."""
    network = trained.network.to(device)
    files = list(files)
    for start in range(0, len(files), batch_size):
        group, images, errors = files[start : start + batch_size], [], {}
        for file in group:
            try:
                with named_warnings() as reading:
                    reading.file = file
                    images.append(read_image(file, trained))
            except DeployError:
                raise
            except Exception as error:  # a damaged file makes decoders raise almost anything
                errors[file] = _reason(error)
        if images:
            batch = torch.stack(images).to(device), torch.zeros(len(images)), torch.zeros(len(images))
            logits = network(trained.data.on_after_batch_transfer(batch)[0])
            labels = ranked(logits, top)
            shares = full_precision(logits).softmax(1).gather(1, labels)
            rows = iter(zip(labels.tolist(), shares.tolist(), strict=True))
        for file in group:
            if file in errors:
                yield Prediction(file, [], errors[file])
            else:
                row = zip(*next(rows), strict=True)
                yield Prediction(file, [(label, names[label], share) for label, share in row])


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be opened ({error.strerror})"
    return f"cannot be read as an image ({type(error).__name__}: {' '.join(str(error).split())})"
