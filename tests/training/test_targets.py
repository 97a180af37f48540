"""What a `_target_` may name: code that stands in the list, or that the user's own package defines."""

import importlib.util
import os
import sys

import pytest
import torch
import yaml

from onlinenorm.cli.compose import load_config
from onlinenorm.cli.files import CONFIGS, GROUPS
from onlinenorm.errors import ConfigError, RunError
from onlinenorm.training.config_check import check_config
from onlinenorm.training.targets import NAMED, locate, targets

OWN = """
import os
from pathlib import Path
from pickle import load, loads
from functools import partial
from torch import nn
from torch.nn import GroupNorm
from onlinenorm.data import Synthetic

ready = partial(nn.GroupNorm, 1)
value = 3

class Norm(nn.Module):
    def __init__(self, num_features, gain: float = 1.0, **more):
        super().__init__()
        self.more = more

class Blind(nn.Module):
    def __init__(self, channels):
        super().__init__()

class NoModule:
    def __init__(self, num_features):
        pass

class Hinted(nn.Module):
    def __init__(self, num_features: int, other: "OnlyForTypeCheckers" = None):
        super().__init__()

class Net(nn.Module):
    def __init__(self, normalizer, num_classes, in_channels, width: int = 4):
        super().__init__()

class HalfNet(nn.Module):
    def __init__(self, normalizer, num_classes):
        super().__init__()

class Images(Synthetic):
    pass

def norm(num_features):
    return nn.GroupNorm(1, num_features)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A package of the user's own on the path, by a name that no other test has."""
    name = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


def write(folder, group, content, name="mine"):
    path = folder / "more" / group / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return str(folder / "more")


def test_all_that_is_named_exists_and_all_that_is_written_is_named():
    for group, names in NAMED.items():
        for name in names:
            assert callable(locate(group, name))
    files = [(group, file) for group in GROUPS for file in (CONFIGS / group).rglob("*.yaml")]
    named = {(group, target) for group, file in files for _, target in targets(yaml.safe_load(file.read_text()))}
    named |= {(key.partition(".")[0], target) for key, target in targets(load_config([]))}
    assert len(named) > 20 and all(target in NAMED[group] for group, target in named)


REFUSED = [
    "pytorch_lightning.core.saving.pl_load",
    "pytorch_lightning.utilities.cloud_io.get_filesystem",
    "lightning_fabric.utilities.cloud_io._load",
    "torch.load",
    "torch.hub.load",
    "torch.optim.lr_scheduler.partial",
    "torch.nn.LayerNorm",
    "torch.nn.BatchNorm2d.__init__",
    "torch.nn.modules.batchnorm.BatchNorm2d",
    "torch.optim.SGD",
    "torch.serialization.pickle.load",
    "onlinenorm.training.checkpoint.pickle.load",
    "onlinenorm.training.checkpoint.torch",
    "onlinenorm.training.checkpoint.read",
    "onlinenorm.models.blocks.Callable",
    "onlinenorm.normalizers.os.system",
    "onlinenorm",
    "hydra.utils.instantiate",
    "hydra.utils.get_method",
    "omegaconf.OmegaConf.load",
    "numpy.load",
    "yaml.unsafe_load",
    "pickle.load",
    "_pickle.loads",
    "os.system",
    "posix.system",
    "subprocess.run",
    "builtins.eval",
    "runpy.run_path",
    "importlib.import_module",
    "pip._internal.main",
    "__main__.x",
    *(["test.support.os_helper.rmtree"] if importlib.util.find_spec("test") else []),
    "train.train",
    "scripts.sweep.main",
    "tests.conftest.root",
    "eval",
    ".x",
    "x.",
    "",
    "..",
    "torch",
    7,
    None,
    ["torch.nn.BatchNorm2d"],
]


@pytest.mark.parametrize("name", REFUSED, ids=str)
@pytest.mark.parametrize("group", NAMED)
def test_all_else_of_torch_python_and_what_is_installed_is_refused(group, name):
    with pytest.raises(ConfigError, match=rf"^{group}._target_: .*is refused; there are"):
        locate(group, name)


def test_a_group_takes_what_is_named_for_it_alone():
    with pytest.raises(ConfigError, match=r"model._target_: 'onlinenorm.data.Synthetic' is refused"):
        locate("model", "onlinenorm.data.Synthetic")


@pytest.mark.parametrize(
    "group, name", [("normalizer", "Norm"), ("normalizer", "norm"), ("model", "Net"), ("data", "Images")]
)
def test_a_package_of_ones_own_is_built_from(group, name, own):
    assert locate(group, f"{own}.{name}").__name__ == name


@pytest.mark.parametrize(
    "group, name, message",
    [
        *(
            ("normalizer", name, "is no class or function that own_")
            for name in ("load", "loads", "GroupNorm", "ready")
        ),
        ("normalizer", "value", "is no class or function"),
        ("data", "Path", "is no class or function"),
        ("normalizer", "os.system", "does not exist"),
        ("normalizer", "Nrom", "does not exist"),
        ("normalizer", "NoModule", "is a subclass of torch.nn.Module"),
        ("data", "Net", "is a subclass of onlinenorm.data.ImageDataModule"),
        ("recipe", "Net", "is refused; there are onlinenorm.training.recipe.Recipe$"),
        ("trainer", "norm", "is refused; there are onlinenorm.training.build_trainer$"),
        ("logger", "norm", "is refused"),
        ("classifier", "Net", "is refused"),
    ],
)
def test_what_it_merely_imports_or_is_of_another_kind_is_not(group, name, message, own):
    with pytest.raises(ConfigError, match=f"^{group}._target_: .*{message}"):
        locate(group, f"{own}.{name}")


def test_a_package_that_is_not_there_or_lacks_another_is_told(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"no module named not_there_at_all.*pip install -e, or .* PYTHONPATH"):
        locate("normalizer", "not_there_at_all.Norm")
    (tmp_path / "needs_another.py").write_text("import not_there_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RunError, match=r"needs the package not_there_at_all"):
        locate("normalizer", "needs_another.Norm")


def test_an_installed_package_is_not_ones_own(tmp_path, monkeypatch):
    installed = tmp_path / "lib" / "site-packages" / "of_others"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text(OWN)
    monkeypatch.syspath_prepend(installed.parent)
    with pytest.raises(ConfigError, match=r"'of_others.norm' is refused"):
        locate("normalizer", "of_others.norm")
    assert "of_others" not in sys.modules


def test_a_yaml_of_a_folder_given_names_it_and_the_command_line_does_not(own, tmp_path):
    folder = write(tmp_path, "normalizer", f"_target_: {own}.Norm\n_partial_: true\ngain: 1.0\n")
    config = load_config(["normalizer=mine", "normalizer.gain=2"], folder)
    check_config(config)
    assert config["normalizer"]["_target_"] == f"{own}.Norm" and config["normalizer"]["gain"] == 2
    for override in (f"normalizer._target_={own}.Norm", f"++normalizer._target_={own}.norm"):
        with pytest.raises(ConfigError, match=r"^normalizer._target_: .* is refused: code is named in files alone"):
            load_config([override], folder)


@pytest.mark.parametrize("text", ["${run_dir}", "${oc.env:OWN_TARGET}", "${oc.select:run_dir}"])
def test_what_is_named_stands_in_the_file_itself(text, own, tmp_path, monkeypatch):
    monkeypatch.setenv("OWN_TARGET", f"{own}.Norm")
    folder = write(tmp_path, "normalizer", f"_target_: {text}\n_partial_: true\n")
    with pytest.raises(ConfigError, match=r"^normalizer._target_: .* is refused: code is named in files alone"):
        load_config(["normalizer=mine", f"run_dir={own}.Norm"], folder)


@pytest.mark.parametrize(
    "override",
    [
        "+hydra.callbacks.x._target_=os.getcwd",
        "hydra.launcher._target_=os.getcwd",
        "hydra.sweeper._target_=os.getcwd",
        "+hydra.job_logging.handlers.x.class=os.getcwd",
        "hydra.searchpath=[structured://antigravity]",
    ],
)
def test_hydras_own_code_is_fixed(override):
    with pytest.raises(ConfigError, match=r"^hydra"):
        load_config([override])


def test_hydras_own_code_is_fixed_in_files_too(tmp_path):
    text = "# @package _global_\nhydra: {callbacks: {x: {_target_: os.getcwd}}}\n"
    with pytest.raises(ConfigError, match=r"^hydra.callbacks: is fixed"):
        load_config(["experiment=mine"], write(tmp_path, "experiment", text))


@pytest.mark.parametrize(
    "more, fine", [("", True), (", x: {_target_: os.getcwd}", False), (", x: [{_target_: os.getcwd}]", False)]
)
def test_launchers_of_submitit_are_known(more, fine, tmp_path):
    name = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"
    text = f"# @package _global_\nhydra: {{launcher: {{_target_: {name}{more}}}}}\n"
    folder = write(tmp_path, "experiment", text)
    if fine:
        assert load_config(["experiment=mine"], folder)["choices"]["experiment"] == "mine"
    else:
        with pytest.raises(ConfigError, match=r"^hydra.launcher: is fixed|^experiment=mine: "):
            load_config(["experiment=mine"], folder)


def test_a_yaml_that_holds_python_objects_is_refused(tmp_path):
    trace = tmp_path / "trace"
    folder = write(tmp_path, "normalizer", f"_target_: !!python/object/apply:os.mkdir ['{trace}']\n_partial_: true\n")
    with pytest.raises(ConfigError):
        load_config(["normalizer=mine"], folder)
    assert not trace.exists()


class Bomb:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("group", ["normalizer", "model", "data", "recipe", "trainer", "logger"])
@pytest.mark.parametrize(
    "call",
    [
        "_target_: pytorch_lightning.core.saving.pl_load\npath_or_url: {file}\nweights_only: false\n",
        "_target_: torch.load\nf: {file}\nweights_only: false\n",
        "_target_: numpy.load\nfile: {file}\nallow_pickle: true\n",
    ],
)
def test_a_pickle_in_a_node_does_not_run(group, call, tmp_path):
    trace, file = tmp_path / "trace", tmp_path / "bomb.pt"
    torch.save(Bomb(trace), file)
    folder = write(tmp_path, group, call.format(file=file))
    with pytest.raises(ConfigError, match=rf"^{group}._target_: .* is refused"):
        check_config(load_config([f"{group}=mine"], folder))
    assert not trace.exists()
    torch.load(file, weights_only=False)
    assert trace.exists(), "the bomb is a dud"


def nodes(**changes):
    config = load_config(["model=cifar_resnet8", "data=synthetic", "trainer=cpu"])
    for group, change in changes.items():
        config[group] = change
    return config


@pytest.mark.parametrize(
    "group, node, message",
    [
        ("normalizer", {"_target_": "Blind", "_partial_": True}, "takes no num_features, .*it takes channels"),
        ("normalizer", {"_target_": "Norm"}, "_partial_: is missing"),
        ("model", {"_target_": "HalfNet"}, "takes no in_channels; train.py calls it with normalizer, num_classes, in_"),
        ("model", {"_target_": "Net", "width": "x"}, None),
        ("model", {"_target_": "Net", "depth": 3}, "no such key"),
        ("normalizer", {"_target_": "Norm", "_partial_": True, "_args_": [1]}, "no such key"),
    ],
)
def test_what_train_needs_of_a_class_is_told_before_it_is_built(group, node, message, own):
    config = nodes(**{group: node | {"_target_": f"{own}.{node['_target_']}"}})
    with pytest.raises(ConfigError, match=f"^{group}.*{message or 'is not a whole number'}"):
        check_config(config)


def test_arguments_by_name_and_hints_that_only_type_checkers_know(own):
    check_config(nodes(normalizer={"_target_": f"{own}.Norm", "_partial_": True, "anything": 3}))
    check_config(nodes(normalizer={"_target_": f"{own}.Hinted", "_partial_": True}))


def test_nothing_in_the_package_reads_what_could_run_code(root):
    """Every reader in its safe form; a new one is looked at here."""
    unsafe = ("weights_only=False)", "allow_pickle=True", "shell=True", "pickle.load", "yaml.unsafe_load", 'eval("')
    files = [*(root / "onlinenorm").rglob("*.py"), *(root / "scripts").rglob("*.py"), root / "train.py"]
    assert len(files) > 100
    for file in files:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            saved = "save_checkpoint(" in line  # which writes
            assert saved or not any(word in line for word in unsafe), f"{file}:{number}"
