#!/usr/bin/env python3
"""The recorded benchmark of the loaders as Markdown: whether they feed training, and all rows.

scripts/bench/loaders_table.py       # writes results/bench_data.md from bench_data.json and bench_training.json there
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts._venv import run_main

from onlinenorm.report import benchmarks
from onlinenorm.report.words import markdown_table

RESULTS = Path(__file__).resolve().parents[2] / "results"
NEEDED = 1.2  # times what training takes: what a loader should give
REFERENCE = "torchvision ImageFolder"
ON_DEVICE = "on device"  # for sets that the GPU's memory holds
SUMMARY = ("machine", "fastest loader", "images/s", f"over {REFERENCE}", "training takes", "loader over training",
           f"at least {NEEDED}?")  # fmt: skip
ROWS = ("stage", "provider", "workers", "images/s", f"over {REFERENCE}", "spread", "the same a core-second")


def render(results: dict, training: dict) -> str:
    """Markdown: for each machine whether the fastest loader feeds training, and all rows.

    Args:
        results: bench_data.json.
        training: bench_training.json, whose rates are those of training where a run was made on the same kind of GPU
            and did not measure training itself.
    """
    runs = results["runs"]
    parts = [
        "# Loaders against training",
        markdown_table(SUMMARY, [line for run in runs for line in _verdicts(run, training)]),
    ]
    for run in runs:
        parts.append(f"## {_machine(run)}")
        parts.append(markdown_table(ROWS, [_row(row) for row in run["rows"]]))
        if all(row["stage"] != "training" for row in run["rows"]):
            parts.append(
                "Training with these loaders was not measured: a network that trains shares the machine with its "
                "loader, and with `nvjpeg` the GPU."
            )
        images, versions = run["images"], run["versions"]
        git = run["git"]["commit"] + (" with local changes" if run["git"]["dirty"] else "")
        parts.append(
            f"JPEG files of {images['mean_width']:.0f} x {images['mean_height']:.0f} pixels and "
            f"{images['mean_bytes'] / 1e3:.0f} kB on average, {images['unique']} different ones; {run['processor']}; "
            + ", ".join(f"{name} {versions[name]}" for name in ("torch", "torchvision", "pillow", "timm"))
            + f", commit {git}; `{run['command']}`"
        )
    return "\n\n".join(parts) + "\n"


def _verdicts(run: dict, training: dict) -> list[list[str]]:
    not_ours_for_all = REFERENCE, "timm", ON_DEVICE
    loaders = [row for row in run["rows"] if row["stage"] == "loader" and row["provider"] not in not_ours_for_all]
    if not loaders:
        return []
    best = max(loaders, key=lambda row: row["images_per_second"])
    rate = best["images_per_second"]
    start = [_machine(run), best["provider"], f"{rate:,.0f}", f"{best['ratio']:.2f}"]
    lines = []
    for name, taken in _taken(run, training).items():
        short = NEEDED * taken - rate
        enough = "yes" if short <= 0 else f"short by {short:,.0f} images/s"
        lines.append([*start, f"{taken:,.0f} ({name})", f"{rate / taken:.2f}", enough])
    return lines or [[*start, "not measured", "", ""]]


def _taken(run: dict, training: dict) -> dict[str, float]:
    """Images/s that training takes from memory, by what trains.

    Of this run, else the fastest setting of train.py that was measured on a GPU of the same kind.
    """
    own = {f"{row['model']}, {row['normalizer']}": row["images_per_second"]
           for row in run["rows"] if row["provider"] == "resident batch"}  # fmt: skip
    if own or training["device"] != run["device"]:
        return own
    fastest, steps = {}, benchmarks.steps(training)
    for name in dict.fromkeys(steps["normalizer"]):
        best = benchmarks.fastest(benchmarks.as_trained(steps, name))
        if best is not None:
            setting = [best[key] for key in ("mode", "dtype") if isinstance(best[key], str)]
            setting += ["with SGD"] if best["optimizer"] else []
            fastest[", ".join(["resnet50", name, *setting])] = best["images_per_second"]
    return dict(sorted(fastest.items(), key=lambda item: -item[1]))


def _machine(run: dict) -> str:
    return f"{run['device']}, {run['cores']} cores" if run["device"] != "cpu" else f"{run['cores']} cores, no GPU"


def _row(row: dict) -> list:
    core = f"{row['ratio_per_core']:.2f}" if "ratio_per_core" in row else ""
    rate, ratio = f"{row['images_per_second']:,.0f}", f"{row['ratio']:.2f}"
    return [row["stage"], row["provider"], row["workers"], rate, ratio, f"{row['spread']:.0%}", core]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS / "bench_data.json", help="(%(default)s)")
    options = parser.parse_args(arguments)
    read = [json.loads(path.read_text(encoding="utf-8")) for path in (options.results, RESULTS / "bench_training.json")]
    options.results.with_suffix(".md").write_text(render(*read), encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_main(main)
