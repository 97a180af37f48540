"""Stop signals to whole process groups, loader workers included: what job steps, timeouts and terminals send."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import process_groups
import programs
import pytest
from distributed_runs import TINY, train
from tests_training import ROOT, outcome

from onlinenorm.training import ImageClassifier
from onlinenorm.training.interruption import StopSignals

RUN = (*TINY, "normalizer=online_clamp", "recipe.scaling=none", "recipe.lr=0.01", "data.num_workers=2")
OFTEN = "trainer.checkpoint_every_n_steps=1"
DDP = ("trainer.strategy=ddp", "trainer.devices=auto")
SLOWLY = 0.03  # seconds of a step, so that signals find one


def train_in_group(rank, folder, *overrides):
    """A run in a process group of its own, a little slower than it could be."""
    os.setsid()
    for name in ("training_step", "validation_step"):
        setattr(ImageClassifier, name, _delayed(getattr(ImageClassifier, name)))
    return train(rank, folder, *overrides)


def _delayed(method):
    def call(*arguments):
        time.sleep(SLOWLY)
        return method(*arguments)

    return call


def start(processes, folder, *overrides):
    several = DDP[: 2 * (processes > 1)]
    return process_groups.start(processes, train_in_group, str(folder), *RUN, OFTEN, *several, *overrides)


def wait_for(condition, started, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition() and not any(pipe.poll() for _, pipe in started):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def stop_and_continue(processes, folder, times, chooser, *overrides):
    """Stops the run at random moments with a signal to all its processes; returns how often it was stopped."""
    last = folder / "checkpoints" / "last.ckpt"
    stopped = 0
    for _ in range(times):
        since = last.stat().st_mtime_ns if last.exists() else 0
        started = start(processes, folder, *overrides)
        wait_for(lambda since=since: last.exists() and last.stat().st_mtime_ns != since, started)
        time.sleep(chooser.random() * 0.5)
        for process, _ in started:
            os.killpg(process.pid, signal.SIGTERM)
        found = process_groups.finish(started)
        if all(succeeded for succeeded, _ in found):
            break
        for succeeded, error in found:
            assert not succeeded and error[0] == "Interrupted" and "SIGTERM: saved at" in error[1], error
        stopped += 1
    process_groups.run(processes, train, str(folder), *RUN, OFTEN, *DDP[: 2 * (processes > 1)], *overrides)
    return stopped


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folders = {}

    def call(processes, *overrides):
        key = (processes, *overrides)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("undisturbed")
            process_groups.run(processes, train, str(folders[key]), *RUN, *DDP[: 2 * (processes > 1)], *overrides)
        return folders[key]

    return call


@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_to_all_processes_and_workers(undisturbed, tmp_path, processes):
    assert stop_and_continue(processes, tmp_path, 2, random.Random(processes))
    assert outcome(tmp_path) == outcome(undisturbed(processes))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_ten_times_sigterm_to_all_processes_and_workers(undisturbed, tmp_path, processes):
    longer = ("recipe.epochs=12", "data.num_train=130")
    stopped = stop_and_continue(processes, tmp_path, 10, random.Random(processes), *longer)
    print(f"{processes} process(es): stopped {stopped} times")
    assert stopped >= 5
    assert outcome(tmp_path) == outcome(undisturbed(processes, *longer))


def stuck(rank, folder, *overrides):
    """A run whose second step takes for ever."""
    os.setsid()
    original = ImageClassifier.training_step

    def step(self, batch, batch_idx):
        if batch_idx == 1:
            Path(self.trainer.default_root_dir, "stuck").touch()
            time.sleep(600)
        return original(self, batch, batch_idx)

    ImageClassifier.training_step = step
    return train(rank, folder, *overrides)


def test_a_second_ctrl_c_ends_the_process_at_once(tmp_path):
    started = process_groups.start(1, stuck, str(tmp_path), *RUN)
    ((process, _),) = started
    wait_for((tmp_path / "stuck").exists, started)
    deadline = time.monotonic() + 60
    while process.is_alive() and time.monotonic() < deadline:  # two that come together count as one
        os.kill(process.pid, signal.SIGINT)
        process.join(0.2)
    assert process.exitcode == -signal.SIGINT
    started[0][1].close()


def test_workers_leave_when_the_run_is_killed(tmp_path):
    started = process_groups.start(1, stuck, str(tmp_path), *RUN)
    ((process, pipe),) = started
    wait_for((tmp_path / "stuck").exists, started)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    assert len(children.split()) == 2
    process.kill()
    process.join()
    pipe.close()
    deadline = time.monotonic() + 60
    while any(_alive(pid) for pid in children.split()):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def command(folder, *overrides):
    return [sys.executable, str(ROOT / "train.py"), *RUN, OFTEN, f"run_dir={folder}", "recipe.epochs=500", *overrides]


def test_ctrl_c_at_a_terminal(tmp_path):
    """The whole foreground group hears it: one line, where and how to go on, and 130."""
    run = programs.Program(*command(tmp_path)[1:], alone=True)
    wait_for(lambda: not run.process.is_alive() or (tmp_path / "checkpoints" / "last.ckpt").exists(), [])
    os.killpg(run.process.pid, signal.SIGINT)
    done = run.wait()
    errors = done.stderr
    assert done.returncode == 130, errors
    assert "Ctrl-C: saved at " in errors and f"the same command continues from there ({tmp_path})" in errors, errors
    assert "Traceback" not in errors and errors.count("Ctrl-C") == 2, errors
    assert not (tmp_path / "failed.txt").exists()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_stopped_while_python_imports(tmp_path, signum):
    run = subprocess.Popen(
        command(tmp_path), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    status = Path(f"/proc/{run.pid}/status")
    wait_for(lambda: int(status.read_text().split("SigCgt:")[1].split()[0], 16) >> (signal.SIGUSR1 - 1) & 1, [])
    os.killpg(run.pid, signum)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 128 + signum and b"Traceback" not in errors, errors


@pytest.mark.slow
def test_sigterm_to_torchrun(tmp_path):
    """It hands the signal on and waits: both processes save, none leaves a traceback."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = command(tmp_path, "trainer=ddp", "trainer.accelerator=cpu", "trainer.precision=32-true", OFTEN)[1:]
    run = subprocess.Popen(
        [*torchrun, *arguments], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    wait_for(lambda: run.poll() is not None or (tmp_path / "checkpoints" / "last.ckpt").exists(), [])
    os.killpg(run.pid, signal.SIGTERM)
    _, errors = run.communicate(timeout=120)
    assert errors.count("SIGTERM: saved at ") == 1, errors
    assert "DataLoader worker" not in errors and "RuntimeError" not in errors, errors
    assert not (tmp_path / "failed.txt").exists()


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_of_the_processes_of_a_terminal_the_first_answers_ctrl_c(monkeypatch, capfd, rank, lines):
    monkeypatch.setenv("LOCAL_RANK", rank)
    with StopSignals() as stop:
        stop.defer()
        signal.raise_signal(signal.SIGINT)
    assert stop.signum == signal.SIGINT and capfd.readouterr().err.count("Ctrl-C: saving") == lines
