#!/usr/bin/env python3
"""A recorded training benchmark as Markdown: the fastest row of each normalizer, then all rows, beside BatchNorm's.

scripts/bench/training_table.py results/bench_training.json          # writes results/bench_training.md
scripts/bench/training_table.py results/bench_training.json --output /tmp/bench.md
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts._venv import run_main

from onlinenorm.report.words import markdown_table, origin, step_time

NAMES = ("normalizer", "stem", "compiler", "mode", "dtype")
BEST = (
    "batch",
    *NAMES,
    "ms a step",
    "images/s",
    "over the best BatchNorm",
    "over torchvision's network, torch.compile",
    "with the optimizer, over the best BatchNorm",
    "peak memory, GiB",
    "over BatchNorm's",
)
ALL = (
    "batch",
    "normalizer",
    "backend",
    *NAMES[1:],
    "optimizer",
    "ms a step",
    "images/s",
    "over the best BatchNorm",
    "peak memory, GiB",
)
PLAIN = {
    "normalizer": "batch",
    "stem": "conv7x7",
    "compiler": "default",
}  # torchvision's network, torch.compile as it is


def named(row: dict, keys: tuple[str, ...]) -> list[str]:
    """What a row is; eager rows have no compiler, and files from before stems were recorded had torchvision's."""
    given = {"stem": "conv7x7", "compiler": "default" if row["mode"].startswith("compile") else None, **row}
    return ["–" if given[key] is None else str(given[key]) for key in keys]


def fastest(rows: list[dict], **wanted) -> dict | None:
    """The row of most images/s among those that have the wanted values."""
    found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return max(found, key=lambda row: row["images_per_second"], default=None)


def smallest(rows: list[dict], **wanted) -> dict | None:
    """The row of least peak memory among those that have the wanted values."""
    found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return min(found, key=lambda row: row["peak_memory_gib"], default=None)


def over(row: dict | None, rival: dict | None, key: str) -> str:
    """A row's figure over its rival's."""
    return f"{row[key] / rival[key]:.3f}" if row and rival and rival[key] else "not run"


def _best(rows: list[dict], dtype: str) -> list[list[str]]:
    """Each normalizer's fastest row in ``dtype`` a batch size, without the optimizer; ratios to BatchNorm's fastest.

    Peak memory is compared with the least that a row of BatchNorm in the same mode takes.
    """
    lines, rows = [], [row for row in rows if row["dtype"] == dtype]
    for batch in sorted({row["batch"] for row in rows}, reverse=True):
        of_size = [row for row in rows if row["batch"] == batch]
        rivals = {optimizer: fastest(of_size, normalizer="batch", optimizer=optimizer) for optimizer in (0, 1)}
        plain = fastest([row for row in of_size if named(row, tuple(PLAIN)) == [*PLAIN.values()]], optimizer=False)
        names = dict.fromkeys(row["normalizer"] for row in of_size)
        best = [row for name in names if (row := fastest(of_size, normalizer=name, optimizer=False))]
        for row in sorted(best, key=lambda row: -row["images_per_second"]):
            whole = fastest(of_size, normalizer=row["normalizer"], optimizer=True)
            like = smallest(of_size, normalizer="batch", mode=row["mode"], optimizer=False)
            lines.append(
                [
                    str(batch),
                    *named(row, NAMES),
                    step_time(row),
                    f"{row['images_per_second']:,.0f}",
                    over(row, rivals[0], "images_per_second"),
                    over(row, plain, "images_per_second"),
                    over(whole, rivals[1], "images_per_second"),
                    f"{row['peak_memory_gib']:.2f}",
                    over(row, like, "peak_memory_gib"),
                ]
            )
    return lines


def _all(rows: list[dict]) -> list[list[str]]:
    lines = []
    for row in sorted(rows, key=lambda row: (row["optimizer"], -row["batch"], -row["images_per_second"])):
        rival = fastest(rows, batch=row["batch"], normalizer="batch", optimizer=row["optimizer"])
        lines.append(
            [
                *named(row, ("batch", "normalizer", "backend", *NAMES[1:])),
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
        name = " ".join(named(row, ("batch", "normalizer", "backend", *NAMES[1:])))
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
    run_main(main)
