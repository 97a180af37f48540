"""What is wrong with a network before it trains: one layer built, one batch sent through without its numbers."""

import copy
import functools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from onlinenorm.errors import ArgumentError, ConfigError
from onlinenorm.models.blocks import fuses
from onlinenorm.normalizers import SyncBatchNorm2d
from onlinenorm.normalizers.dependence import statistics_depend_on
from onlinenorm.normalizers.settings import LARGEST_CLAMP, STATISTICS
from onlinenorm.text import first_line
from onlinenorm.training.clamping import clamped_layers
from onlinenorm.training.config_check import AUTO_KEYS, build, check_config, full_keys
from onlinenorm.training.fast_path import left_to_choose, make_data, with_values
from onlinenorm.training.launch import process_count
from onlinenorm.training.roles import is_normalizer, parameter_roles
from onlinenorm.training.targets import NAMED, own_errors

CHANNELS, BATCH = 64, 3  # of the layer that is tried, and the images it is tried with
CLASSES = 7  # of the network that is tried
MISTAKES = (AttributeError, TypeError, NameError, LookupError)  # of a class, wherever it is tried
_UNDECIDED = (RuntimeError, NotImplementedError, AssertionError)  # of a layer of somebody's own that needs numbers
_SYNCHRONISED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, SyncBatchNorm2d)


def probe_settings(config: dict[str, Any]) -> None:
    """Raises ConfigError for what is wrong whatever the data hold, and wherever a run takes place: of many, beforehand.

    Each combination of values is tried once.
    """
    check_config(config)
    _probe_settings(json.dumps({group: config[group] for group in ("normalizer", "model", "data", "recipe")}))


@functools.cache
def _probe_settings(nodes: str) -> None:
    config = {**json.loads(nodes), "seed": 0}
    config = with_values(config, {key: AUTO_KEYS[key] for key in left_to_choose(config)})
    recipe, factory = build(config, "recipe"), build(config, "normalizer")
    probe_normalizer(factory, config["normalizer"])
    with full_keys(config, "data", "recipe"):
        in_channels = make_data(config, recipe).in_channels
    try:
        with torch.no_grad(), FakeTensorMode(), full_keys(config, "normalizer"):
            network = build(config, "model", normalizer=factory, num_classes=CLASSES, in_channels=in_channels)
            probe_network(network, config)
    except (ConfigError, *_UNDECIDED) as error:
        if not isinstance(error.__cause__ or error, _UNDECIDED):
            raise


def probe_normalizer(
    factory: Callable[..., Any], node: dict[str, Any], trainer: Mapping[str, Any] | None = None
) -> None:
    """Builds one layer of a normalizer and raises ConfigError, naming the key, for values that it cannot be meant with.

    So it does for one that several processes of a `trainer` (resolved) cannot train: whose statistics cannot be
    averaged (``averages_statistics = False``), or that synchronising would replace by torch's own.

    torch's own layers take any eps and momentum; the ranges of both are checked here for every layer that has them.
    """
    name = node["_target_"]
    with full_keys({"normalizer": node}, "normalizer"), own_errors("normalizer", name, "could not be built"):
        try:
            layer = factory(num_features=CHANNELS)
        except ArgumentError:
            raise
        except (TypeError, ValueError, RuntimeError) as error:
            if name not in NAMED["normalizer"]:
                raise
            raise ConfigError(
                f"normalizer: {name} could not be built ({first_line(error)}); correct its keys"
            ) from error
    if not isinstance(layer, nn.Module):
        raise ConfigError(
            f"normalizer._target_: {name} makes a {type(layer).__name__} and not a torch.nn.Module; name what makes one"
        )
    try:
        parameter_roles(layer)
        statistics_depend_on(layer)
    except ValueError as error:
        raise ConfigError(f"normalizer._target_: {error}") from None
    if factory(num_features=CHANNELS) is layer:
        raise ConfigError(
            f"normalizer._target_: {name} makes the same layer at each call, and each site needs its own; build a new "
            "one in each"
        )
    trainer = trainer or {}
    several = process_count(trainer) > 1
    if several and not all(getattr(inner, "averages_statistics", True) for inner in layer.modules()):
        raise ConfigError(
            f"normalizer._target_: {name} says that its statistics cannot be averaged over processes "
            "(averages_statistics), so that each would validate a network of its own; train on one, trainer.devices=1"
        )
    kinds = {type(inner) for inner in layer.modules() if isinstance(inner, _BatchNorm)}
    own = sorted(kind.__name__ for kind in kinds.difference(_SYNCHRONISED))
    if several and trainer.get("sync_batchnorm") and own:
        raise ConfigError(
            f"trainer.sync_batchnorm: {', '.join(own)} of {name} would be replaced by torch's SyncBatchNorm, "
            "without what it does otherwise; leave it false"
        )
    if name not in NAMED["normalizer"]:
        _probe_own(factory, layer, name, None if several else trainer.get("accelerator"))
    eps, momentum = getattr(layer, "eps", None), getattr(layer, "momentum", None)
    if "eps" in node and isinstance(eps, int | float) and not 0 < eps < math.inf:
        raise ConfigError(f"normalizer.eps: {eps!r} must be larger than 0: it is added to the variance, as 1e-5 is")
    if "momentum" in node and isinstance(momentum, int | float) and not 0 < momentum <= 1:
        raise ConfigError(
            f"normalizer.momentum: {momentum!r} must be larger than 0 and at most 1: it is the share of a batch in the "
            "running statistics (or null, for their mean over all batches)"
        )


def _probe_own(factory: Callable[..., Any], layer: nn.Module, name: str, accelerator: str | None) -> None:
    """Raises ConfigError for a layer of the user's own that a batch, or its own state_dict(), shows to be wrong.

    Args:
        factory: makes such layers; `layer` is one.
        name: of the class, in full.
        accelerator: "cpu" or "gpu" where one process trains it, and so shows here whether it can; else None, and it may
            need what is not here.
    """
    for part in layer.modules():
        if isinstance(said := getattr(part, "statistics", None), str) and said not in STATISTICS:
            raise ConfigError(
                f"normalizer._target_: {name} says statistics = {said!r}, which is not one of {', '.join(STATISTICS)}"
            )
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(BATCH, CHANNELS, 8, 8, generator=generator) * 3 + 1 for _ in range(3)]
    device = torch.device("cuda" if accelerator == "gpu" else "cpu")
    batches, layer = [x.to(device) for x in batches], layer.to(device)
    with own_errors("normalizer", name, "fails with a batch"), torch.no_grad():
        try:
            outputs = [layer.train()(x.clone()) for x in batches]
        except Exception as error:
            if accelerator or isinstance(error, MISTAKES):
                raise
            return
    x, y = batches[0], outputs[0]
    if not isinstance(y, torch.Tensor) or y.shape != x.shape:
        made = list(y.shape) if isinstance(y, torch.Tensor) else type(y).__name__
        raise ConfigError(f"normalizer._target_: {name} makes {made} of {list(x.shape)}; it must keep the shape")
    for path, part in layer.named_modules():
        for key, value in vars(part).items():
            if isinstance(value, torch.Tensor) and value.shape[:1] != (BATCH,):  # else of the batch, not a statistic
                raise ConfigError(
                    f"normalizer._target_: {name} keeps the tensor {f'{path}.{key}'.lstrip('.')} outside of its "
                    "buffers, where no checkpoint holds it and no device gets it; make it one: "
                    f'self.register_buffer("{key}", ...)'
                )
    with own_errors("normalizer", name, "does not take its own state_dict()"), torch.no_grad():
        _probe_state(factory, layer, name, x)
    if fuses(layer, "fuses_residual"):
        with own_errors("normalizer", name, "says fuses_residual and fails"), torch.no_grad():
            want, fused = (layer.eval()(x.clone()) + x).relu(), layer(x.clone(), residual=x.clone(), relu=True)
        if not torch.allclose(want, fused, rtol=1e-3, atol=1e-3, equal_nan=True):
            raise ConfigError(
                f"normalizer._target_: {name} says fuses_residual, and layer(x, residual=r, relu=True) is not "
                "relu(layer(x) + r)"
            )


def _probe_state(factory: Callable[..., Any], trained: nn.Module, name: str, x: torch.Tensor) -> None:
    """Raises ConfigError where new layers with the state_dict() of a trained one compute something else than it."""
    state = copy.deepcopy(trained.state_dict())
    layers = [trained, *(factory(num_features=CHANNELS).to(x.device) for _ in range(2))]
    lost = _unsaved(trained, layers[1])
    for new in layers[1:]:
        new.load_state_dict(state)
    for training in (False, True):
        outputs = []
        for layer in layers:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                outputs.append(layer.train(training)(x.clone()))
        was, loaded, again = outputs
        same = [torch.allclose(loaded, other, rtol=1e-4, atol=1e-5, equal_nan=True) for other in (was, again)]
        if same == [False, True]:  # else it draws random numbers of its own
            raise ConfigError(
                f"normalizer._target_: {name} {'trains on' if training else 'evaluates'} otherwise once its "
                "state_dict() is loaded into a new layer: checkpoints and exports would not hold what it has learnt. "
                f"Keep {', '.join(lost) or 'all of it'} in buffers that are saved: self.register_buffer(NAME, TENSOR)"
            )


def _unsaved(trained: nn.Module, new: nn.Module) -> list[str]:
    """Names of what a layer keeps and does not save, and what it is not in a new one."""
    names = []
    modules = dict(new.named_modules())
    for path, part in trained.named_modules():
        names += [f"{path}.{key}" for key in part._non_persistent_buffers_set]
        before = vars(modules.get(path, new))
        for key in vars(part).keys() - vars(nn.Module()).keys():
            if isinstance(vars(part)[key], int | float | list | tuple | dict) and key != "training":
                names += [f"{path}.{key}"] if repr(vars(part)[key]) != repr(before.get(key)) else []
    return sorted(key.lstrip(".") for key in names)


def probe_network(network: Any, config: dict[str, Any]) -> None:
    """Raises ConfigError for what a model's function made where that is no network with the normalizer in it.

    So it does where the recipe would raise its clamps out of their range.
    """
    name = config["model"]["_target_"]
    if not isinstance(network, nn.Module):
        raise ConfigError(f"model._target_: {name} makes a {type(network).__name__} and not a torch.nn.Module")
    if not any(map(is_normalizer, network.modules())):
        raise ConfigError(
            f"model._target_: {name} holds no layer of the normalizer, and its run would be reported as one of it; "
            "build each norm by the argument normalizer: self.norm = normalizer(channels)"
        )
    try:
        parameter_roles(network)
    except ConfigError as error:
        raise ConfigError(f"model._target_: {error}") from error
    raised = config["recipe"].get("clamp_raise_epochs", 0)
    value = max((layer.clamp_value for layer in clamped_layers(network)), default=0.0)
    if value * 2.0 ** min(raised, 99) >= LARGEST_CLAMP:
        most = math.ceil(math.log2(LARGEST_CLAMP / value)) - 1
        raise ConfigError(
            f"recipe.clamp_raise_epochs: {raised} doublings of the clamp value {value:g} lead to {LARGEST_CLAMP:g} and "
            f"beyond, which 16-bit activations do not hold; use at most {most}, or recipe.clamp_off_epochs for no clamp"
        )


def probe_batch(config: dict[str, Any], factory: Callable[..., Any], in_channels: int, image_size: int) -> None:
    """Raises ConfigError where a training batch leaves a layer of torch's norms a single value to normalise with.

    So it does for a network of the user's own that fails, leaves the normalizer out, or does not give a logit a class.

    Args:
        config: of the run, its trainer resolved.
        factory: of its normalizer.
        in_channels, image_size: of the images.
    """
    name = config["model"]["_target_"]
    own = name not in NAMED["model"]
    if not own and not any(isinstance(layer, _NormBase) for layer in factory(num_features=CHANNELS).modules()):
        return
    trainer = {"devices": 1, "num_nodes": 1, "accumulate_grad_batches": 1, "sync_batchnorm": False} | config["trainer"]
    parts = trainer["accumulate_grad_batches"]
    parts *= 1 if trainer["sync_batchnorm"] else process_count(trainer)
    batch = max(config["recipe"]["batch_size"] // parts, 1)
    used: set[nn.Module] = set()
    try:
        with (
            torch.no_grad(),
            FakeTensorMode(),  # shapes without numbers
            torch.compiler.set_stance("force_eager"),
            own_errors("model", name, "fails with a batch"),
        ):
            network = build(config, "model", normalizer=factory, num_classes=CLASSES, in_channels=in_channels)
            probe_network(network, config)
            for layer in filter(is_normalizer, network.modules()) if own else ():
                layer.register_forward_hook(lambda layer, *_: used.add(layer))
            logits = network.train()(torch.empty(batch, in_channels, image_size, image_size))
    except (ValueError, *_UNDECIDED) as error:
        cause = (error.__cause__ or error) if isinstance(error, ConfigError) else error
        if isinstance(cause, _UNDECIDED):
            return
        if not str(cause).startswith("Expected more than 1"):
            raise
        alone = "spatial" in str(cause)  # InstanceNorm: whatever the batch
        raise ConfigError(
            f"normalizer: {config['choices']['normalizer']} has a single value a channel to take statistics of: images "
            f"of {image_size} pixels end in maps of 1 x 1{'' if alone else ' and a batch is one image'}; use a larger "
            f"data.image_size{'' if alone else ' or recipe.batch_size'}, or another normalizer"
        ) from error
    if own and not used:
        raise ConfigError(
            f"model._target_: {name} calls no layer of the normalizer in forward(), and its run would be reported as "
            "one of it; call them"
        )
    if own and (not isinstance(logits, torch.Tensor) or logits.shape != (batch, CLASSES)):
        made = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ConfigError(
            f"model._target_: {name} built with num_classes={CLASSES} makes {made} of {batch} "
            f"images, and not their logits, [{batch}, {CLASSES}]"
        )
