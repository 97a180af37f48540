"""What is wrong with a network before it trains: one layer built, one batch sent through without its numbers."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.modules.batchnorm import _NormBase

from onlinenorm.errors import ConfigError
from onlinenorm.training.config_check import build, prefixed
from onlinenorm.training.roles import parameter_roles

CHANNELS = 64  # of the layer that is tried


def probe_normalizer(factory: Callable[..., Any], node: dict[str, Any]) -> None:
    """Builds one layer of a normalizer and raises ConfigError, naming the key, for values that it cannot be meant with.

    torch's own layers take any eps and momentum; the ranges of both are checked here for every layer that has them.
    """
    name = node["_target_"]
    with prefixed("normalizer", node):
        try:
            layer = factory(num_features=CHANNELS)
        except (TypeError, RuntimeError) as error:
            raise ConfigError(f"normalizer: {name} could not be built ({str(error).splitlines()[0]})") from error
    if not isinstance(layer, nn.Module):
        raise ConfigError(f"normalizer._target_: {name} makes a {type(layer).__name__} and not a torch.nn.Module")
    try:
        parameter_roles(layer)
    except ConfigError as error:
        raise ConfigError(f"normalizer._target_: {error}") from None
    eps, momentum = getattr(layer, "eps", None), getattr(layer, "momentum", None)
    if "eps" in node and isinstance(eps, int | float) and not 0 < eps < math.inf:
        raise ConfigError(f"normalizer.eps: {eps!r} must be larger than 0: it is added to the variance, as 1e-5 is")
    if "momentum" in node and isinstance(momentum, int | float) and not 0 < momentum <= 1:
        raise ConfigError(
            f"normalizer.momentum: {momentum!r} must be larger than 0 and at most 1: it is the share of a batch in the "
            "running statistics (or null, for their mean over all batches)"
        )


def probe_batch(config: dict[str, Any], factory: Callable[..., Any], in_channels: int, image_size: int) -> None:
    """Raises ConfigError where a training batch leaves a layer of torch's norms a single value to normalise with.

    Args:
        config: of the run, its trainer resolved.
        factory: of its normalizer.
        in_channels, image_size: of the images.
    """
    if not any(isinstance(layer, _NormBase) for layer in factory(num_features=CHANNELS).modules()):
        return
    trainer = {"devices": 1, "num_nodes": 1, "accumulate_grad_batches": 1, "sync_batchnorm": False} | config["trainer"]
    parts = trainer["accumulate_grad_batches"]
    parts *= 1 if trainer["sync_batchnorm"] else trainer["devices"] * trainer["num_nodes"]
    batch = max(config["recipe"]["batch_size"] // parts, 1)
    try:
        with torch.no_grad(), FakeTensorMode(), torch.compiler.set_stance("force_eager"):  # shapes without numbers
            network = build(config, "model", normalizer=factory, num_classes=2, in_channels=in_channels)
            network.train()(torch.empty(batch, in_channels, image_size, image_size))
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
