"""What overrides mean, and the one sentence that those get which mean nothing."""

import hydra
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from onlinenorm.cli.compose import jobs, load_config
from onlinenorm.cli.files import CONFIGS
from onlinenorm.errors import ConfigError

MISTAKES = [
    (["model=resnet20"], r"^model: 'resnet20' is not one of its options; did you mean model=cifar_resnet20\?$"),
    (
        ["normalizer=batch", "normalizer.clamp_value=3"],
        "^normalizer.clamp_value: no such key of the normalizer chosen; it belongs to normalizer=online_clamp, ",
    ),
    (["data=embedded", "data.content_seed=3"], "it belongs to data=synthetic$"),
    (["optimizer=adam"], "^optimizer: no such group; the optimizer is SGD .*recipe.lr, recipe.momentum"),
    (["optimizer.lr=3"], "^optimizer.lr: no such key; the optimizer is SGD"),
    (["recipe.optimizer=adam"], "^recipe.optimizer: no such key; the optimizer is SGD with momentum, of recipe.lr"),
    (["recipe.learning_rate=3"], r"^recipe.learning_rate: no such key; did you mean recipe.lr\?$"),
    (["recipe.workers=3"], r"^recipe.workers: no such key; did you mean data.num_workers\?$"),
    (["epochs=3"], r"^epochs: no such key; did you mean recipe.epochs\?$"),
    (["data.clamp_value=3"], r"^data.clamp_value: no such key; did you mean normalizer.clamp_value\?$"),
    (["normalizer.blah=1"], "^normalizer.blah: no such key; there are normalizer._partial_, normalizer._target_"),
    (["normalizer=batch,group"], "^normalizer: 'batch,group' are several values, .* add -m, or use scripts/sweep.py$"),
    (["seed=range(3)"], r"^seed: 'range\(3\)' are several values"),
    (["normalizer=glob(*)"], r"^normalizer: 'glob\(\*\)' are several values"),
    (
        ["recipe.milestones=2,3"],
        r"^recipe.milestones: '2,3' is a list; write it in brackets: 'recipe.milestones=\[2,3\]'$",
    ),
    (
        ["logger=tensorboard,wandb"],
        r"^logger: 'tensorboard,wandb': several are a list: 'logger=\[tensorboard,wandb\]', of csv, tensorb",
    ),
    (["recipe.lr=a=b"], "^recipe.lr: 'a=b' cannot be read .* if it is meant as a text, quote it: 'recipe.lr=\"a=b\"'$"),
    (["foo"], "^'foo': is not of the form KEY=VALUE"),
    ([""], "^'': is not of the form KEY=VALUE"),
    (["=3"], "^'=3': names no key"),
]


def test_loggers_are_a_list_of_any_length():
    for names in ("wandb", "tensorboard,wandb", "wandb,csv,tensorboard"):
        config = load_config([f"logger=[{names}]", "logger.project=mine"])
        assert config["choices"]["logger"] == names
        assert config["logger"]["wandb"] is True and config["logger"]["project"] == "mine"
        assert config["logger"].get("tensorboard", False) == ("tensorboard" in names)
    with pytest.raises(ConfigError, match=r"^logger: 'tensorbord' is not one of .* did you mean logger=tensorboard\?$"):
        load_config(["logger=[csv,tensorbord]"])


@pytest.mark.parametrize("overrides, message", MISTAKES)
def test_mistakes_get_one_sentence(overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override, message",
    [
        ("recipe.lr=interval(0,1)", r"^recipe.lr: an interval\(\) holds no finite number of values"),
        ("recipe.lr=glob(*)", r"^recipe.lr: glob\(\) chooses among files of a group"),
        (
            "normalizer=glob(x*)",
            r"^normalizer: glob\(x\*\) gives no value; list those that are meant, as in normalizer=",
        ),
        ("seed=range(5,0)", r"^seed: range\(5,0\) gives no value; list"),
        ("seed=range(0,5,0)", r"^seed: a range\(\) needs a step other than 0$"),
        ("seed=range(0,1000000)", "gives more than 10,000 values; list"),
        ("seed=choice()", r"^seed: 'choice\(\)' cannot be read"),
        ("seed=glob(", r"^seed: 'glob\(' cannot be read"),
        ("seed='1,2", "^seed: .* cannot be read"),
    ],
)
def test_mistakes_in_sweeps_get_one_sentence(override, message):
    with pytest.raises(ConfigError, match=message):
        jobs([override])


def test_sweeps_of_all_kinds():
    assert jobs(["normalizer=glob(online_*)"]) == [
        ["normalizer=online_clamp"], ["normalizer=online_layer_scaling"], ["normalizer=online_none"],
    ]  # fmt: skip
    assert jobs(["normalizer=glob(*,exclude=online_*)", "seed=1"])[0] == ["normalizer=batch", "seed=1"]
    assert jobs(["seed=range(2)", "normalizer=choice(batch,group)"])[1] == ["seed=0", "normalizer=group"]
    (first, second) = jobs(["data.root=/a b,'/c,d'"])
    assert [load_config(job)["data"]["root"] for job in (first, second)] == ["/a b", "/c,d"]


@pytest.mark.parametrize("path", ["~/imagenet", "/daten/übung", "/a=b[1](c", "/a b,c", "normalizer.clamp_value=3/x"])
def test_paths_arrive_as_they_are(path):
    config = load_config([f"data.root={path}", f"run_dir={path}"])
    assert config["data"]["root"] == path == config["run_dir"]


@settings(max_examples=60)
@given(st.sampled_from(["recipe.lr=", "normalizer=", "seed=", "~", "+", "a.b", ""]), st.text(max_size=12))
@example("seed=", "${oc.env:NOT_THERE}")
@example("normalizer=", "[batch]")
@example("normalizer=", "{a:b}")
@example("", "normalizer@x=batch")
@example("+", "normalizer=batch")
@example("", "normalizer/x=batch")
@example("recipe.lr=", "${")
def test_whatever_is_typed_composes_or_gets_a_sentence(start, text):
    for call in (load_config, jobs):
        try:
            call([start + text])
        except ConfigError as error:
            assert str(error).strip()


def test_more_configurations_from_a_folder(tmp_path):
    (tmp_path / "normalizer").mkdir()
    file = tmp_path / "normalizer" / "mine.yaml"
    file.write_text("_target_: torch.nn.BatchNorm2d\n_partial_: true\nmomentum: 0.5\n")
    config = load_config(["normalizer=mine"], str(tmp_path))
    assert config["normalizer"]["momentum"] == 0.5 and config["choices"]["normalizer"] == "mine"
    assert load_config(["normalizer=batch"], str(tmp_path))["normalizer"]["momentum"] == 0.1
    with pytest.raises(ConfigError, match=r"did you mean normalizer=mine\?"):
        load_config(["normalizer=min"], str(tmp_path))
    with pytest.raises(ConfigError, match="--config-dir: /nowhere is no folder"):
        load_config([], "/nowhere")
    with pytest.raises(ConfigError, match=f"holds none of the folders .*above it: --config-dir {tmp_path}$"):
        load_config([], str(tmp_path / "normalizer"))
    load_config([], str(CONFIGS))
    file.rename(file.with_suffix(".yml"))
    with pytest.raises(ConfigError, match=r"mine.yml is not read: names of files end in .yaml"):
        load_config(["normalizer=batch"], str(tmp_path))


GLOBAL = "# @package _global_\n"


@pytest.mark.parametrize(
    "file, text, override, message",
    [
        ("normalizer/batch", "_target_: a.B\n", "seed=1", "^normalizer: batch is also in configs/.* rename FILE$"),
        ("experiment/quickstart", GLOBAL, "experiment=quickstart", "^experiment: quickstart is also .*rename FILE$"),
        ("data/base/images", "root: x\n", "seed=1", "^data/base: images is also in configs/.* rename FILE$"),
        ("normalizer/mine", "# mine\n_target_: [\n", "normalizer=mine", "^FILE, line 3: is no YAML"),
        ("normalizer/mine", "a: 1\n\tb: 2\n", "normalizer=mine", r"^FILE, line 2: is no YAML \(.*'\\t'"),
        ("experiment/mine", "recipe:\n  epochs: 1\n", "experiment=mine", "^FILE: sets nothing .*@package _global_"),
        (
            "normalizer/mine",
            "defaults: [batch_renorm, _self_]\n",
            "normalizer=mine",
            "^normalizer._label_: 'BatchRenorm'",
        ),
        ("normalizer/mine", "_label_: Batch Norm\n", "normalizer=mine", "the row of normalizer=batch is.* into FILE$"),
        ("normalizer/mine", '_label_: "no normalizer" # x\n', "normalizer=mine", "the row of normalizer=none is"),
        (
            "experiment/mine",
            f"{GLOBAL}defaults:\n  - override /model: cifar_resnet21\n",
            "experiment=mine",
            r"^model: 'cifar_resnet21' is not one .* did you mean model=cifar_resnet",
        ),
    ],
)
def test_what_is_wrong_with_a_file_of_ones_own(tmp_path, file, text, override, message):
    path = tmp_path / f"{file}.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ConfigError, match=message.replace("FILE", str(path))):
        load_config([override], str(tmp_path))


@pytest.mark.parametrize(
    ("limits", "folder"),
    [
        ([], None),
        (["data.limit_train=null"], None),
        (["data.limit_train=64"], "runs/table1-limit_train64/batch/seed1"),
        (["data.limit_val=8", "+data.limit_train=64"], "runs/table1-limit_train64-limit_val8/batch/seed1"),
        (["data.limit_train=64", "run_dir=mine"], "mine"),
        (["data=embedded", "data.limit_train=64"], None),
    ],
)
def test_a_limited_run_has_a_folder_of_its_own(limits, folder):
    assert load_config(["experiment=table1", "normalizer=batch", "seed=1", *limits])["run_dir"] == folder


def test_limits_of_an_experiment_itself_keep_its_folder():
    assert load_config(["experiment=resnet50"])["run_dir"] is None


def test_hydra_leaves_the_loggers_of_loaded_modules_alone():
    """Each job of a sweep configures logging anew: what was imported by then would not warn any more."""
    with hydra.initialize_config_dir(str(CONFIGS), version_base=None):
        composed = hydra.compose("train", return_hydra_config=True).hydra
    for name in ("job_logging", "hydra_logging"):
        assert composed[name].root is None and not composed[name].disable_existing_loggers


@pytest.mark.parametrize("path", ["/a${seed}b", "a${b}c", "${", "a$b", r"a\${seed}", r"a\\${seed}\b", "$${x}"])
def test_paths_hold_no_interpolations(path):
    assert load_config([f"run_dir={path}"])["run_dir"] == path


def test_an_experiment_can_be_left_out():
    assert load_config(["~experiment"]) == load_config([])


def test_choices_of_files_are_composed_once(monkeypatch):
    composed, compose = [], hydra.compose
    monkeypatch.setattr(
        hydra, "compose", lambda name, words, **given: composed.append(words) or compose(name, words, **given)
    )
    choices = ["recipe=goyal2017", "normalizer=group", "data=cifar100", "model=resnet101"]
    first, second = load_config(choices), load_config(choices)
    assert composed.count(choices) == 1 and first == second and first is not second
    assert load_config([*choices, "seed=3"]) == {**first, "seed": 3} and composed[-1] == [*choices, "seed=3"]
