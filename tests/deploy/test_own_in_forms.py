"""A network of ours with a normalizer of one's own: no form takes for BatchNorm what only looks like it."""

import functools
import sys

import pytest

from onlinenorm.deploy import DeployError, load_trained
from onlinenorm.deploy.forms import FORMS, prepare

CODE = """
import torch
from torch import nn

from onlinenorm import OnlineNorm2d


class Squashed(OnlineNorm2d):
    def forward(self, x):
        return torch.tanh(super().forward(x))


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
        "trainer=cpu")  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory, train_run):
    """runs(class) -> a finished run, under the recipe that decays no betas."""
    folder = tmp_path_factory.mktemp("gated")
    (folder / "gated_norms.py").write_text(CODE)
    (folder / "normalizer").mkdir()
    sys.path.insert(0, str(folder))
    train = sys.modules["train"]

    @functools.cache
    def make(name):
        (folder / "normalizer" / f"{name}.yaml").write_text(f"_target_: gated_norms.{name}\n_partial_: true\n")
        config = train.load_config([*TINY, f"normalizer={name}", f"run_dir={folder / name}"], str(folder))
        train.train(config)
        return folder / name

    yield make
    sys.path.remove(str(folder))


@pytest.fixture
def run(runs):
    return runs("Gated")


@pytest.mark.parametrize("form", [name for name, form in FORMS.items() if not form.holds_guards])
def test_what_only_looks_like_batch_norm_is_not_folded_away(run, form):
    trained = load_trained(run, allowed=["gated_norms.Gated"])
    with pytest.raises(DeployError, match=rf"^--to {form}: .*gated_norms\.Gated is your own; use onnx"):
        prepare(trained, FORMS[form])


def test_other_forms_hold_it(run, script, tmp_path):
    arguments = ["--to", "exported-program", "--output", tmp_path, "--latency", 0, "--images", 8]
    assert script("export")(run, *arguments, "--allow", "gated_norms.Gated") == 0
    assert (tmp_path / "cifar_resnet8-exported-program.pt2").exists()


def test_a_clamping_layer_with_a_forward_of_its_own_is_exported_where_it_can_be(runs, script, tmp_path, capsys):
    arguments = ["--to", "all", "--output", tmp_path, "--latency", 0, "--images", 8, "--allow", "gated_norms.Squashed"]
    assert script("export")(runs("Squashed"), *arguments) == 1, "some forms are refused"
    written = {file.suffix for file in tmp_path.iterdir()} - {".md", ".json"}
    assert written == {".onnx", ".torchscript", ".pt2"}
    assert "torchvision: holds weights" in capsys.readouterr().out


def test_its_betas_are_exempt_as_those_of_batch_norm_are(run):
    from onlinenorm.training.checkpoint import read

    groups = read(run / "checkpoints" / "last.ckpt")["optimizer_states"][0]["param_groups"]
    assert {group["name"]: len(group["params"]) for group in groups} == {"decay": 9 + 9 + 2, "no_decay": 2 * 9}
