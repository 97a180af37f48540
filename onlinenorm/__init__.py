"""Online Normalization with activation clamping, and the harness that reproduces its ImageNet results."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onlinenorm.normalizers import OnlineNorm1d, OnlineNorm2d, convert, remove_clamping

__version__ = "0.1.0"
__all__ = ["OnlineNorm1d", "OnlineNorm2d", "convert", "remove_clamping"]


def __getattr__(name: str):
    if name in __all__:  # on demand: a command line that asks for help does not wait for torch
        return getattr(importlib.import_module("onlinenorm.normalizers"), name)
    raise AttributeError(f"module 'onlinenorm' has no attribute {name!r}")
