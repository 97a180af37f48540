"""How the processes of a run exchange statistics, as its output and results.json tell it."""

import contextlib
import io
import json

import process_groups
import pytest
from distributed_runs import THIRTY_STEPS, train

from onlinenorm.training.exchange import sentence

RUN = (*THIRTY_STEPS, "normalizer=online_clamp", "recipe.epochs=1", "recipe.milestones=[]")


def told(rank, folder, *overrides):
    """What a process prints, and what it records of the exchange."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        results = train(rank, folder, *RUN, *overrides)
    return output.getvalue(), results["exchange"]


@pytest.mark.parametrize(
    "overrides, reason",
    [
        ((), "exchange=gather"),
        (("normalizer.exchange=auto",), "backend=torch, which has no kernels for it"),
        (("normalizer.statistics=local",), ""),
    ],
)
def test_a_run_of_several_processes_says_why_it_gathers(overrides, reason, tmp_path):
    overrides = ("trainer.strategy=ddp", "trainer.devices=auto", *overrides)
    (output, found), (other_output, other) = process_groups.run(2, told, str(tmp_path), *overrides)
    assert found == other and "statistics of 2" not in other_output
    if not reason:
        assert found is None and "statistics of 2" not in output
        return
    assert found["by_kernels"] == 0 and found["gathered"] > 1 and found["reason"] == reason
    assert output.splitlines().count(f"  statistics of 2 processes gathered by collectives: {reason}") == 1, output
    assert json.loads((tmp_path / "results.json").read_text())["exchange"] == found
    (tmp_path / "results.json").unlink()  # a start that trains nothing tells of the one before
    assert [again for _, again in process_groups.run(2, told, str(tmp_path), *overrides)] == [found] * 2


def test_one_process_exchanges_nothing(tmp_path):
    ((output, found),) = process_groups.run(1, told, str(tmp_path))
    assert found is None and "statistics of" not in output


@pytest.mark.parametrize(
    "by_kernels, gathered, expected",
    [
        (2, 0, "statistics of 8 processes exchanged by the kernels of 2 layers, in symmetric memory"),
        (
            1, 3,
            "statistics of 8 processes exchanged by the kernels of 1 layer, in symmetric memory; gathered by "
            "collectives for 3: two machines",
        ),
        (0, 3, "statistics of 8 processes gathered by collectives: two machines"),
    ],
)  # fmt: skip
def test_what_is_said(by_kernels, gathered, expected):
    reason = "two machines" if gathered else ""
    assert sentence(dict(processes=8, by_kernels=by_kernels, gathered=gathered, reason=reason)) == expected
