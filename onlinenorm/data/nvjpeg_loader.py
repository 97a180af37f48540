"""JPEG decoding on the GPU: workers send file bytes and plans, a thread of the main process turns them into batches.

The plan (box, size, crop, mirror) is made in the worker from the file's header by the same functions as for the other
decoders, so boxes and mirrors are theirs. What the GPU does not decode (`suits_device`: PNG, CMYK, progressive, cut
short) is decoded by the worker with the CPU decoder.
"""

import queue
import threading
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, decode_jpeg

from onlinenorm.data.datasets import Batch
from onlinenorm.data.decoders import warnings_lock
from onlinenorm.data.nvjpeg_dataset import EncodedBatch, NvjpegDataset, plan_of_row
from onlinenorm.data.transforms import Plan

_QUEUE = 2  # decoded batches that wait for the training step


class NvjpegLoader:
    """A DataLoader of `EncodedBatch`es as a loader of decoded batches on `device`.

    A thread decodes ahead on a stream of its own, so that decoding and training steps overlap. Length, sampler and
    order are those of the loader within. `dataset` finds replacements for what the GPU cannot decode.
    """

    def __init__(self, loader: DataLoader, device: torch.device):
        self.loader, self.device = loader, device
        self.dataset, self.batch_sampler = loader.dataset, loader.batch_sampler
        self.num_workers = loader.num_workers

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        results: queue.Queue = queue.Queue(_QUEUE)
        stopped = threading.Event()
        worker = threading.Thread(target=self._produce, args=(results, stopped), name="nvjpeg", daemon=True)
        worker.start()
        try:
            while (item := results.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                batch, ready = item
                if ready is not None:
                    stream = torch.cuda.current_stream(self.device)
                    stream.wait_event(ready)
                    for tensor in batch:
                        if tensor.is_cuda:
                            tensor.record_stream(stream)
                yield batch
        finally:
            stopped.set()
            while worker.is_alive():  # it may wait for room
                _drain(results)
                worker.join(0.05)

    def _produce(self, results: queue.Queue, stopped: threading.Event) -> None:
        on_gpu = self.device.type == "cuda"
        stream = torch.cuda.Stream(self.device) if on_gpu else None
        try:
            with torch.cuda.stream(stream):
                for encoded in self.loader:
                    if stopped.is_set():
                        return
                    batch = decode_batch(encoded, self.dataset, self.device)
                    results.put((batch, stream.record_event() if on_gpu else None))
            results.put(None)
        except BaseException as error:  # told to the thread that waits
            results.put(error)


def decode_batch(encoded: EncodedBatch, dataset: NvjpegDataset, device: torch.device) -> Batch:
    """The batch that a CPU decoder would have given, with images on `device` (uint8, N x 3 x S x S, channels_last)."""
    size = dataset.crop_size
    images_NCHW = torch.empty(
        (len(encoded.labels), 3, size, size), dtype=torch.uint8, device=device, memory_format=torch.channels_last
    )
    labels, indices = encoded.labels.clone(), encoded.indices.clone()
    if len(encoded.rows):
        images_NCHW[encoded.rows.to(device)] = encoded.crops_NHWC.to(device, non_blocking=True).permute(0, 3, 1, 2)
    bounds = encoded.bounds.tolist()
    on_device = [n for n in range(len(labels)) if bounds[n + 1] > bounds[n]]
    if on_device:
        files = [encoded.data[bounds[n] : bounds[n + 1]] for n in on_device]
        plans = [plan_of_row(encoded.plans_N9[n].tolist(), size) for n in on_device]
        decoded, failed = _decode_all(files, device)
        kept = [k for k in range(len(on_device)) if k not in failed]
        if kept:
            crops_NCHW = _crop_all([decoded[k] for k in kept], [plans[k] for k in kept], size)
            images_NCHW[torch.tensor([on_device[k] for k in kept]).to(device)] = crops_NCHW
        for k in failed:  # damaged, or a kind of JPEG that this GPU does not know: the CPU decoder has the last word
            n = on_device[k]
            label, reported, crops_KHWC = dataset.on_cpu(int(indices[n]), int(encoded.epochs[n]))
            labels[n], indices[n] = label, reported
            images_NCHW[n] = torch.from_numpy(crops_KHWC[0]).to(device).permute(2, 0, 1)
    batch = images_NCHW, labels, indices
    return (*batch, encoded.colour.to(device)) if len(encoded.colour) else batch


def _decode_all(files: list[torch.Tensor], device: torch.device) -> tuple[list[torch.Tensor | None], set[int]]:
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


def _crop_all(images: list[torch.Tensor], plans: list[Plan], size: int) -> torch.Tensor:
    """Each image's plan followed on its device: uint8, N x 3 x size x size."""
    crops = []
    for image_CHW, plan in zip(images, plans, strict=True):
        if plan.box is not None:
            left, top, width, height = plan.box
            image_CHW = image_CHW[:, top : top + height, left : left + width]
        x_NCHW = image_CHW[None].float()
        if (x_NCHW.shape[3], x_NCHW.shape[2]) != plan.size:
            x_NCHW = torch.nn.functional.interpolate(x_NCHW, size=plan.size[::-1], mode="bilinear", antialias=True)
        left, top, _ = plan.crops[0]
        if (left, top, *plan.size) != (0, 0, size, size):
            right, bottom = left + size - plan.size[0], top + size - plan.size[1]
            x_NCHW = torch.nn.functional.pad(x_NCHW, (-left, right, -top, bottom))  # negative: cut off
        crops.append(x_NCHW)
    # rounded once for all: three small kernels less an image
    out_NCHW = torch.cat(crops).round_().clamp_(0, 255).to(torch.uint8)
    mirrored = torch.from_numpy(np.array([plan.crops[0][2] for plan in plans])).to(out_NCHW.device)
    return torch.where(mirrored[:, None, None, None], out_NCHW.flip(3), out_NCHW)


def _drain(results: queue.Queue) -> None:
    try:
        while True:
            results.get_nowait()
    except queue.Empty:
        return
