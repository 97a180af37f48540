"""What is refused before anything is built, and how it is said."""

import copy
import math

import pytest

from onlinenorm.arguments import flatten
from onlinenorm.cli.compose import load_config
from onlinenorm.errors import ArgumentError, ConfigError, DataError, UnreadableImageError
from onlinenorm.training.config_check import build, check_config, check_keys, full_keys
from onlinenorm.training.hints import nearest, unknown_option
from onlinenorm.training.probe import probe_normalizer
from onlinenorm.training.trainer import resolve


def config(**changes):
    """A configuration with one plausible node a group, and `changes` to its nodes."""
    nodes = {
        "normalizer": {"_target_": "onlinenorm.normalizers.OnlineNorm2d", "_partial_": True, "alpha_fwd": 0.99},
        "model": {"_target_": "onlinenorm.models.cifar_resnet8", "compile": False},
        "data": {"_target_": "onlinenorm.data.Synthetic", "num_workers": 0},
        "recipe": {"_target_": "onlinenorm.training.recipe.Recipe", "epochs": 2, "batch_size": 8},
        "trainer": {"_target_": "onlinenorm.training.build_trainer", "devices": 1},
        "logger": {"_target_": "onlinenorm.training.loggers.csv_only"},
        "classifier": {"_target_": "onlinenorm.training.ImageClassifier"},
        "seed": 0,
        "run_dir": None,
    }
    for key, change in changes.items():
        nodes[key] = nodes.get(key) | change if isinstance(change, dict) and key in nodes else change
    return nodes


def test_a_sound_configuration_passes():
    check_config(config())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"normalizer": {"alpha_fw": 0.5}}, r"normalizer.alpha_fw: no such key; did you mean normalizer.alpha_fwd\?"),
        ({"recipe": {"epocs": 3}}, r"recipe.epocs: no such key; did you mean recipe.epochs\?"),
        ({"recipe": {"epochs": "many"}}, "recipe.epochs: 'many' is not a whole number"),
        ({"recipe": {"epochs": True}}, "recipe.epochs: True is not a whole number"),
        ({"recipe": {"milestones": [1, "x"]}}, r"recipe.milestones: \[1, 'x'\] is not a list of whole numbers"),
        ({"normalizer": {"eps": "abc"}}, "normalizer.eps: 'abc' is not a number"),
        ({"model": {"num_classes": 7}}, "model.num_classes: is set by train.py itself"),
        ({"trainer": {"precision": "bf16-mixd"}}, "trainer.precision: .* is not one of auto, 32-true.*bf16-mixed?"),
        ({"trainer": {"devices": "two"}}, "trainer.devices: 'two' is not a whole number or one of auto"),
        (
            {"trainer": {"disabled_optimizations": ["fold_gradients", "casts"]}},
            r"trainer.disabled_optimizations: .*'casts'\] is not a list of any of cast_weights, memset_kernels, prog",
        ),
        ({"normaliser": {"_target_": "x"}}, r"normaliser: no such key; did you mean normalizer\?"),
        ({"seed": -1}, "seed: -1 is not a whole number from 0 to 4294967295"),
        ({"data": None}, "data: is missing; name one, as in data=NAME"),
        ({"logger": None}, "logger: is missing; name one, as in logger=csv, which is metrics.csv alone"),
        (
            {"data": None, "choices": {"data": "mine"}},
            "data._target_: data/mine.yaml does not name a class; add the line",
        ),
        ({"recipe": {"_target_": "os.system"}}, "recipe._target_: 'os.system' is refused"),
        ({"recipe": {"_target_": "onlinenormal.evil"}}, "'onlinenormal.evil' is refused"),
        (
            {"recipe": {"_target_": "onlinenorm.training.recipe.Recip"}},
            "'onlinenorm.training.recipe.Recip' is refused; there are onlinenorm.training.recipe.Recipe$",
        ),
        ({"model": {"_partial_": True}}, "model._partial_: is for normalizers"),
        ({"data": {"root": [{"a": {"_target_": "onlinenorm.data.Synthetic"}}]}}, "data.root: a node within a node"),
        *(
            ({"normalizer": {key: value}}, f"normalizer.{key}: no such key")
            for key, value in {"_args_": [1], "_recursive_": True, "_convert_": "all", "_mode_": "x"}.items()
        ),
        ({"recipe": {"_args_": [1]}}, "recipe._args_: no such key"),
        ({"normalizer": {"_label_": "a | b"}}, "normalizer._label_: 'a | b' is not a text of at most 40 letters"),
        ({"normalizer": {"_colour_": "red"}}, 'normalizer._colour_: .red. is not a colour such as "#0072B2"'),
        ({"model": {"_label_": "ResNet"}}, "model._label_: no such key"),
        ({"normalizer": {"backend": {"_target_": "onlinenorm.x"}}}, "normalizer.backend: a node within a node"),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        check_config(config(**changes))


def test_missing_argument_is_named():
    nodes = config()
    del nodes["recipe"]["epochs"]
    with pytest.raises(ConfigError, match=r"recipe.epochs: is missing; onlinenorm.training.recipe.Recipe needs it"):
        check_config(nodes)


def test_errors_of_constructors_get_the_full_key():
    with pytest.raises(ConfigError, match=r"recipe.milestones: 200 lies past the last epoch \(2\)"):
        build(config(recipe={"milestones": [200]}), "recipe")
    with pytest.raises(ConfigError, match=r"normalizer.alpha_fwd: 1.5"), full_keys(config(), "normalizer"):
        build(config(normalizer={"alpha_fwd": 1.5}), "normalizer")(num_features=4)
    for error in (ArgumentError("other", "kept as it is"), DataError("kept as it is", "other"), ValueError("other: x")):
        with pytest.raises(type(error)) as raised, full_keys(config(), "normalizer", "recipe"):
            raise error
        assert raised.value is error


def test_the_first_node_that_has_the_key_is_named():
    nodes = config()
    for paths in (("normalizer", "recipe"), ("recipe", "normalizer")):
        with pytest.raises(ConfigError, match=r"^recipe.epochs: none$"), full_keys(nodes, *paths):
            raise ArgumentError("epochs", "none")


@pytest.mark.parametrize("kind", [DataError, UnreadableImageError])
def test_data_that_fail_are_no_configuration_that_cannot_be_meant(kind):
    with pytest.raises(kind, match=r"^recipe.epochs: none$") as raised, full_keys(config(), "recipe"):
        raise kind("none", key="epochs")
    assert type(raised.value) is kind and raised.value.exit_code == 1


def test_partial_nodes_build_a_fresh_layer_at_each_call():
    normalizer = build(config(), "normalizer")
    first, second = normalizer(num_features=3), normalizer(num_features=3)
    assert first is not second and first.alpha_fwd == 0.99 and first.num_features == 3


def test_options_and_keys():
    assert "did you mean normalizer=online_clamp" in str(
        unknown_option("normalizer", "online_clmap", ["batch", "online_clamp"])
    )
    assert "there are batch, group" in str(unknown_option("normalizer", None, ["group", "batch"]))
    check_keys(["recipe", "recipe.epochs", "experiment", "seed"], config())
    with pytest.raises(ConfigError, match=r"seed.x: no such key; there are"):
        check_keys(["seed.x"], config())


def test_nearest_compares_the_last_part_first():
    keys = ["recipe.epochs", "recipe.lr", "model.compile", "seed"]
    assert nearest("recipe.epocs", keys) == "recipe.epochs"
    assert nearest("epochs", keys) == "recipe.epochs"
    assert nearest("model.num_classes", keys) == ""
    assert nearest("sed", keys) == "seed"


def test_flatten_keeps_empty_mappings():
    assert flatten({"a": {"b": 1, "c": {}}, "d": [2]}) == {"a.b": 1, "a.c": {}, "d": [2]}


@pytest.mark.parametrize(
    "node, message",
    [
        ({"_partial_": None}, "normalizer._partial_: is missing beside _target_: .*add the line '_partial_: true'"),
        (
            {"_target_": "onlinenorm.normalizers.OnlineNorm2d", "_partial_": False},
            "normalizer._partial_: is missing",
        ),
    ],
)
def test_normalizers_that_the_network_cannot_call(node, message):
    with pytest.raises(ConfigError, match=message):
        check_config(config(normalizer=node))


@pytest.mark.parametrize(
    "group", ["normalizer=online_clamp", "normalizer=batch", "normalizer=group", "recipe=he2015", "trainer=ddp"]
)
@pytest.mark.parametrize("value", [None, -1, math.nan, math.inf, "x", [], [1], {"a": 1}, True])
def test_values_of_the_wrong_kind_are_no_bugs(group, value):
    """Each key of a group with a value that may mean nothing: fine, or a sentence that names the key."""
    base = load_config([group])
    group = group.partition("=")[0]
    assert base[group]
    for key in base[group]:
        changed = copy.deepcopy(base)
        changed[group][key] = value
        try:
            check_config(changed)
            resolve(changed["trainer"])
            build(changed, "recipe")
            probe_normalizer(build(changed, "normalizer"), changed["normalizer"])
        except ConfigError as error:
            assert str(error).startswith((f"{group}.{key}", group)), key


def test_null_is_called_null():
    with pytest.raises(ConfigError, match=r"^trainer.log_every_n_steps: null is not a whole number"):
        check_config(load_config(["trainer.log_every_n_steps=null"]))
