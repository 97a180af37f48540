#!/usr/bin/env python3
"""The tests that need an NVIDIA GPU, recorded one by one as they end.

scripts/dev/gpu_tests.py                                        # results/gpu_tests.json, and gpu_tests.md beside it
scripts/dev/gpu_tests.py --jobs 10                              # ten processes side by side, on all GPUs
scripts/dev/gpu_tests.py tests/ops -k single_read --output some.json

Arguments that are not its own are pytest's: files to take tests from (all that hold GPU tests otherwise), -k, -x. What
was collected and has not ended by the time the command is stopped is recorded as not run. Exit code: pytest's, or 1
where a process of several failed.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts._venv import ROOT, run_main

import torch

from onlinenorm.report.words import markdown_table, origin
from scripts.bench import common

NOT_RUN = "not run"
FORMER = ROOT / "results" / "gpu_tests.json"
LINES_KEPT = 4  # of what a test prints; more is the log of a training run
UNTIMED = 60.0  # seconds that a test may take which no former run has timed


class Recorder:
    """A plugin of pytest that writes the file anew after every test."""

    def __init__(self, path: Path, results: dict):
        self.path, self.results = path, results
        self._rows = {row["test"]: row for row in results["tests"]}

    def pytest_collection_finish(self, session) -> None:
        for item in session.items:
            summary = (item.obj.__doc__ or "").strip().split("\n\n")[0]
            self._rows[item.nodeid] = {
                "test": item.nodeid, "summary": " ".join(summary.split()), "outcome": NOT_RUN, "seconds": 0.0,
                "printed": "",
            }  # fmt: skip
        self._write()

    def pytest_runtest_logreport(self, report) -> None:
        row = self._rows[report.nodeid]
        row["seconds"] = round(row["seconds"] + report.duration, 2)
        if report.when == "call":
            printed = report.capstdout.strip().splitlines()
            row["printed"] = "\n".join(printed) if len(printed) <= LINES_KEPT else ""
        if report.when == "call" or not report.passed:
            row["outcome"] = report.outcome
            if report.failed:
                row["printed"] = str(report.longrepr)[-2000:]
            elif report.skipped:
                row["printed"] = str(report.longrepr[-1])
        self._write()

    def _write(self) -> None:
        self.results["tests"] = list(self._rows.values())
        common.write(str(self.path), self.results)


def render(results: dict) -> str:
    """Markdown of a results file: a line a test, its variants together."""
    groups: dict[str, list[dict]] = {}
    for row in results["tests"]:
        groups.setdefault(row["test"].partition("[")[0], []).append(row)
    body, failures = [], []
    for name, rows in groups.items():
        outcomes = [row["outcome"] for row in rows]
        counts = ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in dict.fromkeys(outcomes))
        said = dict.fromkeys(line for row in rows if row["outcome"] != "failed" for line in row["printed"].splitlines())
        words = rows[0]["summary"] or name.rpartition("::")[2].removeprefix("test_").replace("_", " ")
        body.append([f"`{name}`", words, counts, f"{math.fsum(row['seconds'] for row in rows):.1f}", "<br>".join(said)])
        failures += [row for row in rows if row["outcome"] == "failed"]
    text = [
        f"# Tests on {results['device']}",
        markdown_table(("test", "what holds", "outcome", "seconds", "printed"), body),
        *(f"`{row['test']}` failed:\n\n```\n{row['printed']}\n```" for row in failures),
        origin(results),
    ]
    return "\n\n".join(text) + "\n"


def collected(*arguments: str) -> list[str]:
    """Names of the tests that pytest takes by ``arguments``."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", *arguments]
    listed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout
    return [line for line in listed.splitlines() if "::" in line]


def gpu_tests() -> list[str]:
    """Those marked, and all others in files of ops/ and data/ that hold one: they use a GPU where there is one."""
    whole: list[str] = []
    others: list[str] = []
    for path in sorted(ROOT.glob("tests/**/test_*.py")):
        if "pytest.mark.gpu" in path.read_text(encoding="utf-8"):
            (whole if path.parent.name in ("ops", "data") else others).append(str(path))
    return collected(*whole) + collected("-m", "gpu", *others)


def split(tests: dict[str, float], jobs: int) -> list[list[str]]:
    """Tests for each of ``jobs`` processes, which take about equally long by the seconds of a former run."""
    parts: list[list[str]] = [[] for _ in range(min(jobs, len(tests)))]
    loads = [0.0] * len(parts)
    for test in sorted(tests, key=lambda name: -tests[name]):
        least = loads.index(min(loads))
        parts[least].append(test)
        loads[least] += tests[test]
    return parts


def merged(results: dict, parts: list[Path], tests: list[str]) -> dict:
    """``results`` with the records of the parts so far, in the order of ``tests``."""
    rows = {row["test"]: row for path in parts if path.exists() for row in json.loads(path.read_text())["tests"]}
    unborn = {"summary": "", "outcome": NOT_RUN, "seconds": 0.0, "printed": ""}
    return {**results, "tests": [rows.get(test, {"test": test, **unborn}) for test in tests]}


def run_side_by_side(results: dict, output: Path, jobs: int, tests: list[str]) -> int:
    """``jobs`` processes of this script, each with a part of the tests and the GPUs in another order."""
    former = json.loads(FORMER.read_text(encoding="utf-8"))["tests"] if FORMER.exists() else []
    seconds = {row["test"]: row["seconds"] for row in former}
    gpus = list(range(torch.cuda.device_count()))
    with tempfile.TemporaryDirectory() as folder:
        processes, paths = [], []
        for n, part in enumerate(split({test: seconds.get(test, UNTIMED) + 0.05 for test in tests}, jobs)):
            paths.append(Path(folder, f"{n}.json"))
            first = n % len(gpus)
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus[first:] + gpus[:first]))}
            call = [sys.executable, __file__, "--output", str(paths[-1]), *part]
            processes.append(subprocess.Popen(call, env=environment, cwd=ROOT))
        while any(process.poll() is None for process in processes):
            time.sleep(2)
            record(output, merged(results, paths, tests))
        record(output, merged(results, paths, tests))
    return int(not tests or any(process.returncode for process in processes))


def record(output: Path, results: dict) -> None:
    common.write(str(output), results)
    output.with_suffix(".md").write_text(render(results), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FORMER)
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    options, rest = parser.parse_known_args(arguments)
    import pytest  # of the extra "test"; rendering does without

    if not torch.cuda.is_available():
        parser.error("no GPU here: these tests need an NVIDIA GPU that torch.cuda sees")
    results = {**common.head(torch.device("cuda")), "tests": []}
    named = any(not word.startswith("-") and Path(word.partition("::")[0]).exists() for word in rest)
    if options.jobs > 1:
        return run_side_by_side(results, options.output, options.jobs, collected(*rest) if named else gpu_tests())
    # Warnings stay warnings: a GPU machine may hold another torch than the pinned one.
    settings = ["-p", "no:cacheprovider", "-o", "filterwarnings=default", "--durations=5", "--rootdir", str(ROOT)]
    code = pytest.main([*settings, *([] if named else gpu_tests()), *rest], plugins=[Recorder(options.output, results)])
    record(options.output, results)
    return int(code)


if __name__ == "__main__":
    run_main(main)
