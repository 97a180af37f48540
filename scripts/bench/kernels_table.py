#!/usr/bin/env python3
"""Recorded times of the single-read kernels and of a whole step as tables: bytes, time, share of the copy bandwidth.

scripts/bench/kernels_table.py results/bench_kernels.json          # writes the .md beside it
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts._venv import run_main

from onlinenorm.ops.fused.tiling import tuning_for
from onlinenorm.report.words import markdown_table, origin

KERNELS = (
    "batch",
    "site",
    "direction",
    "MB",
    "us",
    "share of copy",
    "two passes, us",
    "fastest of all, us",
)
GUARDS = {"clamp": "clamp", "layer_scaling": "layer scaling"}
STEPS = {"online_clamp": "OnlineNorm + clamp", "online_layer_scaling": "+ layer scaling", "batch": "BatchNorm"}

LARGE = 160e6  # bytes from which a layer counts as large
SHARES = ("error compensation", "layers", "count", "share of copy", "of them at the fastest tuning", "others behind it")

# Written down by hand when each change was made, on the commits of that time: nothing here is computed from the file.
TRIED = (
    (
        "threads of their own for loading, summing and writing; tiles brought by the copy engine",
        "large layers from 62-75 % to 80 % of copy bandwidth",
        "80-92 %",
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
        "0.05 GiB less, but 12-45 % more time in every backward kernel: given up for the next",
    ),
    (
        "backward takes moments from the difference of the states before and after a sample",
        "the memory of the former, the time of kept moments",
        "both; backward at 64 x 112² from 666 to 471 us, at 256 x 56² + residual from 944 to 771; given up later, as "
        "the digits are lost where statistics move slowly (alpha_fwd .99999): forward stores moments again",
    ),
    (
        "stem: a 4x4 convolution on 2x2 blocks in place of 7x7 with stride 2, for every normalizer",
        "1.8 ms less",
        "BatchNorm's step of 256 from 44.18 to 42.45 ms in one run",
    ),
    (
        "stem: norm, ReLU and max-pool in one kernel each way",
        "1.9 ms less",
        "309 and 447 us, where norms and pool took 343 and 388, 513 and 1,477",
    ),
    (
        "the gradient of global pooling put in order where it is made",
        "0.05 GiB and 0.15 ms less",
        "its first form copied all gradients; now only that one, seen in the graph",
    ),
    ("more, smaller stages (6, 8); tiles of 64 rows", "shorter waits", "slower, the smallest layers at batch 32 apart"),
    (
        "128 instead of 256 threads a role",
        "less waiting within a role",
        "2-4 % at large residual sites, slower elsewhere",
    ),
    (
        "layer scaling in one read: tiles stay in shared memory until the moments of all channels are known",
        "a step 0.87 times as fast as BatchNorm's to 1.1 times",
        "done; its norms took some 30 ms of a step before",
    ),
    (
        "zeta from a role that follows the moments ahead of all writers, not from the writer of a sample's first tile",
        "no chain of waiting from sample to sample",
        "forward at 256 x 56² + residual from 568 to 510 us, at 1024 x 14² + residual from 177 to 128; at 256 x 14² "
        "from 38 to 66, and with eight samples side by side to 42",
    ),
    (
        "one warp a block waits for the sum over channels, not eight",
        "fewer reads of the same few words",
        "backward at 2048 x 7² + residual from 131 to 122 us, at 512 x 28² + residual from 412 to 395",
    ),
    (
        "fewer samples at a time (8) in backward",
        "fewer registers",
        "0-7 % at large residual sites, with and without layer scaling; slower at 14² and below with clamping",
    ),
)


def _time(row: dict) -> float | None:
    """Microseconds of the tuning that the kernels take at this site; None where it was not measured."""
    scaled, pixels = row["error_compensation"] == "layer_scaling", row["side"] ** 2
    tuning = tuning_for(row["direction"], scaled, row["residual"], row["batch"], pixels)
    return row["microseconds"].get(f"{tuning.group},{tuning.stages},{tuning.chunk},{tuning.rows}")


def _kernels(rows: list[dict], bandwidth: float) -> list[list[str]]:
    lines = []
    for row in rows:
        time = _time(row)
        share = f"{row['bytes'] / (1e-6 * time) / bandwidth:.0%}" if time else "not run"
        site = f"{row['channels']} x {row['side']}²{' + residual' * row['residual']}"
        times = (row.get("two_pass"), min(row["microseconds"].values()))
        lines.append(
            [str(row["batch"]), site, row["direction"], f"{row['bytes'] / 1e6:.1f}"]
            + [f"{time:.1f}" if time else "not run", share]
            + [f"{other:.1f}" if other else "not run" for other in times]
        )
    return lines


def _shares(results: dict) -> list[list[str]]:
    """Lowest and highest shares of the copy bandwidth by size of the layer, and what the choice of tuning costs."""
    lines = []
    for guard, name in GUARDS.items():
        for large in (True, False):
            rows = [row for row in results["kernels"] if row["error_compensation"] == guard]
            timed = [(row, time) for row in rows if (row["bytes"] >= LARGE) == large and (time := _time(row))]
            if not timed:
                continue
            shares = [row["bytes"] / (1e-6 * time) / results["copy_bytes_per_second"] for row, time in timed]
            behind = [time / min(row["microseconds"].values()) - 1 for row, time in timed]
            slower = [loss for loss in behind if loss > 0]
            size, reached = (
                f"{'from' if large else 'below'} {LARGE / 1e6:.0f} MB",
                f"{min(shares):.0%} to {max(shares):.0%}",
            )
            fastest = f"{len(behind) - len(slower)} of {len(behind)}"
            losses = f"{min(slower):.1%} to {max(slower):.1%}" if slower else ""
            lines.append([name, size, str(len(timed)), reached, fastest, losses])
    return lines


def _step(step: dict[str, dict]) -> list[list[str]]:
    sides = [step[name] for name in STEPS]
    lines = []
    for part in dict.fromkeys(part for side in sides for part in side):
        entries = [side.get(part, {"kernels": 0, "milliseconds": 0.0}) for side in sides]
        lines.append([part, *(cell for entry in entries for cell in _cells(entry["kernels"], entry["milliseconds"]))])
    totals = [
        (sum(e["kernels"] for e in side.values()), sum(e["milliseconds"] for e in side.values())) for side in sides
    ]
    return [*lines, ["all", *(cell for total in totals for cell in _cells(*total))]]


def _cells(kernels: int, milliseconds: float) -> tuple[str, str]:
    return str(kernels), f"{milliseconds:.2f}"


def render(results: dict) -> str:
    """Markdown of a results file in the form of bench_kernels.json."""
    bandwidth = results["copy_bytes_per_second"]
    text = [
        f"# The single-read kernels on one {results['device']}",
        "",
        "ReLU behind every norm, bfloat16, in CUDA graphs over rotating inputs. Bytes count every tensor once, two",
        "gradients for backward of residual sites; shares are of the "
        f"{bandwidth / 1e12:.2f} TB/s of an elementwise copy.",
        "The tuning of a site follows rules fixed beforehand; the last column has the fastest that was measured there.",
        "",
        markdown_table(SHARES, _shares(results)),
        "",
    ]
    for guard, name in GUARDS.items():
        rows = [row for row in results["kernels"] if row["error_compensation"] == guard]
        text += [f"## OnlineNorm + {name}", "", markdown_table(KERNELS, _kernels(rows, bandwidth)), ""]
    text += [
        "## A step",
        "",
        f"Where the time of a step goes at batch {results['kernels'][0]['batch']} under torch.compile:",
        "",
        markdown_table(
            ("part of the step", *(h for name in STEPS.values() for h in (f"{name}: kernels", "ms"))),
            _step(results["step"]),
        ),
        "",
        origin(results),
        "",
        "## What was tried, by hand",
        "",
        "Noted when each change was made, on the commits and by the measurements of that time; not computed from the",
        "recorded data, and not of the commit above.",
        "",
        markdown_table(("change", "expected", "found"), [list(entry) for entry in TRIED]),
    ]
    return "\n".join(text) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("results", type=Path, help="a bench_kernels.json")
    path = parser.parse_args(arguments).results
    path.with_suffix(".md").write_text(render(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_main(main)
