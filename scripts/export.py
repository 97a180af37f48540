#!/usr/bin/env python3
"""A trained network as a file for other software: torchvision or folded weights, ONNX, TorchScript, torch.export.

    scripts/export.py runs/quickstart/online_clamp/seed0 --to onnx --output exports
    scripts/export.py runs/table1/online_clamp/seed0/checkpoints/best.ckpt --to all --output exports

RUN is a run folder (its last weights) or a checkpoint file in one. The clamp is removed unless --keep-clamp says
otherwise; --reestimate N mends some of what that costs. Each file is read back and compared with the network on
validation images before it is kept, and gets a model card. Exit code 0: all forms asked for are written; 1: refused by
that comparison, the run's data failed, or --to all could not make each form (the others are written, the table says
why); 2: the run, the form or the arguments do not allow it.
"""

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts._venv import run_main

from onlinenorm.cli.arguments import parse_options
from onlinenorm.deploy import FORMS, load_trained
from onlinenorm.deploy.card import TORCHSCRIPT
from onlinenorm.deploy.command import ALLOW, exit_code
from onlinenorm.deploy.export import export, facts, table


def main(arguments: list[str] | None = None) -> int:
    """Exports; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder, or a checkpoint file in one")
    parser.add_argument(
        "--to", metavar="FORM", required=True, choices=[*FORMS, "all"], help=f"{', '.join(FORMS)} or all"
    )
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="folder for the file and its card")
    parser.add_argument(
        "--keep-clamp", action="store_true", help="leave the clamp in (forms other than torchvision, folded)"
    )
    parser.add_argument(
        "--reestimate", type=int, default=0, metavar="N", help="statistics anew on N training images without the clamp"
    )
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest logit difference allowed (default 1e-4)")
    parser.add_argument(
        "--images", type=int, metavar="N", default=2000, help="validation images to compare on (default 2000)"
    )
    parser.add_argument("--data-root", metavar="DIR", help="where the dataset lies (default: where the run found it)")
    parser.add_argument(
        "--latency", metavar="N", type=int, default=20, dest="latency_runs", help="timed calls a form (20)"
    )
    parser.add_argument("--allow", metavar="NAME", action="append", default=[], help=ALLOW)
    options = parse_options(parser, arguments)
    command = shlex.join(["scripts/export.py", *(sys.argv[1:] if arguments is None else arguments)])

    def program() -> int:
        trained = load_trained(options.run, options.data_root, "center_crop", options.allow)
        names = list(FORMS) if options.to == "all" else [options.to]
        result = export(
            trained, names, options.output, command,
            options.keep_clamp, options.tolerance, options.images, max(options.latency_runs, 0),
            options.reestimate,
        )  # fmt: skip
        print(table(facts(trained, result, command)))
        if any(row.form == "torchscript" and row.file for row in result.rows):
            print(f"Note: {TORCHSCRIPT}.\n")
        for row in result.rows:
            if row.file:
                print(f"{options.output / row.file} (card: {Path(row.file).with_suffix('.md')})")
        missing = [row.form for row in result.rows if not row.file]
        if missing:
            print(f"export.py: not made: {', '.join(missing)}; the reasons stand above", file=sys.stderr)
        return int(bool(missing))

    return exit_code("export.py", program)


if __name__ == "__main__":
    run_main(main)
