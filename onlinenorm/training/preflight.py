"""Whether a run would train, fit and end in time: findings that each need only those before them.

Nothing is trained and nothing is written but the index of the images.
"""

import copy
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch

from onlinenorm.data import ImageDataModule, TinyImageNet
from onlinenorm.data.datasets import FolderDataset
from onlinenorm.data.index import name_few
from onlinenorm.data.kept_batches import KeptBatches, fits
from onlinenorm.data.sampler import check_division
from onlinenorm.data.unreadable import CURE, check_share
from onlinenorm.records import lookup, run_path
from onlinenorm.text import duration
from onlinenorm.training.checkpoint import resumable
from onlinenorm.training.clamping import clamped_layers
from onlinenorm.training.config_check import AUTO_KEYS, build, check_config, full_keys
from onlinenorm.training.epoch_log import EpochLog
from onlinenorm.training.fast_path import (
    ANEW,
    Choice,
    FastPathFailed,
    adopt,
    check_compiles_here,
    choose,
    free_device,
    naming_fast_path,
    open_data,
    with_values,
)
from onlinenorm.training.final_validation import can_reestimate
from onlinenorm.training.interruption import StopSignals
from onlinenorm.training.launch import process_count
from onlinenorm.training.opening import how, notes
from onlinenorm.training.probe import probe_batch, probe_network, probe_normalizer
from onlinenorm.training.probe_data import probe_data
from onlinenorm.training.progress import RunProgress
from onlinenorm.training.run_folder import RunFolder
from onlinenorm.training.saving import Checkpoints
from onlinenorm.training.trainer import resolve_in

OK, WARN, FAIL = "ok", "warning", "FAIL"
CHECKPOINT_FILES = 4  # last, previous, best, and the one being written
SAMPLED = 32  # images of a split that are decoded
FORWARD_SHARE = 3  # a training step costs about three forward passes
STEPS_AT_ONCE = 4  # a GPU is waited for after so many batches, as training does not wait after each
MOST_TIMES = 20
LONGEST_ALONE = 60.0  # seconds of a first batch on the CPU after which no second is waited for

Finding = dict[str, Any]


def preflight(config: dict[str, Any], seconds: float, limit: float | None) -> Iterator[Finding]:
    """Findings {check, status, text, figures...} on the run of a configuration (plain values).

    Raises what the run would: ConfigError for what cannot be meant, DataError or RunError for what is missing.

    Args:
        config: as composed.
        seconds: of each measurement.
        limit: seconds that are left for the run, or None.
    """
    check_config(config)
    with full_keys(config, "data", "recipe", "normalizer"):
        yield from _findings(config, seconds, limit)


def _findings(config: dict[str, Any], seconds: float, limit: float | None) -> Iterator[Finding]:
    folder = run_path(config)
    run_folder = RunFolder(folder, rank_zero=False)
    config = {**config, "trainer": resolve_in(run_folder, config["trainer"])}
    recorded = run_folder.recorded_config()
    config = adopt(config, recorded, ANEW)
    if recorded:
        check_compiles_here(config, folder)
    recipe, normalizer = build(config, "recipe"), build(config, "normalizer")
    processes = process_count(config["trainer"])
    probe_normalizer(normalizer, config["normalizer"], config["trainer"])
    yield finding("config", OK, " ".join(f"{key}={name}" for key, name in config["choices"].items() if name))
    asked = config
    choice = choose(asked, lambda config: open_data(config, recipe))
    config, data = choice.config, choice.data
    probe_data(data, config)
    probe_batch(config, normalizer, data.in_channels, data.image_size)
    yield check_data(data)
    check_division(data, recipe.batch_size, processes, config["trainer"]["accumulate_grad_batches"])
    run_folder.check_config(config)
    position = {"epoch": 0, "step": 0}
    if any(run_folder.checkpoints.glob("*.ckpt")):
        position |= resumable(run_folder.checkpoints, config, data)[1] or {}
    network = _network(choice, normalizer)
    probe_network(network, config)
    yield from (finding("settings", WARN, note) for note in notes(network, config, data, recipe))
    yield check_disk(folder, network, recipe)
    validations = Validations.of(network, recipe)
    del network
    step, device = None, _device(config)
    while step is None:
        try:
            choice.data.feeds = device  # as the Trainer's loaders do
            loader = choice.data.train_dataloader()
            step = check_step(choice, _network(choice, normalizer), loader, recipe, seconds)
        except FastPathFailed as failure:
            key, message = failure.key, str(failure)
        if step is None:
            yield finding("step", WARN, message)
            free_device()
            asked = with_values(asked, {key: AUTO_KEYS[key]})
            choice = choose(asked, lambda config: open_data(config, recipe))
    yield step
    if step["status"] != FAIL:
        speed = check_speed(choice.data, loader, choice.config["trainer"], step, seconds)
        yield speed
        yield check_time(choice.data, recipe, step, speed, validations, position, limit)


def _device(config: dict[str, Any]) -> torch.device:
    return torch.device("cuda", 0) if config["trainer"]["accelerator"] == "gpu" else torch.device("cpu")


def _network(choice: Choice, normalizer: Any) -> torch.nn.Module:
    torch.manual_seed(choice.config["seed"])
    sizes = {"num_classes": choice.data.num_classes, "in_channels": choice.data.in_channels}
    return build(choice.config, "model", normalizer=normalizer, **sizes)


def check_data(data: ImageDataModule) -> Finding:
    """Counts, and a few images of each split decoded.

    Raises UnreadableImageError where more of them are unreadable than the run would leave out.
    """
    bad = []
    for split, dataset in zip(("train", "val"), data._sets, strict=True):
        if isinstance(dataset, FolderDataset):
            places = range(0, len(dataset), max(len(dataset) // SAMPLED, 1))
            bad += [f"{split}/{dataset.index.relative_path(i)}" for i in places if not _readable(dataset, i)]
    described = data.describe()
    text = (
        f"{data.name} ({data.scale}): {data.num_classes:,} classes, {data.train_images:,} training and "
        f"{data.val_images:,} validation images"
    )
    status = OK
    if bad:
        skips = data.on_unreadable == "skip"
        for split, images in (("train", data.train_images), ("val", data.val_images)) if skips else ():
            check_share(bad, split, images, data.unreadable_limit, bad[-1])
        status, cure = (WARN, "skip leaves such images out") if skips else (FAIL, f"replace them, or {CURE}")
        text += f"; unreadable: {name_few(bad)} ({cure})"
    elif described.get("verified", True) is None and not isinstance(data, TinyImageNet):  # which --verify does not read
        status = WARN
        text += f"; never verified: scripts/prepare_imagenet.py --verify {shlex.quote(str(data.root))}"
    elif (described.get("verified") or {}).get("problems"):
        status, text = WARN, f"{text}; verification found: {'; '.join(described['verified']['problems'])}"
    if data.batch_size > data.train_images:
        status, text = FAIL, f"{text}; fewer than one batch of {data.batch_size}"
    return finding("data", status, text, scale=data.scale, dataset=described, unreadable=bad)


def _readable(dataset: FolderDataset, index: int) -> bool:
    try:
        dataset.decode(index, torch.zeros(30).double().numpy())
    except Exception:  # a damaged file makes decoders raise almost anything
        return False
    return True


def check_disk(folder: Path, network: torch.nn.Module, recipe) -> Finding:
    """Free space where the run folder will be, against the checkpoints that lie there at once."""
    state = sum(t.numel() * t.element_size() for t in network.state_dict().values())
    moments = sum(p.numel() * p.element_size() for p in network.parameters()) if recipe.momentum else 0
    needed = CHECKPOINT_FILES * (state + moments)
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    writable = os.access(existing, os.W_OK)
    status = FAIL if free < needed or not writable else WARN if free < 2 * needed else OK
    text = f"{folder}: {CHECKPOINT_FILES} checkpoints of {(state + moments) / 1e6:,.0f} MB, {free / 1e9:,.1f} GB free"
    if status == FAIL:
        text += "; free some space or choose another run_dir=" if writable else f"; {existing} cannot be written to"
    return finding("disk", status, text, needed_bytes=needed, free_bytes=free)


class StepTimer(pl.Callback):
    """Seconds a batch of a trainer's own loop, without its data: `times[0]` of the first, which also compiles.

    As an iterable it gives the trainer one batch again and again, until enough has been measured.
    """

    def __init__(self, batch: tuple[torch.Tensor, ...], seconds: float):
        self.batch, self.seconds = batch, seconds
        self.times: list[float] = []
        self._began, self._since = 0.0, 0

    def __len__(self) -> int:  # known, or the trainer would take a batch ahead
        return 10**9

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        while not self._enough():
            yield self.batch

    def _enough(self) -> bool:
        first, *times = self.times or [0.0]
        slow = self.batch[0].device.type == "cpu" and first > LONGEST_ALONE
        return slow or len(times) >= MOST_TIMES or sum(times) >= self.seconds

    @property
    def seconds_a_batch(self) -> float:
        """Median, without the first where there are others."""
        times = sorted(self.times[1:] or self.times)
        return times[len(times) // 2]

    def on_train_start(self, trainer, module) -> None:
        self._began = time.perf_counter()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self._since += 1
        on_gpu, parts = module.device.type == "cuda", trainer.accumulate_grad_batches
        at_once = -(-STEPS_AT_ONCE // parts) * parts if on_gpu else parts  # each with its share of optimizer steps
        if self.times and self._since < at_once:
            return
        if on_gpu:
            torch.cuda.synchronize(module.device)
        now = time.perf_counter()
        self.times.append((now - self._began) / self._since)
        self._began, self._since = now, 0


def check_step(choice: Choice, network: torch.nn.Module, loader: Any, recipe: Any, seconds: float) -> Finding:
    """Steps of the run's own trainer at the batch of one process, as compiled, captured and rounded as the run's.

    On the CPU a single one where it is slow. Of several processes one is timed, without what they exchange. The batch
    is the first of the run's own loader, again and again. Raises FastPathFailed where the run would go on without
    something that auto chose.
    """
    config, data = choice.config, choice.data
    trainer = config["trainer"]
    device = _device(config)
    parts = process_count(trainer) * trainer["accumulate_grad_batches"]
    batch = max(recipe.batch_size // parts, 1)
    timer = StepTimer(tuple(part[:batch] for part in next(iter(loader))), seconds)
    repeated = copy.copy(data)  # the run's own way from a batch to the network's input
    vars(repeated)["train_dataloader"] = lambda: timer
    classifier = build(config, "classifier", network=network, recipe=recipe)
    figures = {"batch": batch, "device": str(device), "precision": trainer["precision"]}
    figures |= {key: lookup(config, key) for key in AUTO_KEYS}
    alone = {**config, "trainer": {**trainer, "devices": 1, "num_nodes": 1, "strategy": "auto"}}
    try:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with tempfile.TemporaryDirectory() as folder:
            log = EpochLog(Path(folder, "metrics.csv"))
            kept = {"folder": Path(folder), "epoch_log": log, "stop": StopSignals(), "loggers": []}
            own = build(alone, "trainer", max_epochs=1, **kept)
            own.limit_val_batches = 0
            writes = EpochLog, RunProgress, Checkpoints
            own.callbacks = [callback for callback in own.callbacks if not isinstance(callback, writes)]
            own.callbacks.append(timer)
            with naming_fast_path(choice, own):
                own.fit(classifier, datamodule=repeated)
    except torch.OutOfMemoryError:
        text = (
            f"a batch of {batch} does not fit into the GPU's {_gpu_memory(device):.0f} GiB; "
            "trainer.accumulate_grad_batches=2 halves it and leaves the result the same, but for BatchNorm, whose "
            "statistics are then of the halves"
        )
        return finding("step", FAIL, text, **figures)
    each = timer.seconds_a_batch
    rate = batch / each
    text = f"a batch of {batch} takes {1e3 * each:,.1f} ms: {rate:,.0f} images/s on {device}, {trainer['precision']}"
    text += how(config, choice.reasons)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30
        total = _gpu_memory(device)
        figures |= {"peak_memory_gib": round(peak, 2), "memory_gib": round(total, 1)}
        text += f", {peak:.1f} of {total:.0f} GiB"
    first = timer.times[0] - each if len(timer.times) > 1 else 0.0
    if first > 1:
        text += f"; {duration(first)} before the first step"
    return finding("step", OK, text, images_per_second=rate, milliseconds=1e3 * each, first_seconds=first, **figures)


def _gpu_memory(device: torch.device) -> float:
    return torch.cuda.get_device_properties(device).total_memory / 2**30


def check_speed(data: ImageDataModule, loader: Any, trainer: dict[str, Any], step: Finding, seconds: float) -> Finding:
    """Images/s of the loaders on this machine against those of the network on all its devices; the slower is named.

    `loader` is that of the training images.
    """
    processes = process_count(trainer)
    device = torch.device(step["device"])
    # a process's share of the cores is what num_workers=null gives it; a number is taken by each
    loaders = trainer["num_nodes"] if data.num_workers is None else processes
    train = loaders * loader_rate(data, loader, device, seconds)
    val_loader = data.val_dataloader()
    val = loaders * loader_rate(data, val_loader, device, seconds / 2)
    crops = 10 if data.evaluation == "ten_crop" else 1
    kept = isinstance(val_loader, KeptBatches) and fits(data.val_images * crops * 3 * data.image_size**2, device)
    model = processes * step["images_per_second"]
    slow = train < model
    files = isinstance(data._sets[0], FolderDataset) and not data.on_device
    source = data.decoder if files else "on the device" if data.on_device else "from memory"
    text = f"loader {train:,.0f} images/s ({source}), network {model:,.0f}: "
    text += f"the {'loader' if slow else 'network'} is the bottleneck"
    if slow:
        text += f", {train / model:.0%} of what the network takes"
    if slow and files:
        text += "; more data.num_workers, a faster data.decoder (torchvision, nvjpeg) or a local disk would help"
    return finding(
        "speed", WARN if slow else OK, text, loader_images_per_second=train, network_images_per_second=model,
        val_images_per_second=min(val, FORWARD_SHARE * model), val_kept=kept,
        bottleneck="loader" if slow else "network",
    )  # fmt: skip


def loader_rate(data: ImageDataModule, loader, device: torch.device, seconds: float) -> float:
    """Batches ready for the network, images/s; those that were prefetched before the clock started are not counted."""
    images, start, batches = 0, time.perf_counter(), iter(loader)
    began, skip = start, 2 * loader.num_workers
    for number, batch in enumerate(batches):
        batch = data.on_before_batch_transfer(batch)
        ready, _, _ = data.on_after_batch_transfer(tuple(tensor.to(device, non_blocking=True) for tensor in batch))
        now = time.perf_counter()
        if number < skip and now - start < seconds:
            began = now
        else:
            images += len(ready)
        if now - began > seconds:
            break
    if images == 0:  # a set of a few batches
        return len(loader.dataset) / (time.perf_counter() - start)
    return images / (time.perf_counter() - began)


class Validations(NamedTuple):
    """What a run validates besides once an epoch.

    doubled: first epochs whose validation runs a second time, without the clamp. final: validations after the last
    epoch. reestimated: training images that statistics are estimated anew on before the last of these.
    """

    doubled: int
    final: int
    reestimated: int

    @classmethod
    def of(cls, network: torch.nn.Module, recipe: Any) -> "Validations":
        """Those of a network, not trained yet, and a `Recipe`."""
        clamps = bool(clamped_layers(network))
        doubled = recipe.epochs - recipe.clamp_off_epochs if clamps and recipe.removal_every_epoch else 0
        reestimated = recipe.reestimate_images if can_reestimate(network) else 0
        return cls(doubled, 1 + clamps + (reestimated > 0), reestimated)


def check_time(
    data: ImageDataModule, recipe: Any, step: Finding, speed: Finding, validations: Validations,
    position: dict[str, int], limit: float | None,
) -> Finding:  # fmt: skip
    """When the run would end if it began or continued (at `position`) now, against the seconds that are left."""
    loader, forward = speed["loader_images_per_second"], FORWARD_SHARE * speed["network_images_per_second"]
    first = data.val_images / speed["val_images_per_second"]
    later = data.val_images / forward if speed["val_kept"] else first
    epoch = data.train_images / min(loader, speed["network_images_per_second"]) + later
    done = position["epoch"] + position["step"] * recipe.batch_size / data.train_images
    left = max(recipe.epochs - done, 0.0)
    total = left * epoch + (first - later) + validations.final * later + step["first_seconds"]
    total += max(validations.doubled - done, 0.0) * data.val_images / forward
    total += validations.reestimated / min(loader, forward)
    end = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + total))
    text = f"{recipe.epochs} epochs of {duration(epoch)}"
    text += f", {f'{left:.1f} of them' if left else 'none'} left, take" if done else " take"
    text += f" {duration(total)} with the validations at the end, without checkpoints: to {end}"
    status = OK
    if limit is not None:
        status = WARN if total > limit else OK
        text += f"; the time limit leaves {duration(limit)}"
        if total > limit:
            text += f": the job has to be started {int(-(-total // max(limit, 1)))} times (the same command continues)"
    return finding("time", status, text, expected_seconds=total, limit_seconds=limit, expected_end=end)


def finding(name: str, status: str, text: str, **figures: Any) -> Finding:
    """A finding as a mapping."""
    return {"check": name, "status": status, "text": text, **figures}
