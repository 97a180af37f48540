import inspect
from pathlib import Path

import hydra
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from onlinenorm import models
from onlinenorm.normalizers import OnlineNorm2d

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "model").glob("*.yaml"))
OURS = {name for name in models.__all__ if name[-1].isdigit()}
GIVEN_BY_TRAINING = {"normalizer", "num_classes", "in_channels"}
DECIDED_BY_TRAINING = {"compile": "auto"}
WITHOUT_BOTTLENECKS = {"resnet18", "resnet34"}


def test_every_network_has_a_config():
    targets = {path.stem: OmegaConf.load(path)["_target_"] for path in CONFIGS}
    assert targets.items() >= {name: f"onlinenorm.models.{name}" for name in OURS}.items()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_a_constructor_call_with_the_defaults(path):
    config = OmegaConf.load(path)
    parameters = inspect.signature(hydra.utils.get_object(config.pop("_target_"))).parameters
    expected = {name: p.default for name, p in parameters.items() if name not in GIVEN_BY_TRAINING}
    expected |= {key: value for key, value in DECIDED_BY_TRAINING.items() if key in expected}
    if path.stem in WITHOUT_BOTTLENECKS:
        del expected["bottleneck_stride"]
    assert dict(config) == expected


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_builds_its_network(path):
    config = OmegaConf.load(path)
    given = {"normalizer": OnlineNorm2d, "num_classes": 10, "in_channels": 1}
    given |= {key: False for key in DECIDED_BY_TRAINING if key in config}
    with torch.device("meta"):
        model = hydra.utils.instantiate(config, **given).eval()
        logits = model(torch.empty(2, 1, 32, 32))
    norms = sum(isinstance(m, OnlineNorm2d) for m in model.modules())
    assert norms == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert logits.shape == (2, 10)
