#!/usr/bin/env python3
"""Table 1 from run folders: published against reproduced, curves, clamp removal, verdicts.

    scripts/table1.py runs/quickstart                  # writes table1.md, table1.json, curves.png, index.html there
    scripts/table1.py runs/table1 --output /tmp/report

    scripts/table1.py runs/quickstart --without batch/seed7      # leaves out a run of other settings
    scripts/table1.py runs/quickstart --before experiment=quickstart    # writes nothing: would such a run fit in?

Reads files only: it works while runs are under way and on a machine without GPU. Exit code 0: written; 1: the runs are
missing, damaged or of different settings (nothing is written, the message names those to leave out); 2: wrong usage.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts._venv import run_main

from rich.console import Console

from onlinenorm.cli.arguments import parse_options
from onlinenorm.errors import ConfigError, ReportError
from onlinenorm.files import write_together
from onlinenorm.report.build import table_files
from onlinenorm.report.mixtures import check_joins
from onlinenorm.report.render import print_report
from onlinenorm.report.runs import load_runs
from onlinenorm.report.settings import load_spec
from onlinenorm.report.tables import build_report


def main(arguments: list[str] | None = None) -> int:
    """Builds the report; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", metavar="RUNS", type=Path, help="folder with runs below it, e.g. runs/quickstart")
    parser.add_argument("--output", metavar="DIR", type=Path, help="where to write the report (default: RUNS)")
    parser.add_argument(
        "--without", metavar="RUN", nargs="+", default=[], help="runs to leave out, named as below RUNS: batch/seed7"
    )
    parser.add_argument(
        "--before",
        metavar="KEY=VALUE",
        nargs="+",
        help="write nothing; refuse runs of other settings than these of train.py",
    )
    options = parse_options(parser, arguments)
    output = options.output or options.runs
    try:
        spec = load_spec()
        found = load_runs(options.runs, options.without)
        if options.before:
            from onlinenorm.cli.compose import load_config  # here: the extra `report` brings no Hydra

            check_joins(found.runs, load_config(options.before))
            return 0
        report = build_report(found.runs, spec)
        files = table_files(report, found, page=output)
        write_together(output, files, ReportError)
    except (ReportError, ConfigError) as error:
        print(f"table1.py: {error}", file=sys.stderr)
        return 1
    width = None if sys.stdout.isatty() else 140
    console = Console(width=width)
    print_report(report, console)
    if options.without:
        console.print(f"Left out, as asked: {', '.join(options.without)}", soft_wrap=True)
    others = ", ".join(name for name in files if name != "index.html")
    console.print(f"Report: {output / 'index.html'} (with {others})", soft_wrap=True)
    return 0


if __name__ == "__main__":
    run_main(main)
