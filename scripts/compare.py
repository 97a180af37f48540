#!/usr/bin/env python3
"""Two finished runs, image by image: who is right where, McNemar's test, and an interval of the accuracy difference.

    scripts/compare.py runs/quickstart/online_clamp/seed0 runs/quickstart/batch/seed0
    scripts/compare.py RUN_A RUN_B --clamp without --json

Reads predictions.npz of both (the validation of the last weights). Exit code 0: printed; 2: a run is missing,
unfinished or damaged, or the two did not see the same images.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts._venv import run_main

import pandas as pd

from onlinenorm.cli.arguments import parse_options
from onlinenorm.errors import ReportError
from onlinenorm.report.paired import check_same_images, pair, read_predictions
from onlinenorm.report.render import render_pairing
from onlinenorm.report.runs import load_run
from onlinenorm.report.seeds import former_attempts


def read_run(folder: Path) -> pd.DataFrame:
    """The run in `folder`; ReportError where there is none."""
    if not folder.is_dir():
        raise ReportError(f"{folder}: is no folder; name a run such as runs/quickstart/batch/seed0")
    return load_run(folder).runs


def main(arguments: list[str] | None = None) -> int:
    """Compares; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run_a", metavar="RUN_A", type=Path)
    parser.add_argument("run_b", metavar="RUN_B", type=Path)
    parser.add_argument(
        "--clamp", choices=("with", "without"), default="with", help="predictions with the clamp or without"
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
        f"{run.folder} ({'; '.join([f'{run.normalizer}, seed {run.seed}', *former_attempts(frame)])})"
        for run, frame in zip((run_a, run_b), runs, strict=True)
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
