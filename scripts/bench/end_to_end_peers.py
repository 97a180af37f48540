#!/usr/bin/env python3
"""What end_to_end.py holds train.py against, each in a process of its own, its result as JSON in --output.

step       the bare training step of a network on a batch that stays where it is: bench/training.py's, with SGD; of
           several processes, each with a batch, that of bench/distributed.py
reference  torchvision's references/classification/train.py written out: its ResNet with BatchNorm, its transforms
           and DataLoader. In its favour: bfloat16, channels_last, torch.compile, and no look at the loss at each step
timm       the same loop with timm's loader and its prefetcher
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts._venv import ROOT, run_main

import torch

from scripts.bench import loaders, training

WARM_UP = 20  # steps of the loops, which compile


def step_rate(args: argparse.Namespace) -> float:
    """Images/s of the bare step."""
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    dtype = "bf16" if args.device.type == "cuda" else "fp32"
    compiler = "default" if args.compile else None
    stem = training.STEMS[0]
    network = training.Network(args.normalizer, "auto", stem, compiler, dtype, args.batch, args)
    network.target %= network.model.fc.out_features
    mode = "compile+graph" if args.compile else "graph"
    row = training.Row(network, {"mode": mode if args.device.type == "cuda" else "eager", "optimizer": True})
    for _ in range(3):
        row.measure(args.repeats)
    return 1e3 * args.batch / row.milliseconds


def step_rate_of_processes(args: argparse.Namespace) -> float:
    """Images/s of the bare step of all processes, whose statistics their kernels exchange."""
    on_gpu = args.device.type == "cuda"
    exchange = "online_peers" if on_gpu else "online_global"
    name = args.normalizer.replace("online_clamp", exchange).replace(
        "online_layer_scaling", f"{exchange}_layer_scaling"
    )
    mode = "+".join(["compile"] * args.compile + ["graph"] * on_gpu) or "eager"
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "step.json"
        options = {
            "normalizer": name, "mode": mode, "model": args.model, "size": args.size,
            "batch": args.batch, "dtype": "bf16" if on_gpu else "fp32", "rounds": 3, "repeats": args.repeats,
            "output": output,
        }  # fmt: skip
        words = ["--standalone", f"--nproc-per-node={args.processes}", str(ROOT / "scripts/bench/distributed.py")]
        words += ["--no-check", *(f"--{key}={value}" for key, value in options.items())]
        subprocess.run([sys.executable, "-m", "torch.distributed.run", *words], check=True)
        rows = json.loads(output.read_text())["rows"]
    return next(row["images_per_second"] for row in rows if row["processes"] == args.processes)


def loop_rate(args: argparse.Namespace) -> float:
    """Images/s of whole epochs, after steps that compile."""
    import torchvision

    on_gpu = args.device.type == "cuda"
    make = loaders.timm_loader if args.program == "timm" else loaders.image_folder
    loader = make(args.images, args.batch, args.workers, args.device).loader  # an epoch of it at a time
    model = getattr(torchvision.models, args.model)().to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    criterion = torch.nn.CrossEntropyLoss()
    run = torch.compile(model) if args.compile else model
    rates = []
    for epoch in range(1 + args.epochs):
        model.train()
        began, count = time.perf_counter(), 0
        for number, (images, labels) in enumerate(loader):
            images = images.to(args.device, non_blocking=True, memory_format=torch.channels_last)
            labels = labels.to(args.device, non_blocking=True)
            with torch.autocast(args.device.type, torch.bfloat16, enabled=on_gpu):
                loss = criterion(run(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            count += len(images)
            if number % 50 == 0:
                loss.item()
            if epoch == 0 and number == WARM_UP:
                break
        loss.item()
        rates.append(count / (time.perf_counter() - began))
    return statistics.harmonic_mean(rates[1:])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", choices=("step", "reference", "timm"))
    parser.add_argument("--normalizer", default="batch", choices=list(training.NORMALIZERS), help="of step")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--size", type=int, default=224, help="pixels a side, of step")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--repeats", type=int, default=20, help="steps a round, of step")
    parser.add_argument("--processes", type=int, default=1, help="of step, each with a batch")
    parser.add_argument("--images", type=Path, help="folder of train/CLASS/*, of the loops")
    parser.add_argument("--epochs", type=int, default=1, help="of the loops, after some steps (%(default)s)")
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(arguments)
    torch.backends.cudnn.benchmark = True
    step = step_rate if args.processes == 1 else step_rate_of_processes
    rate = (step if args.program == "step" else loop_rate)(args)
    args.output.write_text(json.dumps({"images_per_second": rate}) + "\n")
    return 0


if __name__ == "__main__":
    run_main(main)
