"""Files of the user's own are part of what a run is."""

import json
import sys

import pytest
from tests_training import RESULTS

from onlinenorm.errors import ConfigError
from onlinenorm.training.own_code import own_code, own_files
from onlinenorm.training.run_folder import RunFolder

CONFIG = {
    "normalizer": {"_target_": "my_layers.norms.Mine", "_partial_": True},
    "model": {"_target_": "my_model.net"},
    "data": {"_target_": "onlinenorm.data.Synthetic"},
    "recipe": {"batch_size": 8},
    "trainer": {"devices": 1},
}
NORMS = """
import torch
from . import rates
from .deep.sums import total

class Mine(torch.nn.Module):
    def __init__(self, num_features):
        super().__init__()
"""
FILES = {
    "my_layers/__init__.py": "",
    "my_layers/norms.py": NORMS,
    "my_layers/rates.py": "RATE = 0.1",
    "my_layers/deep/__init__.py": "",
    "my_layers/deep/sums.py": "def total(x):\n    from my_helper import LIMIT\n    return x * LIMIT",
    "my_layers/unused.py": "",
    "my_helper.py": "from onlinenorm.data import Synthetic\nimport my_layers.norms\nLIMIT = 3",
    "my_model.py": "import torch\nfrom json import dumps\ndef net(): ...",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Modules of one's own on the path."""
    for name, text in FILES.items():
        (tmp_path / "code" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "code" / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    yield tmp_path / "code"
    for name in [name for name in sys.modules if name.startswith(("my_layers", "my_model", "my_helper"))]:
        del sys.modules[name]


@pytest.fixture
def finished(folder, tmp_path):
    """The folder of a run of CONFIG that is done."""
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.record_start(CONFIG, 1, None)
    (run.path / "results.json").write_text(json.dumps(RESULTS))
    return run


def test_the_files_are_those_of_the_targets_and_all_that_they_import(folder):
    found = own_files(CONFIG)
    assert set(found) == {"normalizer", "model"}
    assert sorted(str(path.relative_to(folder)) for path in found["normalizer"].values()) == sorted(
        set(FILES) - {"my_layers/unused.py", "my_model.py"}
    )
    assert found["model"] == {"my_model": folder / "my_model.py"}
    assert own_files({"normalizer": {"_target_": "torch.nn.BatchNorm2d"}, "data": None}) == {}


@pytest.mark.parametrize("edited", ["my_layers/norms.py", "my_layers/rates.py", "my_helper.py", "my_model.py"])
def test_an_edited_file_is_not_the_same_run(folder, finished, edited):
    recorded = json.loads((finished.path / "environment.json").read_text())["own_code"]
    assert recorded == own_code(CONFIG) and len(recorded["normalizer"]["my_helper"]) == 64
    assert finished.results(CONFIG) == RESULTS
    (folder / "my_layers" / "unused.py").write_text("x = 1")
    assert finished.results(CONFIG) == RESULTS
    (folder / edited).write_text(FILES[edited] + "\n# edited")
    group = "model" if edited == "my_model.py" else "normalizer"
    with pytest.raises(ConfigError, match=rf"(?s)run of other code:\n  {group}: {folder / edited} has changed\nChoose"):
        finished.results(CONFIG)
    (folder / edited).write_text(FILES[edited])
    assert finished.results(CONFIG) == RESULTS


def test_a_checkpoint_is_not_continued_by_an_edited_file(folder, finished):
    (finished.path / "results.json").unlink()
    finished.checkpoints.mkdir()
    (finished.checkpoints / "last.ckpt").write_bytes(b"x")
    (folder / "my_helper.py").unlink()
    with pytest.raises(ConfigError, match="normalizer: module my_helper is gone"):
        finished.check_config(CONFIG)


def test_runs_recorded_without_their_code_stay_readable(folder, finished):
    path = finished.path / "environment.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "own_code"}))
    (folder / "my_model.py").write_text("edited")
    assert finished.results(CONFIG) == RESULTS
