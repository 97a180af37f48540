#!/usr/bin/env python3
"""Every table and figure that the data recorded in results/ give, in one process: most of the time goes into imports.

scripts/dev/rebuild.py FOLDER        # laid out as results/; what reproduce.sh compares with what is committed
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts._venv import ROOT, run_main

import matplotlib

from onlinenorm.deploy.export import page
from scripts import study, table1
from scripts.bench import (
    distributed_table,
    end_to_end,
    end_to_end_table,
    kernels_table,
    levers_table,
    loaders_picture,
    loaders_table,
    norm_sites_table,
    shortcut_table,
    training,
    training_table,
)
from scripts.dev import gpu_tests

RESULTS = ROOT / "results"
PAGES = {
    "bench_training": training_table, "bench_normalizer": norm_sites_table, "bench_kernels": kernels_table,
    "bench_distributed": distributed_table, "bench_data": loaders_table, "bench_shortcut": shortcut_table,
    "bench_levers": levers_table, "end_to_end": end_to_end_table,
}  # fmt: skip


def _kind(name: str) -> str:
    """The name of a measurement without the number of GPUs, which one on more than two, or than one, ends with."""
    return re.sub(r"_\d+$", "", name)


def rebuild(folder: Path) -> int:
    """Writes all of it into `folder`; returns the first exit code of a script that is not 0."""
    jobs = [
        (table1, [str(runs), "--output", str(folder / runs.parent.name)]) for runs in sorted(RESULTS.glob("*/runs"))
    ]
    if (RESULTS / "study").is_dir():
        told = ["--page", str(RESULTS / "README.md.j2")]
        jobs.append((study, [str(RESULTS / "study"), "--output", str(folder / "study"), *told]))
    data = {file.stem: folder / file.name for file in sorted(RESULTS.glob("*.json")) if _kind(file.stem) in PAGES}
    for name, file in data.items():
        shutil.copy(RESULTS / file.name, file)  # a page is written beside its data
        jobs.append((PAGES[_kind(name)], [str(file)]))
    for script, arguments in jobs:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            if code := script.main(arguments):
                return code
    if "bench_data" in data:
        loaders_picture.draw(data["bench_data"])
    if "bench_training" in data:
        picture = data["bench_training"].with_suffix(".png")
        training.plot(json.loads(data["bench_training"].read_text(encoding="utf-8")), str(picture))
    for name in data:
        if _kind(name) == "end_to_end":
            end_to_end.draw(data[name])
    for file in data.values():
        file.unlink()
    for file in RESULTS.glob("exports/*/exports.json"):
        copy = folder / file.relative_to(RESULTS).with_suffix(".md")
        copy.parent.mkdir(parents=True)
        copy.write_text(page(json.loads(file.read_text(encoding="utf-8"))), encoding="utf-8")
    if (tests := RESULTS / "gpu_tests.json").exists():
        text = gpu_tests.render(json.loads(tests.read_text(encoding="utf-8")))
        (folder / "gpu_tests.md").write_text(text, encoding="utf-8")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    matplotlib.use("Agg")
    return rebuild(parser.parse_args(arguments).folder)


if __name__ == "__main__":
    run_main(main)
