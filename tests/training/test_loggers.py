"""The mirrors hold the same curves as metrics.csv."""

import csv
import json
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from onlinenorm.training.epoch_log import COLUMNS
from onlinenorm.training.loggers import has_wandb_key

TWO_EPOCHS = ("normalizer=batch", "recipe.epochs=2", "recipe.milestones=[]")


def table(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def wandb_history(folder):
    """Rows of history records of a run's offline files, by wandb's own reader."""
    rows = []
    for file in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        out = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL).stdout
        for line in out.splitlines():
            record = json.loads(line)
            if record["type"] == "history":
                rows.append(record)
    return rows


def test_offline_wandb_run_equals_the_csv(run, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    run(tmp_path, *TWO_EPOCHS, "logger=wandb")
    rows = [{key: row["history"]["item"][key] for key in COLUMNS} for row in wandb_history(tmp_path)]
    assert rows == table(tmp_path) and len(rows) == 2
    assert (tmp_path / "wandb_id").read_text() in next((tmp_path / "wandb").glob("offline-run-*")).name


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
