"""What is wrong with a network before it trains: one layer built, one batch sent through without its numbers."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from onlinenorm.errors import ArgumentError, ConfigError
from onlinenorm.normalizers import SyncBatchNorm2d
from onlinenorm.normalizers.dependence import statistics_depend_on
from onlinenorm.scales import COMPARABLE, LABEL, is_label
from onlinenorm.text import first_line
from onlinenorm.training.config_check import build, full_keys
from onlinenorm.training.roles import parameter_roles
from onlinenorm.training.targets import NAMED

CHANNELS, BATCH = 64, 3  # of the layer that is tried, and the images it is tried with
CLASSES = 7  # of the network that is tried
_SYNCHRONISED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, SyncBatchNorm2d)


def probe_normalizer(
    factory: Callable[..., Any], node: dict[str, Any], trainer: Mapping[str, Any] | None = None
) -> None:
    """Builds one layer of a normalizer and raises ConfigError, naming the key, for values that it cannot be meant with.

    So it does for one that several processes of a `trainer` (resolved) cannot train: whose statistics cannot be
    averaged (``averages_statistics = False``), or that synchronising would replace by torch's own.

    torch's own layers take any eps and momentum; the ranges of both are checked here for every layer that has them.
    """
    name = node["_target_"]
    with full_keys({"normalizer": node}, "normalizer"):
        try:
            layer = factory(num_features=CHANNELS)
        except ArgumentError:
            raise
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"normalizer: {name} could not be built ({first_line(error)})") from error
    if not isinstance(layer, nn.Module):
        raise ConfigError(f"normalizer._target_: {name} makes a {type(layer).__name__} and not a torch.nn.Module")
    try:
        parameter_roles(layer)
        statistics_depend_on(layer)
    except ValueError as error:
        raise ConfigError(f"normalizer._target_: {error}") from None
    if factory(num_features=CHANNELS) is layer:
        raise ConfigError(f"normalizer._target_: {name} makes the same layer at each call, and each site needs its own")
    trainer = trainer or {}
    several = trainer.get("devices", 1) * trainer.get("num_nodes", 1) > 1
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
        _probe_own(layer, name)
    eps, momentum = getattr(layer, "eps", None), getattr(layer, "momentum", None)
    if "eps" in node and isinstance(eps, int | float) and not 0 < eps < math.inf:
        raise ConfigError(f"normalizer.eps: {eps!r} must be larger than 0: it is added to the variance, as 1e-5 is")
    if "momentum" in node and isinstance(momentum, int | float) and not 0 < momentum <= 1:
        raise ConfigError(
            f"normalizer.momentum: {momentum!r} must be larger than 0 and at most 1: it is the share of a batch in the "
            "running statistics (or null, for their mean over all batches)"
        )


def _probe_own(layer: nn.Module, name: str) -> None:
    """Raises ConfigError for a layer of the user's own that changes a shape, or keeps what no checkpoint holds."""
    x = torch.randn(BATCH, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            y = layer.train()(x)
    except Exception:  # it may need a GPU; what else is wrong shows where it trains
        y = x
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


def probe_network(network: Any, config: dict[str, Any]) -> None:
    """Raises ConfigError for what a model's function made where that is not a network."""
    if not isinstance(network, nn.Module):
        name = config["model"]["_target_"]
        raise ConfigError(f"model._target_: {name} makes a {type(network).__name__} and not a torch.nn.Module")


def probe_data(data: Any, config: dict[str, Any]) -> None:
    """Raises ConfigError for a data set of the user's own that lacks what a run and its table need."""
    name = config["data"]["_target_"]
    for key in ("scale", "licence", "class_names", "mean_std"):
        try:
            value = getattr(data, key)
        except (NotImplementedError, AttributeError):
            raise ConfigError(
                f"data._target_: {name} has no {key}; onlinenorm.data.ImageDataModule says what a data set provides"
            ) from None
        if key == "scale" and not is_label(value):
            raise ConfigError(f"data._target_: {name}.scale is {value!r}; it is {LABEL}, such as flowers")
        if key == "licence" and (not isinstance(value, str) or not value.strip() or "\n" in value):
            raise ConfigError(f"data._target_: {name}.licence is {value!r}; say in a line how the images may be used")
    if name not in NAMED["data"] and data.scale == COMPARABLE:
        raise ConfigError(
            f"data._target_: {name}.scale is {COMPARABLE!r}, which published figures are of; name it otherwise"
        )


def probe_batch(config: dict[str, Any], factory: Callable[..., Any], in_channels: int, image_size: int) -> None:
    """Raises ConfigError where a training batch leaves a layer of torch's norms a single value to normalise with.

    So it does where a network of the user's own does not give a logit for each class.

    Args:
        config: of the run, its trainer resolved.
        factory: of its normalizer.
        in_channels, image_size: of the images.
    """
    own = config["model"]["_target_"] not in NAMED["model"]
    if not own and not any(isinstance(layer, _NormBase) for layer in factory(num_features=CHANNELS).modules()):
        return
    trainer = {"devices": 1, "num_nodes": 1, "accumulate_grad_batches": 1, "sync_batchnorm": False} | config["trainer"]
    parts = trainer["accumulate_grad_batches"]
    parts *= 1 if trainer["sync_batchnorm"] else trainer["devices"] * trainer["num_nodes"]
    batch = max(config["recipe"]["batch_size"] // parts, 1)
    try:
        with torch.no_grad(), FakeTensorMode(), torch.compiler.set_stance("force_eager"):  # shapes without numbers
            network = build(config, "model", normalizer=factory, num_classes=CLASSES, in_channels=in_channels)
            probe_network(network, config)
            logits = network.train()(torch.empty(batch, in_channels, image_size, image_size))
    except (RuntimeError, NotImplementedError):
        return  # a layer of somebody's own that needs numbers
    except ValueError as error:
        if not str(error).startswith("Expected more than 1"):
            raise
        alone = "spatial" in str(error)  # InstanceNorm: whatever the batch
        raise ConfigError(
            f"normalizer: {config['choices']['normalizer']} has a single value a channel to take statistics of: images "
            f"of {image_size} pixels end in maps of 1 x 1{'' if alone else ' and a batch is one image'}; use a larger "
            f"data.image_size{'' if alone else ' or recipe.batch_size'}, or another normalizer"
        ) from error
    if own and (not isinstance(logits, torch.Tensor) or logits.shape != (batch, CLASSES)):
        made = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ConfigError(
            f"model._target_: {config['model']['_target_']} built with num_classes={CLASSES} makes {made} of {batch} "
            f"images, and not their logits, [{batch}, {CLASSES}]"
        )
