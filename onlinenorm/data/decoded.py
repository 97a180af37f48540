"""Whole sets of decoded images, one after another in one flat uint8 tensor: in a device's memory, or in a file."""

import hashlib
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.data import Dataset

from onlinenorm.data.datasets import FolderDataset, InMemoryDataset
from onlinenorm.data.decoders import decode_whole, named_warnings
from onlinenorm.data.index_cache import Arrays, cached_arrays
from onlinenorm.data.jpeg_header import read_frame
from onlinenorm.data.nvjpeg_dataset import NvjpegDataset
from onlinenorm.data.nvjpeg_loader import decode_all, wait_for
from onlinenorm.data.progress import Progress
from onlinenorm.data.sampler import Request, split_requests
from onlinenorm.data.unreadable import no_memory
from onlinenorm.data.workers import worker_loader
from onlinenorm.errors import ArgumentError, DataError
from onlinenorm.files import locked, replacing, user_cache

_FORMAT = "onlinenorm decoded 1"
_TOGETHER = 4  # images that a worker sends at once
_NVJPEG_TOGETHER = 64  # that a GPU decodes at once
_SAMPLE = 1000  # images of which the space of all is judged before any is decoded
_THREADS = 16  # that read headers
_PIECE = 1 << 26  # bytes copied at once


Allocate = Callable[[int], torch.Tensor]
Piece = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # pixels of some images, their sizes, whether of torch


class DecodedImages(NamedTuple):
    """N images, each channels x height x width.

    pixels_B: uint8. starts_N: int64, where each begins. sizes_N2: int64, width and height; 0 of one that cannot be
    read. of_torch_N: bool, whether the CPU path resizes it with torch's arithmetic in place of Pillow's.
    """

    pixels_B: torch.Tensor
    starts_N: np.ndarray
    sizes_N2: np.ndarray
    of_torch_N: np.ndarray


class _WholeImages(Dataset):
    """Images of a FolderDataset, decoded only: a `Piece` of a list of requests."""

    def __init__(self, dataset: FolderDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, requests: list[Request]) -> Piece:
        pixels, sizes, of_torch = [], [], []
        for index in split_requests(requests)[1].tolist():
            try:
                with named_warnings() as reading:
                    reading.file = self.dataset.index.path(index)
                    image_CHW, kind = decode_whole(self.dataset.index.read(index), self.dataset.decoder)
            except MemoryError as error:
                raise no_memory(self.dataset.index.path(index)) from error
            except Exception:  # a damaged file makes decoders raise almost anything
                image_CHW, kind = torch.empty((3, 0, 0), dtype=torch.uint8), False
            pixels.append(image_CHW.flatten())
            sizes.append(image_CHW.shape[:0:-1])
            of_torch.append(kind)
        return torch.cat(pixels), torch.tensor(sizes), torch.tensor(of_torch)


def in_memory_images(dataset: InMemoryDataset, device: torch.device) -> DecodedImages:
    """Those of a set that is held in memory anyway."""
    images_NCHW, _ = dataset.originals(np.arange(len(dataset)))
    count, channels, height, width = images_NCHW.shape
    starts_N = np.arange(count) * (channels * height * width)
    sizes_N2 = np.tile([[width, height]], (count, 1))
    return DecodedImages(images_NCHW.to(device).flatten(), starts_N, sizes_N2, np.ones(count, dtype=bool))


def decode_images(dataset: FolderDataset, workers: int, device: torch.device, allocate: Allocate) -> DecodedImages:
    """Decodes every image of a set once.

    Args:
        dataset: the files and the decoder.
        workers: processes that decode; 0: this one does.
        device: the GPU that decodes where the decoder is nvjpeg.
        allocate: bytes -> the uint8 tensor to fill.
    """
    count = len(dataset)
    pixels_B = allocate(_bytes(header_sizes(dataset, np.arange(count))))
    requests = [[(0, i) for i in range(first, min(first + _TOGETHER, count))] for first in range(0, count, _TOGETHER)]
    if isinstance(dataset, NvjpegDataset):
        pieces: Iterable[Any] = _nvjpeg_pieces(dataset, device)
    else:
        pieces = worker_loader(_WholeImages(dataset), requests, workers)
    progress, at = rank_zero_only(Progress()), 0
    sizes: list[list[int]] = []
    of_torch: list[bool] = []
    for data, sizes_M2, of_torch_M in pieces:
        pixels_B[at : at + len(data)].copy_(data, non_blocking=True)
        at += len(data)
        sizes += sizes_M2.tolist()
        of_torch += of_torch_M.tolist()
        progress(f"decoding {_split(dataset)}/, once", len(sizes), count)
    sizes_N2 = np.array(sizes, dtype=np.int64)
    starts_N = np.concatenate([[0], np.cumsum(3 * sizes_N2.prod(axis=1))[:-1]])
    return DecodedImages(pixels_B, starts_N, sizes_N2, np.array(of_torch))


def _nvjpeg_pieces(dataset: NvjpegDataset, device: torch.device) -> Iterator[Piece]:
    """What the GPU decodes, some images at a time, and in its place what the workers would decode."""
    on_cpu = _WholeImages(dataset)
    with ThreadPoolExecutor(_THREADS) as pool:
        for first in range(0, len(dataset), _NVJPEG_TOGETHER):
            indices = range(first, min(first + _NVJPEG_TOGETHER, len(dataset)))
            files = dict(zip(indices, pool.map(dataset.file_for_device, indices), strict=True))
            sent = [i for i in indices if files[i]]
            images: list[torch.Tensor | None] = []
            if sent:
                images = decode_all([torch.frombuffer(bytearray(files[i]), dtype=torch.uint8) for i in sent], device)
            by_index = dict(zip(sent, images, strict=True))
            for i in indices:
                image_CHW = by_index.get(i)
                if image_CHW is None:
                    yield on_cpu.__getitems__([(0, i)])
                else:
                    yield image_CHW.flatten(), torch.tensor([image_CHW.shape[:0:-1]]), torch.tensor([True])
            wait_for(device)  # until they have been copied


def kept_images(dataset: FolderDataset, workers: int, device: torch.device) -> DecodedImages:
    """`decode_images` into a file beside the index, in the user's cache folder, or from there if nothing has changed.

    Raises DataError where it cannot be written.
    """
    index, decoder = dataset.index, dataset.decoder
    what: tuple = _FORMAT, torch.__version__, torchvision.__version__, PIL.__version__, index.times_digest
    if isinstance(dataset, NvjpegDataset):
        decoder = "nvjpeg"  # whose pixels are those of a kind of GPU
        what += dataset.device_fraction, torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    digest = hashlib.sha256(repr((*what, decoder)).encode())
    index.update_digest(digest)
    key, place = digest.hexdigest(), hashlib.sha256(os.fsencode(index.folder)).hexdigest()[:16]
    name = f"decoded-{_split(dataset)}-{decoder}"
    file = user_cache() / f"{name}-{place}-{key[:16]}.u8"

    mapped: list[torch.Tensor] = []  # before another run may replace the file

    def build() -> Arrays:
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked(file.parent / f".{name}-{place}.lock"):
            for former in (*file.parent.glob(f"{name}-{place}-*"), *file.parent.glob(f".{name}-{place}-*.partial")):
                former.unlink(missing_ok=True)  # partial ones are of killed runs: others would hold the lock
            with replacing(file) as partial:
                made = decode_images(dataset, workers, device, lambda size: _mapped(partial, "w+", size))
                mapped.append(_mapped(partial, "c", _bytes(made.sizes_N2)))
        return {"starts": made.starts_N, "sizes": made.sizes_N2, "of_torch": made.of_torch_N}

    def holds(arrays: Arrays) -> bool:
        unread = np.flatnonzero(arrays["sizes"].prod(axis=1) == 0).tolist()
        whole = _WholeImages(dataset)
        if any(whole.__getitems__([(0, i)])[1].prod() > 0 for i in unread):
            return False  # the file may have been out of reach
        try:
            mapped.append(_mapped(file, "c", _bytes(arrays["sizes"])))
        except (OSError, ValueError):  # missing, cut short
            return False
        return True

    try:
        arrays = cached_arrays(index.folder, name, key, build, holds)
    except OSError as error:
        raise DataError(
            f"{file} cannot be written ({error.strerror or error}); make room there, let XDG_CACHE_HOME "
            "name another folder, or use data.keep_decoded=false",
            key="keep_decoded",
        ) from error
    return DecodedImages(mapped[-1], arrays["starts"], arrays["sizes"], arrays["of_torch"])


def on_device(images: DecodedImages, device: torch.device) -> DecodedImages:
    """The same with their pixels on `device`."""
    pixels_B = torch.empty(len(images.pixels_B), dtype=torch.uint8, device=device)
    for first in range(0, len(pixels_B), _PIECE):
        pixels_B[first : first + _PIECE].copy_(images.pixels_B[first : first + _PIECE])
    return images._replace(pixels_B=pixels_B)


def check_fits(datasets: Sequence[InMemoryDataset | FolderDataset], device: torch.device, name: str) -> None:
    """Raises ArgumentError where the decoded images of all these sets exceed the free memory of `device`."""
    free = free_memory(device)
    if free is not None and (needed := decoded_bytes(datasets)) > free:
        raise ArgumentError(
            "on_device",
            f"the {sum(map(len, datasets)):,} decoded images of {name} take about {needed / 1e9:,.1f} GB and {device} "
            f"has {free / 1e9:,.1f} GB free; use data.on_device=false, or fewer images by data.limit_train and "
            "data.limit_val",
        )


def decoded_bytes(datasets: Sequence[InMemoryDataset | FolderDataset]) -> float:
    """What the decoded images of all these sets take; of many files judged by a sample, evenly spaced."""
    needed = 0.0
    for dataset in datasets:
        if isinstance(dataset, InMemoryDataset):
            needed += dataset.source.images(np.arange(1)).nbytes * len(dataset)
        else:
            chosen = np.arange(0, len(dataset), -(-len(dataset) // _SAMPLE))
            needed += _bytes(header_sizes(dataset, chosen)) * len(dataset) / len(chosen)
    return needed


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a GPU, or in main memory; None where that is not known."""
    if device.type == "cpu":
        try:
            found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
        except OSError:  # not Linux
            return None
        return int(found[1]) << 10 if found else None
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def header_sizes(dataset: FolderDataset, chosen: np.ndarray) -> np.ndarray:
    """Width and height of the images at these indices from their files' headers, int64, M x 2; 0 of the unreadable."""

    def size(index: int) -> tuple[int, int]:
        try:
            data = dataset.index.read(index)
            if frame := read_frame(data):
                return frame.width, frame.height
            with Image.open(io.BytesIO(data)) as image:
                return image.size
        except Exception:  # as when decoding
            return 0, 0

    with ThreadPoolExecutor(_THREADS) as pool:
        return np.array(list(pool.map(size, chosen.tolist())), dtype=np.int64).reshape(-1, 2)


def _bytes(sizes_N2: np.ndarray) -> int:
    return 3 * int(sizes_N2.prod(axis=1).sum())


def _split(dataset: FolderDataset) -> str:
    return "train" if dataset.training else "val"  # archives of both lie in one folder


def _mapped(file: Path, mode: Any, size: int) -> torch.Tensor:
    if mode == "w+":
        with open(file, "wb") as stream:
            stream.truncate(max(size, 1))
            if hasattr(os, "posix_fallocate"):  # all of it now: writing to a map of a full disk would be a SIGBUS
                os.posix_fallocate(stream.fileno(), 0, max(size, 1))
        mode = "r+"
    return torch.from_numpy(np.memmap(file, dtype=np.uint8, mode=mode, shape=(max(size, 1),)))
