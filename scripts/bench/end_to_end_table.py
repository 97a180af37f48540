#!/usr/bin/env python3
"""The recorded whole epochs as Markdown: every row against its bare step, and against what is wanted of it.

scripts/bench/end_to_end_table.py       # writes results/end_to_end.md from end_to_end.json there
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts._venv import run_main

from onlinenorm.report.settings import load_spec
from onlinenorm.report.words import markdown_table, origin
from scripts.bench.end_to_end import RESULTS, TRAIN

HEAD = "what trains", "images from", "images/s", "bare step", "of it", "with validation", "wanted", "reached?"
# Of train.py's rows, by data: the figure, what it should be at least, and in words.
WANTED = {
    "jpeg": ("images_per_second", 6_000, "6,000 images/s"),
    "on_device": ("ratio", 0.97, "0.97 of the bare step"),
    "cifar10": ("images_per_second", 80_000, "80,000 images/s"),
}
OF_SEVERAL = "ratio", 0.9, "0.90 of the bare step"  # GPUs


def render(results: dict) -> str:
    """Markdown of a results file in the form of end_to_end.json."""
    processes = results.get("processes", 1)
    name, count = (f"end_to_end_{processes}", str(processes)) if processes > 1 else ("end_to_end", "one")
    parts = [
        f"# Whole epochs of training on {count} {results['device']} with {results['cores']} cores",
        "Rates of training alone, from an epoch's start to its last step, and beside them with validation and "
        "checkpoints; of runs side by side, of all together while all train, with validation in both. Each run's first "
        "epoch is left out. The bare step has its images on the device.",
        markdown_table(HEAD, [_cells(row, processes) for row in results["rows"]]),
    ]
    if processes > 1:
        parts.append(
            f"Batches are those of each of {processes} processes, a GPU each; the bare step is that of all, too, with "
            "all that they exchange, as scripts/bench/distributed.py measures it."
        )
    if missing := results["not_run"]:
        rows = [f"{_trains(row)}, {_source(row)} ({row['why']})" for row in missing]
        parts.append(f"Not run: {'; '.join(rows)}.")
    if images := results.get("images"):
        parts.append(
            f"JPEG files of {images['mean_width']:.0f} x {images['mean_height']:.0f} pixels and "
            f"{images['mean_bytes'] / 1e3:.0f} kB on average, {images['unique']} different ones."
        )
    origins = [origin(results)]
    for commit in dict.fromkeys(row["commit"] for row in results["rows"] if "commit" in row):
        measured = [row for row in results["rows"] if row.get("commit") == commit]
        commands = dict.fromkeys(row["command"] for row in measured)
        what = "; ".join(f"{_trains(row)}, {_source(row)}" for row in measured)
        origins.append(f"Of commit {commit}: {what}; " + ", ".join(f"`{command}`" for command in commands))
    return "\n\n".join([*parts, f"![]({name}.png)", *origins]) + "\n"


def _cells(row: dict, processes: int) -> list[str]:
    wanted, reached = "", ""
    if row["program"] == TRAIN:
        figure, least, wanted = WANTED[row["data"]] if processes == 1 else OF_SEVERAL
        reached = "yes" if row[figure] >= least else "**no**"
    rates = [row["images_per_second"], row["step_images_per_second"], row.get("wall_images_per_second")]
    rate, step, wall = ("" if rate is None else f"{rate:,.0f}" for rate in rates)
    return [_trains(row), _source(row), rate, step, f"{row['ratio']:.3f}", wall, wanted, reached]


def _trains(row: dict) -> str:
    if row["program"] != TRAIN:
        return row["program"]
    runs = f"{row['runs']} runs side by side, " if row["runs"] > 1 else ""
    return f"train.py, {runs}{load_spec().row(row['normalizer']).label}, batches of {row['batch']}"


def _source(row: dict) -> str:
    files = f"JPEG files, decoder {row['decoder']}"
    return {"jpeg": files, "on_device": "the device's memory", "cifar10": "the device's memory, 32 px"}[row["data"]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS, help="(%(default)s)")
    path = parser.parse_args(arguments).results
    path.with_suffix(".md").write_text(render(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_main(main)
