"""A normalizer of one's own with statistics of its own: two processes validate, save and record one network."""

import json

import process_groups
import pytest
import torch
import torch.nn.functional as F
from distributed_runs import THIRTY_STEPS, load_train_module

from onlinenorm.deploy import load_trained
from onlinenorm.deploy.images import validation_batches
from onlinenorm.normalizers import merged
from onlinenorm.training.checkpoint import read


@pytest.fixture
def configs(tmp_path):
    (tmp_path / "more" / "normalizer").mkdir(parents=True)
    file = tmp_path / "more" / "normalizer" / "DriftingNorm.yaml"
    file.write_text("_target_: own_normalizers.DriftingNorm\n_partial_: true\n")
    return str(tmp_path / "more")


def train(rank: int, configs: str, *overrides: str) -> dict:
    """The results of a run with the configurations of one's own, on one of its processes."""
    module = load_train_module()
    return module.train(module.load_config([*overrides], configs))


def test_results_of_two_processes_are_those_of_the_checkpoint_alone(configs, tmp_path):
    run = tmp_path / "run"
    overrides = (*THIRTY_STEPS, "recipe.epochs=2", "recipe.milestones=[]", "normalizer=DriftingNorm", f"run_dir={run}")
    two = process_groups.run(2, train, configs, *overrides, "trainer.strategy=ddp", "trainer.devices=auto")
    assert two[0]["parameters_sha256"] == two[1]["parameters_sha256"], "both end with one network"
    state = read(run / "checkpoints" / "last.ckpt")
    assert len(state["local_statistics"]) == 2 * 9
    for name, table in state["local_statistics"].items():
        assert torch.equal(state["state_dict"][name], merged(table)), name
    trained = load_trained(run, allowed=["own_normalizers.DriftingNorm"])
    assert trained.results is not None, "the weights are those that the run ended with"
    loss = top1 = images = 0.0
    for batch, labels, _ in validation_batches(trained, None, torch.device("cpu")):
        logits = trained.network(batch)
        loss += float(F.cross_entropy(logits.double(), labels, reduction="sum"))
        top1 += int((logits.argmax(1) == labels).sum())
        images += len(labels)
    last = json.loads((run / "results.json").read_text())["last"]
    assert last["val_top1"] == top1 / images and last["val_loss"] == pytest.approx(loss / images, rel=1e-5)
