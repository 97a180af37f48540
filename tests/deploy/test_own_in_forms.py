"""A network of ours with a normalizer of one's own: no form takes for BatchNorm what only looks like it."""

import sys

import pytest

from onlinenorm.deploy import DeployError, load_trained
from onlinenorm.deploy.forms import FORMS, prepare

CODE = """
import torch
from torch import nn


class Gated(nn.BatchNorm2d):
    parameter_roles = {"gate": "norm_bias"}

    def __init__(self, num_features: int):
        super().__init__(num_features)
        self.gate = nn.Parameter(torch.zeros(num_features))

    def forward(self, x):
        return torch.tanh(super().forward(x)) + self.gate.view(1, -1, 1, 1)
"""
TINY = ("data=embedded", "data.limit_train=64", "data.limit_val=40", "model=cifar_resnet8", "recipe=reference",
        "recipe.epochs=1", "recipe.milestones=[]", "recipe.batch_size=16", "recipe.augmentation=pad_crop",
        "trainer=cpu", "normalizer=gated")  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory, train_run):
    """A finished run, under the recipe that decays no betas."""
    folder = tmp_path_factory.mktemp("gated")
    (folder / "gated_norms.py").write_text(CODE)
    (folder / "normalizer").mkdir()
    (folder / "normalizer" / "gated.yaml").write_text("_target_: gated_norms.Gated\n_partial_: true\n")
    sys.path.insert(0, str(folder))
    train = sys.modules["train"]
    train.train(train.load_config([*TINY, f"run_dir={folder / 'run'}"], str(folder)))
    yield folder / "run"
    sys.path.remove(str(folder))


@pytest.mark.parametrize("form", [name for name, form in FORMS.items() if not form.holds_guards])
def test_what_only_looks_like_batch_norm_is_not_folded_away(run, form):
    trained = load_trained(run, allowed=["gated_norms.Gated"])
    with pytest.raises(DeployError, match=rf"^--to {form}: .*gated_norms\.Gated is your own; use onnx"):
        prepare(trained, FORMS[form])


def test_other_forms_hold_it(run, script, tmp_path):
    arguments = ["--to", "exported-program", "--output", tmp_path, "--latency", 0, "--images", 8]
    assert script("export")(run, *arguments, "--allow", "gated_norms.Gated") == 0
    assert (tmp_path / "cifar_resnet8-exported-program.pt2").exists()


def test_its_betas_are_exempt_as_those_of_batch_norm_are(run):
    from onlinenorm.training.checkpoint import read

    groups = read(run / "checkpoints" / "last.ckpt")["optimizer_states"][0]["param_groups"]
    assert {group["name"]: len(group["params"]) for group in groups} == {"decay": 9 + 9 + 2, "no_decay": 2 * 9}
