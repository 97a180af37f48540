"""Time of each single-read kernel at each norm site of ResNet-50, for several tunings, and of the parts of a step.

    python scripts/bench/kernels.py                                # every tuning in use, one Hopper GPU, minutes
    python scripts/bench/kernels.py --tuning 128,3,16,400 ...      # and others: threads a role, stages, chunk, rows

What TUNINGS of onlinenorm/ops/fused/tiling.py is chosen from. Times are microseconds a call in CUDA graphs over
rotating inputs; bytes count every tensor once. Each tuning's results are compared with the two-pass kernels' first, and
with themselves a second time: one that differs is told and left out. The parts of a compiled step come from torch's
profiler. scripts/bench/kernels_table.py makes the page.
"""

import argparse
import itertools
import statistics
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts._venv import run_main

import torch

from onlinenorm.ops.fused import single_read, two_pass
from onlinenorm.ops.fused.tiling import TUNINGS, WIDTH, Tuning
from onlinenorm.ops.spec import NormSpec
from scripts.bench import common, norm_sites, training

SPECS = {name: NormSpec(error_compensation=name) for name in ("clamp", "layer_scaling")}
CHECKED = ((5, 64, 9, False), (37, 128, 28, True), (70, 64, 56, False), (130, 512, 7, True), (33, 128, 3, True))
PARTS = (  # of a step, by what a kernel's name holds; the first match counts
    ("norm: single-read kernels", ("online_norm",)),
    ("max-pool", ("max_pool",)),
    ("convolutions and matrix products", ("sm90_", "cutlass", "nvjet", "cudnn", "nhwcAddPadding", "splitK", "gemm")),
    ("memsets", ("Memset",)),
    ("norm: fills of messages", ("FillFunctor",)),
    ("casts of weights", ("_to_copy",)),
    ("norm: Triton", ("batch_norm", "threshold", "relu", "fused_forward", "fused_backward")),
)


def name_of(tuning: Tuning) -> str:
    return f"{tuning.group},{tuning.stages},{tuning.chunk},{tuning.rows}"


def part_of(kernel: str) -> str:
    return next((part for part, marks in PARTS if any(mark in kernel for mark in marks)), "other")


def drawn(count: int, *shape: int) -> list[torch.Tensor]:
    draws = torch.randn((count, *shape), device="cuda", dtype=torch.bfloat16)
    return [draw.contiguous(memory_format=torch.channels_last) for draw in draws]


class Use:
    """Context in which every launch takes one tuning."""

    def __init__(self, tuning: Tuning | None):
        self.tuning = tuning

    def __enter__(self):
        self.usual = single_read.tuning_for, single_read.shortcut_tuning_for
        single_read.tuning_for = single_read.shortcut_tuning_for = lambda *_: self.tuning

    def __exit__(self, *_):
        single_read.tuning_for, single_read.shortcut_tuning_for = self.usual


def step(path, spec, tensors, weight, bias, state) -> list[torch.Tensor]:
    """All that forward and backward of one layer give, from copies of ``state``."""
    x, grad, residual, extra = tensors
    mean, var, u, v = (t.clone() for t in state)
    y, tables, kept = path.forward(x, residual, weight, bias, mean, var, spec, True)
    if path is single_read:
        found = path.backward(grad, extra, x, kept, weight, bias, tables, u, v, spec, True)
    else:
        out = None if residual is None else y
        found = path.backward(
            grad, extra, x, out, weight, bias, tables, kept, u, v, spec, True, residual is not None
        )  # fmt: skip
    return [y, mean, var, u, v, *(t for t in found if t is not None)]


def agrees(tuning: Tuning, spec: NormSpec) -> bool:
    """Whether a tuning gives what two passes give, and the same bits twice."""
    for samples, channels, side, residual in CHECKED:
        x, grad, other, extra = drawn(4, samples, channels, side, side)
        tensors = (x, grad, other, extra) if residual else (x, grad, None, None)
        weight, bias = torch.rand(2, channels, device="cuda") + 0.5
        state = list(torch.rand((4, channels), device="cuda") * 0.1 + 0.05)
        truth = step(two_pass, spec, tensors, weight, bias, state)
        with Use(tuning):
            found, again = (step(single_read, spec, tensors, weight, bias, state) for _ in range(2))
        far = max(common._distance(a, b) for a, b in zip(found, truth, strict=True))
        if not far < 2e-2 or not all(torch.equal(a, b) for a, b in zip(found, again, strict=True)):
            where = f"{spec.error_compensation}, {samples} x {channels} x {side}"
            print(f"{name_of(tuning)} is wrong at {where}: {far:.1e}", flush=True)
            return False
    return True


def microseconds(call, sets: list, repeats: int) -> float:
    """Median time of ``call(*set)`` over rotating sets."""
    replay = common.captured(lambda: [call(*tensors) for tensors in sets])
    times = common.timed(replay, torch.device("cuda"), repeats + 2)[2:]
    return round(1e3 * statistics.median(times) / len(sets), 1)


def measure(site, batch: int, tunings: list[Tuning], spec: NormSpec, repeats: int) -> list[dict]:
    """A row for each direction of one site."""
    channels, side, residual, relu = site
    size = 2 * batch * channels * side * side
    copies = max(1, min(6, int(norm_sites.ROTATE // size)))
    absent = () if residual else (None, None)
    sets = [(*drawn(4 if residual else 2, batch, channels, side, side), *absent) for _ in range(copies)]
    weight, bias = torch.ones(channels, device="cuda"), torch.zeros(channels, device="cuda")
    mean, var, u, v = (torch.full((channels,), float(k == 1), device="cuda") for k in range(4))

    def forward(path):
        return lambda x, _, other, __: path.forward(x, other, weight, bias, mean, var, spec, relu)

    def backward(path, saved):
        def call(x, grad, other, extra):
            y, tables, kept = saved[id(x)]
            if path is single_read:
                return path.backward(grad, extra, x, kept, weight, bias, tables, u, v, spec, relu)
            out = y if residual and relu else None
            return path.backward(grad, extra, x, out, weight, bias, tables, kept, u, v, spec, relu, residual and relu)

        return call

    tensors = {"forward": 2 + residual, "backward": 3 + (2 if residual else 0)}
    rows = []
    for direction in ("forward", "backward"):
        times = {}
        for tuning in (None, *tunings):
            path = two_pass if tuning is None else single_read
            saved = {id(given[0]): forward(path)(*given) for given in sets} if direction == "backward" else None
            call = forward(path) if saved is None else backward(path, saved)
            with Use(tuning):
                times["two_pass" if tuning is None else name_of(tuning)] = microseconds(call, sets, repeats)
        row = {"error_compensation": spec.error_compensation, "batch": batch, "channels": channels, "side": side}
        row |= {"residual": residual, "direction": direction}
        rows.append({**row, "bytes": tensors[direction] * size, "two_pass": times.pop("two_pass"),
                     "microseconds": times})  # fmt: skip
    return rows


def parts(normalizer: str, batch: int, size: int) -> dict[str, dict]:
    """Kernels and milliseconds of each part of a compiled step."""
    args = argparse.Namespace(device="cuda", model="resnet50", size=size)
    backend = "torch" if normalizer == "batch" else "fused"
    network = training.Network(normalizer, backend, training.STEMS[0], "default", "bf16", batch, args)
    for _ in range(5):
        network.step(captured=True)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        network.step(captured=True)
        torch.cuda.synchronize()
    found: dict[str, dict] = defaultdict(lambda: {"kernels": 0, "milliseconds": 0.0})
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            entry = found[part_of(event.name)]
            entry["kernels"] += 1
            entry["milliseconds"] += event.device_time / 1e3
    order = sorted(found, key=lambda part: -found[part]["milliseconds"])
    return {part: {**found[part], "milliseconds": round(found[part]["milliseconds"], 3)} for part in order}


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 32])
    parser.add_argument("--size", type=int, default=224, help="pixels a side of the network's input")
    parser.add_argument("--tuning", nargs="+", default=[], metavar="G,S,C,R", help="besides those in use")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("results/bench_kernels.json"))
    args = parser.parse_args(argv)
    if not (torch.cuda.is_available() and single_read.supports_device(0)):
        parser.error("the single-read kernels need a GPU of the Hopper generation or later")
    others = [Tuning(*map(int, text.split(","))) for text in args.tuning]
    tunings = list(dict.fromkeys([*(row[-1] for row in TUNINGS), *others]))
    torch.backends.cudnn.benchmark = True
    device = torch.device("cuda")
    fit = {name: [tuning for tuning in tunings if agrees(tuning, spec)] for name, spec in SPECS.items()}
    results = {**common.head(device), "copy_bytes_per_second": norm_sites.copy_bandwidth(device, 20)}
    results |= {"step": {}, "kernels": []}
    sites = [site for site in norm_sites.sites("resnet50", args.size) if site[0] % WIDTH == 0]
    for (name, spec), batch in itertools.product(SPECS.items(), args.batch):
        for site in sites:
            for row in measure(site, batch, fit[name], spec, args.repeats):
                results["kernels"].append(row)
                print({key: value for key, value in row.items() if key != "bytes"}, flush=True)
            common.write(args.output, results)
    for normalizer in ("online_clamp", "online_layer_scaling", "batch"):
        results["step"][normalizer] = parts(normalizer, args.batch[0], args.size)
        print(normalizer, results["step"][normalizer], flush=True)
        common.write(args.output, results)


if __name__ == "__main__":
    run_main(main)
