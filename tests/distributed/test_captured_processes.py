"""Captured runs of several GPUs are those without, and end where they fail.

python -m pytest tests/distributed/test_captured_processes.py -m gpu [-k gpus4]      on a machine with two GPUs
"""

import subprocess
import sys

import process_groups
import pytest
import torch
from distributed_runs import THIRTY_STEPS, curve, distance, train
from gpus import gpu_counts


@pytest.mark.gpu
@pytest.mark.parametrize("processes", gpu_counts())
@pytest.mark.parametrize(
    "overrides, same_bits",
    [
        (["normalizer=online_clamp", "normalizer.statistics=local"], True),
        (["normalizer=online_clamp"], True),
        (["normalizer=batch", "trainer.sync_batchnorm=true"], True),
        (["normalizer=online_clamp", "trainer.accumulate_grad_batches=2"], True),
        (["normalizer=online_clamp", "normalizer.statistics=local", "model.compile=true"], False),
    ],
    ids=str,
)
def test_captured_steps_make_the_run_without(tmp_path, overrides, same_bits, processes):
    """Thirty steps in float32, a drop of the learning rate among them; gradients are averaged within the graph.

    In one collective, where those of three processes or more are added in another order than in buckets: as many bits
    are the same of two alone.
    """
    shared = (*THIRTY_STEPS, "trainer=ddp", "trainer.precision=32-true", *overrides)
    shared += ("trainer.deterministic=true",) * same_bits
    digests = []
    for captured in ("false", "true"):
        results = process_groups.run(
            processes, train, str(tmp_path / captured), *shared, f"trainer.cuda_graph={captured}", seconds=400
        )
        digests.append(results[0]["parameters_sha256"])
    far = distance(tmp_path / "true", tmp_path / "false")
    print(f"{' '.join(overrides)}: largest relative difference {far:.1e}")
    if same_bits and processes == 2:
        assert digests[0] == digests[1]
    columns = "train_loss", "val_loss"
    pairs = (curve(tmp_path / captured, *columns) for captured in ("true", "false"))
    torch.testing.assert_close(*pairs, rtol=1e-4, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("processes", gpu_counts())
def test_a_captured_run_that_fails_ends(root, tmp_path, processes):
    """Although NCCL waits for graphs that hold its collectives, and the error's traceback for them."""
    overrides = (
        *THIRTY_STEPS,
        "trainer=ddp",
        f"trainer.devices={processes}",
        "trainer.cuda_graph=true",
        "recipe.lr=1e30",
    )
    command = [sys.executable, "train.py", *overrides, f"run_dir={tmp_path}"]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240)
    assert ended.returncode != 0 and "became NaN or infinite" in ended.stderr + ended.stdout, ended.stderr
