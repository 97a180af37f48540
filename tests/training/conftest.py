"""Runs of the real configuration, shrunk to seconds."""

import pytest
from tests_training import TINY, load_train_module


@pytest.fixture(scope="session")
def train_module():
    return load_train_module()


@pytest.fixture(scope="session")
def run(train_module):
    """Runs a tiny configuration: run(folder, *overrides) -> results."""

    def call(folder, *overrides):
        return train_module.train(train_module.load_config([*TINY, f"run_dir={folder}", *overrides]))

    return call
