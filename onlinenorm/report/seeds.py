"""What the runs and attempts of one row came to, over seeds."""

from dataclasses import dataclass
from typing import Any

import pandas as pd

from onlinenorm.report.runs import METRICS
from onlinenorm.report.statistics import summarize


@dataclass(frozen=True)
class Tally:
    """Runs of a row (one a seed) and their former attempts; `diverged` counts both."""

    runs: int
    finished: int
    attempts: int  # former ones
    diverged: int
    failed: int  # runs and former attempts that ended otherwise
    running: int

    @property
    def tries(self) -> int:
        """All attempts, the present ones included: each is finished, diverged, failed or running."""
        return self.runs + self.attempts

    @property
    def mark(self) -> str:
        """What a mean must say of the tries that it leaves out, as in "3 of 5 diverged"; "" where it has all."""
        of = f"of {self.tries}" + " attempts" * bool(self.attempts)
        counts = {"diverged": self.diverged, "failed": self.failed, "not finished": self.running}
        left_out = [f"{count} {of} {word}" for word, count in counts.items() if count]
        return ", ".join([f"{self.finished} {of} finished", *left_out]) if left_out else ""


def tally(runs: pd.DataFrame) -> Tally:
    former = [attempt.startswith("diverged") for attempts in runs["attempts"] for attempt in attempts]
    finished, diverged, failed = (int(runs[key].sum()) for key in ("finished", "diverged", "failed"))
    running = len(runs) - finished - diverged - failed
    lost = sum(former)
    return Tally(len(runs), finished, len(former), diverged + lost, failed + len(former) - lost, running)


def former_attempts(runs: pd.DataFrame) -> list[str]:
    """A line for each attempt that was not a run's last, as in "seed 1, attempt 1 of 2 diverged: ..."."""
    return [
        f"seed {run.seed}, attempt {place} of {len(run.attempts) + 1} {attempt}"
        for run in runs.itertuples()
        for place, attempt in enumerate(run.attempts, 1)
    ]


def over_seeds(runs: pd.DataFrame, confidence: float) -> dict[str, Any]:
    """Figures, summaries and their epochs of a row's finished runs by metric, and what came of the others."""
    finished = runs[runs["finished"]].sort_values("seed")
    figures = {metric: finished[metric].tolist() for metric in METRICS}
    entries = {metric: "last" if metric.startswith("last") else metric for metric in METRICS}
    return {
        "seeds": finished["seed"].tolist(),
        "figures": figures,
        "summaries": {metric: summarize(values, confidence) for metric, values in figures.items()},
        "epochs": {m: [results[entry]["epoch"] for results in finished["results"]] for m, entry in entries.items()},
        "diverged": [f"seed {run.seed} {run.status}" for run in runs.itertuples() if run.diverged],
        "unfinished": [f"seed {run.seed} {run.status}" for run in runs.itertuples() if not run.finished],
        "attempts": former_attempts(runs),
        "tally": tally(runs),
    }
