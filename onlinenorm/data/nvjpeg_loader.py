"""JPEG decoding on the GPU: workers send file bytes and plans, threads of the main process turn them into batches.

The plan (box, size, crop, mirror) is made in the worker from the file's header by the same functions as for the other
decoders, so boxes and mirrors are theirs. What the GPU does not decode (`suits_device`: PNG, CMYK, progressive, cut
short) is decoded by the worker with the CPU decoder. Crops of a batch are made by two kernels, with the bits that the
CPU decoder would give the decoded pixels.

torchvision's decoder stays though 0.29 deprecates it, as its successor, TorchCodec 0.16, always turns an image by its
EXIF orientation, so that boxes planned from the header and the CPU decoders' pixels would be those of another image.
"""

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg

from onlinenorm.data.decoders import warnings_lock
from onlinenorm.data.nvjpeg_dataset import EncodedBatch, NvjpegDataset
from onlinenorm.data.prefetch import Batch, prefetch, to_device, transfer_rest
from onlinenorm.data.resize import crop_table, most_taps, resize_crops

NO_GPU = (
    "nvjpeg decodes on an NVIDIA GPU, and this process has none to train on; use torchvision, or pillow for reference "
    "pixels"
)


def more_work_queues() -> None:
    """Lets nvJPEG work beside captured training steps; to be called before CUDA starts.

    A process has 8 hardware work queues by default. Streams beyond them share one, where work runs in turn: with the 14
    of nvJPEG some would stand behind a whole step, and decoding with them. What the environment says stays, and so does
    the default under MPS, whose processes share one pool of queues.
    """
    if not Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or "/tmp/nvidia-mps").exists():
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


class NvjpegLoader:
    """A DataLoader of `EncodedBatch`es as a loader of decoded batches on `device`.

    One thread decodes ahead, another makes the crops of what it has decoded, each on a stream of its own, so that
    decoding, crops and training steps overlap (see `more_work_queues`). Length, sampler and order are those of the
    loader within. `dataset` finds replacements for what the GPU cannot decode.
    """

    def __init__(self, loader: DataLoader, device: torch.device):
        self.loader, self.device = loader, device
        self.dataset: Any = loader.dataset
        self.batch_sampler = loader.batch_sampler
        self.num_workers = loader.num_workers

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        # generators: what they do is done in the threads, one batch after another as they are asked for
        decoded = prefetch((decode(encoded, self.device) for encoded in self.loader), self.device, "decoding")
        with contextlib.closing(decoded):
            yield from prefetch((make_batch(part, self.dataset, self.device) for part in decoded), self.device)


class DecodedBatch(NamedTuple):
    """A batch whose files are decoded.

    sent: positions in the batch of the files, in their order. images: of those, 3 x H x W uint8 on the device, None for
    those that could not be decoded.
    """

    encoded: EncodedBatch
    sent: list[int]
    images: list[torch.Tensor | None]


def decode(encoded: EncodedBatch, device: torch.device) -> DecodedBatch:
    """Decodes a batch's files; see `decode_all` for what is due to the images."""
    sizes = encoded.bounds.diff().tolist()
    sent = [n for n, size in enumerate(sizes) if size]
    files = encoded.data.split(sizes) if sent else ()
    return DecodedBatch(encoded, sent, decode_all([files[n] for n in sent], device) if sent else [])


def make_batch(batch: DecodedBatch, dataset: NvjpegDataset, device: torch.device) -> Batch:
    """The batch that a CPU decoder would have given, with images on `device` (uint8, N x 3 x S x S, channels_last)."""
    encoded, size = batch.encoded, dataset.crop_size
    labels, indices = encoded.labels.clone(), encoded.indices.clone()
    decoded = {n: image for n, image in zip(batch.sent, batch.images, strict=True) if image is not None}
    places = torch.tensor(list(decoded), dtype=torch.int64)
    images_NCHW = crop_all(list(decoded.values()), encoded.plans_N9[places], size, device)
    if len(places) < len(labels):
        crops_NCHW = images_NCHW
        images_NCHW = torch.empty(
            (len(labels), 3, size, size), dtype=torch.uint8, device=device, memory_format=torch.channels_last
        )
        images_NCHW[to_device(places, device)] = crops_NCHW
    if len(encoded.rows):
        crops_NCHW = encoded.crops_NHWC.to(device, non_blocking=True).permute(0, 3, 1, 2)
        images_NCHW[to_device(encoded.rows, device)] = crops_NCHW
    for n in batch.sent:
        if n not in decoded:  # damaged, or a kind of JPEG that this GPU does not know: the CPU decoder decides
            label, reported, crops_KHWC = dataset.on_cpu(int(indices[n]), int(encoded.epochs[n]))
            labels[n], indices[n] = label, reported
            images_NCHW[n] = torch.from_numpy(crops_KHWC[0]).to(device).permute(2, 0, 1)
    rest = (labels, indices, encoded.colour) if len(encoded.colour) else (labels, indices)
    return (images_NCHW, *transfer_rest(rest, device))


def decode_all(files: list[torch.Tensor], device: torch.device) -> list[torch.Tensor | None]:
    """Decoded images, 3 x H x W uint8, None for those that could not be.

    Whoever reads the images waits for that to end (`wait_for`) before dropping them: the next call may get their
    memory, and torchvision's decoder, on a stream of its own, writes there at once. So memory comes from a stream that
    serves nothing else.
    """
    stream = _decoding_stream(device) if device.type == "cuda" else None
    try:
        with torch.cuda.stream(stream):
            return _decode_all(files, device)
    finally:
        if stream is not None:
            torch.cuda.current_stream(device).wait_stream(stream)


@functools.cache
def _decoding_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def wait_for(device: torch.device) -> None:
    """Returns when a GPU has done all that was asked of it on the current stream."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _decode_all(files: list[torch.Tensor], device: torch.device) -> list[torch.Tensor | None]:
    with warnings_lock, warnings.catch_warnings():
        # torchvision 0.29 announces a move to TorchCodec, whose decode_jpeg takes the same arguments
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return decode_jpeg(files, mode=ImageReadMode.RGB, device=device)
        except RuntimeError:
            _end_of_decoding(device)
            decoded: list[torch.Tensor | None] = []
            for file in files:
                try:
                    decoded.append(decode_jpeg([file], mode=ImageReadMode.RGB, device=device)[0])
                except RuntimeError:
                    _end_of_decoding(device)
                    decoded.append(None)
    return decoded


def _end_of_decoding(device: torch.device) -> None:
    """Returns when a call that failed halfway writes no more: its images are dropped, others may get their memory."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gpu_decodes(device: torch.device) -> bool:
    """Whether a GPU decodes JPEG: a file of 16 x 16 pixels is tried."""
    return decode_all([encode_jpeg(torch.zeros(3, 16, 16, dtype=torch.uint8))], device) != [None]


def crop_all(images: list[torch.Tensor], plans_N9: torch.Tensor, size: int, device: torch.device) -> torch.Tensor:
    """Each image's plan followed on its device, with the arithmetic of the CPU decoder: uint8, N x 3 x size x size."""
    sizes_N2 = np.array([image.shape[:0:-1] for image in images], dtype=np.int64).reshape(-1, 2)
    starts_N = 3 * np.cumsum(sizes_N2.prod(axis=1)) - 3 * sizes_N2.prod(axis=1)
    table = crop_table(plans_N9.numpy(), starts_N, sizes_N2, of_torch_M=True)
    pixels = torch.cat([image.flatten() for image in images] or [torch.empty(0, dtype=torch.uint8, device=device)])
    wait_for(device)  # for the copy, so that the images may go; the crops are made while the next ones are decoded
    on_device = to_device(torch.from_numpy(table), device)
    return resize_crops(pixels, on_device, most_taps(table), size, channels=3)
