"""Flags anywhere on the line, and paths that mean themselves."""

import argparse

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from onlinenorm.cli.arguments import literal, parse, parse_options, parse_script, quoted
from onlinenorm.errors import ConfigError


def read(override):
    return OverridesParser.create().parse_override(override).value()


@given(st.text(alphabet=st.characters(exclude_characters="\0", exclude_categories=("Cs",))))
def test_quoted_texts_are_read_back(text):
    assert read(f"key={quoted(text)}") == text


@pytest.mark.parametrize("key", ["data.root", "run_dir", "+data.root", "++run_dir"])
@pytest.mark.parametrize(
    "path", ["~/imagenet", "/daten/übung", "/a=b", "/a[1]", "/a(b", "/a b", "/a,b", "2026", "/it's", "a\\", "glob(*)"]
)
def test_paths_mean_themselves(key, path):
    (override,) = literal([f"{key}={path}"])
    assert read(override) == path


def test_what_a_path_already_means_to_hydra_stays():
    given = [
        "run_dir=null",
        "data.root=",
        "data.root='/a b'",
        'data.root="/a=b"',
        "recipe.milestones=[1,2]",
        "~data.root",
    ]
    assert literal(given) == given


def test_several_paths_are_separated_by_commas_outside_quotes():
    assert literal(["data.root=/a=1,/b"], several=True) == ["data.root='/a=1','/b'"]
    assert literal(["data.root='/a,1',/b"], several=True) == ["data.root='/a,1','/b'"]
    assert literal(["data.root=choice('/a','/b')"], several=True) == ["data.root=choice('/a','/b')"]


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
def test_flags_are_found_at_any_position(flag):
    words = ["experiment=quickstart", "normalizer=batch,group", "seed=0,1"]
    for place in range(4):
        found = parse([*words[:place], flag, *words[place:]])
        assert found.overrides == words and found.multirun


def test_flags_with_a_value_keep_it():
    found = parse(["a=1", "--config-dir", "more", "--cfg=job", "b=2"])
    assert found.overrides == ["a=1", "b=2"] and found.config_dir == "more"
    assert found.flags == ["--config-dir", "more", "--cfg", "job"]
    with pytest.raises(ConfigError, match="--cfg -m: each asks for something else"):
        parse(["--cfg", "job", "a=1,2", "-m"])
    with pytest.raises(ConfigError, match="--cfg: needs a value"):
        parse(["--cfg"])
    with pytest.raises(ConfigError, match=r"^--config-dir: more and own are two, and one is read"):
        parse(["--config-dir", "more", "a=1", "-cd=own"])


@pytest.mark.parametrize(
    "words, meant",
    [
        (["--epochs", "10"], r"did you mean recipe.epochs=10\?"),
        (["--epochs=10"], r"did you mean recipe.epochs=10\?"),
        (["--learning-rate", "0.1"], r"did you mean recipe.lr=0.1\?"),
        (["--batch-size", "8"], r"did you mean recipe.batch_size=8\?"),
        (["--normalizer", "batch"], r"did you mean normalizer=batch\?"),
        (["--dataset", "imagenet"], r"did you mean data=imagenet\?"),
        (["--seed"], r"did you mean seed=VALUE\?"),
        (["--multi-run"], r"did you mean --multirun\?"),
        (["--zzz"], "settings are given as KEY=VALUE, as in recipe.epochs=10"),
    ],
)
def test_flags_that_do_not_exist_name_the_key_that_does(words, meant):
    with pytest.raises(ConfigError, match=rf"^{words[0].partition('=')[0]}: no such flag; .*{meant}"):
        parse(words)


def test_scripts_take_flags_among_overrides():
    parser = argparse.ArgumentParser()
    parser.add_argument("overrides", nargs="+")
    parser.add_argument("--parallel", type=int, default=1)
    options = parse_script(parser, ["a=1", "--parallel", "2", "b=2"])
    assert options.overrides == ["a=1", "b=2"] and options.parallel == 2
    with pytest.raises(ConfigError, match=r"--epochs: no such flag.*recipe.epochs="):
        parse_script(parser, ["a=1", "--epochs", "10"])
    parser.add_argument("--config-dir", action="append")
    assert parse_script(parser, ["a=1", "--config-dir", "own"]).config_dir == "own"
    assert parse_script(parser, ["a=1"]).config_dir is None
    with pytest.raises(ConfigError, match=r"^--config-dir: more and own are two"):
        parse_script(parser, ["a=1", "--config-dir", "more", "--config-dir=own"])


@pytest.mark.parametrize(
    "words", [["--bogus"], ["--bogus=1", "runs"], ["--outputs", "x"], ["runs", "--output", "x", "--bogus"]]
)
def test_an_option_that_does_not_exist_is_told_before_an_argument_that_is_missing(words, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("runs")
    parser.add_argument("--output")
    with pytest.raises(SystemExit):
        parse_options(parser, words)
    name = next(word for word in words if word.startswith(("--b", "--outputs"))).partition("=")[0]
    meant = "; did you mean --output?" * (name == "--outputs")
    assert capsys.readouterr().err.endswith(f"error: {name}: no such option{meant}\n")
    assert parse_options(parser, ["--out=x", "--", "--bogus"]).runs == "--bogus"
    with pytest.raises(SystemExit):
        parse_options(parser, [])
    assert "arguments are required: runs" in capsys.readouterr().err
    sweep = argparse.ArgumentParser()
    sweep.add_argument("overrides", nargs="+")
    with pytest.raises(ConfigError, match=r"^--epochs: no such flag.*recipe.epochs=10"):
        parse_script(sweep, ["--epochs", "10"])
