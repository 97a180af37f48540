"""scripts/sweep.py: which runs a sweep has, and the folder of each."""

import pytest
from distributed_runs import TINY
from tests_training import load_train_module

from onlinenorm.errors import ConfigError
from scripts import sweep


def test_folders_are_a_function_of_the_overrides(tmp_path):
    rows = sweep.plan([*TINY, "normalizer=batch", "seed=range(2)", "recipe.lr=0.1,0.2"], tmp_path)
    assert len(rows) == 4 == len({row.folder for row in rows})
    assert rows[0].folder == tmp_path / "default" / "recipe.lr=0.1" / "batch" / "seed0"
    (row,) = sweep.plan([*TINY, "normalizer=batch", "recipe.lr=0.1"], tmp_path)
    assert row.folder == tmp_path / "default" / "batch" / "seed0", "the folder of the same train.py command"


def test_a_key_given_twice_names_its_folder_by_the_last(tmp_path):
    rows = sweep.plan([*TINY, "normalizer=batch", "recipe.milestones=[]", "recipe.milestones=[],[1]"], tmp_path)
    assert [row.folder.parts[-3] for row in rows] == ["recipe.milestones=[]", "recipe.milestones=[1]"]


def test_a_key_of_a_guard_counts_where_it_guards(tmp_path):
    assert len(sweep.plan([*TINY, "normalizer=online_clamp", "normalizer.clamp_value=1,5"], tmp_path)) == 2
    scaled = ["normalizer=online_layer_scaling", "normalizer.layer_scaling_eps=1e-5,1e-4"]
    assert len(sweep.plan([*TINY, *scaled], tmp_path)) == 2


@pytest.mark.parametrize("name", ["runs", "it's {odd}, this"])
def test_folders_of_swept_keys_reach_the_run(tmp_path, name):
    row = sweep.plan([*TINY, "normalizer=batch", "recipe.lr=0.1,0.2"], tmp_path / name)[0]
    assert load_train_module().load_config(row.command(row.folder))["run_dir"] == str(row.folder)


@pytest.mark.parametrize("folder", ["~x", "a=b", "a[1](c", "it's", "a b,c", "übung"])
def test_any_folder_of_runs_reaches_the_run(tmp_path, folder):
    row = sweep.plan([*TINY, "normalizer=batch", "normalizer.momentum=0.1,0.2"], tmp_path / folder)[1]
    assert load_train_module().load_config(row.command(row.folder))["run_dir"] == str(row.folder)


@pytest.mark.parametrize("sweep_of", ["recipe.lr=interval(0,1)", "recipe.lr=glob(*)", "seed='1,2", "seed=choice()"])
def test_sweeps_that_mean_nothing_get_a_sentence(tmp_path, sweep_of):
    with pytest.raises(ConfigError):
        sweep.plan([*TINY, sweep_of], tmp_path)
    (row,) = sweep.plan([*TINY, "normalizer=glob(*scal*)"], tmp_path)
    assert row.normalizer == "online_layer_scaling"
