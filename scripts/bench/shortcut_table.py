#!/usr/bin/env python3
"""The norms at the end of a residual block, one kernel against two, as a table.

scripts/bench/shortcut_table.py results/bench_shortcut.json          # writes the .md beside it
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts._venv import run_main

from onlinenorm.report.words import markdown_table, origin

HEAD = "batch", "error compensation", "channels", "side", "direction"


def render(results: dict) -> str:
    """Markdown of a results file in the form of bench_shortcut.json."""
    ways = list(dict.fromkeys(way for row in results["rows"] for way in row["microseconds"]))
    lines = []
    for row in results["rows"]:
        site = str(row["batch"]), row["error_compensation"], str(row["channels"]), str(row["side"]), row["direction"]
        times = [row["microseconds"].get(way) for way in ways]
        lines.append([*site, *("none" if time is None else f"{time:.1f}" for time in times)])
    text = [
        f"# The norms of a residual block's end and of its shortcut on one {results['device']}",
        "",
        "Microseconds of both layers in a kernel each, and in one kernel by its tuning: threads, stages, chunk, rows.",
        "What was in use is the table of the commit below.",
        "",
        markdown_table((*HEAD, *ways), lines),
        "",
        origin(results),
    ]
    return "\n".join(text) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("results", type=Path, help="a bench_shortcut.json")
    path = parser.parse_args(arguments).results
    path.with_suffix(".md").write_text(render(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_main(main)
