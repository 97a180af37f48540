"""What the batch scripts do when a run ends, with stand-ins for SLURM's commands."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from tests_training import ROOT

COMMANDS = {
    "srun": '[ -n "$CODE" ] && exit "$CODE"; trap "exit 138" USR1; touch started; while :; do /bin/sleep 0.05; done',
    "scontrol": 'case "$1" in show) echo "JobId=7 PreemptTime=$PREEMPTED";; *) echo "$@" >>asked;; esac',
    "sleep": "exit 0",
}
ARRAY = {"SLURM_ARRAY_JOB_ID": "1234", "SLURM_ARRAY_TASK_ID": "3"}


def hears(pid, signum):
    caught = Path(f"/proc/{pid}/status").read_text().split("SigCgt:")[1].split()[0]
    return int(caught, 16) >> (signum - 1) & 1


@pytest.fixture
def job(tmp_path):
    """job(**environment) -> (exit code, what scontrol was asked), of a script that ends in train_and_requeue."""
    for name, body in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)

    def run(signum=None, **environment):
        own = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "1234", "SLURM_JOB_NUM_NODES": "1"}
        script = f"set -euo pipefail; source {ROOT}/scripts/slurm/requeue.sh; train_and_requeue seed=0"
        defaults = {"CODE": "", "PREEMPTED": "None"}
        shell = subprocess.Popen(
            ["bash", "-c", script], cwd=tmp_path, env={**os.environ, **defaults, **own, **environment}
        )
        while signum and not (tmp_path / "started").exists():
            time.sleep(0.01)
        if signum:
            shell.send_signal(signum)
        code = shell.wait(60)
        asked = tmp_path / "asked"
        return code, asked.read_text().strip() if asked.exists() else ""

    return run


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({"CODE": "0"}, (0, "")),
        ({"CODE": "1"}, (1, "")),
        ({"CODE": "143"}, (143, "")),  # somebody stopped the step on purpose
        ({"CODE": "143", "PREEMPTED": "2026-01-01T00:00:00"}, (143, "requeue 1234")),
        ({"CODE": "1", "PREEMPTED": "2026-01-01T00:00:00"}, (1, "")),  # it failed before
        ({"CODE": "143", "PREEMPTED": "2026-01-01T00:00:00", **ARRAY}, (143, "requeue 1234_3")),
    ],
)
def test_what_is_requeued(job, environment, expected):
    assert job(**environment) == expected


@pytest.mark.parametrize("environment, number", [({}, "1234"), (ARRAY, "1234_3")])
def test_near_its_time_limit(job, environment, number):
    assert job(signal.SIGUSR1, **environment) == (138, f"requeue {number}")
