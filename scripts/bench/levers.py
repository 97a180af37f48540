"""What each lever saves of a compiled training step of ResNet-50: milliseconds predicted and measured, one run.

    python scripts/bench/levers.py --leave-one-out                # what a step loses without each, one Hopper GPU
    python scripts/bench/levers.py --batch 256 --lever shortcut --base max_pool   # some, on top of others

Steps with and without a lever are timed in turn, round after round, forward and backward in one CUDA graph, bf16. They
share a network; levers that act at its capture come first, the others compile it anew, a minute each. What
``--seconds`` leaves no time to compile is listed as not run; results and the table beside them are written after every
row. Predictions are those of the byte budget made before any was built.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts._venv import run_main

import torch

from onlinenorm.models.blocks import BasicBlock, Bottleneck
from onlinenorm.ops.fused import inductor_pass, memset_nodes
from onlinenorm.ops.fused.nvrtc import Kernel
from scripts.bench import common, levers_table, training


def _set_max_pool(network: training.Network, on: bool) -> None:
    network.model.fuse_max_pool = on


def _set_shortcut(network: training.Network, on: bool) -> None:
    for block in network.model.modules():
        if isinstance(block, (BasicBlock, Bottleneck)):
            block.fuse_shortcut = on


def _set_early(_, on: bool) -> None:
    Kernel.starts_early = on


def _set_memsets(_, on: bool) -> None:
    memset_nodes.MOST_BYTES = 4096 if on else -1


def _set_casts(network: training.Network, on: bool) -> None:
    network.casts_at_once = on


def _set_stem(network: training.Network, on: bool) -> None:
    network.model.conv1.stem = "space_to_depth_2x4" if on else "space_to_depth"


def _set_blocks(network: training.Network, on: bool) -> None:
    if not on:  # whatever `stem` says
        network.model.conv1.stem = "conv7x7"


SWITCHES: dict[str, Callable[[training.Network, bool], None]] = {
    "early": _set_early,
    "memsets": _set_memsets,
    "casts": _set_casts,
    "stem": _set_stem,
    "blocks": _set_blocks,  # behind `stem`
    "shortcut": _set_shortcut,
    "max_pool": _set_max_pool,
}
BASE = "blocks", "shortcut", "max_pool"
WHAT = {
    "max_pool": "first norm, ReLU and max-pool in one kernel each way",
    "shortcut": "the shortcut's norm inside the kernel of the block's last norm, each way",
    "early": "norm kernels begin before the kernel in front of them has ended",
    "memsets": "small memsets of the graph as kernels",
    "stem": "the first convolution as 4x3 on 2x4 blocks of pixels",
    "casts": "weights cast together, and their gradients, in a few kernels each way",
    "blocks": "the first convolution on blocks of pixels, not 7x7",
    "all": "all of these",
}
PREDICTED = {  # milliseconds saved at N = 256 and 32, on an H100
    "max_pool": {256: 1.9, 32: 0.24},
    "shortcut": {256: 1.2, 32: 0.20},
    "early": {256: 0.1, 32: 0.1},
    "memsets": {256: 0.32, 32: 0.13},  # by a profile on an H200
    "stem": {256: 0.45, 32: 0.06},
    "casts": {256: 0.19, 32: 0.19},  # by a profile on an H200
    "blocks": {256: 0.5, 32: 0.06},
}


def switch(network: training.Network, on: tuple[str, ...]) -> None:
    """Set exactly these levers: early, memsets and casts for the next capture, and what torch.compile is to guard."""
    for name, set_lever in SWITCHES.items():
        set_lever(network, name in on)


def plan(levers: list[str], base: list[str], leave_one_out: bool) -> tuple[dict, dict]:
    """Steps to time, by name the levers that are on, and of each lever the names of the steps without and with it."""
    every = (*base, *levers)
    if leave_one_out:
        steps = {"all": every} | {name: tuple(other for other in every if other != name) for name in levers}
        pairs = {name: (name, "all") for name in levers}
    else:
        steps = {"none": tuple(base)} | {name: (*base, name) for name in levers}
        pairs = {name: ("none", name) for name in levers}
    if len(levers) > 1:
        steps |= {"all": every, "none": tuple(base)}  # in the place that each has by now
        pairs["all"] = "none", "all"
    return steps, pairs


def predicted(levers: list[str], batch: int) -> float | None:
    values = [PREDICTED[name].get(batch) for name in levers]
    known = [value for value in values if value is not None]
    return round(sum(known), 3) if len(known) == len(values) else None


def records(rows: dict[tuple[str, int], training.Row], pairs: dict[str, tuple[str, str]], batches: list[int]) -> dict:
    """What is known by now: a row a lever and batch, and those that were not run."""
    found: dict[str, list] = {"rows": [], "not_run": []}
    levers = [name for name in pairs if name != "all"]
    for name, (without, with_) in pairs.items():
        for batch in batches:
            step_without, step_with = rows.get((without, batch)), rows.get((with_, batch))
            if step_without is None or step_with is None:
                found["not_run"].append({"batch": batch, "lever": name})
                continue
            own = step_with if without == "none" else step_without
            found["rows"].append({
                "batch": batch, "lever": name, "what": WHAT[name],
                "without": round(step_without.milliseconds, 3), "with": round(step_with.milliseconds, 3),
                "predicted": predicted(levers if name == "all" else [name], batch),
                "spread": round(common.spread([t for each in own.rounds for t in each]), 4),
            })  # fmt: skip
    return found


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--size", type=int, default=224, help="pixels a side")
    parser.add_argument("--normalizer", default="online_clamp", choices=list(training.NORMALIZERS))
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 32])
    parser.add_argument("--lever", nargs="+", choices=list(SWITCHES), help="by default all that are not in --base")
    told = f"on in every step; by default {' '.join(BASE)}, and of --leave-one-out every other than --lever's"
    parser.add_argument("--base", nargs="*", choices=list(SWITCHES), help=told)
    parser.add_argument("--leave-one-out", action="store_true", help="all on but one in turn, not one on in turn")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="compile nothing more after so long")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=20, help="steps a round")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", default="results/bench_levers.json")
    args = parser.parse_args(argv)
    common.check_device(parser, args)
    began = time.perf_counter()
    torch._dynamo.config.recompile_limit = 100
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch.backends.cudnn.benchmark = True
    inductor_pass.install()  # for BatchNorm too
    if args.base is None:
        args.base = list(set(SWITCHES) - set(args.lever or SWITCHES)) if args.leave_one_out else list(BASE)
    levers = [name for name in SWITCHES if name not in args.base and name in (args.lever or SWITCHES)]
    if not levers:
        parser.error("every --lever is in --base: nothing to compare")
    if not args.leave_one_out and "stem" in levers and "blocks" not in args.base:
        parser.error("--lever stem is a choice of blocks: put blocks into --base")
    steps, pairs = plan(levers, args.base, args.leave_one_out)
    results = {**common.head(torch.device(args.device)), "model": args.model, "normalizer": args.normalizer}
    results["leave_one_out"] = args.leave_one_out
    network_of = partial(training.Network, args.normalizer, "fused", "space_to_depth", "default", "bf16")
    networks = {batch: network_of(batch, args) for batch in args.batch}
    rows: dict[tuple[str, int], training.Row] = {}
    for turn in range(args.rounds):
        for (name, on), batch in itertools.product(steps.items(), args.batch):
            if turn == 0 and time.perf_counter() - began < args.seconds:
                key = {"batch": batch, "mode": "compile+graph", "optimizer": False}
                rows[name, batch] = training.Row(networks[batch], key)
            if (name, batch) in rows:
                switch(networks[batch], on)
                start, row = time.perf_counter(), rows[name, batch]
                row.measure(args.repeats)
                took = f"{time.perf_counter() - start:.0f} s"
                print(f"N = {batch}, {name}: {row.milliseconds:.3f} ms, in {took}", flush=True)
                common.write(args.output, results | records(rows, pairs, args.batch))
                levers_table.main([args.output])
    print(levers_table.render(results | records(rows, pairs, args.batch)), flush=True)


if __name__ == "__main__":
    run_main(main)
