"""How many runs and attempts stand behind a mean, and what became of those that it leaves out."""

from collections.abc import Sequence
from dataclasses import dataclass

from onlinenorm.report.runs import Run


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


def tally(runs: Sequence[Run]) -> Tally:
    former = [attempt for run in runs for attempt in run.attempts]
    diverged = sum(run.diverged for run in runs) + sum(attempt.diverged for attempt in former)
    failed = sum(run.status.startswith("failed") for run in runs) + sum(not attempt.diverged for attempt in former)
    finished = sum(run.finished for run in runs)
    running = len(runs) + len(former) - finished - diverged - failed
    return Tally(len(runs), finished, len(former), diverged, failed, running)


def former_attempts(runs: Sequence[Run]) -> list[str]:
    """A line for each attempt that was not a run's last, as in "seed 1, attempt 1 of 2 diverged: ..."."""
    return [
        f"seed {run.seed}, attempt {place} of {len(run.attempts) + 1} {attempt.status}"
        for run in runs
        for place, attempt in enumerate(run.attempts, 1)
    ]
