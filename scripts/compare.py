#!/usr/bin/env python3
"""Two finished runs, image by image: who is right where, McNemar's test, and an interval of the accuracy difference.

    scripts/compare.py runs/quickstart/online_clamp/seed0 runs/quickstart/batch/seed0
    scripts/compare.py RUN_A RUN_B --clamp without --json

Reads predictions.npz of both (the validation of the last weights), as trained unless --clamp says otherwise. Exit code
0: printed; 2: a run is missing, unfinished or damaged, or the two did not see the same images.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts._venv import run_main

import pandas as pd

from onlinenorm.cli.arguments import parse_options
from onlinenorm.errors import ReportError
from onlinenorm.report.paired import check_same_images, pair, read_predictions
from onlinenorm.report.predictions import as_trained, epochs_without_clamp
from onlinenorm.report.render import render_pairing
from onlinenorm.report.runs import load_run
from onlinenorm.report.seeds import former_attempts
from onlinenorm.text import plural


def read_run(folder: Path) -> pd.DataFrame:
    """The run in `folder`; ReportError where there is none."""
    if not folder.is_dir():
        raise ReportError(f"{folder}: is no folder; name a run such as runs/quickstart/batch/seed0")
    return load_run(folder).runs


def described(run: Any, attempts: list[str], clamp: str | None) -> str:
    """The folder of a run and what is compared of it."""
    told = [f"{run.normalizer}, seed {run.seed}"]
    if run.results.get("clamping"):
        if epochs := epochs_without_clamp(run.config):
            told.append(f"trained without the clamp in the last {plural(epochs, 'epoch')}")
        if clamp not in (None, as_trained(run.config)):
            told.append("compared with the clamp put back" if clamp == "with" else "compared with the clamp removed")
    return f"{run.folder} ({'; '.join([*told, *attempts])})"


def main(arguments: list[str] | None = None) -> int:
    """Compares; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run_a", metavar="RUN_A", type=Path)
    parser.add_argument("run_b", metavar="RUN_B", type=Path)
    parser.add_argument(
        "--clamp", choices=("with", "without"), help="predictions with the clamp or without it (default: as trained)"
    )
    parser.add_argument("--level", type=float, default=0.95, help="of the interval (default 0.95)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parse_options(parser, arguments)
    try:
        runs = [read_run(folder) for folder in (options.run_a, options.run_b)]
        run_a, run_b = (next(run.itertuples()) for run in runs)
        a, b = (read_predictions(run, options.clamp) for run in (run_a, run_b))
        check_same_images(run_a, run_b, a, b)
        pairing = pair(a, b, options.level)
    except ValueError as error:  # ReportError is one
        print(f"compare.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    names = [
        described(run, former_attempts(frame), options.clamp) for run, frame in zip((run_a, run_b), runs, strict=True)
    ]
    if options.json:
        print(json.dumps({"a": str(run_a.folder), "b": str(run_b.folder), **asdict(pairing)}, indent=2))
        return 0
    print(render_pairing(pairing, *names), end="")
    if run_a.seed != run_b.seed:
        print("The seeds differ, so the two also saw their training images in different orders.")
    return 0


if __name__ == "__main__":
    run_main(main)
