#!/usr/bin/env python3
"""Memory of the loader's workers over epochs of an index as long as ImageNet's, and how fast a run starts with it.

    scripts/bench/loader_memory.py                 1,281,167 images, 3 epochs: some minutes on two cores

The index is as long as ImageNet's, all of it leads to one tiny image, and of 64 images one is decoded, so that an epoch
takes a minute and not an hour; sampling, index, reading and the workers are those of training. PSS counts shared pages
by their share, USS only a worker's own, among them pages that its reference counts have copied. Both are read as they
are, and again (`in_use`) after the workers have handed back what they had freed and glibc's malloc kept for later: that
store fills in the first epoch, to a level that depends on the order of large allocations, and is no growth of what is
held.
"""

import argparse
import ctypes
import io
import json
import os
import signal
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts._venv import ROOT, run_main

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

from onlinenorm.data import ImageNet, archives
from onlinenorm.data.datasets import FolderDataset
from onlinenorm.data.index import pack_names
from onlinenorm.data.index_cache import cached_arrays
from onlinenorm.data.sampler import GlobalBatchSampler
from onlinenorm.provenance import environment, hardware

TRAIN, VAL, CLASSES = 1_281_167, 50_000, 1000


class Sparing(FolderDataset):
    """A FolderDataset that reads every file and decodes one of 64."""

    def decode(self, index: int, draws_K: np.ndarray) -> np.ndarray:
        if index % 64 == 0:
            return super().decode(index, draws_K)
        assert self.index.read(index) and self.index.relative_path(index)
        return np.zeros((1, self.crop_size, self.crop_size, 3), dtype=np.uint8)


def long_index(root: Path, train: int, val: int, classes: int) -> Path:
    """A folder of two shards of one image each, with a cached index that says they hold `train` and `val` images."""
    content = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 100, 50)).save(content, "JPEG")
    for split, count in (("train", train), ("val", val)):
        shard = root.resolve() / f"{split}.tar"
        with tarfile.open(shard, "w") as tar:
            member = tarfile.TarInfo("n00000000/image.JPEG")
            member.size = len(content.getvalue())
            tar.addfile(member, io.BytesIO(content.getvalue()))
        labels = np.sort(np.arange(count, dtype=np.int32) % classes)
        arrays = {
            **pack_names([f"n{label:08d}/n{label:08d}_{n}.JPEG" for n, label in enumerate(labels.tolist())]),
            "labels": labels,
            "sizes": np.full(count, len(content.getvalue())),
            "places": np.zeros(count, dtype=np.int32),
            "starts": np.full(count, 512),
            "class_names": np.array([f"n{label:08d}" for label in range(classes)]),
        }
        cached_arrays(shard.parent, split, archives.files_key([shard]), partial(dict, arrays))
    return root


def memory(pids: list[int]) -> dict[str, float]:
    """PSS and USS of processes together, MiB."""
    total = {"pss": 0.0, "uss": 0.0}
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
            name, kilobytes = line.split(":")
            if name == "Pss":
                total["pss"] += int(kilobytes.split()[0]) / 1024
            elif name.startswith("Private_") and name != "Private_Hugetlb":
                total["uss"] += int(kilobytes.split()[0]) / 1024
    return total


def hand_back(*_) -> None:
    """Freed memory back to the system (glibc)."""
    ctypes.CDLL(None).malloc_trim(0)


def memory_now(pids: list[int]) -> dict[str, float]:
    """`memory` as it is, and what of it is in use; the workers must have `hand_back` as their handler of SIGUSR2."""
    found = memory(pids)
    for pid in pids:
        os.kill(pid, signal.SIGUSR2)
    time.sleep(3)  # workers act on it between two batches
    return found | {f"{key}_in_use": value for key, value in memory(pids).items()}


def measure(root: Path, epochs: int, workers: int) -> dict:
    """Seconds to the first batch, and the workers' memory early in the first epoch and at the end of each."""
    start = time.perf_counter()
    data = ImageNet(root=str(root), num_workers=workers, batch_size=1024, image_size=16, decoder="pillow",
                    augmentation="random_resized_crop")  # fmt: skip
    data.setup()
    assert data.fingerprint
    ready = time.perf_counter() - start
    data._sets[0].__class__ = Sparing
    loader = data.train_dataloader()
    assert isinstance(loader, DataLoader) and isinstance(loader.batch_sampler, GlobalBatchSampler)
    prepare = loader.worker_init_fn or (lambda worker: None)

    def start_worker(worker: int) -> None:
        prepare(worker)
        signal.signal(signal.SIGUSR2, hand_back)

    loader.worker_init_fn = start_worker
    found: dict = {"start_up_seconds": round(ready, 2), "images": data.train_images, "workers": workers, "epochs": []}
    for epoch in range(epochs):
        loader.batch_sampler.set_epoch(epoch)
        iterator: Any = iter(loader)  # whose workers are torch's own affair
        for number, _ in enumerate(iterator):
            if epoch == 0 and number == 0:
                found["first_batch_seconds"] = round(time.perf_counter() - start, 2)
            if epoch == 0 and number == 8 * workers:
                found["early"] = memory_now([worker.pid for worker in iterator._workers])
        found["epochs"].append(memory_now([worker.pid for worker in iterator._workers]))
        print(json.dumps(found), flush=True)
    found |= growth(found)
    return found


def growth(found: dict) -> dict[str, dict[str, float]]:
    """Growth from the end of the first epoch to that of the last, and from the first batches."""

    def since(start: dict[str, float]) -> dict[str, float]:
        return {key: round(found["epochs"][-1][key] / value - 1, 4) for key, value in start.items()}

    return {"growth": since(found["epochs"][0]), "growth_since_first_batches": since(found["early"])}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=TRAIN)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "loader_memory.json")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        # in a process of its own: millions of freed strings here would be taken for the workers' memory
        with ProcessPoolExecutor(1) as other:
            root = other.submit(long_index, Path(folder), options.images, VAL, CLASSES).result()
        found = measure(root, options.epochs, options.workers)
    about = environment(world_size=1)
    found = {"hardware": hardware(), **{key: about[key] for key in ("versions", "git", "command")}, **found}
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    for key in ("growth", "growth_since_first_batches"):
        figures = ", ".join(f"{name.replace('_', ' ')} {value:+.2%}" for name, value in found[key].items())
        print(f"{key.replace('_', ' ')}: {figures}")
    print(f"start-up {found['start_up_seconds']} s; written to {options.output}")
    return 0


if __name__ == "__main__":
    run_main(main)
