#!/usr/bin/env python3
"""A recorded training benchmark as a Markdown table: speed and memory beside the best BatchNorm row of the same batch.

scripts/bench_report.py results/bench_training.json          # writes results/bench_training.md
scripts/bench_report.py results/bench_training.json --output /tmp/bench.md
"""

import argparse
import json
import sys
from pathlib import Path

HEAD = (
    "batch",
    "normalizer",
    "backend",
    "mode",
    "dtype",
    "optimizer",
    "ms a step",
    "images/s",
    "over BatchNorm",
    "peak memory, GiB",
)


def render(results: dict) -> str:
    """Markdown of a results file in the form of bench_training.json."""
    lines = [
        f"# ResNet-50, 224 px, forward and backward, without and with the optimizer: {results['device']}",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|" + " --- |" * len(HEAD),
    ]
    rows = sorted(results["rows"], key=lambda row: (row["optimizer"], -row["batch"], -row["images_per_second"]))
    for row in rows:
        same = [r for r in rows if (r["batch"], r["optimizer"]) == (row["batch"], row["optimizer"])]
        rivals = [r for r in same if r["normalizer"] == "batch"]
        best = max(rivals, key=lambda r: r["images_per_second"], default=None)
        ratio = f"{row['images_per_second'] / best['images_per_second']:.3f}" if best else "not run"
        cells = [str(row[key]) for key in ("batch", "normalizer", "backend", "mode", "dtype")]
        cells += [
            "yes" if row["optimizer"] else "no",
            f"{row['milliseconds']:.2f} ± {row['repeat_spread'] / 2:.1%}",
            f"{row['images_per_second']:,.0f}",
        ]
        lines.append("| " + " | ".join([*cells, ratio, f"{row['peak_memory_gib']:.2f}"]) + " |")
    lines += [
        "",
        f"torch {results['torch']}, triton {results['triton']}, commit {results['commit']}; `{results['command']}`",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("results", type=Path, help="a bench_training.json")
    parser.add_argument("--output", type=Path, help="default: beside it, as .md")
    options = parser.parse_args(arguments)
    text = render(json.loads(options.results.read_text(encoding="utf-8")))
    (options.output or options.results.with_suffix(".md")).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
