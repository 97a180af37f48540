#!/usr/bin/env python3
"""Recorded times of the single-read kernels and of a whole step as tables: bytes, time, share of the copy bandwidth.

scripts/bench_kernels_table.py results/bench_kernels.json          # writes the .md beside it
"""

import argparse
import json
import sys
from pathlib import Path

from onlinenorm.ops.fused.single_read import tuning_for
from onlinenorm.reporting.markdown import markdown_table

KERNELS = (
    "batch",
    "site",
    "direction",
    "MB",
    "us",
    "share of copy",
    "before, us",
    "two passes, us",
    "fastest of all, us",
)
STEP = ("part of the step", "OnlineNorm + clamp: kernels", "ms", "BatchNorm: kernels", "ms")

TRIED = (
    (
        "threads of their own for loading, summing and writing; tiles brought by the copy engine",
        "large layers from 62-75 % to 80 % of copy bandwidth",
        "the table above",
    ),
    (
        "tables in a shape that Inductor does not store anew",
        "104 copies, 0.26 ms",
        "the copies are gone from the graph",
    ),
    ("workspace from chunks instead of a fill a launch", "106 fills, 0.18 ms and their gaps", "not timed alone"),
    (
        "backward sums x itself instead of keeping moments",
        "0.05 GiB less at batch 256",
        "with the next: peak memory over BatchNorm's from 1.034 to the ratio above",
    ),
    (
        "the gradient of global pooling put in order where it is made",
        "0.05 GiB and 0.15 ms less",
        "its first form copied all gradients; now only that one, seen in the graph",
    ),
    (
        "two stages of whole samples instead of three of parts (backward at 14² and 7²)",
        "fewer messages",
        "198 instead of 257 us (1024 x 14²)",
    ),
    ("more, smaller stages (6, 8); tiles of 64 rows", "shorter waits", "slower, the smallest layers at batch 32 apart"),
    (
        "128 instead of 256 threads a role",
        "less waiting within a role",
        "2-4 % at large residual sites, slower elsewhere",
    ),
)


def _kernels(results: dict) -> list[list[str]]:
    lines = []
    for row in results["kernels"]:
        name, samples, pixels = row["direction"], row["batch"], row["side"] ** 2
        tuning = tuning_for(name, row["residual"], samples, pixels)
        time = row["microseconds"].get(f"{tuning.group},{tuning.stages},{tuning.chunk},{tuning.rows}")
        share = f"{row['bytes'] / (1e-6 * time) / results['copy_bytes_per_second']:.0%}" if time else "not run"
        site = f"{row['channels']} x {row['side']}²{' + residual' * row['residual']}"
        times = (row.get("one_loop"), row.get("two_pass"), min(row["microseconds"].values()))
        lines.append(
            [str(row["batch"]), site, name, f"{row['bytes'] / 1e6:.1f}", f"{time:.1f}" if time else "not run", share]
            + [f"{other:.1f}" if other else "not run" for other in times]
        )
    return lines


def _step(results: dict) -> list[list[str]]:
    ours, theirs = (results["step"][name] for name in ("online_clamp", "batch"))
    lines = []
    for part in dict.fromkeys([*ours, *theirs]):
        cells = [part]
        for side in (ours, theirs):
            cells += [str(side[part]["kernels"]), f"{side[part]['milliseconds']:.2f}"] if part in side else ["0", "0"]
        lines.append(cells)
    totals = (
        sum(entry[key] for entry in side.values()) for side in (ours, theirs) for key in ("kernels", "milliseconds")
    )
    return [*lines, ["all", *(f"{total:.2f}" if isinstance(total, float) else str(total) for total in totals)]]


def render(results: dict) -> str:
    """Markdown of a results file in the form of bench_kernels.json."""
    bandwidth = results["copy_bytes_per_second"] / 1e12
    rows = {row["normalizer"]: row for row in results["training"]["rows"]}
    ours, theirs = rows["online_clamp"], rows["batch"]
    speed, memory = (ours[key] / theirs[key] for key in ("images_per_second", "peak_memory_gib"))
    text = [
        f"# The single-read kernels of OnlineNorm + clamp on one {results['device']}",
        "",
        "ReLU behind every norm, bfloat16, in CUDA graphs over rotating inputs. Bytes count every tensor once, two",
        f"gradients for backward of residual sites; shares are of the {bandwidth:.2f} TB/s of an elementwise copy.",
        "Before: the fastest of the kernels before these, in which one loop read, reduced and wrote in turn.",
        f"Kernels: {results['kernels_commit']}. What backward takes since it sums x itself is not measured.",
        "",
        markdown_table(KERNELS, _kernels(results)),
        "",
        "Where the time of a step goes at batch 256 under torch.compile, before these kernels "
        f"(commit {results['step_commit']}):",
        "",
        markdown_table(STEP, _step(results)),
        "",
        f"The step with these kernels (commit {results['training']['commit']}, batch 256, compile + graph): "
        f"{ours['milliseconds']:.2f} ms against BatchNorm's {theirs['milliseconds']:.2f}, {speed:.3f} of its speed and",
        f"{memory:.3f} of its peak memory. That commit copied every gradient before each norm's backward and added the",
        "gradients of residual blocks in front of it; the next one does neither, and has not been timed.",
        "",
        "## What was tried",
        "",
        markdown_table(("change", "expected", "found"), [list(entry) for entry in TRIED]),
        "",
        "Small layers (28² and less without residual, a few microseconds of traffic) stay at a quarter to two thirds",
        "of the copy bandwidth: every block follows the recurrence over all samples for itself. The max-pool's",
        "backward, some 1.46 ms and six times its bytes' time, is the same for both normalizers and is Inductor's.",
    ]
    return "\n".join(text) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("results", type=Path, help="a bench_kernels.json")
    path = parser.parse_args(arguments).results
    path.with_suffix(".md").write_text(render(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
