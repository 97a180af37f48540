#!/usr/bin/env python3
"""A recorded training benchmark as Markdown: the fastest row of each normalizer, then all rows, beside BatchNorm's.

scripts/bench_report.py results/bench_training.json          # writes results/bench_training.md
scripts/bench_report.py results/bench_training.json --output /tmp/bench.md
"""

import argparse
import json
import sys
from pathlib import Path

from onlinenorm.errors import cli_errors
from onlinenorm.reporting.cost import origin, step_time
from onlinenorm.reporting.markdown import markdown_table

BEST = (
    "batch",
    "normalizer",
    "mode",
    "dtype",
    "ms a step",
    "images/s",
    "over BatchNorm",
    "with the optimizer, over BatchNorm",
    "peak memory, GiB",
    "over BatchNorm's",
)
ALL = (
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


def fastest(rows: list[dict], **wanted) -> dict | None:
    """The row of most images/s among those that have the wanted values."""
    found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return max(found, key=lambda row: row["images_per_second"], default=None)


def over(row: dict | None, rival: dict | None, key: str) -> str:
    """A row's figure over its rival's."""
    return f"{row[key] / rival[key]:.3f}" if row and rival and rival[key] else "not run"


def _best(rows: list[dict], dtype: str) -> list[list[str]]:
    """Each normalizer's fastest row in ``dtype`` a batch size, without the optimizer; ratios to BatchNorm's fastest."""
    lines, rows = [], [row for row in rows if row["dtype"] == dtype]
    for batch in sorted({row["batch"] for row in rows}, reverse=True):
        rivals = {
            optimizer: fastest(rows, batch=batch, normalizer="batch", optimizer=optimizer) for optimizer in (0, 1)
        }
        names = dict.fromkeys(row["normalizer"] for row in rows if row["batch"] == batch)
        best = [row for name in names if (row := fastest(rows, batch=batch, normalizer=name, optimizer=False))]
        for row in sorted(best, key=lambda row: -row["images_per_second"]):
            whole = fastest(rows, batch=batch, normalizer=row["normalizer"], optimizer=True)
            lines.append(
                [
                    *(str(row[key]) for key in ("batch", "normalizer", "mode", "dtype")),
                    step_time(row),
                    f"{row['images_per_second']:,.0f}",
                    over(row, rivals[0], "images_per_second"),
                    over(whole, rivals[1], "images_per_second"),
                    f"{row['peak_memory_gib']:.2f}",
                    over(row, rivals[0], "peak_memory_gib"),
                ]
            )
    return lines


def _all(rows: list[dict]) -> list[list[str]]:
    lines = []
    for row in sorted(rows, key=lambda row: (row["optimizer"], -row["batch"], -row["images_per_second"])):
        rival = fastest(rows, batch=row["batch"], normalizer="batch", optimizer=row["optimizer"])
        lines.append(
            [
                *(str(row[key]) for key in ("batch", "normalizer", "backend", "mode", "dtype")),
                "yes" if row["optimizer"] else "no",
                step_time(row),
                f"{row['images_per_second']:,.0f}",
                over(row, rival, "images_per_second"),
                f"{row['peak_memory_gib']:.2f}",
            ]
        )
    return lines


def workload(results: dict) -> str:
    """What was trained; files from before that was recorded are of ResNet-50."""
    return f"{results.get('model', 'resnet50')} at {results.get('size', 224)} px"


def render(results: dict) -> str:
    """Markdown of a results file in the form of bench_training.json."""
    rows = [{"optimizer": results.get("optimizer", False), **row} for row in results["rows"]]
    lines = [
        f"# A training step of {workload(results)} on one {results['device']}",
        "",
        "Forward and backward, the fastest row of each normalizer; ± is half the spread of repeats, where recorded.",
        "",
    ]
    if rounds := sorted({row["rounds"] for row in rows if "rounds" in row}):
        lines += [f"Rounds that a row was measured in: {', '.join(map(str, rounds))}.", ""]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        lines += [f"In {dtype}:", "", markdown_table(BEST, _best(rows, dtype)), ""]
    lines += [
        "All rows:",
        "",
        markdown_table(ALL, _all(rows)),
        "",
    ]
    for row in results.get("not_run", []):
        name = " ".join(str(row[key]) for key in ("batch", "normalizer", "backend", "mode", "dtype"))
        lines.append(f"- not run: {name}{', with optimizer' if row['optimizer'] else ''}: {row['why']}")
    lines += [""] * bool(results.get("not_run")) + [origin(results)]
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
    with cli_errors():
        sys.exit(main())
