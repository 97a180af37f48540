"""Shared by all tests: the repository's root, a cache folder, and one thread a worker."""

import gc
import signal
from pathlib import Path

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("untimed", deadline=None)  # the machine may be busy
hypothesis.settings.load_profile("untimed")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and what they start, ignore it


def pytest_collection_finish():
    """What has been imported stays: it need not be searched for garbage after every test that makes some."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    """This project's part of the user's cache folder, which is one of the test's own and empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "onlinenorm"


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
