"""A process of a run that Lightning's launcher started dies: the first says so and ends, and the run continues."""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import process_groups
import programs
import pytest
import torch
import torch.distributed as dist
from tests_training import ROOT, TINY, load_train_module

from onlinenorm.errors import RunError
from onlinenorm.training.children import WatchingLauncher

RUN = (*TINY, "normalizer=online_clamp", "recipe.epochs=8", "recipe.milestones=[6]")
RUN += ("trainer.strategy=ddp", "trainer.devices=2", "trainer.checkpoint_every_n_steps=1")


def children(process):
    """Processes that a run's first one has started to train with it."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in listed if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("victim", ["the second", "the first"])
def test_a_killed_process_is_told_of_and_the_run_continues(victim, tmp_path):
    run_dir = tmp_path / "run"
    with programs.running(tmp_path, ROOT / "train.py", *RUN, f"run_dir={run_dir}") as (run, pipe):
        deadline = time.monotonic() + 120
        while not (run_dir / "checkpoints" / "last.ckpt").exists() and time.monotonic() < deadline and run.is_alive():
            time.sleep(0.05)
        (child,) = children(run)
        killed, code = (child, 1) if victim == "the second" else (run.pid, -signal.SIGKILL)
        os.kill(killed, signal.SIGKILL)
        errors = programs.read_to_end(pipe)
        run.join()
    assert run.exitcode == code, errors
    said = f"process 1 of 0 to 1 on this machine (PID {child}) was killed by SIGKILL"
    said = said if killed == child else f"process 0 on this machine (PID {run.pid}) is gone"
    assert errors.count(said) == 1, errors
    assert "the same command continues the run from its last checkpoint" in " ".join(errors.split()), errors
    assert "Traceback" not in errors
    alone = load_train_module()  # which two processes do in test_interrupted_processes.py
    assert alone.train(alone.load_config([*RUN[:-3], f"run_dir={run_dir}"]))["resumed"] == 1


@pytest.mark.parametrize(
    "override, says",
    [("recipe.batch_size=16", "does not divide by 3 processes"), ("data.num_val=2", "cannot be spread")],
)
def test_what_cannot_be_dealt_out_is_said_once_before_processes_are_started(tmp_path, override, says):
    words = *TINY, "recipe.batch_size=12", "trainer.strategy=ddp", "trainer.devices=3", override, f"run_dir={tmp_path}"
    done = programs.call(ROOT / "train.py", *words)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and says in done.stderr, done


HUNG = """
import subprocess, sys, time
from types import SimpleNamespace
from onlinenorm.training import children

children.PATIENCE_SECONDS = 0.2
environment = SimpleNamespace(validate_settings=lambda **_: None, creates_processes_externally=False)
launcher = children.WatchingLauncher(environment, 3, 1)
commands = "exec sleep 10000", "sleep 0.2; {end}"
launcher._call_children_scripts = lambda: launcher.procs.extend(
    subprocess.Popen(["sh", "-c", command]) for command in commands
)
launcher.launch(time.sleep, 10_000)
"""


@pytest.mark.parametrize("end, words", [("kill -9 $$", "was killed by SIGKILL"), ("exit 3", "ended with exit code 3")])
def test_a_first_process_that_waits_for_a_dead_one_ends(end, words):
    done = programs.call("-c", HUNG.format(end=end))
    assert done.returncode == 1 and words in done.stderr, done
    assert "process 2 of 0 to 2 on this machine" in done.stderr


ORPHANED = """
import os, threading, time
from types import SimpleNamespace
from onlinenorm.training import children

children.PATIENCE_SECONDS = 1.0
first = os.getpid()
os.environ[children.FIRST] = str(first)
if os.fork():
    time.sleep(60)

def work(ends):
    for _ in range(600):
        time.sleep(0.1)
        if os.getppid() != first and ends:
            break

environment = SimpleNamespace(validate_settings=lambda **_: None, creates_processes_externally=True)
launcher = children.WatchingLauncher(environment, 2, 1)
print("begun", flush=True)
with children.watching(SimpleNamespace(strategy=SimpleNamespace(launcher=launcher))):
    launcher.launch(work, {waits} != "in the loop")
    if {waits} == "behind it":
        work(False)
    if {waits} == "fails":
        raise RuntimeError("connection closed")
for thread in threading.enumerate():
    if thread.name == "process-observer":
        thread.join()
print("done")
"""


@pytest.mark.parametrize("waits", ["in the loop", "behind it", "fails", ""])
def test_processes_whose_first_one_was_killed_end_too(waits, tmp_path):
    """With a word where they were at work, and as ever where that was done."""
    with programs.running(tmp_path, "-c", ORPHANED.format(waits=repr(waits))) as (first, pipe):
        assert pipe.readline() == b"begun\n"
        first.kill()
        said = programs.read_to_end(pipe)
    if waits:
        assert said.count(f"process 0 on this machine (PID {first.pid}) is gone") == 1 and "done" not in said
    else:
        assert said == "done\n"


def wait_for_the_other(rank):
    """What the first of two processes says of a second that comes late to a collective."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=2))
    dist.barrier()
    if rank == 1:
        time.sleep(6)
        return None
    environment = SimpleNamespace(validate_settings=lambda **_: None, creates_processes_externally=True)
    with pytest.raises(RunError) as raised:
        WatchingLauncher(environment, 2, 1).launch(dist.all_reduce, torch.zeros(1))
    return str(raised.value)


def test_a_process_that_has_waited_for_a_stuck_one_says_so():
    said = process_groups.run(2, wait_for_the_other)[0]
    assert said.startswith("another process did not come to where this one has waited for it (") and "2000ms" in said
    assert "The same command continues the run" in said


LATE = """
import time
from types import SimpleNamespace
import torch
from onlinenorm.ops import distributed
from onlinenorm.training.children import WatchingLauncher

distributed._late.append(torch.tensor([1 + 2]))  # as a kernel leaves it
environment = SimpleNamespace(validate_settings=lambda **_: None, creates_processes_externally=True)
WatchingLauncher(environment, 3, 1).launch(time.sleep, 10_000)
"""


def test_a_process_whose_kernel_has_waited_in_vain_says_for_whom_and_ends():
    done = programs.call("-c", LATE)
    assert done.returncode == 1 and done.stderr.count("process 2 did not come to a layer") == 1, done
    assert "the same command continues the run" in done.stderr.lower()
