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
between, as in runs/table1/recipe.lr=0.1/batch/seed0. What data.decoder=auto became in the first run stands for the
others of the same images. A run's output is in output.log there, a failure's last lines in failed.txt.

Exit code 0: all done, or submitted; 1: some failed, diverged or are missing; 2: a configuration cannot be meant,
nothing was started; 128 + signal: stopped, the run in hand has saved itself.
"""

import argparse
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts._venv import ROOT, run_main

from onlinenorm.cli.arguments import literal, parse_script
from onlinenorm.cli.compose import jobs, limited_experiment, load_config, parse_override
from onlinenorm.errors import ConfigError

if TYPE_CHECKING:
    from onlinenorm.training.matrix import Row


def plan(overrides: list[str], runs: Path, config_dir: str | None = None) -> "list[Row]":
    """The rows of the matrix, their configurations checked."""
    from onlinenorm.training.matrix import check_folders, plan_row  # not above: --help does not wait for torch

    if runs.exists() and not runs.is_dir():
        raise ConfigError(f"--runs: {runs} is a file, not a folder; name another place")
    parsed = [parse_override(override) for override in literal(overrides, several=True)]
    if any(override.key_or_group == "run_dir" for override in parsed):
        raise ConfigError("run_dir: a sweep names its folders itself; --runs DIR moves them all")
    swept = {o.key_or_group for o in parsed if o.is_sweep_override()} - {"experiment", "normalizer", "seed"}
    more = [] if config_dir is None else ["--config-dir", str(Path(config_dir).absolute())]
    rows = []
    for job in jobs(overrides, config_dir):
        config = load_config(job, config_dir)
        rows.append(plan_row([*more, *job], config, limited_experiment(config["choices"], job), swept, runs))
    check_folders(rows)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Runs what is missing; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", metavar="KEY=VALUE[,VALUE...]", nargs="+", help="as for train.py")
    parser.add_argument("--runs", metavar="DIR", type=Path, default=Path("runs"), help="where the folders go")
    parser.add_argument("--parallel", metavar="N", type=int, default=1, help="that many at a time, a GPU or none each")
    parser.add_argument("--sbatch", metavar="SCRIPT", type=Path, help="submit each run with this batch script")
    parser.add_argument("--config-dir", metavar="DIR", action="append", help="more configurations, as for train.py")
    parser.add_argument("--retry", action="store_true", help="start diverged runs once more")
    parser.add_argument("--status", action="store_true", help="show the table and start nothing")
    parser.add_argument("--dry-run", action="store_true", help="show the table and the commands, start nothing")
    options = parse_script(parser, arguments)
    if options.sbatch is not None and shutil.which("sbatch") is None:
        parser.error("--sbatch: there is no sbatch command here; submit from a login node of the cluster")
    if options.parallel < 1:
        parser.error(f"--parallel: {options.parallel} is not a whole number of at least 1")
    from onlinenorm.training.matrix import UNDONE, Sweep, decoder_notes, decoder_of, submit, table

    rows = plan(options.overrides, options.runs, options.config_dir)
    if options.parallel > 1 and any(row.devices != 1 for row in rows):
        parser.error("--parallel: runs on several GPUs go one after another; leave it out, or use trainer.devices=1")
    states, lines = table(rows)
    print(*lines, sep="\n", flush=True)
    undone = (*UNDONE, "diverged") if options.retry else UNDONE
    todo = [row for row, state in zip(rows, states, strict=True) if state in undone]
    print(*(f"{note}\n" for note in decoder_notes(rows, todo, bool(options.sbatch))), sep="", end="", flush=True)
    if options.dry_run:
        start = ["sbatch", str(options.sbatch)] if options.sbatch else ["python", "train.py"]
        print(*(shlex.join([*start, *row.command(row.folder, decoder_of(row, rows))]) for row in todo), sep="\n")
        return 0
    if not options.status and todo:
        sweep = Sweep([sys.executable, str(ROOT / "train.py")], rows, options.parallel)
        if options.sbatch is None:
            sweep.take_all(todo)
        for row in todo if options.sbatch is not None else ():
            if sweep.signum:
                break
            submit(row, options.sbatch, ROOT, decoder_of(row, rows))
        states, lines = table(rows)
        print("", *lines, sep="\n")
        if sweep.signum:
            return 128 + sweep.signum
    fine = {"done", "queued", "running"} if options.sbatch is not None else {"done"}
    return int(not set(states) <= fine)


if __name__ == "__main__":
    run_main(main)
