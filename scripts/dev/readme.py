#!/usr/bin/env python3
"""Makes README.md: its template, README.md.j2, with figures of what is recorded in results/.

scripts/dev/readme.py            # writes README.md
scripts/dev/readme.py --check    # exit code 1 where it differs from what is recorded
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts._venv import ROOT, run_main

from jinja2 import Environment, StrictUndefined

from onlinenorm.report import benchmarks

BATCH = "batch"  # the normalizer that speeds are compared with


class Recorded:
    """Figures as words, from tables of studies (results/study/*/table1.json) and results/bench_training.json.

    A study, row or measurement that is not there is a KeyError, which names it.
    """

    def __init__(self, results: Path):
        self._results = results
        self._benchmark = _read(results / "bench_training.json")

    def device(self) -> str:
        """What speeds were measured on."""
        return self._benchmark["device"]

    def rate(self, normalizer: str, batch: int) -> str:
        """Images/s of a training step."""
        return f"{self._rate(normalizer, batch):,.0f}"

    def faster(self, normalizer: str, batch: int) -> str:
        """How many times BatchNorm's images/s."""
        return f"{self._rate(normalizer, batch) / self._rate(BATCH, batch):.2f}"

    def published(self, normalizer: str) -> str:
        """The published accuracy."""
        return f"{100 * self._row('fashion_mnist', normalizer)['published']['best_top1']:.1f} %"

    def top1(self, study: str, normalizer: str) -> str:
        """The best epoch's accuracy, a mean over seeds."""
        return f"{100 * self._row(study, normalizer)['summaries']['best_top1']['mean']:.1f} %"

    def seeds(self, study: str, normalizer: str) -> str:
        """How many finished."""
        return str(len(self._row(study, normalizer)["seeds"]))

    def details(self, study: str) -> str:
        """The last of what a study's scale names: "20 epochs"."""
        return self._table(study)["scale_label"].removesuffix(")").rpartition(", ")[2]

    def margin(self, study: str) -> str:
        """Within which two rows are equivalent in accuracy."""
        (margin,) = {found["margin"] for found in self._between(study)}
        return f"{100 * margin:g} points"

    def verdict(self, study: str, first: str, second: str) -> str:
        """Of the difference of two rows in accuracy."""
        verdicts = {(found["first"], found["second"]): found["verdict"]["outcome"] for found in self._between(study)}
        return verdicts[first, second]

    def _rate(self, normalizer: str, batch: int) -> float:
        """Of the fastest of what was measured as train.py trains: the fused kernels, bfloat16 and SGD."""
        rows = benchmarks.best(self._benchmark, batch)
        if normalizer not in set(rows[rows["optimizer"]]["normalizer"]):
            raise KeyError(f"bench_training.json: no step of {normalizer} in batches of {batch} with SGD in bf16")
        return rows.set_index("normalizer").at[normalizer, "images_per_second"]

    def _row(self, study: str, normalizer: str) -> dict[str, Any]:
        return {row["normalizer"]: row for row in self._table(study)["rows"]}[normalizer]

    def _between(self, study: str) -> list[dict[str, Any]]:
        """Comparisons of two of a study's own rows in accuracy."""
        found = self._table(study)["comparisons"]
        return [one for one in found if one["second"] and one["metric"] == "best_top1"]

    def _table(self, study: str) -> dict[str, Any]:
        return _read(self._results / "study" / study / "table1.json")


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def filled(template: str, results: Path) -> str:
    """A page whose `{{ figures }}` are the methods of `Recorded`."""
    recorded = Recorded(results)
    names = {name: getattr(recorded, name) for name in dir(recorded) if not name.startswith("_")}
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    return environment.from_string(template).render(names)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where README.md is stale")
    options = parser.parse_args(arguments)
    page = ROOT / "README.md"
    text = filled((ROOT / "README.md.j2").read_text(encoding="utf-8"), ROOT / "results")
    if options.check:
        stale = page.read_text(encoding="utf-8") != text
        if stale:
            print("README.md differs from what is recorded; run scripts/dev/readme.py", file=sys.stderr)
        return int(stale)
    page.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_main(main)
