#!/usr/bin/env python3
"""What the activation clamp of a trained network does: validation without it and at other values, no retraining.

    scripts/audit_clamping.py runs/quickstart/online_clamp/seed0
    scripts/audit_clamping.py runs/table1/online_clamp/seed0 --values 2 3 8 --data-root IMAGENET --output audit

Validates as trained, without clamp, at each clamp value, and with the clamps up to each layer removed; prints two
tables and the layer where the cost of removal starts; writes clamping.json, clamping.md and clamping.png. Exit code 0:
written; 1: the run's data failed; 2: the run or the arguments do not allow it.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts._venv import run_main

from onlinenorm.cli.arguments import parse_options
from onlinenorm.deploy import load_trained
from onlinenorm.deploy.audit import audit, draw_audit, render_audit
from onlinenorm.deploy.command import ALLOW, exit_code
from onlinenorm.deploy.export import made_with
from onlinenorm.deploy.images import pick_device
from onlinenorm.errors import DeployError
from onlinenorm.files import staging
from onlinenorm.provenance import hardware

VALUES = (0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 12)


def main(arguments: list[str] | None = None) -> int:
    """Audits; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder, or a checkpoint file in one")
    parser.add_argument("--values", type=float, nargs="+", default=VALUES, metavar="C", help="clamp values to try")
    parser.add_argument("--images", type=int, metavar="N", help="validation images, spread evenly (default: all)")
    parser.add_argument("--output", metavar="DIR", type=Path, help="default: clamping/ in the run folder")
    parser.add_argument("--data-root", metavar="DIR", help="where the dataset lies (default: where the run found it)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--allow", metavar="NAME", action="append", default=[], help=ALLOW)
    options = parse_options(parser, arguments)
    command = shlex.join(["scripts/audit_clamping.py", *(sys.argv[1:] if arguments is None else arguments)])

    def program() -> int:
        device = pick_device(options.device)
        trained = load_trained(options.run, options.data_root, allowed=options.allow)
        output = options.output or trained.folder / "clamping"
        result = audit(trained, options.values, options.images, device)
        tables = render_audit(result)
        about = {
            "command": command,
            "checkpoint": trained.checkpoint.name,
            "device": device.type,
            "hardware": hardware(),
            "made_with": made_with(),
        }
        with staging(output, DeployError) as work:
            content = json.dumps({**about, **result.as_dict()}, indent=2, allow_nan=False) + "\n"
            (work / "clamping.json").write_text(content, encoding="utf-8")
            (work / "clamping.md").write_text(tables, encoding="utf-8", errors="backslashreplace")
            draw_audit(result, work / "clamping.png")
        print(tables)
        print(f"{output}: clamping.json, clamping.md, clamping.png")
        return 0

    return exit_code("audit_clamping.py", program)


if __name__ == "__main__":
    run_main(main)
