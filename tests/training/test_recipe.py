import dataclasses
import io
import math
from functools import partial
from pathlib import Path

import hydra
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from onlinenorm.cli.compose import load_config
from onlinenorm.models import cifar_resnet20, resnet50
from onlinenorm.normalizers import OnlineNorm2d, group_norm, identity, layer_norm
from onlinenorm.records import ADDED
from onlinenorm.training.recipe import (
    Recipe,
    build_optimizer,
    build_schedule,
    clamp_factor,
    lr_of_step,
    parameter_groups,
    scaled_lr_momentum,
)
from onlinenorm.training.roles import parameter_roles

CONFIGS = Path(__file__).parents[2] / "configs" / "recipe"
NORMALIZERS = {
    "batch": nn.BatchNorm2d,
    "group": group_norm,
    "layer": layer_norm,
    "instance": partial(nn.InstanceNorm2d, affine=True),
    "online": OnlineNorm2d,
}
REFERENCE = {"epochs": 100, "batch_size": 32, "milestones": (30, 60, 80, 90)}


def shipped(name):
    return hydra.utils.instantiate(load_config([f"recipe={name}"])["recipe"])


def on_meta(build, normalizer, **options):
    with torch.device("meta"):
        return build(normalizer, **options)


@pytest.mark.parametrize(
    "batch_size, lr, momentum",
    [(32, 0.00163546, 0.98691628), (256, 0.1, 0.9), (1024, 1.3756, 0.6561), (1, 1.607343e-06, 0.999588523)],
)
def test_horizon_rule(batch_size, lr, momentum):
    scaled = scaled_lr_momentum(0.1, 0.9, batch_size, 256, "horizon")
    assert scaled == pytest.approx((lr, momentum), rel=5e-6)
    recipe = Recipe(epochs=1, batch_size=batch_size)
    assert (recipe.scaled_lr, recipe.scaled_momentum) == scaled


@pytest.mark.parametrize("batch_size", [1, 32, 100, 4096])
def test_horizon_rule_keeps_what_one_image_does(batch_size):
    lr, momentum = scaled_lr_momentum(0.1, 0.9, batch_size, 256, "horizon")
    assert lr / (1 - momentum) / batch_size == pytest.approx(0.1 / (1 - 0.9) / 256)
    assert momentum ** (10_000 / batch_size) == pytest.approx(0.9 ** (10_000 / 256))


def test_other_rules():
    assert scaled_lr_momentum(0.1, 0.9, 1024, 256, "linear") == (0.4, 0.9)
    assert scaled_lr_momentum(0.1, 0.9, 1024, 256, "none") == (0.1, 0.9)
    assert scaled_lr_momentum(0.1, 0.0, 512, 256, "horizon") == (0.2, 0.0)
    with pytest.raises(ValueError, match="scaling: 'horizn' is not one of horizon, linear, none; did you mean horiz"):
        scaled_lr_momentum(0.1, 0.9, 32, 256, "horizn")


@pytest.mark.parametrize("key", NORMALIZERS)
def test_groups_are_equal_for_all_normalizers(key):
    model = on_meta(resnet50, NORMALIZERS[key])
    decayed, exempt = parameter_groups(model, Recipe(**REFERENCE))
    assert (len(decayed["params"]), len(exempt["params"])) == (53 + 53 + 2, 53)
    assert sum(p.numel() for p in exempt["params"]) == 26_560
    assert sum(p.numel() for g in (decayed, exempt) for p in g["params"]) == 25_557_032
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (1e-4, 0)
    assert parameter_roles(model) == parameter_roles(on_meta(resnet50, nn.BatchNorm2d))


def test_roles_follow_the_type_of_the_owner():
    roles = parameter_roles(on_meta(resnet50, OnlineNorm2d))
    assert roles["layer1.0.downsample.1.weight"] == roles["bn1.weight"] == "norm_weight"
    assert roles["layer1.0.downsample.1.bias"] == roles["layer4.2.bn3.bias"] == "norm_bias"
    assert roles["layer1.0.downsample.0.weight"] == roles["fc.weight"] == "weight"
    assert roles["fc.bias"] == "bias"


def test_names_do_not_matter():
    model = nn.Sequential()
    model.norm_like_name = nn.Linear(2, 2)
    model.plain = nn.Sequential(nn.LayerNorm(2), nn.InstanceNorm1d(2, affine=True), nn.RMSNorm(2), nn.BatchNorm1d(2))
    roles = parameter_roles(model)
    assert roles.pop("norm_like_name.weight") == "weight" and roles.pop("norm_like_name.bias") == "bias"
    assert set(roles.values()) == {"norm_weight", "norm_bias"} and len(roles) == 7


@pytest.mark.parametrize("norm_weight", [False, True])
@pytest.mark.parametrize("norm_bias", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_each_key_moves_its_parameters(norm_weight, norm_bias, bias):
    model = on_meta(cifar_resnet20, OnlineNorm2d)
    keys = {"decay_norm_weight": norm_weight, "decay_norm_bias": norm_bias, "decay_bias": bias}
    groups = {g["name"]: g["params"] for g in parameter_groups(model, Recipe(epochs=1, batch_size=1, **keys))}
    decayed = {id(p) for p in groups["decay"]}
    assert (id(model.layer2[0].downsample[1].weight) in decayed) is norm_weight
    assert (id(model.bn1.bias) in decayed) is norm_bias
    assert (id(model.fc.bias) in decayed) is bias
    assert id(model.conv1.weight) in decayed and id(model.fc.weight) in decayed
    assert sum(map(len, groups.values())) == len(list(model.parameters()))


def test_no_empty_group_without_normalizer():
    groups = parameter_groups(on_meta(cifar_resnet20, identity), Recipe(epochs=1, batch_size=1))
    assert [g["name"] for g in groups] == ["decay"]


def test_shared_and_frozen_parameters():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    assert list(parameter_roles(model)) == ["0.weight", "0.bias", "1.bias", "2.bias"]


def test_sgd_moves_each_group_as_its_equation_says():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), OnlineNorm2d(4))
    recipe = Recipe(epochs=1, batch_size=64, weight_decay=0.01)
    optimizer = build_optimizer(model, recipe)
    lr, momentum = recipe.scaled_lr, recipe.scaled_momentum
    tracked = {"decayed": model[0].weight, "gamma": model[1].weight, "beta": model[1].bias}
    decay = {"decayed": 0.01, "gamma": 0.01, "beta": 0.0}
    model[1].bias.data.fill_(0.5)
    expected = {key: p.detach().clone() for key, p in tracked.items()}
    buffers = {key: torch.zeros_like(p) for key, p in expected.items()}
    for step in range(3):
        for parameter in tracked.values():
            parameter.grad = torch.full_like(parameter, 0.1 * (step + 1))
        optimizer.step()
        for key, w in expected.items():
            buffers[key] = momentum * buffers[key] + 0.1 * (step + 1) + decay[key] * w
            expected[key] = w - lr * buffers[key]
            torch.testing.assert_close(tracked[key].detach(), expected[key])


def rates(recipe, errors=None):
    """Learning rate of each epoch, counting from 1."""
    optimizer = build_optimizer(nn.Linear(2, 2), recipe)
    schedule = build_schedule(optimizer, recipe)
    seen = []
    for epoch in range(recipe.epochs):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step(*(() if errors is None else (errors[epoch],)))
    return seen


def test_a_milestone_counts_completed_epochs():
    seen = rates(shipped("reference"))
    full = 0.00163546
    for first, last, factor in [(1, 30, 1), (31, 60, 0.1), (61, 80, 0.01), (81, 90, 1e-3), (91, 100, 1e-4)]:
        assert seen[first - 1 : last] == pytest.approx([full * factor] * (last - first + 1), rel=5e-6)


def test_plateau_divides_after_patience_runs_out():
    keys = {"schedule": "plateau", "plateau_patience": 2, "plateau_threshold": 0.01, "scaling": "none"}
    recipe = Recipe(epochs=10, batch_size=1, **keys)
    errors = [0.9, 0.5, 0.495, 0.494, 0.493, 0.3, 0.3, 0.3, 0.3, 0.3]
    assert rates(recipe, errors) == pytest.approx([0.1] * 5 + [0.01] * 4 + [0.001])


def test_plateau_acts_at_tiny_rates():
    recipe = Recipe(epochs=3, batch_size=1, lr=1e-9, scaling="none", schedule="plateau", plateau_patience=0)
    assert rates(recipe, [0.5, 0.5, 0.5]) == pytest.approx([1e-9, 1e-9, 1e-10])


def test_the_clamp_is_doubled_and_then_taken_away():
    recipe = Recipe(epochs=7, batch_size=1, clamp_raise_epochs=3, clamp_off_epochs=2)
    assert [clamp_factor(recipe, epoch) for epoch in range(1, 8)] == [1, 1, 2, 4, 8, None, None]
    assert [clamp_factor(Recipe(epochs=2, batch_size=1), epoch) for epoch in (1, 2)] == [1, 1]
    raised = Recipe(epochs=3, batch_size=1, clamp_raise_epochs=1)
    assert [clamp_factor(raised, epoch) for epoch in (1, 2, 3)] == [1, 1, 2]


@pytest.mark.parametrize("name", ["reference", "he2015", "cifar", "goyal2017"])
def test_states_survive_a_safe_load(name):
    recipe = shipped(name)
    optimizer = build_optimizer(nn.Linear(2, 2), recipe)
    schedule = build_schedule(optimizer, recipe)
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), schedule.state_dict()], file)
    file.seek(0)
    saved_optimizer, saved_schedule = torch.load(file, weights_only=True)
    optimizer.load_state_dict(saved_optimizer)
    schedule.load_state_dict(saved_schedule)


def test_every_key_of_a_recipe_is_spelled_out():
    keys = {field.name for field in dataclasses.fields(Recipe)} | {"_target_"}
    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    for name in names:
        assert set(load_config([f"recipe={name}"])["recipe"]) == keys, name
    assert names == {"reference", "he2015", "cifar", "goyal2017"}


def test_keys_that_older_runs_lack_are_off_by_default():
    options = OmegaConf.load(CONFIGS / "base" / "options.yaml")
    assert options == ADDED["recipe"]
    defaults = {field.name: field.default for field in dataclasses.fields(Recipe)}
    assert {key: defaults[key] for key in options} == options


def test_goyal2017_recipe():
    recipe = shipped("goyal2017")
    assert (recipe.epochs, recipe.milestones, recipe.scaled_lr, recipe.scaled_momentum) == (90, (30, 60, 80), 3.2, 0.9)
    steps = 1_281_167 // 8192
    assert lr_of_step(recipe, 1, steps) == pytest.approx(0.1 + 3.1 / (5 * steps))
    assert lr_of_step(recipe, 5 * steps, steps) == 3.2 and lr_of_step(recipe, 5 * steps + 1, steps) is None
    decayed, exempt = parameter_groups(on_meta(resnet50, nn.BatchNorm2d), recipe)
    assert (len(decayed["params"]), len(exempt["params"])) == (53 + 2, 106)


def test_the_rate_rises_evenly_and_falls_as_a_cosine():
    recipe = Recipe(
        epochs=6, batch_size=64, scaling="linear", lr=0.4, schedule="cosine", warmup_epochs=2, warmup_lr=0.02
    )
    seen = [lr_of_step(recipe, step, 5) for step in range(1, 31)]
    assert seen[:10] == pytest.approx([0.02 + 0.008 * t for t in range(1, 11)]) and seen[9] == 0.1
    assert seen[10:] == pytest.approx([0.05 * (1 + math.cos(math.pi * t / 20)) for t in range(20)])
    assert all(lr_of_step(Recipe(epochs=6, batch_size=64), step, 5) is None for step in range(1, 31))
    assert rates(recipe) == [0.1] * 6  # the schedule itself leaves it alone


def test_reference_recipe():
    recipe = shipped("reference")
    assert recipe == Recipe(**REFERENCE)
    assert (recipe.scaled_lr, recipe.scaled_momentum) == pytest.approx((0.00163546, 0.98691628), rel=5e-6)


def test_he2015_recipe():
    recipe = shipped("he2015")
    assert (recipe.schedule, recipe.augmentation, recipe.evaluation) == ("plateau", "scale_jitter", "ten_crop")
    assert (recipe.batch_size, recipe.scaled_lr, recipe.scaled_momentum) == (256, 0.1, 0.9)
    assert recipe.epochs * 1_281_167 / 256 == pytest.approx(60e4, rel=0.002)


def test_cifar_recipe():
    recipe = shipped("cifar")
    assert (recipe.epochs, recipe.milestones, recipe.augmentation) == (250, (100, 150, 200), "pad_crop")
    assert (recipe.batch_size, recipe.scaled_lr, recipe.scaled_momentum) == (128, pytest.approx(0.1), 0.9)
    groups = parameter_groups(on_meta(cifar_resnet20, OnlineNorm2d), recipe)
    assert [(g["name"], g["weight_decay"], len(g["params"])) for g in groups] == [("decay", 2e-4, 65)]


def test_milestones_come_as_plain_values():
    config = OmegaConf.create({"_target_": "onlinenorm.training.recipe.Recipe", "epochs": 9, "batch_size": 2})
    config.milestones = [3, 6]
    recipe = hydra.utils.instantiate(config)
    assert recipe.milestones == (3, 6) and type(recipe.milestones) is tuple
    assert hash(recipe) == hash(Recipe(9, 2, milestones=[3, 6]))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"milestones": [200]}, "200 lies past the last epoch (100); use values in 1..99 or raise recipe.epochs"),
        ({"milestones": [30, 100]}, "100 is the last epoch, so nothing runs after it; use values in 1..99 or raise"),
        ({"milestones": [5], "epochs": 1}, "5 lies past the last epoch (1); use recipe.milestones=[] or raise"),
        ({"milestones": [0, 3]}, "0 is not a whole number of at least 1; use values in 1..99"),
        ({"milestones": [30.5]}, "30.5 is not a whole number of at least 1"),
        ({"milestones": [60, 30]}, "must rise strictly, got [60, 30]"),
        ({"milestones": [30, 30]}, "must rise strictly, got [30, 30]"),
        ({"milestones": 30}, "must be a list of epochs such as [30, 60], got 30"),
        ({"milestones": None}, "must be a list of epochs such as [30, 60], got None"),
        ({"milestones": [30], "schedule": "plateau"}, "schedule=plateau has none; use recipe.milestones=[] or"),
        ({"milestones": [30], "schedule": "cosine"}, "schedule=cosine has none; use recipe.milestones=[] or"),
        ({"warmup_epochs": -1}, "must be a whole number of at least 0, got -1"),
        ({"warmup_epochs": 100}, "100 of 100 epochs leave none at the full rate; use fewer"),
        ({"warmup_epochs": 5, "schedule": "plateau"}, "schedule=plateau has none; use 0, or recipe.schedule=step or"),
        ({"warmup_epochs": 5, "milestones": [3, 30]}, "the milestone 3 lies within the 5 epochs of warm-up; move one"),
        ({"warmup_lr": -0.1}, "must be a number >= 0, got -0.1"),
        ({"label_smoothing": 1.0}, "must be a number in [0, 1), got 1.0"),
        ({"label_smoothing": "some"}, "must be a number in [0, 1), got 'some'"),
        ({"clamp_raise_epochs": -1}, "must be a whole number of at least 0, got -1"),
        ({"clamp_off_epochs": 0.5}, "must be a whole number of at least 0, got 0.5"),
        (
            {"clamp_off_epochs": 100},
            "0 epochs of raising and 100 without clamp leave none of 100 with it; use",
        ),
        ({"clamp_raise_epochs": 1, "epochs": 1}, "1 epoch of raising and 0 without clamp leave none of 1 with it"),
        ({"clamp_raise_epochs": 100}, "100 epochs of raising and 0 without clamp leave none of 100 with it"),
        ({"reestimate_images": -1}, "must be a whole number of at least 0, got -1"),
        ({"removal_every_epoch": 1}, "must be true or false, got 1"),
        ({"epochs": 0}, "must be a whole number of at least 1, got 0"),
        ({"epochs": 2.0}, "must be a whole number of at least 1, got 2.0"),
        ({"batch_size": True}, "must be a whole number of at least 1, got True"),
        ({"batch_size": "32"}, "must be a whole number of at least 1, got '32'"),
        ({"base_batch_size": -1}, "must be a whole number of at least 1, got -1"),
        ({"plateau_patience": -1}, "must be a whole number of at least 0, got -1"),
        ({"plateau_threshold": -0.1}, "must be a number >= 0, got -0.1"),
        ({"lr": 0}, "must be a number > 0, got 0"),
        ({"lr": float("nan")}, "must be a number > 0, got nan"),
        ({"lr": float("inf")}, "must be a number > 0, got inf"),
        ({"lr": "fast"}, "must be a number > 0, got 'fast'"),
        ({"momentum": 1}, "must be a number in [0, 1), got 1"),
        ({"momentum": -0.1}, "must be a number in [0, 1), got -0.1"),
        ({"weight_decay": -1e-4}, "must be a number >= 0, got -0.0001"),
        ({"lr_factor": 1.0}, "must be a number in (0, 1), got 1.0"),
        ({"decay_norm_weight": 1}, "must be true or false, got 1"),
        ({"decay_bias": "no"}, "must be true or false, got 'no'"),
        ({"scaling": "liner"}, "'liner' is not one of horizon, linear, none; did you mean linear?"),
        ({"scaling": None}, "None is not one of horizon, linear, none"),
        ({"schedule": "steps"}, "'steps' is not one of step, plateau, cosine; did you mean step?"),
        ({"augmentation": "random_resize_crop"}, "did you mean random_resized_crop?"),
        ({"evaluation": "tencrop"}, "'tencrop' is not one of center_crop, ten_crop; did you mean ten_crop?"),
    ],
)
def test_wrong_values_are_named(values, message):
    with pytest.raises(ValueError) as caught:
        Recipe(**{"epochs": 100, "batch_size": 32, **values})
    assert str(caught.value).startswith(f"{next(iter(values))}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("batch_size, first, full", [(64, 0.025, 0.025), (256, 0.1, 0.1), (8192, 0.1, 3.2)])
def test_the_recipe_for_large_batches_takes_small_ones(batch_size, first, full):
    """The paper's range; what is below 256 images starts at its own rate, and rises no more."""
    node = load_config(["recipe=goyal2017", f"recipe.batch_size={batch_size}"])["recipe"]
    recipe = Recipe(**{key: value for key, value in node.items() if key != "_target_"})
    rates = [lr_of_step(recipe, step, 1000) for step in (1, 5000)]
    assert rates == [pytest.approx(first + (full - first) / 5000), full]
