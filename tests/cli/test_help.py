"""The page of --help: every key with its value and meaning, without torch."""

import subprocess
import sys

import pytest

from onlinenorm.arguments import flatten
from onlinenorm.cli import help
from onlinenorm.cli.compose import load_config
from onlinenorm.cli.files import CONFIGS, GROUPS, group_files
from onlinenorm.errors import ConfigError


@pytest.mark.parametrize(
    "overrides, groups",
    [
        (["experiment=quickstart"], GROUPS),
        (["normalizer=batch", "data=synthetic"], ("normalizer", "data")),
        (["recipe.epochs=3"], ("recipe",)),
    ],
)
def test_every_key_has_its_value_and_a_meaning(overrides, groups):
    lines = help.render(overrides, width=120)
    page = " ".join(lines.split())
    for key, value in flatten(load_config(overrides)).items():
        group = key.partition(".")[0]
        if group in ("choices", *GROUPS) and group not in groups:
            assert f"\n  {key}=" not in lines
        elif group != "choices" and not key.rpartition(".")[2].startswith("_"):
            assert f" {key}=" in page, key
            shown = page.partition(f" {key}=")[2]
            if isinstance(value, int) and not isinstance(value, bool) and key != "recipe.epochs":
                assert shown.split()[0] == str(value), key
    for group in groups:
        for name in group_files(group):
            assert f" {name} " in page


@pytest.mark.parametrize("overrides", [[], ["seed=3"]])
def test_without_a_group_it_is_a_page_that_fits_on_a_screen(overrides):
    page = help.render(overrides, width=120)
    assert len(page.splitlines()) < 66 and max(map(len, page.splitlines())) <= 120
    for group in GROUPS:
        names = page.partition(f"  {group}=")[2].split()
        assert set(group_files(group)) <= set(names)
    assert page.partition("  normalizer=")[2].split()[0] == "online_clamp", "the default first"
    values = flatten(load_config([]))
    for key in help.MOST_USED:
        shown, *meaning = page.partition(f"  {key}=")[2].splitlines()[0].split(maxsplit=1)
        assert shown == {None: "null"}.get(values[key], str(values[key])) and meaning
    commands = [line.strip() for line in page.partition("For example")[2].split("\n\n")[0].splitlines() if line.strip()]
    assert len(commands) > 4
    for command in commands:  # every key and choice in them is there
        overrides = [word for word in command.split("    ")[0].split() if "=" in word]
        assert load_config(overrides)


def test_a_choice_that_there_is_not_is_told():
    with pytest.raises(
        ConfigError, match="normalizer: 'bacth' is not one of its options; did you mean normalizer=batch"
    ):
        help.render(["normalizer=bacth"])


@pytest.mark.parametrize("defaults", ["defaults:\n  - online_none\n  - _self_", "defaults: [online_none, _self_]"])
def test_what_a_file_inherits_is_told_too(tmp_path, defaults):
    own = tmp_path / "normalizer" / "own.yaml"
    own.parent.mkdir()
    own.write_text(f"{defaults}\n\nclamp_value: 3.0 # mine\n")
    found = help.settings(own)
    assert found["clamp_value"] == help.Setting("3.0", "mine") and found["error_compensation"].value == "none"
    assert found.keys() == help.settings(CONFIGS / "normalizer" / "online_clamp.yaml").keys()
    config = load_config(["normalizer=own"], str(tmp_path))["normalizer"]
    assert config["_target_"].endswith("OnlineNorm2d") and config["clamp_value"] == 3


def test_what_is_ones_own_is_told_too(tmp_path):
    """The folder of --config-dir, with an experiment that chooses from it and a file that builds on one of ours."""
    for name, text in {
        "normalizer/own.yaml": "# Of my own.\ndefaults: [batch, _self_]\nmomentum: 0.5 # mine\n",
        "data/own.yaml": "defaults:\n  - base/images@_here_ # of all\n  - _self_\n_target_: mine.Own\n",
        "experiment/own.yaml": "# @package _global_\ndefaults:\n  - override /normalizer: own\nseed: 3\n",
    }.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    assert "own" in help.render([], 120, str(tmp_path)).partition("  normalizer=")[2].splitlines()[0]
    page = help.render(["experiment=own", "data=own"], 120, str(tmp_path))
    assert "normalizer=own    of:" in page and "Of my own" in page and "experiment=own " in page
    own = page.partition("  of other choices:")[0]
    assert "normalizer.momentum=0.5" in own and "mine" in own
    assert "  data.limit_train=" in page.partition("\ndata=own    of:")[2].partition("  of other choices:")[0]


def test_each_setting_is_commented():
    for group in GROUPS[:-1]:
        files = group_files(group)
        assert files
        for file in files.values():
            assert help.about(file), file
        keys = [(file, key) for file in files.values() for key in help.settings(file)]
        assert keys or group == "logger"  # whose csv has none
        for file, key in keys:
            assert help.meaning(key, files), f"{file}: {key} says nothing of itself"


@pytest.mark.parametrize(
    "script, words, says",
    [
        ("train.py", ["normalizer=batch"], ["normalizer.momentum=0.1", "0 < momentum <= 1"]),
        ("scripts/sweep.py", [], ["--parallel N"]),
    ],
)
def test_help_loads_neither_torch_nor_lightning(root, script, words, says):
    program = (
        f"import sys; sys.argv = {[script, *words, '--help']!r}; import contextlib, runpy;\n"
        f"with contextlib.suppress(SystemExit): runpy.run_path({str(root / script)!r}, run_name='__main__')\n"
        "assert not {'torch', 'pytorch_lightning'} & set(sys.modules), 'too slow for a page of text'"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert all(text in done.stdout for text in says)
