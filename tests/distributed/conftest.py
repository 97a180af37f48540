"""What the tests of sweeps share."""

import signal

import pytest
from distributed_runs import TINY
from fake_training import FAKE_TRAIN

from onlinenorm.data.workers import STOP_SIGNALS
from scripts import sweep


@pytest.fixture
def run_sweep(tmp_path, monkeypatch):
    """run_sweep(*arguments) -> exit code, with a stand-in for train.py, in an empty folder."""
    (tmp_path / "train.py").write_text(FAKE_TRAIN)
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    former = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield lambda *arguments: sweep.main([*TINY, *arguments])
    for number, handler in former.items():
        signal.signal(number, handler)
