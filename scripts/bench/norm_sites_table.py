#!/usr/bin/env python3
"""Recorded times of norm sites as a table per kernel and a picture: bytes, time, share of the copy bandwidth.

scripts/bench/norm_sites_table.py results/bench_normalizer.json          # writes the .md and .png beside it
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts._venv import run_main

from onlinenorm.report.words import markdown_table, origin
from scripts.bench.norm_sites import plot

HEAD = (
    "batch",
    "site",
    "calls",
    "direction",
    "MB",
    "fused clamp, us",
    "share of copy",
    "fused layer scaling, us",
    "BatchNorm compiled, us",
    "BatchNorm eager, us",
)


def _site(row: dict) -> str:
    extras = " + residual" * row["residual"] + " + ReLU" * row["relu"]
    return f"{row['channels']} x {row['side']}²{extras}"


def _rows(results: dict) -> tuple[list[list[str]], dict[tuple[int, str], float]]:
    """Cells of the table, and milliseconds a step by (batch, provider) over all sites."""
    found = {}
    totals: dict[tuple[int, str], float] = {}
    for row in results["rows"]:
        found[row["batch"], _site(row), row["provider"]] = row
        for direction in ("forward", "backward"):
            key = row["batch"], row["provider"]
            totals[key] = totals.get(key, 0.0) + 1e-3 * row["count"] * row[direction]["microseconds"]
    lines = []
    for (batch, site, provider), row in found.items():
        if provider != "fused":
            continue
        for direction in ("forward", "backward"):
            mine = row[direction]
            cells = [str(batch), site, str(row["count"]), direction, f"{mine['bytes'] / 1e6:.1f}"]
            cells += [f"{mine['microseconds']:.1f}", f"{mine['share']:.0%}"]
            for rival in ("fused:layer_scaling", "batch:compile", "batch"):
                other = found.get((batch, site, rival))
                cells.append(f"{other[direction]['microseconds']:.1f}" if other else "not run")
            lines.append(cells)
    return lines, totals


def render(results: dict) -> str:
    """Markdown of a results file in the form of bench_normalizer.json."""
    lines, totals = _rows(results)
    bandwidth = results["copy_bytes_per_second"] / 1e12
    text = [
        f"# Norm sites of ResNet-50, bfloat16, on one {results['device']}",
        "",
        f"Bytes count every tensor once; shares are of the {bandwidth:.2f} TB/s that an elementwise copy reaches.",
        "",
        markdown_table(HEAD, lines),
        "",
        "All sites of one training step, forward and backward:",
        "",
        markdown_table(("batch", "provider", "ms"), [[str(b), name, f"{ms:.2f}"] for (b, name), ms in totals.items()]),
        "",
        origin(results),
    ]
    return "\n".join(text) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("results", type=Path, help="a bench_normalizer.json")
    path = parser.parse_args(arguments).results
    results = json.loads(path.read_text(encoding="utf-8"))
    path.with_suffix(".md").write_text(render(results), encoding="utf-8")
    plot(results, str(path.with_suffix(".png")))
    return 0


if __name__ == "__main__":
    run_main(main)
