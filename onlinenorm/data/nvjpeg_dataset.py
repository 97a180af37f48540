"""What a worker sends where the GPU decodes: file bytes with their plans, and crops of what the GPU cannot decode."""

from typing import NamedTuple

import numpy as np
import torch

from onlinenorm.data.datasets import FolderDataset
from onlinenorm.data.decoders import is_line
from onlinenorm.data.index import FolderIndex
from onlinenorm.data.jpeg_header import Frame, read_frame
from onlinenorm.data.randomness import CONTENT, hash64, uniforms
from onlinenorm.data.sampler import Request, split_requests
from onlinenorm.data.transforms import DRAWS, colour_shifts, rows_of_plan

CPU_DECODER = "torchvision"  # of what the GPU does not decode

_BASELINE = (0xC0, 0xC1)


class EncodedBatch(NamedTuple):
    """N images, of which M were decoded by the worker.

    data: uint8, files one after another. bounds: int64, N + 1, where each begins and ends; empty for the M.
    plans_N9: int32, see `transforms.rows_of_plan`. crops_NHWC: uint8, M x S x S x 3. rows: int64, M, their positions in
    the batch. epochs, labels, indices: int64, N; indices and labels as in every batch. colour: float32, N x 3 or empty.
    """

    data: torch.Tensor
    bounds: torch.Tensor
    plans_N9: torch.Tensor
    crops_NHWC: torch.Tensor
    rows: torch.Tensor
    epochs: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    colour: torch.Tensor


def suits_device(frame: Frame | None) -> bool:
    """Whether GPU decoders take this file: whole, baseline, 8 bits, gray or three components, and no line."""
    if frame is None or is_line(frame.width, frame.height):
        return False
    return frame.process in _BASELINE and frame.bits == 8 and frame.components in (1, 3)


class NvjpegDataset(FolderDataset):
    """A FolderDataset whose batches are decoded on the GPU: reads files, plans crops, decodes only what the GPU cannot.

    Args:
        device_fraction: share of the images that is meant for the GPU, from 0 to 1. Which ones is a function of the
            index alone, so that an image is decoded by the same decoder on any number of workers and processes.
        Others as FolderDataset; the plan must give one crop.
    """

    def __init__(
        self, index: FolderIndex, plan: str, crop_size: int, padding: int, seed: int, training: bool,
        device_fraction: float = 1.0,
    ):  # fmt: skip
        super().__init__(index, plan, crop_size, padding, CPU_DECODER, seed, training)
        self.device_fraction = device_fraction

    def __getitems__(self, requests: list[Request]) -> EncodedBatch:
        epochs, indices = split_requests(requests)
        draws_NK = uniforms(self.seed, epochs, indices, DRAWS)
        labels = self.index.labels[indices].astype(np.int64)
        reported = indices.copy()
        plans_N9 = np.zeros((len(indices), 9), dtype=np.int32)
        files, rows, crops = [], [], []
        for n, index in enumerate(indices.tolist()):
            data = self.file_for_device(index)
            files.append(data)
            if data:
                frame = read_frame(data)
                assert frame is not None
                plans_N9[n] = rows_of_plan(self.planner(draws_NK[n])(frame.width, frame.height))[0]
            else:
                labels[n], reported[n], crops_KHWC = self.readable(index, draws_NK[n])
                rows.append(n)
                crops.append(crops_KHWC[0])
        size = self.crop_size
        return EncodedBatch(
            torch.frombuffer(bytearray().join(files) or bytearray(1), dtype=torch.uint8),
            torch.from_numpy(np.concatenate([[0], np.cumsum([len(data) for data in files])]).astype(np.int64)),
            torch.from_numpy(plans_N9),
            torch.from_numpy(np.stack(crops) if crops else np.empty((0, size, size, 3), dtype=np.uint8)),
            torch.tensor(rows, dtype=torch.int64),
            torch.from_numpy(epochs),
            torch.from_numpy(labels),
            torch.from_numpy(reported),
            torch.from_numpy(colour_shifts(draws_NK)) if self.plan == "scale_jitter" else torch.empty(0, 3),
        )

    def on_cpu(self, index: int, epoch: int) -> tuple[int, int, np.ndarray]:
        """`readable` for an image that the GPU gave back."""
        draws_NK = uniforms(self.seed, epoch, np.array([index]), DRAWS)
        return self.readable(index, draws_NK[0])

    def file_for_device(self, index: int) -> bytes:
        """The file, or nothing where it cannot be read or is not for the GPU."""
        if self.device_fraction < 1.0 and _fraction_of(index) >= self.device_fraction:
            return b""
        try:
            data = self.index.read(index)
        except OSError:
            return b""
        return data if suits_device(read_frame(data)) else b""


def _fraction_of(index: int) -> float:
    return float(hash64(0, CONTENT, index)[0] >> np.uint64(11)) * 2.0**-53
