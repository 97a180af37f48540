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

RUN = (
    *TINY, "data.num_train=640", "recipe.epochs=36", "normalizer=online_clamp", "trainer.accelerator=cpu",
    "data.num_workers=1",
)  # fmt: skip
ONE = (*TINY, "data.num_train=160", "trainer.precision=32-true", "data.num_workers=2")
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


def submit(output, *arguments, **environment):
    """The number of a job of this repository's scripts."""
    exported = {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "PYTHON": sys.executable, **environment}
    export = ",".join(["ALL", *(f"{name}={value}" for name, value in exported.items())])
    command = ["sbatch", "--parsable", f"--chdir={ROOT}", f"--output={output}", f"--export={export}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slurm
@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("SLURM_JOB_ID") is not None, reason="starts jobs of its own")
def test_sigterm_to_a_step_with_loader_workers(tmp_path):
    """What scancel sends, and preemption with a grace time: to every process of the step."""
    if nodes() < 1:
        pytest.skip("no SLURM cluster is running")
    folder, output = tmp_path / "job", tmp_path / "job.out"
    arguments = (
        "scripts/slurm/row.sbatch",
        *ONE,
        "trainer.accelerator=cpu",
        "normalizer=online_clamp",
        f"run_dir={folder}",
    )
    job = Job(submit(output, *arguments))
    try:
        job.wait(lambda state, _: state == "RUNNING" and (folder / "metrics.csv").exists())
        ask("scancel", "--signal=TERM", f"{job.number}.0")
        job.wait(lambda state, _: state == "FAILED")
        assert "SIGTERM: saved at" in output.read_text() and "Traceback" not in output.read_text(), output.read_text()
        again = Job(submit(output, *arguments))
        again.wait(lambda state, _: state in ("COMPLETED", "FAILED"))
    finally:
        subprocess.run(["scancel", job.number], check=False)
    assert again.state()[0] == "COMPLETED", output.read_text()
    whole = (str(tmp_path / "whole"), *ONE, "normalizer=online_clamp")
    process_groups.run(1, train, *whole, seconds=LIMIT)
    assert outcome(folder) == outcome(tmp_path / "whole")


@pytest.mark.slurm
@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("SLURM_JOB_ID") is not None, reason="starts jobs of its own")
def test_one_element_of_an_array_requeues_itself_alone(tmp_path):
    """The last one bears the number of the whole array as its own."""
    if nodes() < 2:
        pytest.skip("no SLURM cluster of two nodes is running")
    array = submit(
        tmp_path / "%a.out", "--array=0-1", "scripts/slurm/matrix.sbatch", *ONE, "trainer.accelerator=cpu",
        "recipe.epochs=600",
        f"run_dir={tmp_path}/${{seed}}", NORMALIZERS="batch", SEEDS="0 1",
    )  # fmt: skip
    elements = [Job(f"{array}_{k}") for k in (0, 1)]
    try:
        for element in elements:
            element.wait(lambda state, _: state == "RUNNING")
        numbers = {ask("squeue", "-h", "-j", e.number, "-o", "%A"): e for e in elements}
        last, other = numbers[array], next(e for number, e in numbers.items() if number != array)
        outputs = {e: tmp_path / f"{e.number[-1]}.out" for e in elements}
        deadline = time.monotonic() + LIMIT
        while not all(o.exists() and "epoch 1/" in o.read_text() for o in outputs.values()):
            assert time.monotonic() < deadline
            time.sleep(0.5)
        ask("scancel", "--batch", "--signal=USR1", last.number)
        last.wait(lambda _, restarts: restarts == 1)
        assert f"requeueing job {last.number}" in outputs[last].read_text()
        assert other.state() == ("RUNNING", 0)
    finally:
        subprocess.run(["scancel", array], check=False)


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
