#!/usr/bin/env python3
"""Reports on the runs of several studies at once, or on one sweep of a key.

    scripts/study.py results/study                    # studies, each with its runs in <study>/runs
    scripts/study.py runs/quickstart --output /tmp/x  # runs of one scripts/sweep.py, in folders <key>=<value>

A sweep gets ablation.md, ablation.json and ablation.png. Of several studies each gets these, or a table over
normalizers (table1.md, table1.json, curves.png, paired.md); and all together clamping.md, cost.md, imagenet.md and
their figures. Reads files only. Exit code 0: written; 1: runs are missing, damaged or of different
settings (nothing is written); 2: wrong usage.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts._venv import ROOT, run_main

from onlinenorm.cli.arguments import parse_options
from onlinenorm.errors import ReportError
from onlinenorm.files import write_together
from onlinenorm.report.ablation import build_ablation
from onlinenorm.report.build import ablation_files, findings_page, load_studies, study_files
from onlinenorm.report.runs import find_run_folders, load_runs
from onlinenorm.report.settings import load_spec
from onlinenorm.report.words import ablation_table


def main(arguments: list[str] | None = None) -> int:
    """Builds the reports; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="studies, or the runs of one sweep")
    parser.add_argument("--output", metavar="DIR", type=Path, help="where to write (default: FOLDER)")
    parser.add_argument(
        "--page", metavar="TEMPLATE", type=Path,
        help="a page about the studies with {{ figures }} to fill in, as results/README.md.j2; it lands above DIR",
    )  # fmt: skip
    parser.add_argument(
        "--benchmark", metavar="JSON", type=Path, default=ROOT / "results" / "bench_training.json",
        help="recorded rows of scripts/bench/training.py, for costs and hours (default: those of results/)",
    )  # fmt: skip
    options = parse_options(parser, arguments)
    output = options.output or options.folder
    try:
        spec = load_spec()
        if any(find_run_folders(options.folder)) and not any(options.folder.glob("*/runs")):
            ablation = build_ablation(load_runs(options.folder).runs, spec)
            files = {".": ablation_files(ablation)}
            print(ablation_table(ablation))
        else:
            benchmark = json.loads(options.benchmark.read_text()) if options.benchmark.exists() else None
            studies = load_studies(options.folder, spec)
            files = study_files(studies, benchmark, spec)
            if options.page:
                files[".."] = {options.page.stem: findings_page(options.page, studies, benchmark, spec)}
        for folder, contents in files.items():
            write_together(output / folder, contents, ReportError)
            print(f"{output / folder}: {', '.join(contents)}")
    except ReportError as error:
        print(f"study.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run_main(main)
