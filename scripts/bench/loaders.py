#!/usr/bin/env python3
"""How fast images get in: decoding, loaders and training with them, beside torchvision's and timm's loaders.

    scripts/bench/loaders.py                       generates JPEG files of ImageNet's sizes, measures what is available
    scripts/bench/loaders.py --draw                page and picture alone, from results/bench_data.json

Every provider gives normalised float batches on the training device, ready for the network. Providers take turns, some
seconds each, in several rounds; figures are medians over the rounds, and ratios are taken within a round, to
torchvision's ImageFolder and DataLoader as its reference training script sets them up. `per_core` divides by the
processor time used by all processes, so that it means something on a machine that others use too.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts._venv import ROOT, run_main

import torch

from onlinenorm.data import ImageNet
from onlinenorm.data.datasets import FolderDataset
from onlinenorm.data.decoders import DECODERS
from onlinenorm.data.nvjpeg_dataset import NvjpegDataset
from scripts.bench import loaders_table
from scripts.bench.jpeg_set import make_set
from scripts.bench.loaders_table import ON_DEVICE, REFERENCE

RESULTS = ROOT / "results" / "bench_data.json"
CACHED = 8192  # images on the device, some 5 GB
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]


class Ours:
    """This project's loader with a decoder: batches as training gets them, over and over the epochs."""

    def __init__(self, root: Path, decoder: Any, batch: int, workers: int, device: torch.device, **arguments):
        self.device = device
        self.data = ImageNet(
            root=str(root), decoder=decoder, batch_size=batch, num_workers=workers, augmentation="random_resized_crop",
            **arguments,
        )  # fmt: skip
        self.data.setup()
        self.data.feeds = device
        self.loader: Any = self.data.train_dataloader()  # of one of several kinds

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for epoch in itertools.count():
            self.loader.batch_sampler.set_epoch(epoch)
            for batch in self.loader:
                batch = self.data.on_before_batch_transfer(batch)
                batch = tuple(tensor.to(self.device, non_blocking=True) for tensor in batch)
                images, labels, _ = self.data.on_after_batch_transfer(batch)
                yield images, labels


class Forever:
    """Any loader of (images, labels), moved to the device, over and over."""

    def __init__(self, loader: Batches, device: torch.device):
        self.loader, self.device = loader, device

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            for images, labels in self.loader:
                yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


def reference_transform() -> Callable:
    """Training transform of torchvision's references/classification/presets.py with its defaults (PIL backend)."""
    from torchvision import transforms

    return transforms.Compose([
        transforms.RandomResizedCrop(224, antialias=True), transforms.RandomHorizontalFlip(),
        transforms.PILToTensor(), transforms.ConvertImageDtype(torch.float), transforms.Normalize(MEAN, STD),
    ])  # fmt: skip


def image_folder(root: Path, batch: int, workers: int, device: torch.device) -> Forever:
    """ImageFolder and DataLoader as in torchvision's references/classification/train.py."""
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(str(root / "train"), reference_transform())
    sampler = torch.utils.data.RandomSampler(dataset)
    pin = device.type == "cuda"  # as it always does; without a GPU pinning fails with a warning
    loader = torch.utils.data.DataLoader(dataset, batch, sampler=sampler, num_workers=workers, pin_memory=pin)
    return Forever(loader, device)


def timm_loader(root: Path, batch: int, workers: int, device: torch.device) -> Forever:
    """timm's create_loader with its prefetcher, uint8 in the workers, and the same augmentation."""
    from timm.data import create_dataset, create_loader

    loader = create_loader(
        create_dataset("", str(root / "train")), (3, 224, 224), batch, is_training=True, color_jitter=0.0,
        interpolation="bilinear", mean=MEAN, std=STD, num_workers=workers, device=device, use_prefetcher=True,
        pin_memory=device.type == "cuda", persistent_workers=True,
    )  # fmt: skip
    return Forever(loader, device)


def processor_seconds() -> float:
    """Seconds of processor time that this process and the children it has now have used."""
    total, ticks = 0.0, os.sysconf("SC_CLK_TCK")
    pids = [os.getpid()]
    for task in Path("/proc/self/task").iterdir():
        pids += map(int, (task / "children").read_text().split())
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += (int(fields[11]) + int(fields[12])) / ticks
    return total


def measure(batches: Iterator, seconds: float, warm_up: int, device: torch.device) -> tuple[float, float]:
    """(images/s, images a second of processor time) over `seconds`, after `warm_up` batches."""
    for _ in range(warm_up):
        next(batches)
    _wait(device)
    start, used, images = time.perf_counter(), processor_seconds(), 0
    while time.perf_counter() - start < seconds:
        images += len(next(batches)[0])
    _wait(device)
    return images / (time.perf_counter() - start), images / max(processor_seconds() - used, 1e-9)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def decode_rows(root: Path, options: argparse.Namespace) -> list[dict]:
    """One core, one file after another: file bytes to a 224 px training crop."""
    from PIL import Image

    data = ImageNet(root=str(root), augmentation="random_resized_crop", num_workers=0)
    data.setup()
    dataset = data._sets[0]
    assert isinstance(dataset, FolderDataset)
    count = min(len(dataset), 256)
    draws = torch.rand(count, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).numpy()
    transform = reference_transform()

    def ours(decoder: str) -> Callable[[int], object]:
        return lambda i: DECODERS[decoder](dataset.index.read(i), dataset.planner(draws[i]))

    def reference(i: int) -> object:
        with Image.open(dataset.index.path(i)) as image:
            return transform(image.convert("RGB"))

    calls = {REFERENCE: reference, **{decoder: ours(decoder) for decoder in DECODERS}}
    rates: dict[str, list[float]] = {name: [] for name in calls}
    torch.set_num_threads(1)
    for _ in range(options.rounds):
        for name, call in calls.items():
            start, done = time.process_time(), 0
            while time.process_time() - start < options.seconds / 2:
                call(done % count)
                done += 1
            rates[name].append(done / (time.process_time() - start))
    if options.device.type == "cuda":
        for _ in range(options.rounds):
            for name, work, images in device_calls(root, options.batch, options.device):
                rates.setdefault(name, []).append(_call_rate(work, images, options))
    return [_row("decode", name, found, found, rates[REFERENCE], workers=0) for name, found in rates.items()]


def device_calls(root: Path, batch: int, device: torch.device) -> Iterator[tuple[str, Callable[[], object], int]]:
    """(name, work of a GPU on one batch whose files are read, images): decoding, decoding and crops, crops alone."""
    from onlinenorm.data.nvjpeg_loader import crop_all, decode, decode_all, make_batch

    data = ImageNet(root=str(root), decoder="nvjpeg", augmentation="random_resized_crop", num_workers=0)
    data.setup()
    dataset = data._sets[0]
    assert isinstance(dataset, NvjpegDataset)
    count = min(len(dataset), batch)
    encoded = dataset.__getitems__([(0, i) for i in range(count)])
    if device.type == "cuda":
        encoded = encoded._replace(data=encoded.data.pin_memory())
    bounds = encoded.bounds.tolist()
    files = [encoded.data[first:end] for first, end in itertools.pairwise(bounds) if end > first]
    plans_N9 = encoded.plans_N9[encoded.bounds.diff() > 0]
    decoded = [image for image in decode_all(files, device) if image is not None]
    yield "nvjpeg", lambda: decode_all(files, device), len(files)
    yield "nvjpeg and crops", lambda: make_batch(decode(encoded, device), dataset, device), count
    yield "crops alone", lambda: crop_all(decoded, plans_N9, dataset.crop_size, device), len(files)


def _call_rate(call: Callable[[], object], images: int, options: argparse.Namespace) -> float:
    call()
    _wait(options.device)
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < options.seconds / 2:
        call()
        done += images
    _wait(options.device)
    return done / (time.perf_counter() - start)


def providers(root: Path, options: argparse.Namespace) -> dict[str, Callable[[], Batches]]:
    """What there is to measure, each made when its turn comes."""
    rest = options.batch, options.workers, options.device
    found: dict[str, Callable[[], Batches]] = {REFERENCE: lambda: image_folder(root, *rest)}
    found |= {decoder: partial(Ours, root, decoder, *rest) for decoder in DECODERS}
    if options.device.type == "cuda":
        found["nvjpeg"] = lambda: Ours(root, "nvjpeg", *rest)
        found["nvjpeg, 70 %"] = lambda: Ours(root, "nvjpeg", *rest, device_fraction=0.7)
        found[ON_DEVICE] = lambda: Ours(root, "torchvision", *rest, on_device=True, limit_train=CACHED)
    try:
        metadata.version("timm")
        found["timm"] = lambda: timm_loader(root, *rest)
    except metadata.PackageNotFoundError:
        print("timm: skipped, it is not installed (pip install timm)", file=sys.stderr)
    wanted = {REFERENCE, *(options.providers or found)}
    if unknown := wanted - found.keys():
        sys.exit(f"--providers: no {', '.join(sorted(unknown))} here, but {', '.join(found)}")
    return {name: found[name] for name in found if name in wanted}


def loader_rows(root: Path, options: argparse.Namespace) -> list[dict]:
    """Batches on the device, as fast as they come."""
    walls: dict[str, list[float]] = {}
    cores: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        for name, make in providers(root, options).items():
            batches = iter(make())
            # prefetched batches were made before the clock started: let them go by
            wall, core = measure(batches, options.seconds, 2 * options.workers + 2, options.device)
            walls.setdefault(name, []).append(wall)
            cores.setdefault(name, []).append(core)
            del batches
    return [
        _row("loader", name, walls[name], cores[name], walls[REFERENCE], options.workers, cores[REFERENCE])
        for name in walls
    ]


def training_rows(root: Path, options: argparse.Namespace) -> Iterator[dict]:
    """SGD steps on a batch that stays on the device, then fed by each of our loaders."""
    from functools import partial

    from onlinenorm import OnlineNorm2d, models

    on_gpu = options.device.type == "cuda"
    normalizer = partial(OnlineNorm2d) if options.normalizer == "online_clamp" else torch.nn.BatchNorm2d
    network = getattr(models, options.model)(normalizer, compile=on_gpu).to(options.device)
    network = network.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, fused=on_gpu)

    def steps(batches: Iterable) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for images, labels in batches:
            images = images.contiguous(memory_format=torch.channels_last)
            with torch.autocast(options.device.type, torch.bfloat16, enabled=on_gpu):
                loss = torch.nn.functional.cross_entropy(network(images), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            yield images, labels

    resident = (
        torch.rand(options.batch, 3, 224, 224, device=options.device),
        torch.zeros(options.batch, dtype=torch.int64, device=options.device),
    )
    setting = {"model": options.model, "normalizer": options.normalizer, "batch": options.batch}
    alone, _ = measure(steps(itertools.repeat(resident)), options.seconds, 5 if on_gpu else 1, options.device)
    yield _row("training", "resident batch", [alone], [], [alone], 0) | setting
    for name, make in providers(root, options).items():
        rate, _ = measure(steps(make()), options.seconds, 2 * options.workers + 2 if on_gpu else 1, options.device)
        yield _row("training", name, [rate], [], [alone], options.workers) | setting


def _row(stage, provider, walls, cores, base, workers, base_cores=None) -> dict:
    ratio = [a / b for a, b in zip(walls, base, strict=False)]
    row = {
        "stage": stage,
        "provider": provider,
        "workers": workers,
        "images_per_second": round(statistics.median(walls), 1),
        "ratio": round(statistics.median(ratio), 3),
        "spread": round((max(walls) - min(walls)) / statistics.median(walls), 3),
        "rounds": len(walls),
    }
    if cores:
        row["per_core"] = round(statistics.median(cores), 1)
    if base_cores:
        row["ratio_per_core"] = round(statistics.median(a / b for a, b in zip(cores, base_cores, strict=True)), 3)
    return row


def head(options: argparse.Namespace) -> dict:
    """Where, with what and by which command a run was made."""
    from onlinenorm.provenance import environment

    found = environment(world_size=1)
    versions = found["versions"] | {name: _version(name) for name in ("pillow", "timm")}
    processor = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            processor = line.split(":", 1)[1].strip()
            break
    return {
        "device": torch.cuda.get_device_name() if options.device.type == "cuda" else "cpu",
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "versions": versions,
        "git": found["git"],
        "command": found["command"],
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"


def keep(path: Path, run: dict) -> None:
    """Puts a run into the results file in place of the one made on the same hardware."""
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    same = ("device", "processor", "cores")
    runs = [other for other in runs if any(other[key] != run[key] for key in same)] + [run]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"runs": runs}, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores, gpu = len(os.sched_getaffinity(0)), torch.cuda.is_available()
    parser.add_argument("--images", type=Path, default=Path(tempfile.gettempdir()) / "onlinenorm-bench-images")
    parser.add_argument(
        "--unique", type=int, default=512 if gpu else 200, help="different files generated (%(default)s)"
    )
    parser.add_argument("--train", type=int, default=40_960 if gpu else 4000, help="files of an epoch (%(default)s)")
    parser.add_argument("--stages", default="decode,loader,training")
    parser.add_argument("--providers", nargs="+", help=f"of loader and training, beside {REFERENCE} (all)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of a measurement (%(default)s)")
    parser.add_argument("--workers", type=int, default=min(cores, 16))
    parser.add_argument("--batch", type=int, default=256 if gpu else 32)
    parser.add_argument("--model", default="resnet50" if gpu else "resnet18")
    parser.add_argument("--normalizer", default="batch", choices=("batch", "online_clamp"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--draw", action="store_true", help="page and picture of what is recorded, no measurement")
    options = parser.parse_args(arguments)
    options.device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    if not options.draw:
        run = head(options) | {"images": make_set(options.images, options.unique, options.train, 64), "rows": []}
        stages = {"decode": decode_rows, "loader": loader_rows, "training": training_rows}
        for stage in options.stages.split(","):
            for row in stages[stage](options.images, options):
                run["rows"].append(row)
                print(json.dumps(row), flush=True)
                keep(options.output, run)  # after every row: an interrupted run leaves what it measured
    loaders_table.main([str(options.output)])
    try:
        from scripts.bench.loaders_picture import draw
    except ImportError as error:
        print(f"no picture: {error}", file=sys.stderr)
    else:
        draw(options.output)
    print(options.output.with_suffix(".md").read_text().split("\n\n")[1])
    return 0


if __name__ == "__main__":
    run_main(main)
