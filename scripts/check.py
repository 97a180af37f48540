#!/usr/bin/env python3
"""Pre-flight of a run, in under a minute: would this command train, fit, and end in time?

    scripts/check.py experiment=table1 normalizer=batch data.root=IMAGENET        the arguments of train.py
    scripts/check.py experiment=table1 data.root=IMAGENET --time-limit 24:00:00 --json

Checks the configuration, the data (a few images are decoded), the disk against the checkpoints' size, one training
step at the real batch against the memory, the loader's images/s against the network's, the expected end against the
time limit (--time-limit, or the SLURM job's own), and lists where the recipe departs from the published one. Trains
nothing, writes nothing but the index of the images.

Exit code 0: ready (warnings are printed); 1: the run would fail; 2: the configuration cannot be meant.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts._venv import run_main

from onlinenorm.cli.arguments import parse_script
from onlinenorm.cli.compose import load_config
from onlinenorm.errors import ConfigError, RunError
from onlinenorm.report.settings import departures, load_spec
from onlinenorm.training.preflight import FAIL, OK, WARN, Finding, finding, preflight
from onlinenorm.training.trainer import quiet_lightning, resolve


def check(
    overrides: list[str], seconds: float, limit: float | None, config_dir: str | None = None
) -> Iterator[Finding]:
    """Findings {check, status, text, figures...}, in an order in which each needs only those before it."""
    config = load_config(overrides, config_dir)
    scale = ""
    for found in preflight(config, seconds, limit):
        scale = found.get("scale", scale)
        yield found
    yield check_recipe({**config, "trainer": resolve(config["trainer"])}, scale)


def check_recipe(config: dict[str, Any], scale: str) -> Finding:
    """Where the settings depart from those behind the published table, or behind what was published on these data.

    `scale` is that of the run's images: on others than the published ones no departure is a warning.
    """
    spec = load_spec().published_on(config["choices"]["data"])
    normalizer = config["choices"]["normalizer"]
    found = list(departures([(normalizer, config)], spec.published_setting).itertuples())
    theirs, decisive = scale == spec.published_scale, any(d.decisive for d in found)
    mark = " (decisive)" if theirs else ""
    text = "; ".join(f"{d.name} is {d.actual}, published {d.published}{mark * d.decisive}" for d in found)
    text = text or "the published setting"
    if not theirs:
        text = f"nothing is published on these images ({scale}), any recipe is right; {spec.published_scale}'s: {text}"
    elif decisive:
        text += "; with a decisive departure tables compare with no published figure"
    keys = "name", "published", "actual", "decisive"
    departing = [{key: getattr(d, key) for key in keys} for d in found]
    return finding("recipe", WARN if theirs and decisive else OK, text, departures=departing)


def parse_limit(text: str) -> float:
    """Seconds of a SLURM time: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]."""
    days, dash, rest = text.rpartition("-")
    if not re.fullmatch(r"\d+(:\d+){0,2}", rest) or not re.fullmatch(r"\d*", days) or (dash and not days):
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write 90 (minutes), 24:00:00 or 2-12 (days-hours)")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, (*parts, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60.0 + seconds


def time_left() -> float | None:
    """Seconds until the SLURM job that this runs in ends, or None."""
    end = os.environ.get("SLURM_JOB_END_TIME", "")
    return max(float(end) - time.time(), 0.0) if end.isdigit() else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="as for train.py")
    parser.add_argument("--config-dir", metavar="DIR", action="append", help="more configurations, as for train.py")
    parser.add_argument("--time-limit", type=parse_limit, metavar="TIME", help="as sbatch takes it, e.g. 24:00:00")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print findings as JSON")
    findings, code, options = [], 0, argparse.Namespace(json=False)
    try:
        options = parse_script(parser, arguments)
        if not options.seconds > 0:
            raise ConfigError(f"--seconds: {options.seconds:g} must be larger than 0")
        with quiet_lightning():
            limit = options.time_limit if options.time_limit is not None else time_left()
            for row in check(options.overrides, options.seconds, limit, options.config_dir):
                findings.append(row)
                if not options.json:
                    print(f"{row['status']:8}{row['check']:7} {row['text']}", flush=True)
                if row["status"] == FAIL:
                    code = 1
    except (ConfigError, RunError, ValueError) as error:
        code = getattr(error, "exit_code", 1)
        findings.append(finding("config" if code == 2 else "data", FAIL, str(error)))
        if not options.json:
            print(f"{FAIL:8}{error}", file=sys.stderr)
    if options.json:
        print(json.dumps({"ready": code == 0, "exit_code": code, "findings": findings}, indent=1, default=str))
    return code


if __name__ == "__main__":
    run_main(main)
