"""Arguments by their keys: checks that name the key, the range and the nearest right value."""

import difflib
from typing import Any

from onlinenorm.errors import ArgumentError


def check_choice(key: str, value: object, options: tuple[str, ...]) -> None:
    """Raises ValueError, naming the options and the nearest one, unless `value` is one of `options`."""
    if value in options:
        return
    near = difflib.get_close_matches(str(value), options, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ArgumentError(key, f"{value!r} is not one of {', '.join(options)}{hint}")


def check_int(key: str, value: object, low: int, high: int | None = None, optional: bool = False) -> None:
    """Raises ValueError, naming the range, unless `value` is a whole number in [low, high] (or None where optional)."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        span = f"{low} or larger" if high is None else f"from {low} to {high}"
        raise ArgumentError(key, f"{value!r} is not a whole number {span}{' (or null)' if optional else ''}")


def check_fraction(key: str, value: object) -> None:
    """Raises ValueError unless `value` is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ArgumentError(key, f"{value!r} is not a fraction from 0 to 1")


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}; empty mappings stay as leaves."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
