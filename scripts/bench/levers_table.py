#!/usr/bin/env python3
"""What each lever saves of a training step, predicted and measured, as a table.

scripts/bench/levers_table.py results/levers.json          # writes the .md beside it
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts._venv import run_main

from onlinenorm.report.words import markdown_table, origin

HEAD = "batch", "lever", "ms without", "ms with", "saved, ms", "predicted, ms"

# Written down by hand when each was given up, by the measurements of that time: nothing here is computed from the file.
DROPPED = (
    (
        "weights cast together, and their gradients, in one kernel each way",
        "0.24 ms",
        "-0.02 ms of 26.82 at batch 256",
    ),
)


def render(results: dict) -> str:
    """Markdown of a results file in the form of levers.json."""
    lines = []
    for row in results["rows"]:
        saved, predicted = row["without"] - row["with"], row["predicted"]
        cells = [str(row["batch"]), row["what"], f"{row['without']:.2f}", f"{row['with']:.2f}", f"{saved:.2f}"]
        lines.append([*cells, "none" if predicted is None else f"{predicted:.2f}"])
    title = f"# Levers of a training step of {results['model']}, {results['normalizer']}, on one {results['device']}"
    told = "Forward and backward as one CUDA graph, each network with and without in turn; predictions are of an H100."
    text = [
        title,
        "",
        told,
        "",
        markdown_table(HEAD, lines),
        "",
        origin(results),
        "",
        "## What was given up, by hand",
        "",
    ]
    text += [
        "Noted when each was taken out, by the measurements of that time, on an H200; not of the commit above.",
        "",
    ]
    text.append(markdown_table(("lever", "predicted to save", "found"), [list(entry) for entry in DROPPED]))
    return "\n".join(text) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("results", type=Path, help="a levers.json")
    path = parser.parse_args(arguments).results
    path.with_suffix(".md").write_text(render(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_main(main)
