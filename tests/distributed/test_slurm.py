"""The shipped batch script on a real SLURM of two nodes: preempted, out of time, and the bits of an undisturbed run.

Needs a running cluster of two nodes that share this folder; SLURM_EVIDENCE=FILE keeps what happened as JSON.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import process_groups
import pytest
import torch
from distributed_runs import TINY, train
from tests_training import ROOT, outcome

RUN = (*TINY, "data.num_train=640", "recipe.epochs=12", "normalizer=online_clamp", "trainer.accelerator=cpu")
LIMIT = 60 * 15


def ask(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def nodes():
    """Of a cluster that answers; SLURM may be installed without one."""
    if not shutil.which("sinfo"):
        return 0
    answer = subprocess.run(["sinfo", "-h", "-N", "-o", "%N"], capture_output=True, text=True, check=False)
    return len(answer.stdout.split()) if answer.returncode == 0 else 0


class Job:
    """A job, and the times at which its state was seen to change."""

    def __init__(self, number):
        self.number, self.events, self._began = number, [], time.monotonic()

    def note(self, event):
        if not self.events or self.events[-1][1] != event:
            self.events.append((round(time.monotonic() - self._began), event))

    def state(self):
        fields = dict(f.split("=", 1) for f in ask("scontrol", "show", "job", self.number).split() if "=" in f)
        self.note(f"{fields['JobState']} (restarts {fields['Restarts']})")
        return fields["JobState"], int(fields["Restarts"])

    def wait(self, condition):
        deadline = time.monotonic() + LIMIT
        while not condition(*self.state()):
            assert time.monotonic() < deadline, self.events
            time.sleep(0.5)


@pytest.mark.slurm
@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("SLURM_JOB_ID") is not None, reason="starts jobs of its own")
def test_preempted_and_out_of_time(tmp_path):
    if nodes() < 2:
        pytest.skip("no SLURM cluster of two nodes is running")
    folder, output = tmp_path / "job", tmp_path / "job.out"
    command = [
        "sbatch", "--parsable", "--nodes=2", "--time=2", "--signal=B:USR1@30", f"--chdir={ROOT}", f"--output={output}",
        # both nodes may be this machine, under names that nothing else resolves
        f"--export=ALL,MASTER_ADDR=127.0.0.1,OMP_NUM_THREADS=1,PYTHON={sys.executable}",
        "scripts/slurm/row.sbatch", *RUN, "trainer.precision=32-true", f"run_dir={folder}",
    ]  # fmt: skip
    job = Job(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip())
    try:
        job.wait(lambda state, _: state == "RUNNING" and (folder / "metrics.csv").exists())
        ask("scontrol", "requeue", job.number)
        job.note("scontrol requeue: preempted")
        job.wait(lambda state, restarts: state == "RUNNING" and restarts == 1)
        job.wait(lambda state, restarts: state == "COMPLETED" or restarts == 2)
        job.wait(lambda state, _: state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"))
    finally:
        subprocess.run(["scancel", job.number], check=False)
    text = output.read_text()
    assert job.state()[0] == "COMPLETED", text
    assert "SIGTERM: saved at" in text and "SIGUSR1: saved at" in text and "requeueing job" in text, text
    whole = tmp_path / "whole"
    several = ("trainer.strategy=ddp", "trainer.devices=auto")
    process_groups.run(2, train, str(whole), *RUN, *several, seconds=LIMIT)
    assert outcome(folder) == outcome(whole)
    record(job, command, text, folder, whole)


def record(job, command, text, folder, whole):
    results = [json.loads((path / "results.json").read_text()) for path in (folder, whole)]
    evidence = {
        "what": "two nodes, one task each: preempted with scontrol requeue, stopped by --signal, requeued by itself",
        "command": " ".join(command).replace(str(folder.parent), "TMP").replace(str(ROOT), "ROOT"),
        "commit": ask("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
        "versions": {"slurm": ask("sinfo", "--version"), "torch": torch.__version__, "python": sys.version.split()[0]},
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, two slurmd on loopback",
        "seconds_and_states": job.events,
        "output": [line for line in text.splitlines() if not line.startswith("epoch ")],
        "parameters_sha256": {
            "job": results[0]["parameters_sha256"],
            "undisturbed, two processes": results[1]["parameters_sha256"],
        },
        "resumed": results[0]["resumed"],
        "metrics_rows_and_predictions": "identical",
    }
    print(json.dumps(evidence, indent=1))
    if path := os.environ.get("SLURM_EVIDENCE"):
        Path(path).write_text(json.dumps(evidence, indent=1).replace(str(ROOT), "ROOT") + "\n")
