"""The mirrors hold the same curves as metrics.csv."""

import contextlib
import csv
import json
import os
import sys
from unittest.mock import MagicMock

import programs
import pytest
import wandb
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from onlinenorm.errors import Interrupted, RunError
from onlinenorm.training import loggers
from onlinenorm.training.epoch_log import COLUMNS
from onlinenorm.training.loggers import has_wandb_key, upload_hint

TWO_EPOCHS = ("normalizer=batch", "recipe.epochs=2", "recipe.milestones=[]")


def table(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def wandb_history(folder):
    """Rows of history records of a run's offline files, by wandb's own reader."""
    return records(folder, "history")


def test_offline_wandb_run_equals_the_csv(run, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    run(tmp_path, *TWO_EPOCHS, "logger=wandb")
    rows = [{key: row["history"]["item"][key] for key in COLUMNS} for row in wandb_history(tmp_path)]
    assert rows == table(tmp_path) and len(rows) == 2
    assert (tmp_path / "wandb_id").read_text() in next((tmp_path / "wandb").glob("offline-run-*")).name


def test_a_run_says_where_it_lies_offline_and_how_it_is_uploaded(tmp_path):
    assert upload_hint(tmp_path) == []
    for name, size in (("offline-run-0-x", 7), ("offline-run-1-x", 8)):  # the first holds no record
        (tmp_path / "a b" / "wandb" / name).mkdir(parents=True)
        (tmp_path / "a b" / "wandb" / name / "run-x.wandb").write_bytes(bytes(size))
    expected = f"W&B: kept offline; upload with: wandb sync '{tmp_path}/a b/wandb/offline-run-1-x'"
    assert upload_hint(tmp_path / "a b") == [expected]


def test_any_set_of_loggers_holds_epochs_steps_and_settings(offline, run, tmp_path, monkeypatch, capsys):
    """8 steps in two epochs; each has a loss of its own but the last of an epoch, of which the epoch's row tells."""
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    run(tmp_path, *TWO_EPOCHS, "logger=[tensorboard,wandb]", "trainer.log_every_n_steps=1")
    steps, epochs = [1, 2, 3, 5, 6, 7], [4, 8]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    history = [record["history"]["item"] for record in wandb_history(tmp_path)]
    assert [event.step for event in events.Scalars("val_loss")] == epochs
    for key, where in (("step_loss", steps), ("step_lr", steps), ("val_loss", epochs), ("lr", epochs)):
        logged = [(event.step, event.value) for event in events.Scalars(key)]
        assert [step for step, _ in logged] == where
        rows = [(row["trainer/global_step"], row[key]) for row in history if key in row]
        assert rows == [(step, pytest.approx(value, rel=1e-6)) for step, value in logged]
    assert set(events.PluginTagToContent("hparams")) >= {"_hparams_/session_start_info", "_hparams_/experiment"}
    content = str(events.PluginTagToContent("hparams")["_hparams_/session_start_info"])
    assert "recipe.batch_size" in content and "normalizer._target_" in content
    assert yaml.safe_load((tmp_path / "tensorboard" / "hparams.yaml").read_text())["recipe.batch_size"] == 16
    (lies,) = (tmp_path / "wandb").glob("offline-run-*")
    assert capsys.readouterr().out.splitlines()[-1] == f"W&B: kept offline; upload with: wandb sync {lies}"


def test_tensorboard_equals_the_csv(run, tmp_path):
    run(tmp_path, *TWO_EPOCHS, "logger=tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for key in ("val_loss", "val_top1", "train_loss"):
        logged = [event.value for event in events.Scalars(key)]
        assert logged == pytest.approx([row[key] for row in table(tmp_path)], rel=1e-6)


def test_a_key_is_found_in_the_environment_or_netrc_and_nobody_is_asked(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not has_wandb_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password key\n")
    (tmp_path / "netrc").chmod(0o600)
    assert has_wandb_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8080/path")
    assert not has_wandb_key()
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert has_wandb_key()


def records(folder, kind):
    """Records of a kind of a run's offline files, in the order in which they were ended: names tell seconds alone."""
    found = []
    files = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    for file in sorted(files, key=lambda file: file.stat().st_mtime_ns):
        done = programs.call("-m", "wandb", "leet", "inspect", "--json", file)
        assert done.returncode == 0, done.stderr
        found += [record for record in map(json.loads, done.stdout.splitlines()) if record["type"] == kind]
    return found


@pytest.fixture
def offline(monkeypatch):
    """No wandb variables of the machine's own."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "environment, mode, expected",
    [
        ({}, "auto", "offline"),
        ({"WANDB_API_KEY": "key"}, "auto", "online"),
        ({"WANDB_API_KEY": "key", "WANDB_MODE": "offline"}, "auto", "offline"),
        ({"WANDB_API_KEY": "key", "WANDB_MODE": "dryrun"}, "auto", "offline"),
        ({"WANDB_API_KEY": "key", "WANDB_MODE": "offline"}, "online", "online"),
        ({"WANDB_API_KEY": "key", "WANDB_MODE": "disabled"}, "auto", None),
        ({"WANDB_API_KEY": "key", "WANDB_DISABLED": "true"}, "auto", None),
        ({"WANDB_API_KEY": "key"}, "disabled", None),
    ],
)
def test_wandb_does_what_it_is_told(offline, monkeypatch, tmp_path, environment, mode, expected):
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    asked = []
    monkeypatch.setattr(wandb, "init", lambda **options: asked.append(options["mode"]) or MagicMock())
    loggers.wandb_logger(tmp_path, "name", {}, mode=mode)
    assert asked == ([expected] if expected else [])
    assert expected or not list(tmp_path.iterdir())


def test_a_server_that_does_not_answer(offline, monkeypatch, tmp_path, capsys):
    init, asked = wandb.init, []

    def unreachable(**options):
        asked.append((options["mode"], options["settings"]["init_timeout"]))
        if options["mode"] == "online":
            raise wandb.errors.CommError("no such host\nwhile retrying")
        return init(**options)

    monkeypatch.setattr(wandb, "init", unreachable)
    monkeypatch.setenv("WANDB_API_KEY", "key")
    with loggers.closing(loggers.wandb_logger(tmp_path, "name", {})):
        pass
    assert asked == [("online", loggers.ANSWER_SECONDS), ("offline", loggers.ANSWER_SECONDS)]
    said = f"Weights & Biases cannot be used (no such host); the run is kept offline in {tmp_path}/wandb\n"
    assert said in capsys.readouterr().err
    with pytest.raises(RunError, match=r"^logger.mode: online, .*\(no such host\)"):
        loggers.wandb_logger(tmp_path, "name", {}, mode="online")


@pytest.mark.parametrize(
    "error, code", [(None, 0), (RunError("NaN"), 1), (Interrupted("SIGTERM", 15), 143), (KeyError("bug"), 1)]
)
def test_wandb_is_told_how_the_run_ended(offline, tmp_path, error, code):
    with (
        contextlib.suppress(*([type(error)] if error else [])),
        loggers.closing(loggers.wandb_logger(tmp_path, "name", {}, mode="offline")),
    ):
        if error:
            raise error
    (end,) = records(tmp_path, "exit")
    assert end["exit"].get("exit_code", 0) == code
    assert bool(records(tmp_path, "preempting")) == (code == 143)


def test_steps_after_the_checkpoint_are_not_shown_twice_in_wandb(offline, tmp_path):
    identities = []
    for steps, resumed in (([1, 2, 3, 4], None), ([3, 4, 5], 2), ([1, 2], None)):  # the last: another attempt
        mirrors = loggers.wandb_logger(tmp_path, "name", {}, resumed, mode="offline")
        identities.append((tmp_path / "wandb_id").read_text())
        with loggers.closing(mirrors):
            for step in steps:
                mirrors[0].log_metrics({"loss": float(step)}, step=step)
    history = [record["history"]["item"] for record in wandb_history(tmp_path)]
    assert [row["trainer/global_step"] for row in history] == [row["_step"] for row in history] == [1, 2, 3, 4, 5, 1, 2]
    assert identities[0] == identities[1] != identities[2]


def test_steps_after_the_checkpoint_are_not_shown_twice_in_tensorboard(tmp_path):
    for steps, resumed in (([1, 2, 3, 4], None), ([3, 4, 5], 2)):  # killed after 4, where 2 was saved
        mirrors = loggers.tensorboard_logger(tmp_path, "name", {}, resumed)
        with loggers.closing(mirrors):
            for step in steps:
                mirrors[0].log_metrics({"loss": float(step)}, step=step)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [event.step for event in events] == [1, 2, 3, 4, 5]
    loggers.tensorboard_logger(tmp_path, "name", {})[0].finalize("failed")
    tags = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()["scalars"]
    assert tags == [] or EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss") == []


def killed_after(folder, steps, resumed=None):
    """Logs steps to wandb in a process, and kills it and wandb's own."""
    script = (
        "import os, signal; from pathlib import Path; from onlinenorm.training import loggers\n"
        f"(mirror,) = loggers.wandb_logger(Path({str(folder)!r}), 'name', {{}}, {resumed}, mode='offline')\n"
        f"for step in {steps}: mirror.log_metrics({{'loss': float(step)}}, step=step)\n"
        "os.killpg(0, signal.SIGKILL)"
    )
    alone = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}  # not this process's
    ended = programs.call("-c", script, environment=alone, alone=True)
    assert ended.returncode == -9, ended.stderr


def test_what_a_kill_takes_from_wandb_is_logged_by_the_next_start(offline, tmp_path):
    killed_after(tmp_path, [1, 2, 3])
    killed_after(tmp_path, [], 2)  # before it got far
    mirrors = loggers.wandb_logger(tmp_path, "name", {}, 2, mode="offline")
    with loggers.closing(mirrors):
        for step in (3, 4):
            mirrors[0].log_metrics({"loss": float(step)}, step=step)
    history = [record["history"]["item"] for record in wandb_history(tmp_path)]
    assert [(row["_step"], row["loss"]) for row in history] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert (tmp_path / "wandb_step").read_text() == "4\n"


@pytest.mark.parametrize("content", ["", "nonsense", "[7]"])
def test_a_damaged_wandb_step_counts_as_absent(offline, tmp_path, content):
    (tmp_path / "wandb_step").write_text(content)
    mirrors = loggers.wandb_logger(tmp_path, "name", {}, 2, mode="offline")
    with loggers.closing(mirrors):
        mirrors[0].log_metrics({"loss": 1.0}, step=3)
    assert [record["history"]["item"]["_step"] for record in wandb_history(tmp_path)] == [3]


@pytest.mark.parametrize("key", ["wandb", "tensorboard"])
def test_a_file_where_a_mirror_would_lie_is_told_in_a_sentence(offline, tmp_path, key):
    (tmp_path / key).write_text("")
    with pytest.raises(RunError, match=f"{tmp_path}/{key}: the curves of logger={key} cannot be written"):
        loggers.open_loggers(tmp_path, "name", {}, mode="offline", **{key: True})


@pytest.mark.parametrize("key", ["wandb", "tensorboard"])
def test_a_full_disk_is_told_in_a_sentence(offline, tmp_path, monkeypatch, key):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    mirrors = loggers.open_loggers(tmp_path, "name", {}, mode="offline", **{key: True})
    with (
        pytest.raises(RunError, match=f"logger={key} cannot be written there .No space left"),
        loggers.closing(mirrors),
    ):
        if key == "wandb":
            monkeypatch.setattr(loggers, "open", full, raising=False)
        else:
            monkeypatch.setattr(mirrors[0].experiment, "add_scalar", full)
            monkeypatch.setattr(mirrors[0].experiment, "flush", full)
        mirrors[0].log_metrics({"loss": 1.0}, step=1)


def test_a_package_that_is_not_installed_is_named(offline, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert loggers.wandb_logger(tmp_path, "name", {}, mode="disabled") == []
    with pytest.raises(RunError, match=r"^logger=wandb: the package wandb is not installed"):
        loggers.wandb_logger(tmp_path, "name", {}, mode="offline")

    def lacking(**_):
        raise ModuleNotFoundError("Neither `tensorboard` nor `tensorboardX` is available")

    monkeypatch.setattr(loggers, "TensorBoardBySteps", lacking)
    with pytest.raises(RunError, match=r"^logger=tensorboard: the package tensorboard is not installed"):
        loggers.tensorboard_logger(tmp_path, "name", {})
