"""Runs of several processes that are killed, stopped, or continued by another number of processes."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import process_groups
import pytest
from distributed_runs import TINY, curve, distance, train
from tests_training import ROOT, outcome

CLAMP = (*TINY, "normalizer=online_clamp", "normalizer.clamp_value=2", "recipe.scaling=none", "recipe.lr=0.01")
DDP = ("trainer.strategy=ddp", "trainer.devices=auto")
OFTEN = "trainer.checkpoint_every_n_steps=1"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """undisturbed(processes) -> folder of a finished run; made once."""
    folders = {}

    def call(processes, *overrides):
        key = (processes, *overrides)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("undisturbed")
            process_groups.run(processes, train, str(folders[key]), *CLAMP, *overrides, *DDP[: 2 * (processes > 1)])
        return folders[key]

    return call


def start(processes, folder, *overrides):
    return process_groups.start(processes, train, str(folder), *CLAMP, OFTEN, *DDP[: 2 * (processes > 1)], *overrides)


def checkpoint_moved(folder, since, started, seconds=60):
    """Waits until last.ckpt is another than at `since`; its time of change, or None where the run has ended first."""
    last = folder / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if last.exists() and (changed := last.stat().st_mtime_ns) != since:
            return changed
        if any(pipe.poll() for _, pipe in started):  # has ended
            found = process_groups.finish(started)
            assert found and all(succeeded for succeeded, _ in found), found
            return None
        time.sleep(0.002)
    raise TimeoutError(f"no new checkpoint in {folder}")


def kill(started):
    for process, _ in started:
        process.kill()
    for process, pipe in started:
        process.join()
        pipe.close()


def kill_and_continue(processes, folder, kills, chooser, *overrides):
    """Kills the run after a random number of new checkpoints and a random pause, `kills` times, then lets it end."""
    since = None
    for _ in range(kills):
        started = start(processes, folder, f"data.num_workers={chooser.choice((0, 1, 2))}", *overrides)
        for _ in range(chooser.randint(1, 2)):
            changed = checkpoint_moved(folder, since, started)
            since = changed or since
        time.sleep(chooser.random() * 0.1)
        kill(started)
    several = DDP[: 2 * (processes > 1)]
    return process_groups.run(processes, train, str(folder), *CLAMP, OFTEN, *several, *overrides)[0]


def test_kill_9_of_several_processes(undisturbed, tmp_path):
    """Of four: with more than two the order counts in which their gradients are added."""
    results = kill_and_continue(4, tmp_path, 1, random.Random(1))
    assert results["resumed"] == 1
    assert outcome(tmp_path) == outcome(undisturbed(4))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_ten_kills_in_a_row(undisturbed, tmp_path, processes):
    longer = ("recipe.epochs=8", "data.num_train=130")  # 64 steps: ten kills take at most 20 of them
    expected = undisturbed(processes, *longer)
    results = kill_and_continue(processes, tmp_path, 10, random.Random(processes), *longer)
    print(f"{processes} process(es): resumed {results['resumed']} times after 10 kills")
    assert results["resumed"] >= 5
    assert outcome(tmp_path) == outcome(expected)


@pytest.mark.parametrize("first, then", [(4, 2), (1, 2)])
def test_continued_by_another_number_of_processes(undisturbed, tmp_path, first, then):
    """In the middle of an epoch, in float64: the run of one process."""
    exact = "trainer.precision=64-true"
    started = start(first, tmp_path, exact)
    changed = checkpoint_moved(tmp_path, None, started)
    checkpoint_moved(tmp_path, changed, started)
    for process, _ in started:
        os.kill(process.pid, signal.SIGTERM)
    for succeeded, error in process_groups.finish(started):
        assert not succeeded and error[0] == "Interrupted", error
    results = process_groups.run(then, train, str(tmp_path), *CLAMP, exact, *DDP)[0]
    assert results["resumed"] == 1
    columns, one = ("train_loss", "val_loss", "val_top1"), undisturbed(1, exact)
    found = float((curve(tmp_path, *columns) - curve(one, *columns)).abs().max()), distance(tmp_path, one)
    print(f"{first} processes, then {then}: largest difference of the curve {found[0]:.1e}, of a weight {found[1]:.1e}")
    assert max(found) <= 1e-9


def test_local_statistics_continue_exactly(tmp_path):
    """Each process gets its own stream back, not the mean."""
    local = "normalizer.statistics=local"
    folders = tmp_path / "whole", tmp_path / "parts"
    process_groups.run(2, train, str(folders[0]), *CLAMP, *DDP, local)
    started = start(2, folders[1], local)
    checkpoint_moved(folders[1], None, started)
    os.kill(started[1][0].pid, signal.SIGUSR1)  # one process hears it, both stop
    assert {error[0] for _, error in process_groups.finish(started)} == {"Interrupted"}
    process_groups.run(2, train, str(folders[1]), *CLAMP, *DDP, local)
    assert outcome(folders[1]) == outcome(folders[0])


def test_validation_is_the_same_on_any_number_of_processes(undisturbed, tmp_path):
    """21 images on 1, 2 and 3 processes: every image once (asserted by the run), identical figures and predictions."""
    finished = undisturbed(1, "recipe.batch_size=12")
    found = []
    for processes in (1, 2, 3):
        folder = tmp_path / str(processes)
        shutil.copytree(finished, folder)
        (folder / "results.json").unlink()  # trained, not validated
        overrides = (*CLAMP, "recipe.batch_size=12", *DDP[: 2 * (processes > 1)])
        results = process_groups.run(processes, train, str(folder), *overrides)[0]
        found.append((results["clamping"], outcome(folder)[2]))
        assert found[-1][1]["index"] == list(range(21))
    print(f"validation loss on 1, 2 and 3 processes: {[clamping['with']['val_loss'] for clamping, _ in found]}")
    assert found[0] == found[1] == found[2]


def test_two_runs_on_one_folder_at_once(tmp_path):
    first = start(1, tmp_path, "recipe.epochs=200")
    try:
        checkpoint_moved(tmp_path, None, first)
        ((succeeded, error),) = process_groups.finish(start(1, tmp_path, "recipe.epochs=200"))
        assert not succeeded and error[0] == "FolderInUse" and "another run is writing to this folder" in error[1]
        assert first[0][0].is_alive()
    finally:
        kill(first)


def train_in_folder_of_rank(rank, folder):
    return train(rank, f"{folder}/{rank}", *CLAMP, *DDP)


def test_processes_that_found_different_checkpoints_do_not_begin(tmp_path):
    """As where each machine has a disk of its own."""
    process_groups.run(1, train, str(tmp_path / "0"), *CLAMP, "trainer.strategy=ddp")
    (tmp_path / "0" / "results.json").unlink()
    found = process_groups.finish(process_groups.start(2, train_in_folder_of_rank, str(tmp_path)))
    assert len(found) == 2, found
    assert all(not succeeded and "have found different checkpoints" in error[1] for succeeded, error in found), found


def train_with_others(rank, folder, overrides):
    return train(rank, folder, *CLAMP, *DDP, *overrides * (rank == 1))


@pytest.mark.parametrize(
    "overrides, says",
    [
        (
            ["recipe.batch_size=8", "recipe.lr=0.02"],
            r"recipe.batch_size: 16 on process 0, 8 on process 1\n  recipe.lr: ",
        ),
        (
            ["data.num_train=71"],
            r"data.num_train: 70 on process 0, 71 on process 1\n  images: \w+ on process 0, \w+ on",
        ),
        (["model=cifar_resnet14"], r"choices.model: cifar_resnet8 on process 0, cifar_resnet14 on process 1"),
    ],
    ids=str,
)
def test_processes_of_two_minds_do_not_begin(tmp_path, overrides, says):
    found = process_groups.finish(process_groups.start(2, train_with_others, str(tmp_path), overrides))
    assert [(succeeded, error[0]) for succeeded, error in found] == [(False, "ConfigError")] * 2, found
    assert all(re.search(says, error[1]) for _, error in found), found
    assert not (tmp_path / "metrics.csv").exists()


def test_processes_may_load_images_and_keep_records_in_their_own_ways(tmp_path):
    ways = ["data.num_workers=1", "logger=tensorboard"]
    assert process_groups.run(2, train_with_others, str(tmp_path), ways)[0]["last"]["epoch"] == 3


@pytest.mark.slow
def test_lightnings_launcher_then_torchrun(undisturbed, tmp_path):
    """SIGTERM reaches the first process of two; what continues is the same run under another launcher."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    arguments = [*CLAMP, "trainer=ddp", "trainer.accelerator=cpu", "trainer.precision=32-true", f"run_dir={tmp_path}"]
    script = str(ROOT / "train.py")
    run = subprocess.Popen(
        [sys.executable, script, *arguments, "trainer.devices=2", OFTEN],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    last = tmp_path / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not last.exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    run.send_signal(signal.SIGTERM)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 128 + signal.SIGTERM, errors
    assert "SIGTERM: saved at" in errors and "Traceback" not in errors
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script]
    done = subprocess.run([*torchrun, *arguments], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("3 epochs: done") == 1, done.stdout
    found, expected = outcome(tmp_path), outcome(undisturbed(2))
    assert found == expected
