"""Tiny trained runs of the real configuration, and the scripts as functions."""

import importlib.util
import shutil
import sys

import pytest

TINY = (
    "experiment=quickstart",
    "data.limit_train=128",
    "data.limit_val=60",
    "recipe.epochs=1",
    "recipe.milestones=[]",
    "recipe.batch_size=16",
)


def load(name, path):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def train_run(root, tmp_path_factory):
    """Trains and returns a run folder: train_run(name, *overrides); once a name."""
    train = load("train", root / "train.py")
    base, done = tmp_path_factory.mktemp("runs"), {}

    def call(name, *overrides):
        if name not in done:
            done[name] = base / name
            train.train(train.load_config([*overrides, f"run_dir={base / name}"]))
        return done[name]

    return call


@pytest.fixture(scope="session")
def clamp_run(train_run):
    """A small network whose clamps act, so that removing them can be seen."""
    return train_run("clamp", *TINY, "normalizer=online_clamp", "normalizer.clamp_value=2.0")


@pytest.fixture(scope="session")
def scaling_run(train_run):
    return train_run("scaling", *TINY, "normalizer=online_layer_scaling")


@pytest.fixture(scope="session")
def batch_run(train_run):
    return train_run("batch", *TINY, "normalizer=batch")


@pytest.fixture(scope="session")
def on_device_run(train_run):
    return train_run("on_device", *TINY, "normalizer=batch", "data.on_device=true")


@pytest.fixture
def copied(tmp_path):
    """A copy of a run folder, to be damaged: copied(run)."""

    def call(run):
        return shutil.copytree(run, tmp_path / "copy")

    return call


@pytest.fixture(scope="session")
def script(root):
    """main() of a script, with arguments of any kind: script("export")(run, "--to", "onnx", ...) -> exit code."""

    def of(name):
        module = load(f"{name}_script", root / "scripts" / f"{name}.py")
        return lambda *arguments: module.main([str(argument) for argument in arguments])

    return of
