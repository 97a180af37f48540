"""How batches are divided is a part of a run's identity where the normalizer's statistics depend on it."""

import functools
import json

import pytest
import yaml
from tests_training import TINY, load_train_module

from onlinenorm.errors import ConfigError
from onlinenorm.training.checkpoint import resumable
from onlinenorm.training.divisions import statistics_seen
from onlinenorm.training.run_folder import RunFolder, changed_keys

PARTS, TWO = "trainer.accumulate_grad_batches=2", "trainer.devices=2"


@functools.cache
def configuration(*overrides):
    return load_train_module().load_config([*TINY, *overrides])


@pytest.mark.parametrize(
    "normalizer, before, after, named",
    [
        ("batch", (), (PARTS,), ["trainer.accumulate_grad_batches"]),
        ("batch", (), (TWO,), ["trainer.devices"]),
        ("batch", (), ("trainer.num_nodes=2",), ["trainer.num_nodes"]),
        ("batch", (TWO,), (TWO, "trainer.sync_batchnorm=true"), ["trainer.sync_batchnorm"]),
        ("batch", (TWO,), (PARTS,), ["trainer.accumulate_grad_batches", "trainer.devices"]),
        ("batch", (), ("trainer.sync_batchnorm=true",), []),
        ("batch", ("trainer.sync_batchnorm=true",), ("trainer.sync_batchnorm=true", TWO), []),
        ("batch", ("trainer.sync_batchnorm=true",), ("trainer.sync_batchnorm=true", PARTS), [PARTS.split("=")[0]]),
        ("batch", (TWO,), ("trainer.num_nodes=2",), []),
        ("online_clamp", (), (PARTS, TWO, "trainer.sync_batchnorm=true"), []),
        ("online_clamp", ("normalizer.statistics=local",), ("normalizer.statistics=local", PARTS), []),
        ("online_clamp", ("normalizer.statistics=local",), ("normalizer.statistics=local", TWO), ["trainer.devices"]),
        ("group", (), (PARTS, TWO), []),
        ("layer", (), (PARTS, TWO), []),
        ("instance", (), (PARTS, TWO), []),
        ("none", (), (PARTS, TWO), []),
    ],
)
def test_keys_that_divide_a_batch_are_named_where_they_matter(normalizer, before, after, named):
    old, new = (configuration(f"normalizer={normalizer}", *overrides) for overrides in (before, after))
    for first, second in ((old, new), (new, old)):
        assert [line.split(":")[0] for line in changed_keys(first, second)] == named


def test_the_trainer_of_a_sweep_is_compared_in_its_divisions_alone():
    """What else it resolves to is known on the machine that trains; "auto" devices cannot contradict."""
    old = configuration("normalizer=batch")
    new = configuration("normalizer=batch", "trainer.precision=64-true", "trainer.devices=auto")
    assert changed_keys(old, new, ("trainer",)) == []
    new = configuration("normalizer=batch", "trainer.precision=64-true", PARTS)
    (line,) = changed_keys(old, new, ("trainer",))
    assert line.startswith("trainer.accumulate_grad_batches: 1 -> 2 (")
    assert changed_keys(*(c | {"normalizer": configuration("normalizer=group")["normalizer"]} for c in (old, new)),
                        ("trainer",)) == []  # fmt: skip


def test_images_that_a_statistic_sees():
    batch = ("normalizer=batch", "recipe.batch_size=64")
    assert statistics_seen(configuration(*batch)) == {"images": 64, "processes": 1, "accumulation": 1}
    assert statistics_seen(configuration(*batch, TWO, PARTS)) == {"images": 16, "processes": 2, "accumulation": 2}
    assert statistics_seen(configuration(*batch, TWO, PARTS, "trainer.sync_batchnorm=true")) == {
        "images": 32,
        "accumulation": 2,
    }
    assert statistics_seen(configuration("normalizer=online_clamp", TWO, PARTS)) == {}
    local = statistics_seen(configuration("normalizer=online_clamp", "normalizer.statistics=local", TWO, PARTS))
    assert local == {"images": 8, "processes": 2}


def test_neither_a_finished_run_nor_its_checkpoint_serves_other_statistics(run, tmp_path):
    once = ("recipe.epochs=1", "recipe.milestones=[]")
    results = run(tmp_path / "batch", "normalizer=batch", *once)
    assert run(tmp_path / "batch", "normalizer=batch", *once) == results
    with pytest.raises(ConfigError, match=r"another configuration:\n  trainer.accumulate_grad_batches: 1 -> 8 \("):
        run(tmp_path / "batch", "normalizer=batch", *once, "trainer.accumulate_grad_batches=8")
    with pytest.raises(ConfigError, match=r"another configuration:\n  trainer.accumulate_grad_batches: 1 -> 2 \("):
        resumable(
            tmp_path / "batch" / "checkpoints", configuration("normalizer=batch", *once, PARTS, f"run_dir={tmp_path}")
        )
    seen = json.loads((tmp_path / "batch" / "environment.json").read_text())["statistics"]
    assert seen == {"images": 16, "processes": 1, "accumulation": 1}
    run(tmp_path / "group", "normalizer=group", *once)
    run(tmp_path / "group", "normalizer=group", *once, PARTS)
    assert json.loads((tmp_path / "group" / "environment.json").read_text())["statistics"] == {}


def test_a_sweep_does_not_call_other_statistics_done(tmp_path):
    folder = RunFolder(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(configuration("normalizer=batch")))
    (tmp_path / "results.json").write_text("{}")
    folder.check_config(configuration("normalizer=batch", "trainer=auto"), ignored=("trainer",))
    with pytest.raises(ConfigError, match=r"trainer\.accumulate_grad_batches: 1 -> 2"):
        folder.check_config(configuration("normalizer=batch", "trainer=auto", PARTS), ignored=("trainer",))
