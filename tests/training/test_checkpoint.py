"""Checkpoint files survive what happens to files."""

import os
import threading
from collections import Counter
from types import SimpleNamespace

import programs
import pytest
import pytorch_lightning as pl
import torch

from onlinenorm.errors import ConfigError, RunError
from onlinenorm.training import checkpoint, saving
from onlinenorm.training.host_copy import host_copy
from onlinenorm.training.trainer import quiet_lightning


def state(value):
    position = {"epoch": value, "step": 0, "global_step": value}
    parts = {
        "best_top1": 0.5, "state_dict": {}, "optimizer_states": [], "callbacks": {}, "schedule": {}, "train_sums": [],
        "local_statistics": {}, "pytorch-lightning_version": "2", "config": {}, "fingerprint": "x",
    }  # fmt: skip
    return parts | {"position": position, "weights": torch.full((1000,), float(value))}


@pytest.fixture
def folder(tmp_path):
    checkpoint.write(state(1), tmp_path / "last.ckpt")
    checkpoint.write(state(2), tmp_path / "last.ckpt")
    return tmp_path


def test_the_previous_one_is_kept(folder):
    assert checkpoint.read(folder / "last.ckpt")["position"]["epoch"] == 2
    assert checkpoint.read(folder / "previous.ckpt")["position"]["epoch"] == 1
    assert checkpoint.resumable(folder) == (folder / "last.ckpt", state(2)["position"])
    assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", "previous.ckpt"]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((10,), 2.0).numpy().tobytes()) + 2000] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, empty, flip_a_bit])
def test_damage_is_found_and_the_previous_one_used(folder, damage, capsys):
    damage(folder / "last.ckpt")
    assert checkpoint.resumable(folder) == (folder / "previous.ckpt", state(1)["position"])
    told = capsys.readouterr().err
    assert f"{folder / 'last.ckpt'} is damaged" in told and "continuing from" in told


def test_nothing_good_left_is_an_error_and_nothing_at_all_is_not(folder, tmp_path):
    truncate(folder / "last.ckpt")
    empty(folder / "previous.ckpt")
    with pytest.raises(RunError, match=r"last.ckpt is damaged .*previous.ckpt is damaged .*delete .* to start over"):
        checkpoint.resumable(folder)
    assert checkpoint.resumable(tmp_path / "none") == (None, None)


def test_a_crash_between_the_two_renames_leaves_the_previous(folder, monkeypatch):
    class Crash(BaseException):
        pass

    def replace(source, target, _replace=os.replace):
        if str(target).endswith("last.ckpt"):
            raise Crash
        _replace(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", replace)
    with pytest.raises(Crash):
        checkpoint.write(state(3), folder / "last.ckpt")
    assert checkpoint.resumable(folder)[1]["epoch"] == 2


def test_what_cannot_be_read_back_never_becomes_the_last(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "verify", lambda path: "record x does not match its checksum")
        with pytest.raises(RunError, match="cannot be read back"):
            checkpoint.write(state(3), folder / "last.ckpt")
    assert checkpoint.read(folder / "last.ckpt")["position"]["epoch"] == 2


def test_a_partial_file_of_before_and_a_folder_that_may_not_be_written(folder, monkeypatch):
    (folder / "last.partial").write_text("of a run that was killed")

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint, "open", refused, raising=False)
    monkeypatch.setattr(checkpoint.Path, "unlink", refused)
    with pytest.raises(RunError, match=f"Permission denied.*Mend that.* continues from {folder}/last.ckpt$"):
        checkpoint.write(state(3), folder / "last.ckpt")


def test_a_file_where_the_folder_was(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(RunError, match=r"last.ckpt: could not be saved .* it starts over$"):
        checkpoint.write(state(3), tmp_path / "checkpoints" / "last.ckpt")


def test_a_folder_where_the_file_goes(tmp_path):
    (tmp_path / "last.ckpt").mkdir()
    with pytest.raises(RunError, match=r"last.ckpt: could not be saved .*Is a directory.* it starts over$"):
        checkpoint.write(state(3), tmp_path / "last.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.gpu
def test_a_copy_of_the_device_is_that_of_the_call():
    weight = torch.randn(64, 32, 3, 3, device="cuda").to(memory_format=torch.channels_last)
    expected = weight.cpu()
    torch.cuda._sleep(10**8)  # what is queued before
    copied, ready = host_copy({"weight": weight})
    weight.zero_()
    ready.synchronize()
    assert torch.equal(copied["weight"], expected) and copied["weight"].stride() == weight.stride()


@pytest.fixture
def held(monkeypatch):
    """Keeps the writing thread waiting until it is set."""
    event, write = threading.Event(), checkpoint.write

    def held_write(state, path):
        assert event.wait(60)
        write(state, path)

    monkeypatch.setattr(checkpoint, "write", held_write)
    return event


def test_what_a_thread_writes_is_the_state_of_the_call(tmp_path, held):
    io = checkpoint.VerifiedIO()
    layer = torch.nn.BatchNorm2d(3)
    content = state(1) | {"state_dict": layer.state_dict(), "rows": [{"tensors": (torch.ones(2), 5)}]}
    content["schedule"]["milestones"] = Counter([30, 60])
    io.save_checkpoint(content, tmp_path / "last.ckpt")
    io.check()  # nothing yet, and no waiting
    assert not list(tmp_path.iterdir())
    with torch.no_grad():
        for value in (layer.weight, layer.running_var, content["rows"][0]["tensors"][0]):
            value.fill_(7)
    content["rows"].append(1)
    held.set()
    io.teardown()
    saved = checkpoint.read(tmp_path / "last.ckpt")
    assert torch.equal(saved["state_dict"]["weight"], torch.ones(3))
    assert torch.equal(saved["state_dict"]["running_var"], torch.ones(3))
    assert saved["state_dict"]._metadata == layer.state_dict()._metadata
    assert saved["schedule"]["milestones"] == {30: 1, 60: 1}
    ((kept,),) = [row.values() for row in saved["rows"]]
    assert torch.equal(kept[0], torch.ones(2)) and kept[1] == 5


def test_a_save_waits_for_the_one_before_of_its_path_only(tmp_path, held):
    io = checkpoint.VerifiedIO()
    io.save_checkpoint(state(1), tmp_path / "best.ckpt")
    io.save_checkpoint(state(2), tmp_path / "last.ckpt")
    second = threading.Thread(target=io.save_checkpoint, args=(state(3), tmp_path / "last.ckpt"))
    second.start()
    second.join(0.1)
    assert second.is_alive() and not list(tmp_path.iterdir())
    held.set()
    second.join()
    io.teardown()
    epochs = {path.name: checkpoint.read(path)["position"]["epoch"] for path in tmp_path.iterdir()}
    assert epochs == {"best.ckpt": 1, "previous.ckpt": 2, "last.ckpt": 3}


@pytest.mark.parametrize("asked", ["check", "teardown", "save"])
def test_what_goes_wrong_in_the_thread_is_raised_once_by_the_next_call(tmp_path, monkeypatch, asked):
    def full(content, file):
        raise OSError(28, "No space left on device")

    io = checkpoint.VerifiedIO()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.torch, "save", full)
        io.save_checkpoint(state(1), tmp_path / "last.ckpt")
        (written,) = io._writing.values()
        assert isinstance(written.exception(), RunError)
    calls = {"check": io.check, "teardown": io.teardown}
    calls["save"] = lambda: io.save_checkpoint(state(2), tmp_path / "best.ckpt")
    with pytest.raises(RunError, match=r"last.ckpt: could not be saved .*No space left on device.*Free some space"):
        calls[asked]()
    io.teardown()
    assert not list(tmp_path.iterdir())


KILLED_OVER_AND_OVER = """
import itertools, os, random, signal, sys, time
from pathlib import Path
from onlinenorm.training import checkpoint
from onlinenorm.training.host_copy import host_copy
from test_checkpoint import state

folder, draw, before = Path(sys.argv[1]), random.Random(0), 0
for attempt in range(20):
    if not (child := os.fork()):
        io = checkpoint.VerifiedIO()
        for number in itertools.count(before + 1):
            io.save_checkpoint(state(number), folder / "last.ckpt")
    time.sleep(draw.uniform(0.01, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    path, position = checkpoint.resumable(folder)
    if path is not None:
        assert (checkpoint.read(path)["weights"] == position["epoch"]).all() and position["epoch"] >= before
        before = position["epoch"]
print(before)
"""


def test_kill_9_at_any_moment_leaves_a_whole_one(tmp_path):
    done = programs.call("-c", KILLED_OVER_AND_OVER, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout) > 0, "it must have got as far as a file for this to test anything"


class Evil:
    def __reduce__(self):
        return os.system, ("true",)


def test_code_in_a_checkpoint_is_refused(tmp_path):
    torch.save({"position": Evil()}, tmp_path / "last.ckpt")
    with pytest.raises(
        RunError, match=r"last.ckpt holds more than tensors .*system\) and is refused: loading it could run"
    ):
        checkpoint.read(tmp_path / "last.ckpt")
    with pytest.raises(RunError, match=r"is refused.* Nothing is left to continue from"):
        checkpoint.resumable(tmp_path)


def test_a_checkpoint_of_another_version_is_told_and_not_continued(folder, capsys):
    old = state(3)
    del old["schedule"], old["local_statistics"]
    torch.save(old, folder / "last.ckpt")
    told = r"last.ckpt was written by another program or version: schedule is missing"
    assert checkpoint.resumable(folder) == (folder / "previous.ckpt", state(1)["position"])
    assert told in capsys.readouterr().err
    torch.save(torch.zeros(3), folder / "previous.ckpt")
    with pytest.raises(
        RunError, match=f"{told}.*previous.ckpt was written.*it is tensor.*, not a mapping.*delete .*another run_dir"
    ):
        checkpoint.resumable(folder)


def test_all_that_is_required_is_what_a_run_saves(run, tmp_path):
    run(tmp_path, "normalizer=batch", "recipe.epochs=1", "recipe.milestones=[]")
    saved = set(checkpoint.read(tmp_path / "checkpoints" / "last.ckpt"))
    known = {key.removesuffix("?") for key in checkpoint.SHAPE}
    assert saved - known == {"epoch", "global_step", "lr_schedulers"}


def test_loop_state_has_every_counter_of_lightnings_loop():
    with quiet_lightning():
        fresh = pl.Trainer(logger=False, barebones=True).fit_loop.state_dict()
    moved = saving.loop_state(fresh, accumulate=2, steps=10, epoch=3, step=4, global_step=34)
    assert moved["epoch_progress"]["current"] == {"ready": 4, "completed": 3, "started": 4, "processed": 3}
    assert moved["epoch_loop.batch_progress"]["total"]["completed"] == 68
    assert moved["epoch_loop.batch_progress"]["current"]["ready"] == 8
    assert moved["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]["completed"] == 34
    between = saving.loop_state(fresh, accumulate=1, steps=10, epoch=3, step=0, global_step=30)
    assert set(between["epoch_progress"]["total"].values()) == {3}


def test_a_damaged_one_does_not_replace_the_previous(folder):
    (folder / "last.ckpt").write_bytes(b"damaged")
    checkpoint.write(state(3), folder / "last.ckpt")
    assert checkpoint.read(folder / "last.ckpt")["position"]["epoch"] == 3
    assert checkpoint.read(folder / "previous.ckpt")["position"]["epoch"] == 1


def test_flags_that_zip_cannot_serve_are_damage(folder):
    """A bit of the directory that says "encrypted", or another compression."""
    content = bytearray((folder / "last.ckpt").read_bytes())
    for offset, value in ((8, 1), (10, 9)):
        changed = bytearray(content)
        changed[content.index(b"PK\x01\x02") + offset] |= value
        (folder / "last.ckpt").write_bytes(changed)
        assert checkpoint.verify(folder / "last.ckpt")
        assert checkpoint.resumable(folder)[0] == folder / "previous.ckpt"


def images(fingerprint):
    return SimpleNamespace(fingerprint=fingerprint, replaced_since=lambda files: None)


def test_one_of_another_run_is_not_continued(folder):
    checkpoint.write(
        state(3) | {"config": {"seed": 1, "data": {"root": "a"}}, "fingerprint": "x"}, folder / "last.ckpt"
    )
    assert checkpoint.resumable(folder, {"seed": 1, "data": {"root": "b"}}, images("x"))[0] == folder / "last.ckpt"
    with pytest.raises(ConfigError, match=r"is a checkpoint of another configuration:\n  seed: 1 -> 0"):
        checkpoint.resumable(folder, {"seed": 0, "data": {"root": "a"}}, images("x"))
    with pytest.raises(ConfigError, match=r"^data.root: holds other images than those that .*last.ckpt was trained on"):
        checkpoint.resumable(folder, {"seed": 1, "data": {"root": "a"}}, images("y"))


@pytest.mark.parametrize(
    "change, told",
    [
        ({"position": [1]}, "position is [1], not a mapping"),
        ({"position": {"epoch": 1, "step": 0}}, "position.global_step is missing"),
        ({"position": {"epoch": 1, "step": 0, "global_step": "9"}}, "position.global_step is '9', not a whole number"),
        ({"config": None}, "config is None, not a mapping"),
        ({"optimizer_states": [1]}, "optimizer_states.0 is 1, not a mapping"),
    ],
)
def test_one_of_another_shape_is_told_and_not_continued(folder, change, told, capsys):
    torch.save(state(3) | change, folder / "last.ckpt")
    assert checkpoint.resumable(folder)[0] == folder / "previous.ckpt"
    assert f"last.ckpt was written by another program or version: {told}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda c: c["state_dict"].popitem(), r"last.ckpt: does not fit the network of config.yaml \(.*Missing key"),
        (lambda c: c["position"].update(global_step=99999), r"last.ckpt: step 0 of 4 in epoch 1 cannot be step 99999"),
        (lambda c: c["position"].update(epoch=7, global_step=28), r"last.ckpt: step 0 of 4 in epoch 7 cannot be"),
    ],
)
def test_one_that_cannot_be_this_runs_is_refused_by_name(run, tmp_path, change, told):
    run(tmp_path, "normalizer=batch", "recipe.epochs=1", "recipe.milestones=[]")
    (tmp_path / "results.json").unlink()
    path = tmp_path / "checkpoints" / "last.ckpt"
    content = checkpoint.read(path)
    change(content)
    torch.save(content, path)
    with pytest.raises(RunError, match=told):
        run(tmp_path, "normalizer=batch", "recipe.epochs=1", "recipe.milestones=[]")
