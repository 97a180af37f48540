"""Runs of several GPUs whose kernels exchange messages: one process is killed or stuck, and the run goes on exactly.

python -m pytest tests/distributed/test_peers_killed.py -m gpu [-k gpus4]     on two GPUs or more, Hopper or later
"""

import os
import random
import time
from datetime import timedelta
from functools import partial

import process_groups
import pytest
from distributed_runs import TINY, train
from gpus import gpu_counts
from test_interrupted_processes import checkpoint_moved
from tests_training import outcome

from onlinenorm.models import cifar
from onlinenorm.training import trainer
from onlinenorm.training.module import ImageClassifier

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu

RUN = (
    *TINY[:-1], "trainer=ddp", "trainer.deterministic=true", "model.compile=false",
    "trainer.checkpoint_every_n_steps=1", "normalizer=online_clamp", "normalizer.exchange=auto", "data.image_size=32",
    "data.num_train=330", "data.num_workers=0", "data.on_device=false", "recipe.batch_size=32", "recipe.epochs=8",
    "recipe.milestones=[6]", "recipe.lr=0.01",
)  # fmt: skip
KILLS = 10
STUCK_AT, SECONDS = 5, 10  # step, and for how long processes wait for each other


def run(rank, folder):
    """The results of a run in which all layers exchange messages."""
    cifar.WIDTHS = (64, 128, 256)
    # of two, gradients have one sum in any order; more train as they do by default
    captured = int(os.environ["WORLD_SIZE"]) > 2
    results = train(rank, folder, *RUN, f"trainer.cuda_graph={str(captured).lower()}")
    assert results["exchange"]["by_kernels"], results["exchange"]
    return results


def run_with_a_stuck_process(rank, folder, said):
    with open(said, "a") as file:
        os.dup2(file.fileno(), 2)
    trainer.MeetingDDPStrategy = partial(trainer.MeetingDDPStrategy, timeout=timedelta(seconds=SECONDS))
    training_step = ImageClassifier.training_step

    def stuck(self, batch, batch_idx):
        if rank == 1 and self.global_step == STUCK_AT:
            time.sleep(1000)
        return training_step(self, batch, batch_idx)

    ImageClassifier.training_step = stuck
    return run(rank, folder)


@pytest.fixture(scope="module", params=gpu_counts(hopper=True))
def processes(request):
    return request.param


@pytest.fixture(scope="module")
def undisturbed(processes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    process_groups.run(processes, run, str(folder))
    return folder


def test_a_process_is_killed_ten_times_and_the_run_is_the_same(processes, undisturbed, tmp_path):
    """The others are ended a second later, as launchers do."""
    chooser, since = random.Random(3), None
    for _ in range(KILLS):
        started = process_groups.start(processes, run, str(tmp_path))
        for _ in range(chooser.randint(1, 2)):
            since = checkpoint_moved(tmp_path, since, started) or since
        time.sleep(chooser.random() * 0.1)
        started[chooser.randrange(processes)][0].kill()
        time.sleep(1.0)
        for process, _ in started:
            process.kill()
        for process, pipe in started:
            process.join()
            pipe.close()
    results = process_groups.run(processes, run, str(tmp_path))[0]
    print(f"resumed {results['resumed']} times after {KILLS} kills")
    assert results["resumed"] >= KILLS // 2
    assert outcome(tmp_path) == outcome(undisturbed)


def test_a_stuck_process_is_named_in_time_and_the_run_continues(processes, undisturbed, tmp_path):
    folder, said = tmp_path / "run", tmp_path / "said"
    started = process_groups.start(processes, run_with_a_stuck_process, str(folder), str(said))
    checkpoint_moved(folder, None, started)
    start = time.monotonic()
    started[0][0].join(60)
    waited = time.monotonic() - start
    code = started[0][0].exitcode
    for process, _ in started:
        process.kill()
    print(f"ended with {code} after {waited:.1f} s, {SECONDS} of which it waits for the other")
    assert code == 1 and "process 1 did not come to a layer that another had reached" in said.read_text(), (
        said.read_text()
    )
    results = process_groups.run(processes, run, str(folder))[0]
    assert results["resumed"] == 1 and outcome(folder) == outcome(undisturbed)
