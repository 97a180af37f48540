#!/usr/bin/env python3
"""Pre-flight of a run, in under a minute: would this command train, fit, and end in time?

    scripts/check.py experiment=table1 normalizer=batch data.root=IMAGENET        the arguments of train.py
    scripts/check.py experiment=table1 data.root=IMAGENET --time-limit 24:00:00 --json

Checks the configuration, the data (a few images are decoded), the disk against the checkpoints' size, one training
step at the real batch against the memory, the loader's images/s against the network's, the expected end against the
time limit (--time-limit, or the SLURM job's own), and lists where the recipe departs from the published one. Trains
nothing, writes nothing but the index of the images.

Exit code 0: ready (warnings are printed); 1: the run would fail; 2: the configuration cannot be meant.
"""

import argparse
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts._venv import run_main

import torch

from onlinenorm.cli.arguments import parse_script
from onlinenorm.cli.compose import load_config
from onlinenorm.data import ImageDataModule
from onlinenorm.data.datasets import FolderDataset
from onlinenorm.data.sampler import GlobalBatchSampler, ValidationSampler
from onlinenorm.errors import ConfigError, RunError
from onlinenorm.report.runs import Run
from onlinenorm.report.settings import departures
from onlinenorm.report.spec import load_spec
from onlinenorm.text import duration
from onlinenorm.training.config_check import build, check_config, full_keys
from onlinenorm.training.probe import probe_batch, probe_data, probe_normalizer
from onlinenorm.training.recipe import build_optimizer
from onlinenorm.training.run_folder import RunFolder, run_path
from onlinenorm.training.trainer import quiet_lightning, resolve

OK, WARN, FAIL = "ok", "warning", "FAIL"
CHECKPOINT_FILES = 4  # last, previous, best, and the one being written
SAMPLED = 32  # images of a split that are decoded
FORWARD_SHARE = 3  # a training step costs about three forward passes

Finding = dict[str, Any]


def check(
    overrides: list[str], seconds: float, limit: float | None, config_dir: str | None = None
) -> Iterator[Finding]:
    """Findings {check, status, text, figures...}, in an order in which each needs only those before it."""
    config = load_config(overrides, config_dir)
    check_config(config)
    config = {**config, "trainer": resolve(config["trainer"])}
    recipe, normalizer = build(config, "recipe"), build(config, "normalizer")
    processes = config["trainer"]["devices"] * config["trainer"]["num_nodes"]
    probe_normalizer(normalizer, config["normalizer"], config["trainer"])
    yield _finding("config", OK, " ".join(f"{key}={name}" for key, name in config["choices"].items() if name))
    views = {"augmentation": recipe.augmentation, "evaluation": recipe.evaluation}
    data = build(config, "data", batch_size=recipe.batch_size, seed=config["seed"], **views)
    data.prepare_data()
    data.setup()
    probe_data(data, config)
    probe_batch(config, normalizer, data.in_channels, data.image_size)
    yield check_data(data)
    accumulate = config["trainer"]["accumulate_grad_batches"]
    with full_keys(config, "data", "recipe"):
        GlobalBatchSampler(data.train_images, recipe.batch_size, 0, 0, processes, accumulate)
        ValidationSampler(data.val_images, data.val_batch_size or 2, 0, processes)
    torch.manual_seed(config["seed"])
    sizes = {"num_classes": data.num_classes, "in_channels": data.in_channels}
    with full_keys(config, "normalizer"):
        network = build(config, "model", normalizer=normalizer, **sizes)
    folder = run_path(config)
    RunFolder(folder, rank_zero=False).check_config(config)
    yield check_disk(folder, network, recipe)
    classifier = build(config, "classifier", network=network, recipe=recipe)
    step = check_step(classifier, data, recipe, config["trainer"], seconds)
    yield step
    speed = None
    if step["status"] != FAIL:
        speed = check_speed(data, config["trainer"], step, seconds)
        yield speed
        yield check_time(data, recipe, speed, limit)
    yield from check_recipe(config)


def check_data(data: ImageDataModule) -> Finding:
    """Counts, and a few images of each split decoded."""
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
        status = WARN if data.on_unreadable == "skip" else FAIL
        text += f"; unreadable: {', '.join(bad[:5])} (data.on_unreadable=skip leaves such images out)"
    elif described.get("verified", True) is None:
        status, text = WARN, f"{text}; never verified: scripts/prepare_imagenet.py --verify {data.root}"
    elif (described.get("verified") or {}).get("problems"):
        status, text = WARN, f"{text}; verification found: {'; '.join(described['verified']['problems'])}"
    if data.batch_size > data.train_images:
        status, text = FAIL, f"{text}; fewer than one batch of {data.batch_size}"
    return _finding("data", status, text, dataset=described, unreadable=bad)


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
    return _finding("disk", status, text, needed_bytes=needed, free_bytes=free)


def check_step(classifier, data: ImageDataModule, recipe, trainer: dict[str, Any], seconds: float) -> Finding:
    """Training steps at the batch of one process, for memory and time; on the CPU a single one where it is slow."""
    device = torch.device("cuda", 0) if trainer["accelerator"] == "gpu" else torch.device("cpu")
    parts = trainer["devices"] * trainer["num_nodes"] * trainer["accumulate_grad_batches"]
    batch = max(recipe.batch_size // parts, 1)
    shape = (batch, data.in_channels, data.image_size, data.image_size)
    kind = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(trainer["precision"])
    classifier.to(device).train()
    if trainer["precision"] == "64-true":
        classifier.double()
    wide = torch.float64 if trainer["precision"] == "64-true" else torch.float32
    images = torch.randn(shape, device=device, dtype=wide)
    labels = torch.arange(batch, device=device) % data.num_classes
    optimizer = build_optimizer(classifier.network, recipe)

    def step() -> None:
        with torch.autocast(device.type, kind, enabled=kind is not None):
            loss = torch.nn.functional.cross_entropy(classifier(images).float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    figures = {"batch": batch, "device": str(device), "precision": trainer["precision"]}
    try:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        first = _timed(step, device)  # also compiles, tunes and allocates
        times = []
        while len(times) < 20 and sum(times) < (seconds if first < seconds else -1):
            times.append(_timed(step, device))
    except torch.OutOfMemoryError:
        text = (
            f"a batch of {batch} does not fit into the GPU's {_gpu_memory(device):.0f} GiB; "
            "trainer.accumulate_grad_batches=2 halves it and leaves the result the same, but for BatchNorm, whose "
            "statistics are then of the halves"
        )
        return _finding("step", FAIL, text, **figures)
    median = sorted(times or [first])[len(times) // 2]
    rate = batch / median
    text = f"a batch of {batch} takes {1e3 * median:,.1f} ms: {rate:,.0f} images/s on {device}, {trainer['precision']}"
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30
        total = _gpu_memory(device)
        figures |= {"peak_memory_gib": round(peak, 2), "memory_gib": round(total, 1)}
        text += f", {peak:.1f} of {total:.0f} GiB"
    return _finding("step", OK, text, images_per_second=rate, milliseconds=1e3 * median, **figures)


def _gpu_memory(device: torch.device) -> float:
    return torch.cuda.get_device_properties(device).total_memory / 2**30


def _timed(step, device: torch.device) -> float:
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def check_speed(data: ImageDataModule, trainer: dict[str, Any], step: Finding, seconds: float) -> Finding:
    """Images/s of the loaders on this machine against those of the network on all its devices; the slower is named."""
    processes = trainer["devices"] * trainer["num_nodes"]
    device = torch.device(step["device"])
    # a process's share of the cores is what num_workers=null gives it; a number is taken by each
    loaders = trainer["num_nodes"] if data.num_workers is None else processes
    train = loaders * loader_rate(data, data.train_dataloader(), device, seconds)
    val = loaders * loader_rate(data, data.val_dataloader(), device, seconds / 2)
    model = processes * step["images_per_second"]
    slow = train < model
    text = f"loader {train:,.0f} images/s ({data.decoder}), network {model:,.0f}: "
    text += f"the {'loader' if slow else 'network'} is the bottleneck"
    if slow:
        text += (
            f", {train / model:.0%} of what the network takes; more data.num_workers, a faster data.decoder "
            "(torchvision, nvjpeg) or a local disk would help"
        )
    return _finding(
        "speed", WARN if slow else OK, text, loader_images_per_second=train, network_images_per_second=model,
        val_images_per_second=min(val, FORWARD_SHARE * model), bottleneck="loader" if slow else "network",
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


def check_time(data: ImageDataModule, recipe, speed: Finding, limit: float | None) -> Finding:
    """When the run would end, against the time that is left."""
    rate = min(speed["loader_images_per_second"], speed["network_images_per_second"])
    epoch = data.train_images / rate + data.val_images / speed["val_images_per_second"]
    total = recipe.epochs * epoch
    text = f"{recipe.epochs} epochs of {duration(epoch)} take {duration(total)}, without checkpoints"
    status = OK
    if limit is not None:
        status = WARN if total > limit else OK
        text += f"; the time limit leaves {duration(limit)}"
        if total > limit:
            text += f": the job has to be started {int(-(-total // max(limit, 1)))} times (the same command continues)"
    return _finding("time", status, text, expected_seconds=total, limit_seconds=limit)


def check_recipe(config: dict[str, Any]) -> Iterator[Finding]:
    """Where the settings depart from those behind the published table."""
    spec = load_spec()
    normalizer = config["choices"]["normalizer"]
    run = Run(Path(), "this", normalizer, config["seed"], config, {}, {}, None)
    found = departures([run], spec.published_setting)
    lines = [f"{d.name} is {d.actual}, published {d.published}{' (decisive)' if d.decisive else ''}" for d in found]
    text = "; ".join(lines) or "the published setting"
    status = WARN if any(d.decisive for d in found) else OK
    keys = "name", "published", "actual", "decisive"
    yield _finding("recipe", status, text, departures=[{key: getattr(d, key) for key in keys} for d in found])


def _finding(name: str, status: str, text: str, **figures: Any) -> Finding:
    return {"check": name, "status": status, "text": text, **figures}


def parse_limit(text: str) -> float:
    """Seconds of a SLURM time: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]."""
    days, dash, rest = text.rpartition("-")
    if not re.fullmatch(r"\d+(:\d+){0,2}", rest) or not re.fullmatch(r"\d*", days) or (dash and not days):
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write 90 (minutes), 24:00:00 or 2-12 (days-hours)")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, (*parts, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60.0 + seconds


def time_left() -> float | None:
    """Seconds until the SLURM job that this runs in ends, or None."""
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    return max(float(end) - time.time(), 0.0) if end.isdigit() else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="as for train.py")
    parser.add_argument("--config-dir", metavar="DIR", help="more configurations, as for train.py")
    parser.add_argument("--time-limit", type=parse_limit, metavar="TIME", help="as sbatch takes it, e.g. 24:00:00")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print findings as JSON")
    findings, code, options = [], 0, argparse.Namespace(json=False)
    try:
        options = parse_script(parser, arguments)
        if not options.seconds > 0:
            raise ConfigError(f"--seconds: {options.seconds:g} must be larger than 0")
        with quiet_lightning():
            limit = options.time_limit if options.time_limit is not None else time_left()
            for finding in check(options.overrides, options.seconds, limit, options.config_dir):
                findings.append(finding)
                if not options.json:
                    print(f"{finding['status']:8}{finding['check']:7} {finding['text']}", flush=True)
                if finding["status"] == FAIL:
                    code = 1
    except (ConfigError, RunError, ValueError) as error:
        code = getattr(error, "exit_code", 1)
        findings.append(_finding("config" if code == 2 else "data", FAIL, str(error)))
        if not options.json:
            print(f"{FAIL:8}{error}", file=sys.stderr)
    if options.json:
        print(json.dumps({"ready": code == 0, "exit_code": code, "findings": findings}, indent=1, default=str))
    return code


if __name__ == "__main__":
    run_main(main)
