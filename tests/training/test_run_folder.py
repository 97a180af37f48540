"""The run folder's records, its lock, and what may change from one start to the next."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests_training import RESULTS

from onlinenorm.cli.compose import load_config
from onlinenorm.errors import ConfigError, Interrupted, RunError
from onlinenorm.records import ADDED, run_path
from onlinenorm.training.fast_path import adopt
from onlinenorm.training.run_folder import RunFolder, changed_keys

CONFIG = {"recipe": {"lr": 0.1}, "trainer": {"devices": 1, "precision": "32-true"}, "logger": {"_target_": "x"}}


def test_changed_keys_names_what_counts():
    new = {"recipe": {"lr": 0.2}, "trainer": {"devices": 8, "precision": "bf16-mixed"}, "logger": {}, "seed": 1}
    assert changed_keys(CONFIG, new) == [
        "recipe.lr: 0.1 -> 0.2",
        "seed: absent -> 1",
        "trainer.precision: 32-true -> bf16-mixed",
    ]
    assert changed_keys({"data": {"root": "a", "roots": "a"}}, {"data": {"root": "b", "roots": "b"}}) == [
        "data.roots: a -> b"
    ]


def test_keys_that_older_runs_lack_are_as_they_then_were():
    new = {**CONFIG, "recipe": {"lr": 0.1, "warmup_epochs": 0, "label_smoothing": 0.0}}
    assert changed_keys(CONFIG, new) == changed_keys(new, CONFIG) == []
    new["recipe"]["warmup_epochs"] = 5
    assert changed_keys(CONFIG, new) == ["recipe.warmup_epochs: 0 -> 5"]


@pytest.mark.parametrize("group, keys", ADDED.items())
def test_a_run_of_before_a_key_is_that_of_its_default(group, keys):
    """And what is left to the run by auto is as the run has it."""
    config = load_config(["experiment=table1"])
    config["trainer"] |= {"accelerator": "cpu"}
    old = config | {group: {key: value for key, value in config[group].items() if key not in keys}}
    assert old[group] != config[group] and changed_keys(old, adopt(config, old)) == []


def test_a_changed_configuration_is_refused_only_where_there_is_progress(tmp_path):
    folder = RunFolder(tmp_path)
    folder.record_start(CONFIG, 1, None)
    changed = {**CONFIG, "recipe": {"lr": 0.2}}
    folder.check_config(changed)
    folder.checkpoints.mkdir()
    (folder.checkpoints / "last.ckpt").write_bytes(b"x")
    folder.check_config({**CONFIG, "trainer": {"devices": 4, "precision": "32-true"}})
    with pytest.raises(ConfigError, match=r"(?s)another configuration:\n  recipe.lr: 0.1 -> 0.2\n.*run_dir=.*delete"):
        folder.check_config(changed)


def test_two_runs_at_once_are_refused_and_a_dead_one_leaves_no_lock(tmp_path):
    hold = (
        "import fcntl, sys\n"
        f"file = open({str(tmp_path / '.lock')!r}, 'a+'); fcntl.lockf(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match="another run is writing to this folder"), RunFolder(tmp_path).lock():
            pass
        other.kill()
        other.wait()
    with RunFolder(tmp_path).lock():
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL])
def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, capsys, number):
    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with RunFolder(tmp_path).lock():
        assert not RunFolder(tmp_path).is_locked(), "which nobody can know there"
    assert f"the file system of {tmp_path} has no locks" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to_or_read_is_told(tmp_path, monkeypatch):
    def refuse(path, *arguments):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(RunError, match=r"^run_dir: .* cannot be written to \(Permission denied\)"):
        RunFolder(tmp_path).lock().__enter__()
    assert not RunFolder(tmp_path).is_locked()


def test_what_ended_a_run_is_left_in_a_file_until_it_is_started_again(tmp_path):
    folder, failed = RunFolder(tmp_path / "run"), tmp_path / "run" / "failed.txt"
    with pytest.raises(ZeroDivisionError), folder.lock():
        1 / 0  # noqa: B018
    assert failed.read_text() == "ZeroDivisionError: division by zero\n"
    with pytest.raises(Interrupted), folder.lock():
        assert not failed.exists()
        raise Interrupted("SIGTERM: saved", 15)
    assert not failed.exists()
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path / "run", rank_zero=False).lock():
        1 / 0  # noqa: B018
    assert not failed.exists()


def test_a_full_disk_does_not_hide_what_ended_a_run(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onlinenorm.files.os.fsync", full)
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path).lock():
        1 / 0  # noqa: B018
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_starts_are_counted(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.record_start(CONFIG, 1, None) == 0
    assert folder.record_start(CONFIG, 2, {"epoch": 1, "step": 0, "global_step": 9}) == 1
    written = json.loads((tmp_path / "environment.json").read_text())
    assert written["world_size"] == 2 and [start["world_size"] for start in written["starts"]] == [1, 2]
    assert folder.record_start(CONFIG, 1, None) == 0, "a run that starts over has not been resumed"


def test_a_file_in_place_of_the_folder_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^run_dir: .*file is a file, not a folder"):
        RunFolder(tmp_path / "file").check_config({})
    (tmp_path / "link").symlink_to("nowhere")
    for path, told in (("link", "is a link to .*nowhere, which does not exist"), ("x" * 300, "File name too long")):
        with pytest.raises(ConfigError, match=rf"^run_dir: .*{told}"):
            RunFolder(tmp_path / path).check_config({})
    with pytest.raises(RunError, match=r"^run_dir: .*cannot be made"), RunFolder(tmp_path / "file" / "below").lock():
        pass


def test_how_unreadable_images_are_met_may_change():
    old = {"data": {"on_unreadable": "raise", "unreadable_limit": 0.0, "limit_val": 1}}
    assert changed_keys(old, {"data": {"on_unreadable": "skip", "unreadable_limit": 0.1, "limit_val": 1}}) == []


DAMAGED = ["", '{"a": 1', "[1]", "\x00", "[" * 100_000]


@pytest.mark.parametrize(
    "name, content, told",
    [
        *((name, content, r"is damaged \(") for name in ("results.json", "config.yaml", "environment.json")
          for content in DAMAGED),
        ("config.yaml", None, "is missing"),
        ("results.json", "{}", r"is damaged \(schema is None"),
        ("results.json", '{"schema": 1}', r"is damaged \(experiment is missing"),
        ("results.json", RESULTS | {"clamping": {}}, r".*clamping.with.val_loss is missing"),
        ("results.json", RESULTS | {"epochs": 10**400}, r".*epochs is .*, outside"),
        ("results.json", RESULTS | {"attempts": [{"folder": "a", "epochs": "x", "failure": None}]},
         r".*attempts.0.epochs is 'x', not a whole number"),
        ("environment.json", '{"starts": null}', r".*starts is None, not a list"),
        ("environment.json", '{"own_code": [1]}', r".*own_code is \[1\], not a mapping"),
        ("environment.json", '{"own_code": 3}', r".*own_code is 3, not a mapping"),
    ],
)  # fmt: skip
def test_damaged_records_are_told_with_what_to_do(tmp_path, name, content, told):
    folder = RunFolder(tmp_path)
    for file, whole in (("config.yaml", CONFIG), ("results.json", RESULTS), ("environment.json", {})):
        (tmp_path / file).write_text(json.dumps(whole))
    assert folder.results(CONFIG) == RESULTS
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    cure = "put it back, or delete the folder" if name == "config.yaml" else "delete it, and the same command"
    with pytest.raises(RunError, match=rf"(?s)/{name}: {told}.*{cure}"):
        folder.results(CONFIG)
    if name == "environment.json":
        (tmp_path / "attempts" / "1").mkdir(parents=True)
        (tmp_path / name).rename(tmp_path / "attempts" / "1" / name)
        with pytest.raises(RunError, match=rf"(?s)attempts/1/{name}: {told}.*{cure}"), folder.lock():
            pytest.fail("a run would train before it is told")


def test_a_file_in_place_of_checkpoints_is_told_before_training(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(ConfigError, match=r"^run_dir: .*/checkpoints is a file, not a folder"):
        RunFolder(tmp_path).check_config(CONFIG)


def test_the_folder_of_a_run(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = {"choices": {"experiment": "table1", "normalizer": "batch"}, "seed": 3, "run_dir": None}
    assert run_path(config) == Path("runs/table1/batch/seed3")
    assert run_path(config | {"run_dir": "~/a=b"}) == Path("/home/me/a=b")
    assert run_path(config | {"run_dir": 2026}) == Path("2026")
