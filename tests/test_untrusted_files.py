"""Files that came from elsewhere are read or refused, never run, and pipes in their place not waited for."""

import importlib.util
import os
import pickle
import signal
import socket
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

sys.path.append(str(Path(__file__).parent / "data"))
sys.path.append(str(Path(__file__).parent / "report"))
from image_folders import write_tree
from official_archives import write_official
from run_folders import write_run

from onlinenorm.data import DataError, ImageNet, devkit
from onlinenorm.data.imagenet import open_splits
from onlinenorm.data.index import load_index
from onlinenorm.data.tiny_imagenet import read_classes
from onlinenorm.deploy.forms import load_folded
from onlinenorm.errors import DeployError, ReportError, RunError
from onlinenorm.records import read_record, read_rows
from onlinenorm.report.predictions import load_predictions
from onlinenorm.report.runs import read_yaml
from onlinenorm.training.checkpoint import resumable
from scripts import prepare_imagenet


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


@pytest.fixture
def patience():
    """Ends a test that waits, as for a pipe that nobody writes to."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(30)
    yield
    signal.alarm(0)


@pytest.fixture
def pipe(tmp_path, patience):
    """pipe(PATH): a pipe there, in place of what is."""

    def make(path):
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        return path

    return make


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "device", "socket"])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_is_no_file_is_unreadable(pipe, tmp_path, own_cache, kind, workers):
    image = write_tree(tmp_path / "set") / "train" / "bee" / "0.JPEG"
    image.unlink()
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(image))
    else:
        image.symlink_to(pipe(tmp_path / "pipe") if kind == "link to a pipe" else "/dev/zero")
        if kind == "pipe":
            pipe(image)
    arguments = {"image_size": 32, "batch_size": 5, "num_workers": workers, "on_unreadable": "raise"}
    data = ImageNet(root=str(tmp_path / "set"), **arguments)
    why = "No such device or address" if kind == "socket" else "[Nn]o regular file but a pipe"
    with pytest.raises(
        DataError, match=rf"bee/0.JPEG cannot be decoded \(OSError: .*{why}[^']*: '\S+/bee/0.JPEG'\). Rep"
    ):
        [data.on_before_batch_transfer(batch) for batch in data.train_dataloader()]


def test_other_files_of_a_set_that_are_none_are_named(pipe, tmp_path):
    archive, kit = write_official(tmp_path / "set") / f"{devkit.NAME}.tar.gz", tmp_path / "set" / devkit.NAME
    with tarfile.open(archive) as tar:
        tar.extractall(archive.parent, filter="data")
    (tmp_path / "val.tar").touch()
    for file, read, at in (
        (archive, devkit.read_devkit, archive),
        (kit / devkit.META, devkit.read_devkit, kit),
        (tmp_path / "wnids.txt", read_classes, tmp_path),
        (tmp_path / "train.tar", open_splits, tmp_path),
    ):
        pipe(file)
        with pytest.raises(DataError, match=rf"^root: \S+/{at.name}.*[Nn]o regular file but a pipe"):
            read(at)


def test_records_and_prepared_files_that_are_none_are_named(pipe, tmp_path, own_cache, capsys):
    source, root = write_tree(tmp_path / "source"), tmp_path / "root"
    for name, packed in (("train/bee/0.JPEG", []), ("train-00000-of-00001.tar", ["--packed"])):
        arguments = [str(source), str(root / str(len(packed))), *packed]
        assert prepare_imagenet.main(arguments) == 0
        pipe(root / str(len(packed)) / name)
        assert prepare_imagenet.main(arguments) == 1 and name in capsys.readouterr().err
    for read, name in ((read_record, "results.json"), (read_rows, "metrics.csv")):
        with pytest.raises(ReportError, match=rf"{name}: is damaged \(.*No regular file but a pipe"):
            read(pipe(tmp_path / name), ReportError)
