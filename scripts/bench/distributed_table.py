#!/usr/bin/env python3
"""The recorded benchmark of several processes as Markdown: rates, what synchronisation costs, and the exactness check.

scripts/bench/distributed_table.py results/bench_distributed.json          # writes results/bench_distributed.md
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts._venv import run_main

from onlinenorm.report.words import markdown_table, origin

SYNCHRONISED = {"sync_batch": "batch", "online_global": "online_local"}  # and what each does without communication
RATES = ("normalizer", "mode", "processes", "images a process", "ms a step", "images/s", "scaling efficiency")
EXACTNESS = ("normalizer", "steps", "largest of a loss", "parameters", "statistics", "processes identical")


def render(results: dict) -> str:
    """Markdown of a results file of distributed.py with at least one row."""
    world, rows = results["processes"], results["rows"]
    parts = [
        f"# {results['model']}, {results['size']} px, {results['backend']}: one process against {world}",
        markdown_table(RATES, [_rate(row) for row in rows]),
        f"{rows[0]['dtype']}: forward, backward with the gradients' all-reduce, and SGD; synthetic "
        f"images. Efficiency: images/s over {world} times those of one process (sync_batch: of batch on one).",
        *(_cost([row for row in rows if row["processes"] == world], mode) for mode in {row["mode"]: 0 for row in rows}),
        f"Float32 without TF32, {world} processes against one, same global batches. Parameters and statistics: norm "
        "of the difference over the norm.",
        markdown_table(EXACTNESS, [_difference(row) for row in results["exactness_float32"]]),
        f"{world} x {results['device']}; {origin(results)}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _rate(row: dict) -> list:
    time = f"{row['milliseconds']:.2f} ± {row['repeat_spread'] / 2:.1%}"
    efficiency = "" if row["processes"] == 1 else "not measured"
    if row["processes"] > 1 and row["scaling_efficiency"] is not None:
        efficiency = f"{row['scaling_efficiency']:.1%}"
    rate = f"{row['images_per_second']:,.0f}"
    return [*(row[key] for key in ("normalizer", "mode", "processes", "batch_per_process")), time, rate, efficiency]


def _cost(rows: list[dict], mode: str) -> str:
    """What synchronisation adds to a step of all processes in a mode, and which step is faster."""
    together = {row["normalizer"]: row["milliseconds"] for row in rows if row["mode"] == mode}
    lines, cost = [], {}
    for name, base in SYNCHRONISED.items():
        if name in together and base in together:
            cost[name] = together[name] - together[base]
            share = cost[name] / together[base]
            lines.append(f"- {mode}: {name} takes {cost[name]:+.2f} ms a step over {base} ({share:+.1%}).")
    if len(cost) == 2:
        ratio = together["sync_batch"] / together["online_global"]
        faster = "faster" if ratio > 1 else "not faster"
        lines.append(
            f"- {mode}: a step with global statistics is {faster} than SyncBatchNorm's: {ratio:.3f} times its rate."
        )
    return "\n".join(lines)


def _difference(row: dict) -> list:
    figures = [f"{row[f'{what}_difference']:.1e}" for what in ("largest_loss", "parameter", "statistic")]
    return [row["normalizer"], row["steps"], *figures, "yes" if row["ranks_identical"] else "NO"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("results", type=Path, help="a bench_distributed.json")
    options = parser.parse_args(arguments)
    text = render(json.loads(options.results.read_text(encoding="utf-8")))
    options.results.with_suffix(".md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_main(main)
