"""Where runs lie, and what ended them."""

from dataclasses import asdict
from pathlib import Path

import pytest

from onlinenorm.errors import Diverged, RunError
from onlinenorm.records import Failure, read_failure, run_path

CONFIG = {"choices": {"experiment": "table1", "normalizer": "batch"}, "run_dir": None, "seed": 3}


def test_a_runs_folder_follows_from_its_configuration():
    assert run_path(CONFIG) == Path("runs/table1/batch/seed3")
    assert run_path(CONFIG, "/elsewhere", ["recipe.lr=0.1"]) == Path("/elsewhere/table1/recipe.lr=0.1/batch/seed3")
    assert run_path({**CONFIG, "run_dir": 2026}, "/elsewhere") == Path("2026")
    assert run_path({**CONFIG, "run_dir": "~/run"}) == Path.home() / "run"


def test_an_error_says_of_what_kind_it_was():
    assert Failure.of(Diverged("the loss is\nno number", 41, 2)) == Failure("diverged", 41, 2, "the loss is")
    assert Failure.of(RunError("No space left")) == Failure("failed", message="No space left")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("exit code 1\nRunError: the loss became NaN or infinite at step 41 (epoch 2, learning", ("diverged", 41, 2)),
        ("a weight or statistic of the network became NaN or infinite at step 7", ("diverged", 7, None)),
        ("exit code 137\nepoch 3/3  train loss nan", ("failed", None, None)),
        ("", ("failed", None, None)),
    ],
)
def test_a_text_from_before_the_record_is_read(tmp_path, text, expected):
    assert read_failure(tmp_path) is None
    (tmp_path / "failed.txt").write_text(text)
    failure = read_failure(tmp_path)
    assert failure is not None and (failure.kind, failure.step, failure.epoch) == expected
    assert failure.message == text.rpartition("\n")[2]


def test_recorded_failures_are_those_of_runs_that_diverged(root):
    texts = sorted((root / "results" / "study").rglob("failed.txt"))
    assert len(texts) >= 4
    assert {asdict(read_failure(text.parent))["kind"] for text in texts} == {"diverged"}


@pytest.mark.parametrize("content", ["{", "[]", '{"kind": "tired"}'])
def test_a_damaged_record_is_no_failure_of_its_own(tmp_path, content):
    (tmp_path / "failed.json").write_text(content)
    with pytest.raises(RunError, match=r"failed\.json: is damaged .*; delete it, and failed\.txt beside it counts"):
        read_failure(tmp_path)
