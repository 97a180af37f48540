"""The settings of an OnlineNorm layer: the values that each may take."""

import math

from torch import Tensor, nn

from onlinenorm.arguments import check_choice
from onlinenorm.errors import ArgumentError
from onlinenorm.ops import BACKENDS, ERROR_COMPENSATIONS

STATISTICS = ("global", "local")
EXCHANGES = ("auto", "gather")
_CHOICES = {
    "error_compensation": ERROR_COMPENSATIONS,
    "backend": ("auto", *BACKENDS),
    "statistics": STATISTICS,
    "exchange": EXCHANGES,
}
LARGEST_CLAMP = 65504.0  # of float16, in which a network may be evaluated: no limit beyond it can be told to its clamp
_RANGES = {
    "alpha_fwd": (0, 1),
    "alpha_bkw": (0, 1),
    "eps": (0, math.inf),
    "clamp_value": (0, LARGEST_CLAMP),
    "layer_scaling_eps": (0, math.inf),
    "gradient_scale": (0, math.inf),
}


def _inside(key: str, value: float | Tensor, low: float, high: float) -> float:
    """``value`` as a float strictly between the bounds."""
    value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value < high:
        raise ArgumentError(key, f"{value!r} must be a number with {low:g} < {key} < {high:g}")
    return float(value)


def check_clamp_value(value: float) -> float:
    """A clamp value as a float. Raises ArgumentError where it is none: 0 < clamp_value < LARGEST_CLAMP."""
    return _inside("clamp_value", value, *_RANGES["clamp_value"])


class CheckedSettings(nn.Module):
    """A layer whose settings are checked wherever they are set."""

    num_features: int

    def __setattr__(self, name: str, value) -> None:
        """Settings are checked wherever they are set. Raises ValueError for one outside its range."""
        if name in _RANGES:
            value = _inside(name, value, *_RANGES[name])
        elif name in _CHOICES:
            check_choice(name, value, _CHOICES[name])
        elif name == "layer_scaling_group_size" and value is not None:
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or value < 1 or self.num_features % value:
                divides = f"must be a whole number that divides num_features={self.num_features}"
                raise ArgumentError(name, f"{value!r} {divides}, or None for all channels")
        super().__setattr__(name, value)
