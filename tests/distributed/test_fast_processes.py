"""Compiled runs of two processes are those of one."""

import process_groups
from distributed_runs import TINY, distance, train
from torch import nn

from onlinenorm.models import cifar

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
