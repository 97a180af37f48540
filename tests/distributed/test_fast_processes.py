"""Compiled and captured runs of two processes are those of one, with the statistics of all processes or a stream each.

python -m pytest tests/distributed/test_fast_processes.py -m gpu [-k gpus4]      on a machine with two GPUs
"""

import process_groups
import pytest
import torch
from distributed_runs import THIRTY_STEPS, TINY, curve, distance, train
from gpus import gpu_counts
from test_interrupted_processes import checkpoint_moved, kill
from torch import nn

from onlinenorm.models import cifar
from onlinenorm.training.cuda_graph import GraphedStep

SHORT = (*TINY, "normalizer=online_clamp", "normalizer.clamp_value=2", "recipe.scaling=none", "recipe.epochs=1")
SHORT += ("recipe.milestones=[]", "trainer.precision=64-true")


def run(rank, folder, *overrides):
    cifar.WIDTHS = (64, 128, 256)  # more parameters than the first of DistributedDataParallel's buckets holds
    train(rank, folder, *SHORT, *overrides)


def run_compiled(rank, folder, *overrides):
    """A compiled run on the CPU, as far as torch.compile has the same program for all backends; the graphs it makes."""
    graphs, compile_in_place = [], nn.Module.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    nn.Module.compile = lambda module: compile_in_place(module, backend=backend)
    run(rank, folder, "model.compile=true", *overrides)
    return len(graphs)


def test_a_compiled_network_is_one_graph_in_several_processes(tmp_path):
    """One of training and one of validation; the same run as of one process, not compiled."""
    process_groups.run(1, run, str(tmp_path / "one"))
    ddp = "trainer.strategy=ddp", "trainer.devices=auto"
    graphs = process_groups.run(2, run_compiled, str(tmp_path / "two"), *ddp, seconds=300)
    assert graphs == [2, 2]
    assert distance(tmp_path / "two", tmp_path / "one") <= 1e-9


ON_GPUS = (
    *(word for word in THIRTY_STEPS if word != "trainer=cpu"), "trainer.precision=32-true", "recipe.lr=0.002",
    "normalizer=online_clamp", "normalizer.clamp_value=2", "data.num_workers=0", "data.on_device=false",
)  # fmt: skip
MODES = {"plain": (False, False), "captured": (False, True), "compiled and captured": (True, True)}


def run_on_gpus(rank, folder, mode, *overrides):
    """A run in full float32; the number of captures."""
    torch.backends.cudnn.allow_tf32 = False
    captures, capture = [], GraphedStep._capture

    def counted(self, *inputs):
        captures.append(1)
        capture(self, *inputs)

    GraphedStep._capture = counted
    compiled, captured = (str(on).lower() for on in MODES[mode])
    train(rank, folder, *ON_GPUS, f"model.compile={compiled}", f"trainer.cuda_graph={captured}", *overrides)
    return len(captures)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """finished(processes, mode, statistics) -> the losses of 30 steps and their validations; made once."""
    curves = {}

    def call(processes, mode, statistics="global"):
        key = processes, mode, statistics
        if key not in curves:
            folder = tmp_path_factory.mktemp("run")
            overrides = f"normalizer.statistics={statistics}", "trainer=ddp" if processes > 1 else "trainer=gpu"
            captures = process_groups.run(processes, run_on_gpus, str(folder), mode, *overrides, seconds=300)
            assert captures == [int(mode != "plain")] * processes
            curves[key] = curve(folder, "train_loss", "val_loss")
        return curves[key]

    return call


@pytest.mark.gpu
@pytest.mark.parametrize("processes", gpu_counts())
@pytest.mark.parametrize("mode", MODES)
def test_thirty_steps_on_several_gpus_are_those_of_one(finished, mode, processes):
    found = float((finished(processes, mode) - finished(1, "plain")).abs().max())
    print(f"{mode}: {processes} GPUs against one, float32: largest difference of a loss {found:.1e}")
    assert found <= 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("processes", gpu_counts())
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "plain"])
def test_streams_of_their_own_are_the_same_in_any_mode(finished, mode, processes):
    found = float((finished(processes, mode, "local") - finished(processes, "plain", "local")).abs().max())
    print(f"{mode}: local statistics against plain ones, float32: largest difference of a loss {found:.1e}")
    assert found <= 1e-4
    assert float((finished(processes, mode, "local") - finished(processes, mode)).abs().max()) > 1e-4, (
        "another run than with global"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("processes", gpu_counts())
def test_a_run_that_is_killed_continues_on_half_as_many_gpus(finished, tmp_path, processes):
    often, fewer = "trainer.checkpoint_every_n_steps=1", processes // 2
    started = process_groups.start(processes, run_on_gpus, str(tmp_path), "captured", "trainer=ddp", often)
    checkpoint_moved(tmp_path, checkpoint_moved(tmp_path, None, started, 120), started)
    kill(started)
    trainer = "trainer=ddp" if fewer > 1 else "trainer=gpu"
    captures = process_groups.run(fewer, run_on_gpus, str(tmp_path), "captured", trainer, often, seconds=300)
    assert captures == [1] * fewer, "steps were left to train"
    found = float((curve(tmp_path, "train_loss", "val_loss") - finished(1, "plain")).abs().max())
    print(f"killed on {processes} GPUs, continued on {fewer}: largest difference of a loss {found:.1e}")
    assert found <= 1e-4
