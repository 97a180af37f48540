#!/usr/bin/env python3
"""A matrix of runs that can be stopped and repeated: keys with several values x seeds, one run folder each.

    scripts/sweep.py experiment=quickstart normalizer=online_clamp,batch seed=0,1,2
    scripts/sweep.py experiment=table1 normalizer=batch seed=0,1 recipe.lr=0.05,0.1 data.root=IMAGENET
    scripts/sweep.py experiment=table1 ... --sbatch scripts/slurm/row.sbatch        each run a job
    scripts/sweep.py ... --status | --dry-run                                       the table | the commands as well
    scripts/sweep.py ... --retry                                                    diverged runs once more

Arguments are those of train.py; a comma in a path separates two, unless the path is quoted: 'data.root="/a,b"'.
Runs are taken one after another, with --parallel N that many at a time with the machine's GPUs in turn, or are
submitted; finished, running and queued ones are left alone, the others started or continued, and one that fails does
not stop the next. One that diverged would end alike again and is left alone as well; --retry starts it once more and
keeps the former attempt. Folders are runs/<experiment>/<normalizer>/seed<k>; other keys with several values come in
between, as in runs/table1/recipe.lr=0.1/batch/seed0. A run's output is in output.log there, a failure's last lines in
failed.txt.

Exit code 0: all done, or submitted; 1: some failed, diverged or are missing; 2: a configuration cannot be meant,
nothing was started; 128 + signal: stopped, the run in hand has saved itself.
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter, deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts._venv import ROOT, run_main

import torch

from onlinenorm.cli.arguments import literal, parse_script
from onlinenorm.cli.compose import jobs, limited_experiment, load_config, parse_override
from onlinenorm.data.workers import STOP_SIGNALS
from onlinenorm.errors import ConfigError
from onlinenorm.text import duration
from onlinenorm.training.attempts import DIVERGED, former_attempts, keep_attempt
from onlinenorm.training.config_check import check_config
from onlinenorm.training.epoch_log import read_rows
from onlinenorm.training.run_folder import FAILED, RunFolder

# exit codes of runs that have saved themselves, or had not begun
STOPPED = {code for number in STOP_SIGNALS for code in (128 + number, -number)}
UNDONE = ("failed", "stopped", "missing")
LINES_KEPT = 30


@dataclass(frozen=True)
class Row:
    """One run of the matrix."""

    overrides: tuple[str, ...]
    folder: Path
    normalizer: str
    epochs: int
    devices: int | str = 1

    @property
    def failure(self) -> Path:
        return self.folder / FAILED

    @property
    def job(self) -> Path:
        return self.folder / "job.txt"

    def state(self, queue: dict[str, str]) -> str:
        """done | running | queued | diverged | failed | stopped (unfinished, to be continued) | missing"""
        if (self.folder / "results.json").exists():
            return "done"
        if RunFolder(self.folder).is_locked():
            return "running"
        number = self.job.read_text().strip() if self.job.exists() else None
        if number in queue:
            return "running" if queue[number] == "RUNNING" else "queued"
        if self.failure.exists() or number is not None:
            told = self.failure.read_text(encoding="utf-8", errors="replace") if self.failure.exists() else ""
            return "diverged" if DIVERGED in told else "failed"
        return "stopped" if any(self.folder.glob("checkpoints/*.ckpt")) else "missing"


def plan(overrides: list[str], runs: Path, config_dir: str | None = None) -> list[Row]:
    """The rows of the matrix, their configurations checked; the folder is a function of the overrides alone."""
    parsed = [parse_override(override) for override in literal(overrides, several=True)]
    if any(override.key_or_group == "run_dir" for override in parsed):
        raise ConfigError("run_dir: a sweep names its folders itself; --runs DIR moves them all")
    swept = {o.key_or_group for o in parsed if o.is_sweep_override()} - {"experiment", "normalizer", "seed"}
    rows = []
    more = () if config_dir is None else ("--config-dir", str(Path(config_dir).absolute()))
    for job in jobs(overrides, config_dir):
        config = load_config(job, config_dir)
        check_config(config)
        values = sorted(part for part in job if part.partition("=")[0].lstrip("+") in swept)
        names = config["choices"]
        between = [",".join(values).replace("/", "_")] if values else []
        experiment = limited_experiment(names, job)
        folder = Path(runs, experiment, *between, names["normalizer"], f"seed{config['seed']}")
        # of the trainer only train.py knows what it resolves to, on the machine where it runs
        RunFolder(folder, rank_zero=False).check_config(config, ignored=("trainer",))
        epochs, devices = config["recipe"]["epochs"], config["trainer"]["devices"]
        rows.append(Row((*more, *job), folder, names["normalizer"], epochs, devices))
    doubled = [str(folder) for folder, count in Counter(row.folder for row in rows).items() if count > 1]
    if doubled:
        raise ConfigError(f"{' '.join(overrides)}: two runs would share {doubled[0]}; name each value once")
    return rows


def queued_jobs() -> dict[str, str]:
    """Job number -> state of this user's SLURM jobs; {} without SLURM."""
    if shutil.which("squeue") is None:
        return {}
    answer = subprocess.run(["squeue", "--me", "-h", "-o", "%i|%T"], capture_output=True, text=True, check=False)
    return dict(line.split("|") for line in answer.stdout.splitlines())


def seconds_left(rows: list[Row], states: list[str]) -> list[float | None]:
    """What each row will still take, from its own epochs, else from those of its normalizer, else of all rows.

    Nothing where it is done or has failed.
    """
    spent = [
        [float(epoch["seconds"]) for epoch in read_rows(row.folder / "metrics.csv") if epoch.get("seconds")]
        for row in rows
    ]

    def mean(choose) -> float | None:
        epochs = [seconds for row, own in zip(rows, spent, strict=True) if choose(row) for seconds in own]
        return sum(epochs) / len(epochs) if epochs else None

    left: list[float | None] = []
    for row, own, state in zip(rows, spent, states, strict=True):
        each = sum(own) / len(own) if own else mean(lambda other, row=row: other.normalizer == row.normalizer)
        each = mean(lambda other: True) if each is None else each
        over = state in ("done", "diverged", "failed")
        left.append(0.0 if over else None if each is None else each * (row.epochs - len(own)))
    return left


def table(rows: list[Row]) -> tuple[list[str], list[str]]:
    """(states, lines for people)."""
    queue = queued_jobs()
    states = [row.state(queue) for row in rows]
    left = seconds_left(rows, states)
    lines = [f"{'state':8} {'epoch':>9} {'left':>12}  folder"]
    for row, state, seconds in zip(rows, states, left, strict=True):
        epochs = f"{len(read_rows(row.folder / 'metrics.csv'))}/{row.epochs}"
        time = "-" if state in ("diverged", "failed") else "?" if seconds is None else duration(seconds)
        former = len(former_attempts(row.folder))
        again = f"  (after {former} failed attempt{'s' * (former > 1)})" if former else ""
        lines.append(f"{state:8} {epochs:>9} {time:>12}  {row.folder}{again}")
    counts = Counter(states)
    text = ", ".join(f"{counts[state]} {state}" for state in sorted(counts))
    known = [seconds for seconds in left if seconds is not None]
    more = "" if len(known) == len(left) else " and what is not known yet"
    lines.append(f"{text}; {duration(sum(known))} of computing left{more}")
    if counts["diverged"]:
        lines.append("Diverged runs would end alike again and are left alone; --retry starts them once more")
    return states, lines


def command(row: Row, folder: Path) -> list[str]:
    return [*row.overrides, f"run_dir={folder}"]


class Sweep:
    """Takes rows, `parallel` at a time; a signal goes to the runs in hand and ends the sweep."""

    def __init__(self, parallel: int):
        self.parallel, self.signum = parallel, 0
        self._runs: set[subprocess.Popen] = set()
        self._gpus = visible_gpus() if parallel > 1 else []
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self._stop)

    def take_all(self, rows: list[Row]) -> None:
        waiting = deque(rows)
        workers = [threading.Thread(target=self._work, args=(waiting, slot)) for slot in range(self.parallel)]
        for worker in workers:
            worker.start()
        for worker in workers:
            while worker.is_alive():
                worker.join(0.2)  # signals are heard here: the main thread must not block for long

    def _stop(self, signum: int, frame: Any) -> None:
        self.signum = signum
        for run in list(self._runs):
            self._pass_on(run)

    def _pass_on(self, run: subprocess.Popen) -> None:
        run.send_signal(self.signum)

    def _work(self, waiting: deque[Row], slot: int) -> None:
        while not self.signum:
            try:
                row = waiting.popleft()
            except IndexError:
                return
            if row.state({}) in (*UNDONE, "diverged"):  # another sweep may have come first
                self._take(row, slot)

    def _take(self, row: Row, slot: int) -> None:
        row.folder.mkdir(parents=True, exist_ok=True)
        keep_attempt(row.folder)
        row.job.unlink(missing_ok=True)
        last: deque[str] = deque(maxlen=LINES_KEPT)
        mark = f"{row.folder}  " if self.parallel > 1 else "  "
        gpu = {"CUDA_VISIBLE_DEVICES": self._gpus[slot % len(self._gpus)]} if self._gpus else {}
        print(f"\n{row.folder}", flush=True)
        # a session of its own: a terminal's Ctrl-C reaches the run as a signal that it saves itself on
        run = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *command(row, row.folder)], env={**os.environ, **gpu},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        self._runs.add(run)
        if self.signum:
            self._pass_on(run)
        with run, open(row.folder / "output.log", "a", encoding="utf-8") as log:
            for line in run.stdout:
                print(f"{mark}{line}", end="", flush=True)
                log.write(line)
                last.append(line)
        self._runs.discard(run)
        if run.returncode and run.returncode not in STOPPED:
            row.failure.write_text(f"exit code {run.returncode}\n{''.join(last)}", encoding="utf-8")


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may be set to for one GPU each."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(k) for k in range(torch.cuda.device_count())] if named is None else [k for k in named.split(",") if k]


def submit(row: Row, script: Path) -> None:
    """Hands a row to SLURM."""
    folder = row.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    keep_attempt(row.folder)
    options = ["--parsable", f"--job-name={row.folder}", f"--chdir={ROOT}", f"--output={folder / 'output.log'}"]
    sbatch = ["sbatch", *options, str(script.resolve()), *command(row, folder)]
    answer = subprocess.run(sbatch, capture_output=True, text=True, check=False)
    if answer.returncode:
        row.failure.write_text(f"sbatch: exit code {answer.returncode}\n{answer.stderr}", encoding="utf-8")
        print(f"{row.folder}: {answer.stderr.strip()}", file=sys.stderr)
    else:
        row.job.write_text(answer.stdout.partition(";")[0].strip() + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Runs what is missing; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", metavar="KEY=VALUE[,VALUE...]", nargs="+", help="as for train.py")
    parser.add_argument("--runs", metavar="DIR", type=Path, default=Path("runs"), help="where the folders go")
    parser.add_argument("--parallel", metavar="N", type=int, default=1, help="that many at a time, a GPU or none each")
    parser.add_argument("--sbatch", metavar="SCRIPT", type=Path, help="submit each run with this batch script")
    parser.add_argument("--config-dir", metavar="DIR", help="more configurations, as for train.py")
    parser.add_argument("--retry", action="store_true", help="start diverged runs once more")
    parser.add_argument("--status", action="store_true", help="show the table and start nothing")
    parser.add_argument("--dry-run", action="store_true", help="show the table and the commands, start nothing")
    options = parse_script(parser, arguments)
    if options.sbatch is not None and shutil.which("sbatch") is None:
        parser.error("--sbatch: there is no sbatch command here; submit from a login node of the cluster")
    if options.parallel < 1:
        parser.error(f"--parallel: {options.parallel} is not a whole number of at least 1")
    rows = plan(options.overrides, options.runs, options.config_dir)
    if options.parallel > 1 and any(row.devices != 1 for row in rows):
        parser.error("--parallel: runs on several GPUs go one after another; leave it out, or use trainer.devices=1")
    states, lines = table(rows)
    print(*lines, sep="\n", flush=True)
    undone = (*UNDONE, "diverged") if options.retry else UNDONE
    todo = [row for row, state in zip(rows, states, strict=True) if state in undone]
    if options.dry_run:
        start = ["sbatch", str(options.sbatch)] if options.sbatch else ["python", "train.py"]
        print(*(shlex.join([*start, *command(row, row.folder)]) for row in todo), sep="\n")
        return 0
    if not options.status and todo:
        sweep = Sweep(options.parallel)
        if options.sbatch is None:
            sweep.take_all(todo)
        for row in todo if options.sbatch is not None else ():
            if sweep.signum:
                break
            submit(row, options.sbatch)
        states, lines = table(rows)
        print("", *lines, sep="\n")
        if sweep.signum:
            return 128 + sweep.signum
    fine = {"done", "queued", "running"} if options.sbatch is not None else {"done"}
    return int(not set(states) <= fine)


if __name__ == "__main__":
    run_main(main)
