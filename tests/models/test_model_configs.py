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
GIVEN_BY_TRAINING = {"normalizer", "num_classes", "in_channels"}
WITHOUT_BOTTLENECKS = {"resnet18", "resnet34"}


def test_every_network_has_a_config():
    assert {path.stem for path in CONFIGS} == {name for name in models.__all__ if name[-1].isdigit()}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_a_constructor_call_with_the_defaults(path):
    config = OmegaConf.load(path)
    assert config["_target_"] == f"onlinenorm.models.{path.stem}"
    parameters = inspect.signature(getattr(models, path.stem)).parameters
    expected = {name: p.default for name, p in parameters.items() if name not in GIVEN_BY_TRAINING}
    if path.stem in WITHOUT_BOTTLENECKS:
        del expected["bottleneck_stride"]
    assert {key: value for key, value in config.items() if key != "_target_"} == expected


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_builds_its_network(path):
    with torch.device("meta"):
        model = hydra.utils.instantiate(OmegaConf.load(path), normalizer=OnlineNorm2d, num_classes=10, in_channels=1)
    norms = sum(isinstance(m, OnlineNorm2d) for m in model.modules())
    assert norms == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert model.fc.out_features == 10 and model.conv1.in_channels == 1
