"""Files that came from elsewhere are read or refused, and never run."""

import importlib.util
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

sys.path.append(str(Path(__file__).parent / "data"))
sys.path.append(str(Path(__file__).parent / "report"))
from image_folders import write_tree
from run_folders import write_run

from onlinenorm.data.index import load_index
from onlinenorm.deploy.forms import load_folded
from onlinenorm.errors import DeployError, ReportError, RunError
from onlinenorm.report.runs import load_predictions, read_yaml
from onlinenorm.training.checkpoint import resumable


class Bomb:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def bomb(tmp_path):
    """Leaves tmp_path/trace where it is unpickled, and must not have by the end of a test."""
    trace = tmp_path / "trace"
    yield Bomb(trace)
    assert not trace.exists(), "a file's code was run"
    pickle.loads(pickle.dumps(Bomb(trace)))
    assert trace.exists(), "a dud"


def test_an_index_with_a_pickle_is_built_anew(bomb, tmp_path, own_cache):
    tree = write_tree(tmp_path / "set")
    expected = load_index(tree / "train")
    files = [*tree.rglob(".onlinenorm-index-train.npz"), *(tmp_path / "cache").rglob("*train.npz")]
    assert files
    for file in files:
        with np.load(file) as stored:
            arrays = {name: stored[name] for name in stored.files}
        for name in arrays.keys() - {"key"}:
            np.savez(file, **arrays | {name: np.array([bomb], dtype=object)})
            found = load_index(tree / "train")
            assert [str(found.path(i)) for i in range(len(found))] == [
                str(expected.path(i)) for i in range(len(expected))
            ]


@pytest.mark.parametrize("column", ["index", "label", "prediction"])
def test_predictions_with_a_pickle_are_refused(bomb, tmp_path, column):
    arrays = {key: np.arange(3) for key in ("index", "label", "prediction")}
    np.savez(tmp_path / "predictions.npz", **arrays | {column: np.array([bomb] * 3, dtype=object)})
    with pytest.raises(ReportError, match="is damaged"):
        load_predictions(tmp_path / "predictions.npz")


def test_a_run_does_not_continue_from_a_pickle(bomb, tmp_path):
    torch.save({"position": bomb}, tmp_path / "last.ckpt")
    (tmp_path / "previous.ckpt").write_bytes(pickle.dumps(bomb))
    with pytest.raises(RunError, match=r"loading it could run code.*Nothing is left to continue from"):
        resumable(tmp_path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_exported_weights_with_a_pickle_are_refused(bomb, tmp_path, suffix):
    torch.save({"state": bomb, "about": {}}, tmp_path / f"folded{suffix}")
    with pytest.raises(DeployError, match=f"folded{suffix}: is no file of weights"):
        load_folded(tmp_path / f"folded{suffix}")


def test_a_report_reads_no_environment_for_a_run(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("A_SECRET", "hunter2")
    folder = write_run(tmp_path, "batch")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["normalizer"]["eps"] = "${oc.env:A_SECRET}"
    config["data"]["name"] = "${oc.env:A_SECRET}"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    spec = importlib.util.spec_from_file_location("table1_of_untrusted", root / "scripts" / "table1.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert read_yaml(folder / "config.yaml")["normalizer"]["eps"] == "${oc.env:A_SECRET}"
    module.main([str(tmp_path), "--output", str(tmp_path / "report")])
    printed = capsys.readouterr()
    written = [file.read_bytes() for file in (tmp_path / "report").glob("*")]
    assert not any(b"hunter2" in text for text in (*written, printed.out.encode(), printed.err.encode()))
