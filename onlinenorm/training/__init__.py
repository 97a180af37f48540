"""Training: recipe rules, the Lightning modules and what a run leaves behind."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onlinenorm.training.module import ImageClassifier
    from onlinenorm.training.trainer import build_trainer

__all__ = ["ImageClassifier", "build_trainer"]
_MODULES = {"ImageClassifier": "module", "build_trainer": "trainer"}


def __getattr__(name: str):
    if name in _MODULES:  # on demand: a wrong key is an error before torch and Lightning are loaded
        return getattr(importlib.import_module(f"onlinenorm.training.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'onlinenorm.training' has no attribute {name!r}")
