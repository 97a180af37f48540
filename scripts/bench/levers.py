"""What each lever saves of a compiled training step of ResNet-50: milliseconds predicted and measured, one run.

    python scripts/bench/levers.py                                # every lever alone and all together, one Hopper GPU
    python scripts/bench/levers.py --batch 256 --lever shortcut --base max_pool   # some

Networks with and without a lever are timed in turn, round after round, forward and backward in one CUDA graph, bf16.
Writes the results as JSON and a table beside it. Predictions are those of the byte budget made before any was built.
"""

import argparse
import sys
from collections.abc import Callable
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


SWITCHES: dict[str, Callable[[training.Network, bool], None]] = {
    "max_pool": _set_max_pool,
    "shortcut": _set_shortcut,
    "early": _set_early,
    "memsets": _set_memsets,
    "stem": _set_stem,
    "casts": _set_casts,
}
WHAT = {
    "max_pool": "first norm, ReLU and max-pool in one kernel each way",
    "shortcut": "the shortcut's norm inside the kernel of the block's last norm, each way",
    "early": "norm kernels begin before the kernel in front of them has ended",
    "memsets": "small memsets of the graph as kernels",
    "stem": "the first convolution as 4x3 on 2x4 blocks of pixels",
    "casts": "weights cast together, and their gradients, in a few kernels each way",
}
PREDICTED = {  # milliseconds saved at N = 256 and 32, on an H100
    "max_pool": {256: 1.9, 32: 0.24},
    "shortcut": {256: 1.2, 32: 0.20},
    "early": {256: 0.1, 32: 0.1},
    "memsets": {256: 0.32, 32: 0.13},  # by a profile on an H200
    "stem": {256: 0.45, 32: 0.06},
    "casts": {256: 0.19, 32: 0.19},  # by a profile on an H200
}


def switch(network: training.Network, on: tuple[str, ...]) -> None:
    """Set exactly these levers; compiled so at the network's first step, captured so at every one."""
    for name, set_lever in SWITCHES.items():
        set_lever(network, name in on)


def measure(variants: dict[str, tuple[str, ...]], batch: int, args) -> dict[str, training.Row]:
    """Rows timed in turn; the first round compiles."""
    rows = {}
    for _ in range(args.rounds):
        for name, levers in variants.items():
            if name not in rows:
                network = training.Network(args.normalizer, "fused", "space_to_depth", "default", "bf16", batch, args)
                rows[name] = training.Row(network, {"batch": batch, "mode": "compile+graph", "optimizer": False})
            switch(rows[name].network, levers)
            rows[name].measure(args.repeats)
            print(f"N = {batch}, {name}: {rows[name].milliseconds:.3f} ms", flush=True)
    return rows


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--size", type=int, default=224, help="pixels a side")
    parser.add_argument("--normalizer", default="online_clamp", choices=list(training.NORMALIZERS))
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 32])
    parser.add_argument("--lever", nargs="+", default=list(SWITCHES)[2:], choices=list(SWITCHES))
    parser.add_argument("--base", nargs="*", default=list(SWITCHES)[:2], choices=list(SWITCHES), help="on in every one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=20, help="steps a round")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", default="results/bench_levers.json")
    args = parser.parse_args(argv)
    common.check_device(parser, args)
    torch._dynamo.config.recompile_limit = 100
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch.backends.cudnn.benchmark = True
    inductor_pass.install()  # for BatchNorm too
    levers, base = list(dict.fromkeys(args.lever)), tuple(args.base)
    variants = {"none": base} | {name: (*base, name) for name in levers}
    if len(levers) > 1:
        variants["all"] = (*base, *levers)
    results = {**common.head(torch.device(args.device)), "model": args.model, "normalizer": args.normalizer}
    results["rows"] = []
    for batch in args.batch:
        rows = measure(variants, batch, args)
        for name in (*levers, "all")[: len(variants) - 1]:
            of = levers if name == "all" else [name]
            predictions = [PREDICTED[lever].get(batch) for lever in of]
            known = [value for value in predictions if value is not None]
            results["rows"].append({
                "batch": batch, "lever": name, "what": WHAT.get(name, "all of these"),
                "without": round(rows["none"].milliseconds, 3), "with": round(rows[name].milliseconds, 3),
                "predicted": round(sum(known), 3) if len(known) == len(of) else None,
                "spread": round(common.spread([t for each in rows[name].rounds for t in each]), 4),
            })  # fmt: skip
        common.write(args.output, results)
        levers_table.main([args.output])
        print(levers_table.render(results), flush=True)
        del rows
        torch.cuda.empty_cache()


if __name__ == "__main__":
    run_main(main)
