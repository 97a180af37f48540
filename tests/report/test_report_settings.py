import json

import pytest
import yaml
from run_folders import write_run

from onlinenorm.cli.compose import load_config
from onlinenorm.errors import ReportError
from onlinenorm.report.mixtures import check_joins, check_one_point, check_one_table
from onlinenorm.report.runs import load_runs
from onlinenorm.report.settings import departures, same


def departing(runs, spec):
    return list(departures(zip(runs["normalizer"], runs["config"], strict=True), spec.published_setting).itertuples())


def test_rows_of_one_study_share_a_table(tmp_path):
    for normalizer in ("online_clamp", "online_layer_scaling", "batch"):
        for seed in range(2):
            write_run(tmp_path, normalizer, seed)
    write_run(tmp_path, "group", done=2)
    check_one_table(load_runs(tmp_path).runs)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"scale": "fashion_mnist"}, ["scale: 'embedded' (a/batch/seed0) | 'fashion_mnist' (b/online_clamp/seed1)"]),
        ({"epochs": 7}, ["recipe.epochs: 5 (a/batch/seed0) | 7 (b/online_clamp/seed1)"]),
        ({"recipe": {"batch_size": 128}}, ["recipe.batch_size: 32 (", "128 (b/online_clamp/seed1)"]),
        ({"model": "cifar_resnet20"}, ["model._target_", "cifar_resnet8", "cifar_resnet20"]),
        ({"epochs": 9, "done": 2}, ["recipe.epochs", "9 (b/online_clamp/seed1)"]),
    ],
)
def test_a_mixture_is_refused_with_what_differs_and_where(tmp_path, other, named):
    write_run(tmp_path / "a", "batch")
    write_run(tmp_path / "b", "online_clamp", 1, **other)
    with pytest.raises(ReportError, match="differ in what all rows of one table must share") as caught:
        check_one_table(load_runs(tmp_path).runs)
    for part in named:
        assert part in str(caught.value)


def test_one_row_with_two_clamp_values_is_refused(tmp_path):
    write_run(tmp_path, "online_clamp", 0)
    write_run(tmp_path, "online_clamp", 1, normalizer_config={"_target_": "x", "clamp_value": 3.0})
    with pytest.raises(ReportError, match=r"the row of online_clamp[\s\S]*normalizer.clamp_value"):
        check_one_table(load_runs(tmp_path).runs)


def test_edited_code_of_ones_own_is_another_setting(tmp_path):
    for group in ("normalizer", "data"):
        for seed, digest in enumerate(("aa", "bb")):
            write_run(tmp_path / group, "mine", seed, environment={"own_code": {group: {"my_norms": digest}}})
        with pytest.raises(ReportError, match=rf"own_code.{group}.my_norms: 'aa' .* 'bb'"):
            check_one_table(load_runs(tmp_path / group).runs)


def test_values_are_told_as_they_would_be_given(tmp_path):
    for normalizer, limit, digest in (("batch", None, "a" * 64), ("group", 1500, "b" * 64)):
        file = write_run(tmp_path, normalizer, data={"limit_train": limit}) / "results.json"
        results = json.loads(file.read_text())
        results["dataset"]["fingerprint"] = digest
        file.write_text(json.dumps(results))
    with pytest.raises(ReportError) as caught:
        check_one_table(load_runs(tmp_path).runs)
    assert "data.limit_train: null (batch/seed0) | 1500 (group/seed0)" in str(caught.value)
    assert "dataset.fingerprint: aaaaaaaaaaaa... (batch/seed0) | bbbbbbbbbbbb... (group/seed0)" in str(caught.value)


def in_folder(run, name, fingerprint):
    """A run of images in a folder of that name."""
    file = run / "results.json"
    results = json.loads(file.read_text())
    results["dataset"] |= {"name": name, "fingerprint": fingerprint}
    file.write_text(json.dumps(results))


def test_images_of_one_fingerprint_are_one_set_whatever_their_folder_is_called(tmp_path):
    for seed, name in enumerate(("photos", "moved", "shards")):
        in_folder(write_run(tmp_path, "batch", seed), name, "a" * 64)
    check_one_table(load_runs(tmp_path).runs)
    check_one_point(load_runs(tmp_path).runs, "a point")
    in_folder(write_run(tmp_path, "batch", 3), "photos", "b" * 64)
    with pytest.raises(ReportError, match=r"--without batch/seed3, or") as caught:
        check_one_table(load_runs(tmp_path).runs)
    assert "dataset.name" not in str(caught.value)
    in_folder(tmp_path / "batch" / "seed3", "cats", "b" * 64)
    with pytest.raises(ReportError, match=r"dataset.name: 'photos' \(.*\) \| 'cats' \(batch/seed3\)"):
        check_one_table(load_runs(tmp_path).runs)


def test_a_run_to_come_is_held_against_those_that_are_there(tmp_path):
    config = load_config(["experiment=quickstart"])
    for name, limit in (("batch", None), ("moving_rms", 1500)):
        folder = tmp_path / name / "seed0"
        folder.mkdir(parents=True)
        recorded = {**config, "data": {**config["data"], "limit_train": limit}, "trainer": {"precision": "32-true"}}
        (folder / "config.yaml").write_text(yaml.safe_dump(recorded))
        (folder / "environment.json").write_text("{}")
    with pytest.raises(ReportError, match=r"^moving_rms/seed0: of other settings") as caught:
        check_joins(load_runs(tmp_path).runs, config)
    assert "data.limit_train: null (this command) | 1500 (moving_rms/seed0)" in str(caught.value)
    check_joins(load_runs(tmp_path, ["moving_rms"]).runs, config)


def test_a_seed_counts_once(tmp_path):
    for part in ("a", "b"):
        write_run(tmp_path / part, "batch", 4)
    with pytest.raises(ReportError, match="a/batch/seed4 and b/batch/seed4 are both seed 4 of batch"):
        check_one_table(load_runs(tmp_path).runs)


def test_the_published_setting_has_no_departures(tmp_path, spec):
    for normalizer in ("online_clamp", "online_layer_scaling", "batch"):
        write_run(
            tmp_path,
            normalizer,
            scale="imagenet",
            model="resnet50",
            epochs=100,
            recipe={"milestones": [30, 60, 80, 90]},
        )
    assert departing(load_runs(tmp_path).runs, spec) == []


def test_departures_name_setting_values_and_rows(tmp_path, spec):
    write_run(tmp_path, "online_clamp", normalizer_config={"alpha_fwd": 0.99, "alpha_bkw": 0.99, "clamp_value": 3})
    write_run(tmp_path, "batch")
    found = {d.name: d for d in departing(load_runs(tmp_path).runs, spec)}
    assert (found["network"].published, found["network"].actual) == (
        "onlinenorm.models.resnet50",
        "onlinenorm.models.cifar_resnet8",
    )
    assert found["epochs"].actual == 5 and found["epochs"].normalizers == []
    assert (found["clamp value"].actual, found["clamp value"].normalizers) == (3, ["online_clamp"])
    assert found["stride of a bottleneck"].actual == "not set"
    assert {"alpha_bkw", "precision", "global batch size"}.isdisjoint(found)


def test_reference_configs_are_the_published_setting(spec):
    """What the committed configs say for the table's run is what published.yaml says was published."""
    for normalizer in ("online_clamp", "online_layer_scaling", "batch"):
        config = load_config(["experiment=table1", f"normalizer={normalizer}"])
        entries = [
            entry
            for entry in spec.published_setting
            if entry.key != ["trainer.precision"] and not (entry.only and normalizer not in entry.only)
        ]
        assert len(entries) > 5
        for entry in entries:
            group, key = entry.key[0].split(".", 1)
            assert same(config[group][key], entry.value), f"{normalizer}: {entry.name}"


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_s_experiments_are_what_was_published_there(spec, name):
    spec = spec.published_on(name)
    rows = [row for row, known in {**spec.rows, **spec.further_rows}.items() if known.published]
    assert {"online_layer_scaling", "batch"} <= set(rows) and "online_clamp" not in rows
    configs = [(row, load_config([f"experiment={name}", f"normalizer={row}"])) for row in rows]
    assert departures(configs, spec.published_setting)["name"].tolist() == ["precision"]  # bfloat16, listed only
    changed = spec.elsewhere[name].setting
    known = {entry.key[0] for entry in spec.published_setting} | {
        key for key, value in changed.items() if value is None
    }
    assert set(changed) <= known


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        (5, 5.0, True),
        (0.1, 0.1 + 1e-17, True),
        ([1, 2.0], (1, 2), True),
        ([1], [1, 2], False),
        (True, 1, False),
        ("a", "a", True),
    ],
)
def test_same(a, b, equal):
    assert same(a, b) == equal
