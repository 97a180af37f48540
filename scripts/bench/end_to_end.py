#!/usr/bin/env python3
"""Whole epochs through train.py, against the bare training step of the same call and against others' training loops.

    scripts/bench/end_to_end.py --seconds 560              # ResNet-50 from JPEG files and from the device's memory
    scripts/bench/end_to_end.py --data cifar10 --peers     # ResNet-20 runs side by side, added to the same file
    scripts/bench/end_to_end.py --data                     # the peers alone, the same
    scripts/bench/end_to_end.py --draw                     # the picture alone
    scripts/bench/end_to_end.py --processes 4 --output results/end_to_end_4.json --batch 128 --data jpeg --peers
                                                           # on four GPUs, against the step of bench/distributed.py

Every row is train.py in a process of its own, its real command line, or a peer (end_to_end_peers.py); the bare step of
its normalizer, compiled, captured, with SGD, is measured before it in the same round, for as many steps as an epoch
has (a GPU lowers its clock under a load that lasts: an H200 makes 2 % more of a burst of 20), and `ratio` is the median
over rounds of one over the other. Rates are those of epochs after the first, which compiles (a peer's first is cut
short: 20 steps):

data        images_per_second
jpeg        training images over the seconds of training, as metrics.csv has them: from an epoch's start to its last
            step, validation and checkpoints left out. Files of ImageNet's sizes, see jpeg_set.py
on_device   the same, from decoded images in the device's memory: 71,680 take 43 GB of it, and an epoch's start weighs
            18 times as much as in one of ImageNet's 1.28 million. Two epochs, as decoding takes as long as they do
cifar10     all runs together: training images over seconds while all of them train, validation and checkpoints
            included. 50,000 + 10,000 images of CIFAR's size; the step is that of one process

`wall_images_per_second` includes validation and checkpoints in every row. `seconds` are those of the whole process,
from its start. The file is written after every row; rows that --seconds leaves no time for are listed in not_run.
"""

import argparse
import csv
import importlib.util
import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts._venv import ROOT, run_main

import torch

from onlinenorm.report.settings import load_spec
from scripts.bench import common
from scripts.bench.jpeg_set import make_set
from scripts.bench.training import NORMALIZERS

CORES = len(os.sched_getaffinity(0))
RESULTS = ROOT / "results" / "end_to_end.json"
TRAIN = "train.py"
PEERS = {"reference": "torchvision reference loop", "timm": "timm loader, same loop"}
DATA = ("jpeg", "on_device", "cifar10")
CIFAR_IMAGES, CIFAR_BATCH, CIFAR_MODEL = (50_000, 10_000), 128, "cifar_resnet20"
_KEY = ("program", "normalizer", "data", "decoder", "batch", "runs")
_SAME = ("device", "torch", "triton", "cores", "processes")  # of measurements that may stand in one file
_POLL = 0.05  # seconds

Ends = list[tuple[float, int]]  # the moments at which a run's epochs ended, seconds, and its optimizer steps by then


class NotRun(Exception):
    """Why a row could not be measured."""


class Bench:
    """The processes of one call: where they run, and until when."""

    def __init__(self, args: argparse.Namespace, scratch: Path):
        self.args, self.scratch = args, scratch
        self.end = time.perf_counter() + args.seconds
        self.started = 0

    def start(self, command: list[str], beside: int = 1) -> tuple[subprocess.Popen, Path]:
        """A process of its own session, one of `beside`, and the file of what it prints."""
        self.started += 1
        # else each of them starts as many compiling processes as there are cores
        threads = {"TORCHINDUCTOR_COMPILE_THREADS": str(max(1, CORES // beside))} if beside > 1 else {}
        log = self.scratch / f"{self.started}.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, env=os.environ | threads, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        return process, log

    def peer(self, program: str, **options) -> float:
        """Images/s of a program of end_to_end_peers.py."""
        output = self.scratch / "peer.json"
        output.unlink(missing_ok=True)
        options |= {"device": self.args.device, "output": output}
        words = [f"--{name}={value}" for name, value in options.items()]
        words.append("--compile" if self.args.compile else "--no-compile")
        self.follow([self.start(["scripts/bench/end_to_end_peers.py", program, *words])], [])
        return json.loads(output.read_text())["images_per_second"]

    def train(self, overrides: list[str], runs: int) -> list[tuple[Path, Ends]]:
        """Runs of train.py side by side, a seed each: their folders, and the ends of their epochs."""
        folders = [Path(tempfile.mkdtemp(dir=self.scratch), "run") for _ in range(runs)]
        compiled = str(self.args.compile).lower()
        captured = str(self.args.device == "cuda").lower()
        common_words = [f"model.compile={compiled}", f"trainer.cuda_graph={captured}", *overrides, *self.args.set]
        started = [
            self.start(["train.py", *common_words, f"seed={seed}", f"run_dir={folder}"], runs)
            for seed, folder in enumerate(folders)
        ]
        return list(zip(folders, self.follow(started, folders), strict=True))

    def follow(
        self, started: list[tuple[subprocess.Popen, Path]], folders: list[Path]
    ) -> list[list[tuple[float, int]]]:
        """(seconds, steps) at the end of every epoch of every run, until all processes have ended; NotRun otherwise."""
        ends: list[list[tuple[float, int]]] = [[] for _ in folders]
        try:
            while True:
                running = any(process.poll() is None for process, _ in started)
                for folder, seen in zip(folders, ends, strict=True):
                    rows = read_metrics(folder)
                    if len(rows) > len(seen):
                        seen.append((time.perf_counter(), int(rows[len(seen)]["step"])))
                for process, log in started:
                    if process.returncode:
                        raise NotRun(_last_line(log) or f"exit code {process.returncode}")
                if not running:
                    return ends
                if time.perf_counter() > self.end:
                    raise NotRun("out of time")
                time.sleep(_POLL)
        finally:
            for process, _ in started:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


def read_metrics(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv so far."""
    try:
        return list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    except FileNotFoundError:
        return []


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    print("\n".join(lines[-30:]), file=sys.stderr)
    return lines[-1] if lines else ""


def together(ends: list[Ends], batch: int) -> float:
    """Images/s of all runs while all are past their first epoch and none has ended, by when their epochs ended."""
    begin, end = max(seen[0][0] for seen in ends), min(seen[-1][0] for seen in ends)
    if begin >= end:
        raise NotRun("a run ended before another had trained an epoch: give more --cifar-epochs")
    steps = sum(_steps_at(seen, end) - _steps_at(seen, begin) for seen in ends)
    return batch * steps / (end - begin)


def _steps_at(seen: Ends, moment: float) -> float:
    for (t0, s0), (t1, s1) in itertools.pairwise(seen):
        if t0 <= moment <= t1:
            return s0 + (s1 - s0) * (moment - t0) / (t1 - t0)
    raise AssertionError("within the run's epochs")


def jpeg_row(bench: Bench, key: dict) -> dict[str, float]:
    args = bench.args
    words = [
        f"experiment={args.experiment}", f"model={args.model}", f"normalizer={key['normalizer']}",
        f"data.root={args.images}", f"data.image_size={args.size}", f"data.decoder={key['decoder']}",
        f"data.num_workers={args.workers}", f"recipe.batch_size={args.batch * args.processes}",
        "recipe.milestones=[]", "recipe.lr=0.01", f"trainer.devices={args.processes}",
    ]  # fmt: skip
    if key["data"] == "on_device":
        words += ["data.on_device=true", f"data.limit_train={min(args.train, args.on_device)}", "recipe.epochs=2"]
    else:
        words.append(f"recipe.epochs={args.epochs}")
    if args.device == "cpu":
        words.append("trainer=cpu")
    ((folder, seen),) = bench.train(words, 1)
    rates = [float(row["images_per_second"]) for row in read_metrics(folder)[1:]]
    return {
        "images_per_second": statistics.harmonic_mean(rates),
        "wall_images_per_second": args.batch * args.processes * (seen[-1][1] - seen[0][1]) / (seen[-1][0] - seen[0][0]),
    }


def cifar_row(bench: Bench, key: dict) -> dict[str, float]:
    args = bench.args
    images = [args.cifar_train, CIFAR_IMAGES[1] * args.cifar_train // CIFAR_IMAGES[0]]
    words = [
        "experiment=cifar10", "data=synthetic", f"normalizer={key['normalizer']}", "data.on_device=true",
        f"data.num_train={images[0]}", f"data.num_val={images[1]}", f"recipe.batch_size={CIFAR_BATCH}",
        f"recipe.epochs={args.cifar_epochs}", "recipe.milestones=[]", "recipe.lr=0.01",
    ]  # fmt: skip
    if args.device == "cpu":
        words.append("trainer=cpu")
    runs = bench.train(words, key["runs"])
    rate = together([seen for _, seen in runs], CIFAR_BATCH)
    metrics = [[float(row["images_per_second"]) for row in read_metrics(folder)[1:]] for folder, _ in runs]
    return {
        "images_per_second": rate,
        "wall_images_per_second": rate,
        "training_images_per_second": sum(map(statistics.harmonic_mean, metrics)),
    }


def peer_row(bench: Bench, key: dict) -> dict[str, float]:
    args = bench.args
    program = next(name for name, title in PEERS.items() if title == key["program"])
    if program == "timm" and importlib.util.find_spec("timm") is None:
        raise NotRun("timm is not installed")
    return {
        "images_per_second": bench.peer(
            program, model=args.model, batch=args.batch, images=args.images, epochs=1, workers=args.workers,
        )
    }  # fmt: skip


def keys_of(args: argparse.Namespace) -> Iterator[dict]:
    """What each row is of, the deciding ones first."""
    for normalizer in args.normalizer:
        for data in args.data:
            if data == "cifar10":
                yield dict(zip(_KEY, (TRAIN, normalizer, data, "none", CIFAR_BATCH, args.runs), strict=True))
                continue
            for decoder in args.decoder if data == "jpeg" else args.decoder[:1]:
                yield dict(zip(_KEY, (TRAIN, normalizer, data, decoder, args.batch, 1), strict=True))
    for peer in args.peers:
        yield dict(zip(_KEY, (PEERS[peer], "batch", "jpeg", "pillow", args.batch, 1), strict=True))


def measure(args: argparse.Namespace, results: dict, scratch: Path) -> None:
    """Fills `results` row by row, round by round."""
    bench = Bench(args, scratch)
    rounds: dict[tuple, list[dict[str, float]]] = {}
    for _ in range(args.rounds):
        steps: dict[tuple, float] = {}
        for key in keys_of(args):
            began, measured = time.perf_counter(), tuple(key.values())
            try:
                network = (
                    (CIFAR_MODEL, 32, CIFAR_BATCH) if key["data"] == "cifar10" else (args.model, args.size, args.batch)
                )
                of_step = key["normalizer"], *network
                if of_step not in steps:
                    options = dict(zip(("normalizer", "model", "size", "batch"), of_step, strict=True))
                    options |= {"repeats": args.repeats, "processes": args.processes}
                    steps[of_step] = bench.peer("step", **options)
                    print(f"bare step of {of_step}: {steps[of_step]:,.0f} images/s, "
                          f"{time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip
                    began = time.perf_counter()
                row = cifar_row if key["data"] == "cifar10" else jpeg_row if key["program"] == TRAIN else peer_row
                figures = row(bench, key) | {"step_images_per_second": steps[of_step]}
            except NotRun as error:
                if measured not in rounds:
                    results["not_run"] = [*without(results["not_run"], key), {**key, "why": str(error)}]
                print(f"{key}: not run: {error}", flush=True)
                continue
            figures["ratio"] = figures["images_per_second"] / steps[of_step]
            figures["seconds"] = time.perf_counter() - began
            rounds.setdefault(measured, []).append(figures)
            of_rounds = rounds[measured]
            record = {name: statistics.median(figures[name] for figures in of_rounds) for name in figures}
            record = {name: round(value, 3 if name == "ratio" else 1) for name, value in record.items()}
            results["rows"] = [
                *without(results["rows"], key),
                {**key, **record, "model": of_step[1], "rounds": len(of_rounds)},
            ]
            results["not_run"] = without(results["not_run"], key)
            print(results["rows"][-1], flush=True)
            common.write(str(args.output), results)


def without(rows: list[dict], key: dict) -> list[dict]:
    """The rows that are of something else."""
    return [row for row in rows if any(row[name] != key[name] for name in _KEY)]


def earlier(path: Path, head: dict) -> dict:
    """What a file holds already, where it was measured on the same machine; else an empty one.

    Rows of another commit say which, and their command, until they are measured anew.
    """
    former = json.loads(path.read_text()) if path.exists() else {}
    if any(former.get(name) != head.get(name) for name in _SAME):
        return {**head, "not_run": [], "rows": []}
    if former["commit"] != head["commit"]:
        origin = {name: former[name] for name in ("commit", "command")}
        return {**former, **head, "rows": [origin | row for row in former["rows"]]}
    commands = [former["command"]] if head["command"] in former["command"] else [former["command"], head["command"]]
    return {**former, "command": " && ".join(commands)}


def draw(path: Path) -> Path:
    """The picture beside a results file: a bar a row, and a mark at its bare step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    spec, results = load_spec(), json.loads(path.read_text())
    panels = [
        ("ImageNet's sizes", [row for row in results["rows"] if row["data"] != "cifar10"]),
        ("CIFAR-10's sizes", [row for row in results["rows"] if row["data"] == "cifar10"]),
    ]
    panels = [(title, rows) for title, rows in panels if rows]
    heights = [1 + len(rows) for _, rows in panels]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(9, 1 + 0.5 * sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for ax, (title, rows) in zip(axes[:, 0], panels, strict=True):
        names = []
        for y, row in enumerate(rows):
            ours = row["program"] == TRAIN
            rate, step = row["images_per_second"], row["step_images_per_second"]
            ax.barh(y, rate, 0.7, color=spec.row(row["normalizer"]).colour if ours else "#B0B0B0")
            ax.plot([step, step], [y - 0.4, y + 0.4], color="black", label="bare step" if y == 0 else None)
            ax.annotate(f" {rate:,.0f} ({row['ratio']:.2f})", (max(rate, step), y), va="center", fontsize=8)
            source = {"jpeg": f"JPEG files, {row['decoder']}", "on_device": "on the device"}
            where = source.get(row["data"], f"{row['runs']} runs side by side")
            names.append(f"{spec.row(row['normalizer']).label if ours else row['program']}\n{where}")
        ax.set_yticks(range(len(rows)), names, fontsize=8)
        ax.invert_yaxis()
        ax.set_xlim(0, 1.25 * max(max(row["images_per_second"], row["step_images_per_second"]) for row in rows))
        ax.set_title(f"{', '.join(sorted({row['model'] for row in rows}))}, {title}", fontsize=9, loc="left")
        ax.legend(fontsize=8, loc="lower right")
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("images/s over whole epochs (over the bare step)", fontsize=9)
    several = f"{results['processes']} x " if "processes" in results else ""
    figure.suptitle(f"{several}{results['device']}, {results['cores']} cores", fontsize=10)
    figure.savefig(path.with_suffix(".png"), dpi=130)
    plt.close(figure)
    return path.with_suffix(".png")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = Path(tempfile.gettempdir()) / "onlinenorm-bench-images"
    parser.add_argument("--normalizer", nargs="+", default=["online_clamp", "batch"], choices=list(NORMALIZERS))
    parser.add_argument("--data", nargs="*", default=["jpeg", "on_device"], choices=DATA)
    parser.add_argument("--decoder", nargs="+", default=["nvjpeg"], help="of jpeg; the first is on_device's as well")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--runs", type=int, default=15, help="of cifar10, side by side (%(default)s)")
    parser.add_argument("--experiment", default="table1", help="of jpeg and on_device")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--size", type=int, default=224, help="pixels a side")
    parser.add_argument("--batch", type=int, default=256, help="of jpeg and on_device")
    parser.add_argument("--processes", type=int, default=1, help="of a run, a GPU and a batch each; not of cifar10")
    parser.add_argument("--epochs", type=int, default=3, help="of jpeg; the first is not counted (%(default)s)")
    parser.add_argument("--cifar-epochs", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--cifar-train", type=int, default=CIFAR_IMAGES[0], help="images (%(default)s)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="networks and steps")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more overrides of train.py")
    parser.add_argument("--images", type=Path, default=folder, help="generated there, kept for the next call")
    parser.add_argument("--unique", type=int, default=512, help="different files (%(default)s)")
    parser.add_argument("--train", type=int, default=81_920, help="files of an epoch (%(default)s)")
    parser.add_argument("--on-device", type=int, default=71_680, help="of them for on_device (%(default)s)")
    parser.add_argument("--workers", type=int, default=min(CORES, 16))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=280, help="bare steps in a row, three times (%(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="ends what runs then (none)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--output", type=Path, default=RESULTS, help="the picture lands beside it")
    parser.add_argument("--draw", action="store_true", help="the picture of what is recorded, no measurement")
    args = parser.parse_args(arguments)
    if not args.draw:
        common.check_device(parser, args)
        if args.processes > 1 and "cifar10" in args.data:
            parser.error("--processes are of jpeg and on_device: runs of cifar10 stand side by side on one GPU")
        if args.epochs < 2 or args.cifar_epochs < 2:
            parser.error("the first epoch is not counted: --epochs and --cifar-epochs are at least 2")
        began = time.perf_counter()
        several = {"processes": args.processes} if args.processes > 1 else {}
        results = earlier(args.output, common.head(torch.device(args.device)) | {"cores": CORES} | several)
        if args.peers or set(args.data) - {"cifar10"}:
            results["images"] = make_set(args.images, args.unique, args.train, 64)
            print(f"files: {time.perf_counter() - began:.0f} s", flush=True)
            args.seconds -= time.perf_counter() - began
        scratch = Path(tempfile.mkdtemp(prefix="onlinenorm-end-to-end-"))
        try:
            measure(args, results, scratch)
        finally:
            common.write(str(args.output), results)
            shutil.rmtree(scratch, ignore_errors=True)
    if json.loads(args.output.read_text())["rows"]:
        print(draw(args.output))
    return 0


if __name__ == "__main__":
    run_main(main)
