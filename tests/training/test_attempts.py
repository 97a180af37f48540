"""Attempts at a run are kept when it is started again."""

import csv
import json

import pytest

from onlinenorm.errors import Diverged, Interrupted, RunError
from onlinenorm.training import ImageClassifier
from onlinenorm.training.attempts import former_attempts, keep_attempt
from onlinenorm.training.run_folder import RunFolder

CONFIG = {"recipe": {"lr": 0.1}}
METRICS = "epoch,val_loss\n1,0.5\n2,0.4\n"


def test_each_failed_attempt_is_kept_with_its_records(tmp_path):
    folder = RunFolder(tmp_path)
    for attempt in range(3):
        with pytest.raises(RunError), folder.lock():
            folder.record_start({"recipe": {"lr": attempt}}, 1, None)
            (tmp_path / "metrics.csv").write_text(METRICS[: 15 + 6 * attempt])
            raise Diverged(f"the loss became NaN or infinite at step {attempt}", attempt, 1)
    with folder.lock():
        folder.record_start({"recipe": {"lr": 3}}, 1, None)
    attempts = former_attempts(tmp_path)
    assert [a["failure"] for a in attempts] == [f"the loss became NaN or infinite at step {k}" for k in range(3)]
    assert [(a["kind"], a["step"], a["epoch"], a["epochs"]) for a in attempts] == [
        ("diverged", k, 1, k) for k in range(3)
    ]
    assert not any((tmp_path / name).exists() for name in ("failed.json", "failed.txt", "metrics.csv"))
    for k in range(3):
        kept = tmp_path / "attempts" / str(k + 1)
        assert (kept / "config.yaml").read_text() == f"recipe:\n  lr: {k}\n"
        assert json.loads((kept / "environment.json").read_text())["starts"]


@pytest.mark.parametrize(
    "error, count", [(RunError("No space left on device"), 0), (Diverged("the loss is not a number", 9, 2), 1)]
)
def test_a_failed_run_that_is_continued_is_another_attempt_only_where_it_diverged(tmp_path, error, count):
    folder = RunFolder(tmp_path)
    with pytest.raises(RunError), folder.lock():
        folder.record_start(CONFIG, 1, None)
        raise error
    with folder.lock():
        folder.record_start(CONFIG, 1, {"epoch": 1, "step": 0, "global_step": 9})
    assert len(former_attempts(tmp_path)) == count
    assert str(error) in (tmp_path / "attempts" / "1" / "failed.txt").read_text(), "its record is kept in any case"


def test_an_interrupted_run_is_one_attempt(tmp_path):
    folder = RunFolder(tmp_path)
    for resumed in (None, {"epoch": 1, "step": 0, "global_step": 9}):
        with pytest.raises(Interrupted), folder.lock():
            folder.record_start(CONFIG, 1, resumed)
            (tmp_path / "metrics.csv").write_text(METRICS)
            raise Interrupted("saved", 15)
    assert former_attempts(tmp_path) == [] and (tmp_path / "metrics.csv").exists()


def test_epochs_whose_checkpoints_were_removed_are_kept_as_an_attempt(tmp_path):
    folder = RunFolder(tmp_path)
    folder.record_start(CONFIG, 1, None)
    (tmp_path / "metrics.csv").write_text(METRICS)
    folder.record_start(CONFIG, 1, None)
    (attempt,) = former_attempts(tmp_path)
    assert (attempt["folder"], attempt["epochs"], attempt["kind"], attempt["failure"]) == (
        "attempts/1",
        2,
        "stopped",
        None,
    )
    folder.record_start(CONFIG, 1, None)
    assert len(former_attempts(tmp_path)) == 1, "a start without epochs has left nothing to keep"


def test_a_start_that_was_killed_while_it_kept_an_attempt_does_not_double_it(tmp_path):
    for name in ("failed.txt", "metrics.csv"):
        (tmp_path / name).write_text(METRICS)
    keep_attempt(tmp_path)
    kept = tmp_path / "attempts" / "1"
    (tmp_path / "failed.txt").write_text((kept / "failed.txt").read_text())
    (tmp_path / "metrics.csv").write_text((kept / "metrics.csv").read_text())
    keep_attempt(tmp_path)
    assert len(former_attempts(tmp_path)) == 1 and not (tmp_path / "failed.txt").exists()


@pytest.mark.parametrize(
    "text, kind", [("the loss became NaN or infinite at step 9 (epoch 2", "diverged"), ("x", "failed")]
)
def test_attempts_from_before_failed_json_count_alike(tmp_path, text, kind):
    (tmp_path / "failed.txt").write_text(f"exit code 1\n{text}")
    keep_attempt(tmp_path)
    (attempt,) = former_attempts(tmp_path)
    assert (attempt["kind"], attempt["failure"]) == (kind, text)


def test_a_damaged_record_is_one_of_a_failure(tmp_path):
    (tmp_path / "failed.json").write_text('{"kind": ')
    keep_attempt(tmp_path)
    (attempt,) = former_attempts(tmp_path)
    assert (attempt["kind"], attempt["failure"]) == ("failed", "failed.json is damaged")


def test_a_gap_in_the_numbers_and_names_that_are_none_are_passed_over(tmp_path):
    for name in ("2", "²", "٣", "1x"):
        (tmp_path / "attempts" / name).mkdir(parents=True)
    (tmp_path / "failed.txt").write_text("the loss became NaN\n")
    keep_attempt(tmp_path)
    assert [attempt["folder"] for attempt in former_attempts(tmp_path)] == ["attempts/2", "attempts/3"]


def test_a_full_disk_loses_no_attempt(tmp_path, monkeypatch):
    (tmp_path / "failed.txt").write_text("the loss became NaN\n")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onlinenorm.training.attempts.shutil.copy2", full)
    with pytest.raises(RunError, match=r"attempts: the former attempt could not be kept .*No space"):
        keep_attempt(tmp_path)
    assert (tmp_path / "failed.txt").exists() and former_attempts(tmp_path) == []


def test_a_run_that_diverged_first_says_so_when_it_is_done(run, tmp_path, monkeypatch, capsys):
    original = ImageClassifier.training_step
    with monkeypatch.context() as patch:
        patch.setattr(ImageClassifier, "training_step", lambda self, *batch: original(self, *batch) * float("nan"))
        with pytest.raises(RunError, match="NaN"):
            run(tmp_path)
    results = run(tmp_path)
    (attempt,) = results["attempts"]
    assert attempt["folder"] == "attempts/1" and "became NaN or infinite at step" in attempt["failure"]
    assert "attempt 2; what ended those before: " in capsys.readouterr().out
    with open(tmp_path / "metrics.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == results["epochs"]
    assert run(tmp_path) == results, "reprinted with its attempts"
