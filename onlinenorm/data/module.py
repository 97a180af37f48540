"""The one interface through which training sees images."""

import functools
import itertools
import logging
import os
from dataclasses import dataclass
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from onlinenorm.arguments import check_choice, check_fraction, check_int
from onlinenorm.data.datasets import FolderDataset, InMemoryDataset, fingerprint
from onlinenorm.data.decoded import check_fits, kept_images
from onlinenorm.data.decoders import DECODERS, DEVICE_DECODERS
from onlinenorm.data.device_loader import AHEAD, DeviceLoader, part_size
from onlinenorm.data.gpu_cache import GpuCacheLoader
from onlinenorm.data.index import name_few
from onlinenorm.data.kept_batches import KeptBatches
from onlinenorm.data.limits import RULE, proportional
from onlinenorm.data.missing import checked_root
from onlinenorm.data.network_input import NetworkInput
from onlinenorm.data.nvjpeg_dataset import NvjpegDataset
from onlinenorm.data.nvjpeg_loader import NO_GPU, NvjpegLoader
from onlinenorm.data.prefetch import Batch
from onlinenorm.data.replaced_files import described_files, replaced_files
from onlinenorm.data.sampler import GlobalBatchSampler, ValidationSampler
from onlinenorm.data.transforms import AUGMENTATIONS, EVALUATIONS
from onlinenorm.data.unreadable import check_share, unreadable_image
from onlinenorm.data.workers import PREFETCHED, check_shared_memory, share_of_cores, worker_loader
from onlinenorm.errors import ArgumentError

log = logging.getLogger(__name__)

_LISTED = 1000  # replaced files named in results.json

AnyDataset = InMemoryDataset | FolderDataset
Loader = DataLoader | DeviceLoader | NvjpegLoader | GpuCacheLoader | KeptBatches


@dataclass(kw_only=True, eq=False, repr=False)
class ImageDataModule(pl.LightningDataModule):
    """Batches of images whose order and augmentation depend on (seed, epoch, index) only.

    After the transfer hooks a batch is (images, labels, indices): images float32, normalised, N x C x H x W (N x 10 x C
    x H x W for ten_crop), labels and indices int64. **A label of -1 means: leave this image out of every sum** (an
    unreadable validation image under `on_unreadable="skip"`). Loaders themselves yield uint8 images; the conversion
    to float, upscaling, colour noise and normalisation happen on the device, in `on_after_batch_transfer`.

    The Trainer must be built with `use_distributed_sampler=False`: the samplers here already know the processes.

    Args:
        root: folder of the dataset, as text or a path object (kept as text), or None where the set has a place of its
            own; refused unless `reads_root`.
        num_workers: loader processes; None chooses this process's share of the cores, at most 16.
        on_device: keep the whole set in the device's memory, as long as this object lives, and augment it there; files
            are decoded once. The pixels are the same.
        keep_decoded: with on_device, keep the decoded files in the user's cache folder for the next run.
        limit_train, limit_val: use that many images (all, if there are fewer): the classes in proportion, evenly spaced
            in each in index order, see `limits.proportional`. The same images for every seed, decoder and number of
            processes. An image's number, which its augmentation depends on, is its position among those used.
        decoder: of training images: "pillow" (reference), "torchvision", or "nvjpeg" (on the GPU); without effect on
            sets held in memory.
        val_decoder: of validation images: "pillow" or "torchvision". Its own key, so that accuracies of runs with
            different training decoders are measured on the same pixels.
        device_fraction: of decoder nvjpeg: share of the images that the GPU decodes, the workers decode the others.
        on_unreadable: "raise" at an image that cannot be decoded, or "skip": the next readable image takes its place
            (training) or it is left out (validation), and it is listed in `unreadable`.
        unreadable_limit: fraction of a split above which skipping raises; one image may be skipped in any case, but
            none at 0.
        image_size: width and height of the network's input, pixels.
        in_channels: channels of the network's input.
        batch_size: global batch, the images of one optimiser step over all processes.
        val_batch_size: images of a validation batch on each process; None chooses the training batch of a process, at
            least 64 (ten_crop: an eighth).
        seed: of order and augmentation.
        augmentation: "random_resized_crop", "scale_jitter", "pad_crop" or "none".
        evaluation: "center_crop" or "ten_crop".
        crop_padding: pixels that pad_crop adds on each side.

    Attributes: name, scale, num_classes, in_channels, class_names, train_images, val_images, fingerprint, unreadable
    (paths of images that this process skipped, in order of appearance), replaced (paths of files that got another size
    between two starts of a run); both are kept in checkpoints. raw_training: may be set where the training step itself
    calls `network_input`; training batches then stay uint8. feeds: may be set to the device whose GPU loaders without
    a Trainer put batches on, as with one; else theirs stay in host memory.
    """

    root: str | os.PathLike[str] | None = None
    num_workers: int | None = 0
    on_device: bool = False
    keep_decoded: bool = False
    limit_train: int | None = None
    limit_val: int | None = None
    decoder: Literal["pillow", "torchvision", "nvjpeg"] = "pillow"
    val_decoder: str = "pillow"
    device_fraction: float = 1.0
    on_unreadable: str = "raise"
    unreadable_limit: float = 0.0001
    image_size: int = 224
    in_channels: int = 3
    batch_size: int = 256
    val_batch_size: int | None = None
    seed: int = 0
    augmentation: str = "none"
    evaluation: str = "center_crop"
    crop_padding: int = 4

    def __post_init__(self) -> None:
        super().__init__()
        check_int("num_workers", self.num_workers, 0, optional=True)
        check_int("limit_train", self.limit_train, 1, optional=True)
        check_int("limit_val", self.limit_val, 1, optional=True)
        check_choice("decoder", self.decoder, (*DECODERS, *DEVICE_DECODERS))
        check_choice("val_decoder", self.val_decoder, tuple(DECODERS))
        check_fraction("device_fraction", self.device_fraction)
        check_choice("on_unreadable", self.on_unreadable, ("raise", "skip"))
        check_fraction("unreadable_limit", self.unreadable_limit)
        check_int("image_size", self.image_size, 8)
        check_int("batch_size", self.batch_size, 1)
        check_int("val_batch_size", self.val_batch_size, 1, optional=True)
        check_int("seed", self.seed, 0)
        check_choice("augmentation", self.augmentation, AUGMENTATIONS)
        check_choice("evaluation", self.evaluation, EVALUATIONS)
        check_int("crop_padding", self.crop_padding, 0)
        self.root = checked_root(self.root, self.reads_root)
        self.name = type(self).__name__
        self.unreadable: list[str] = []
        self.replaced: list[str] = []
        self._resumed = (0, 0)
        self._train_sampler: GlobalBatchSampler | None = None
        self._validation: dict[tuple, Loader] = {}
        self._cached: dict[tuple, GpuCacheLoader] = {}  # of each set, whose images it holds
        self._fits = self.raw_training = False
        self.feeds: torch.device | None = None

    # what a kind of dataset provides

    def build(self) -> tuple[AnyDataset, AnyDataset]:
        """Opens the whole training and validation set; raises DataError if they are missing or broken."""
        raise NotImplementedError

    @property
    def scale(self) -> str:
        """The results' label: "imagenet", "imagenet-subset", "fashion_mnist", "embedded", "synthetic", or one's own.

        Of a set of the user's own any short text but "imagenet", which is compared with published figures.
        """
        raise NotImplementedError

    @property
    def reads_root(self) -> bool:
        """Whether the images come from `root`."""
        return True

    @property
    def licence(self) -> str:
        """Under which terms the images may be used, in a line; stands in results.json and beside exported weights."""
        raise NotImplementedError

    @property
    def class_names(self) -> list[str] | tuple[str, ...]:
        """Names of the classes, in label order."""
        raise NotImplementedError

    @property
    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of the set's own channels, in units of [0, 1]."""
        raise NotImplementedError

    @property
    def native_size(self) -> int:
        """Pixels a side of the images as loaders yield them; those of another `image_size` are scaled on the device."""
        return self.image_size

    # description

    @functools.cached_property
    def network_input(self) -> NetworkInput:
        """What makes the network's input of a batch's uint8 images."""
        return NetworkInput(*self.mean_std, self.image_size, self.in_channels)

    @functools.cached_property
    def _sets(self) -> tuple[AnyDataset, AnyDataset]:
        train, val = whole = self.build()
        self._limited_from = (len(train), len(val))
        chosen = [
            proportional(dataset.labels(), limit) if limit is not None else None
            for dataset, limit in zip(whole, (self.limit_train, self.limit_val), strict=True)
        ]
        train, val = (d if c is None else d.limited(c) for d, c in zip(whole, chosen, strict=True))
        return train, val

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def train_images(self) -> int:
        return len(self._sets[0])

    @property
    def val_images(self) -> int:
        return len(self._sets[1])

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over the content (class folders: over paths, sizes and labels) of the images in use."""
        return fingerprint([s.source if isinstance(s, InMemoryDataset) else s.index for s in self._sets])

    @property
    def limited(self) -> dict[str, Any] | None:
        """What limit_train and limit_val leave of the set, in numbers and by which rule; None for the whole set."""
        counts = self.train_images, self.val_images
        if counts == self._limited_from:
            return None
        train, val = (f"{used} of {all}" for used, all in zip(counts, self._limited_from, strict=True))
        return {"train_images": train, "val_images": val, "rule": RULE}

    def describe(self) -> dict[str, Any]:
        """The `dataset` entry of results.json; `limited` only where it is."""
        described: dict[str, Any] = {
            "name": self.name,
            "train_images": self.train_images,
            "val_images": self.val_images,
            "fingerprint": self.fingerprint,
            "licence": self.licence,
        }
        if self.limited is not None:
            described["limited"] = self.limited
        if self.replaced:
            described["replaced"] = {"count": len(self.replaced), "files": self.replaced[:_LISTED]}
        return described

    def files(self) -> dict[str, Any] | None:
        """What a checkpoint keeps of the files, for `replaced_since`; None where there are none.

        A run may go on after a damaged file was replaced, so that sizes are kept one by one, names in a digest.
        """
        indexes = [dataset.index for dataset in self._sets if isinstance(dataset, FolderDataset)]
        return None if len(indexes) < len(self._sets) else described_files(indexes)

    def replaced_since(self, files: dict[str, Any] | None) -> list[str] | None:
        """Paths whose size differs from that in `files` of a checkpoint; None where these are other images."""
        indexes = [dataset.index for dataset in self._sets if isinstance(dataset, FolderDataset)]
        return None if files is None or len(indexes) < len(self._sets) else replaced_files(files, indexes)

    def note_replaced(self, files: dict[str, Any] | None) -> None:
        """Keeps, and logs, which files were replaced since a checkpoint with `files` was written."""
        new = self.replaced_since(files) or []
        self.replaced = list(dict.fromkeys([*self.replaced, *new]))
        if new and self._process()[0] == 0:
            log.warning("files of another size than before count as replaced (%d): %s", len(new), name_few(new))

    # Lightning's hooks

    def prepare_data(self) -> None:
        """Downloads, indexes, and with keep_decoded decodes, what is not there yet; on one process a node."""
        folders = [dataset for dataset in self._sets if isinstance(dataset, FolderDataset)]
        if self.on_device and self.keep_decoded and folders:
            self._check_on_device()
            for dataset in folders:
                kept_images(dataset, self._workers(), self._device())

    def setup(self, stage: str | None = None) -> None:
        """Opens the sets; may be called again at no cost, and before a Trainer exists."""
        assert self._sets

    def resume(self, epoch: int, step: int) -> None:
        """Makes the next run begin after `step` optimiser steps of epoch `epoch` (counted from 0)."""
        self._resumed = (epoch, step)
        if self._train_sampler is not None:
            self._train_sampler.start_at(epoch, step)

    def train_dataloader(self) -> Loader:
        rank, world_size = self._process()
        accumulate = getattr(self.trainer, "accumulate_grad_batches", 1)
        self._train_sampler = GlobalBatchSampler(
            self.train_images, self.batch_size, self.seed, rank, world_size, accumulate, *self._resumed
        )
        return self._loader(self._sets[0], self._train_sampler)

    def val_dataloader(self) -> Loader:
        rank, world_size = self._process()
        size = self.val_batch_size
        if size is None:
            size = max(self.batch_size // world_size, 64) // (8 if self.evaluation == "ten_crop" else 1)
        key = size, rank, world_size, self._gpu_fed(), self._workers()
        if key not in self._validation:  # one for all validations, as it may keep what it has decoded
            loader = self._loader(self._sets[1], ValidationSampler(self.val_images, size, rank, world_size))
            files = isinstance(self._sets[1], FolderDataset) and not self.on_device
            self._validation = {key: KeptBatches(loader) if files else loader}
        return self._validation[key]

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int = 0) -> Batch:
        """Takes reports of unreadable images out of the batch and applies the policy to them."""
        images, labels, indices, *colour = batch
        if not (indices.numpy() < 0).any():  # not by torch, which would let other threads in, and wait for them
            return batch
        flagged = indices < 0
        indices = torch.where(flagged, -indices - 1, indices)
        for index, label in zip(indices[flagged].tolist(), labels[flagged].tolist(), strict=True):
            self._handle_unreadable(index, "val" if label < 0 else "train")
        return (images, labels, indices, *colour)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int = 0) -> Batch:
        """uint8 to normalised float32 of the network's size and channels, on the batch's device."""
        if self.raw_training and self.trainer is not None and self.trainer.training:
            return batch
        images, labels, indices, *colour = batch
        return self.network_input(images, *colour), labels, indices

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: images found unreadable or replaced so far. Order and augmentation need no state."""
        lists = {"unreadable": self.unreadable, "replaced": self.replaced}
        return {name: list(paths) for name, paths in lists.items() if paths}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.unreadable = [str(path) for path in state_dict.get("unreadable", [])]
        self.replaced = [str(path) for path in state_dict.get("replaced", [])]

    def _process(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _gpu(self) -> torch.device:
        device = torch.device("cuda") if self.trainer is None else self.trainer.strategy.root_device
        if device.type != "cuda" or not torch.cuda.is_available():
            raise ArgumentError("decoder", NO_GPU)
        return device

    def _loader(self, dataset: AnyDataset, sampler: GlobalBatchSampler | ValidationSampler) -> Loader:
        workers = self._workers()
        if self.on_device:
            self._check_on_device()
            loader = GpuCacheLoader(dataset, sampler, self._device(), workers, self.keep_decoded)
            return self._cached.setdefault((dataset, loader.device), loader).with_sampler(sampler)
        gpu = None if isinstance(dataset, NvjpegDataset) else self._gpu_fed()
        if workers:
            whole = sampler.local_batch_size, PREFETCHED
            size, ahead = whole if gpu is None else (part_size(whole[0], workers), AHEAD)
            check_shared_memory(dataset, size, workers, getattr(self.trainer, "num_devices", 1), ahead)
        if gpu is not None:
            return DeviceLoader(dataset, sampler, gpu, workers)
        decoding = worker_loader(dataset, sampler, workers)
        return NvjpegLoader(decoding, self._gpu()) if isinstance(dataset, NvjpegDataset) else decoding

    def _gpu_fed(self) -> torch.device | None:
        """The GPU that loaders put batches on, or None."""
        device = getattr(getattr(self.trainer, "strategy", None), "root_device", self.feeds)
        return device if device is not None and device.type == "cuda" else None

    def _workers(self) -> int:
        chosen = self.num_workers
        return share_of_cores(getattr(self.trainer, "num_devices", 1)) if chosen is None else chosen

    def _check_on_device(self) -> None:
        if not self._fits:
            check_fits(self._sets, self._device(), str(self.name))
            self._fits = True  # asked once: what is loaded by then is no longer free

    def _device(self) -> torch.device:
        if isinstance(self._sets[0], NvjpegDataset):
            return self._gpu()
        here = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(here) if self.trainer is None else self.trainer.strategy.root_device

    def _handle_unreadable(self, index: int, split: str) -> None:
        dataset = self._sets[0 if split == "train" else 1]
        assert isinstance(dataset, FolderDataset)
        path, holder = dataset.index.path(index), dataset.index.holder(index)
        cause = f"{path} cannot be decoded ({dataset.failure(index)})"
        if self.on_unreadable == "raise":
            raise unreadable_image(cause, "the file" if holder == path else str(holder))
        name = f"{split}/{dataset.index.relative_path(index)}"
        if name in self.unreadable:
            return
        self._check_share([*self.unreadable, name], split, cause)  # else it may be replaced, and counts for nothing
        self.unreadable.append(name)
        log.warning("skipped: %s", cause)

    def agree_on_unreadable(self) -> None:
        """Make the list that of all processes, by rank, and hold it against the limit; every process calls this."""
        if self._process()[1] == 1 or self.on_unreadable == "raise":
            return
        lists: list[Any] = [None] * self._process()[1]
        torch.distributed.all_gather_object(lists, self.unreadable)
        self.unreadable = list(dict.fromkeys(itertools.chain(*lists)))
        for split in ("train", "val"):
            if met := [path for path in self.unreadable if path.startswith(f"{split}/")]:
                self._check_share(self.unreadable, split, met[-1])

    def _check_share(self, unreadable: list[str], split: str, last: str) -> None:
        check_share(unreadable, split, len(self._sets[0 if split == "train" else 1]), self.unreadable_limit, last)
