"""JPEG decoding on the GPU: workers send file bytes and plans, a thread of the main process turns them into batches.

The plan (box, size, crop, mirror) is made in the worker from the file's header by the same functions as for the other
decoders, so boxes and mirrors are theirs. What the GPU does not decode (`suits_device`: PNG, CMYK, progressive, cut
short) is decoded by the worker with the CPU decoder. Crops of a batch are made by two kernels, with the bits that the
CPU decoder would give the decoded pixels.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg

from onlinenorm.data.datasets import Batch
from onlinenorm.data.decoders import warnings_lock
from onlinenorm.data.nvjpeg_dataset import EncodedBatch, NvjpegDataset
from onlinenorm.data.prefetch import prefetch, to_device
from onlinenorm.data.resize import crop_table, most_taps, resize_crops


class NvjpegLoader:
    """A DataLoader of `EncodedBatch`es as a loader of decoded batches on `device`.

    A thread decodes ahead on a stream of its own, so that decoding and training steps overlap. Length, sampler and
    order are those of the loader within. `dataset` finds replacements for what the GPU cannot decode.
    """

    def __init__(self, loader: DataLoader, device: torch.device):
        self.loader, self.device = loader, device
        self.dataset: Any = loader.dataset
        self.batch_sampler = loader.batch_sampler
        self.num_workers = loader.num_workers

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        # decoded in the thread: one by one as they are asked for
        return prefetch((decode_batch(encoded, self.dataset, self.device) for encoded in self.loader), self.device)


def decode_batch(encoded: EncodedBatch, dataset: NvjpegDataset, device: torch.device) -> Batch:
    """The batch that a CPU decoder would have given, with images on `device` (uint8, N x 3 x S x S, channels_last)."""
    size = dataset.crop_size
    images_NCHW = torch.empty(
        (len(encoded.labels), 3, size, size), dtype=torch.uint8, device=device, memory_format=torch.channels_last
    )
    labels, indices = encoded.labels.clone(), encoded.indices.clone()
    if len(encoded.rows):
        images_NCHW[to_device(encoded.rows, device)] = encoded.crops_NHWC.to(device, non_blocking=True).permute(
            0, 3, 1, 2
        )
    bounds = encoded.bounds.tolist()
    on_device = [n for n in range(len(labels)) if bounds[n + 1] > bounds[n]]
    if on_device:
        files = [encoded.data[bounds[n] : bounds[n + 1]] for n in on_device]
        decoded, failed = decode_all(files, device)
        kept = [k for k in range(len(on_device)) if k not in failed]
        if kept:
            places = torch.tensor([on_device[k] for k in kept])
            crops_NCHW = crop_all([image for image in decoded if image is not None], encoded.plans_N9[places], size)
            images_NCHW[to_device(places, device)] = crops_NCHW
        for k in failed:  # damaged, or a kind of JPEG that this GPU does not know: the CPU decoder has the last word
            n = on_device[k]
            label, reported, crops_KHWC = dataset.on_cpu(int(indices[n]), int(encoded.epochs[n]))
            labels[n], indices[n] = label, reported
            images_NCHW[n] = torch.from_numpy(crops_KHWC[0]).to(device).permute(2, 0, 1)
    batch = images_NCHW, labels, indices
    return (*batch, encoded.colour.to(device)) if len(encoded.colour) else batch


def decode_all(files: list[torch.Tensor], device: torch.device) -> tuple[list[torch.Tensor | None], set[int]]:
    """Decoded images, 3 x H x W uint8, and the positions of those that could not be."""
    with warnings_lock, warnings.catch_warnings():
        # torchvision 0.29 announces a move to TorchCodec, whose decode_jpeg takes the same arguments
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return decode_jpeg(files, mode=ImageReadMode.RGB, device=device), set()
        except RuntimeError:
            decoded: list[torch.Tensor | None] = []
            for file in files:
                try:
                    decoded.append(decode_jpeg([file], mode=ImageReadMode.RGB, device=device)[0])
                except RuntimeError:
                    decoded.append(None)
    return decoded, {k for k, image in enumerate(decoded) if image is None}


def gpu_decodes(device: torch.device) -> bool:
    """Whether a GPU decodes JPEG: a file of 16 x 16 pixels is tried."""
    _, failed = decode_all([encode_jpeg(torch.zeros(3, 16, 16, dtype=torch.uint8))], device)
    return not failed


def crop_all(images: list[torch.Tensor], plans_N9: torch.Tensor, size: int) -> torch.Tensor:
    """Each image's plan followed on its device, with the arithmetic of the CPU decoder: uint8, N x 3 x size x size."""
    sizes_N2 = np.array([image.shape[:0:-1] for image in images])
    starts = np.cumsum([0, *(image.numel() for image in images[:-1])])
    table = crop_table(plans_N9.numpy(), starts, sizes_N2, of_torch_M=True)
    pixels = torch.cat([image.flatten() for image in images])
    on_device = to_device(torch.from_numpy(table), pixels.device)
    return resize_crops(pixels, on_device, most_taps(table), size, channels=3)
