"""Swept keys of runs: scripts/sweep.py names the folders <key>=<value>[,<key>=<value>]/<normalizer>/seed<k>."""

import math
import re
from collections.abc import Iterable
from typing import Any

from onlinenorm.records import lookup
from onlinenorm.report.settings import NOT_SET

OFF = "off"
CLAMP_KEY = "normalizer.clamp_value"
_NEXT_PAIR = re.compile(r",(?=[+~]*[\w.@]+=)")


def swept(name: str) -> dict[str, str]:
    """Keys and values in the folder names above a run, e.g. {"normalizer.clamp_value": "3"}."""
    pairs = [pair for part in name.split("/")[:-2] if "=" in part for pair in _NEXT_PAIR.split(part)]
    return {
        key.lstrip("+~"): plain_value(value.strip("'")) for key, _, value in (pair.partition("=") for pair in pairs)
    }


def plain_value(value: Any) -> str:
    """One spelling for a number: "5" for "5.0", 5 and 5.0."""
    try:
        return f"{float(value):.12g}"
    except (TypeError, ValueError):
        return str(value)


def value_of(run: Any, key: str) -> str:
    """Value of a key in a run, in one spelling; OFF for the clamp value of a network that does not clamp.

    Of a group, as `model`, what was chosen of it.
    """
    if key == CLAMP_KEY and lookup(run.config, "normalizer.error_compensation", "clamp") != "clamp":
        return OFF
    value = lookup(run.config, key, NOT_SET)
    if isinstance(value, dict):
        value = lookup(run.config, "choices", {}).get(key, NOT_SET)
    return swept(run.name).get(key) or plain_value(value)


def in_order(values: Iterable[str]) -> list[str]:
    """Numbers by size, then words, by the size of numbers within them."""
    return sorted(set(values), key=lambda value: (number(value) is None, number(value) or 0.0, natural(value)))


def natural(words: str) -> list[tuple[bool, float, str]]:
    """A key that sorts numbers within words by size."""
    parts = re.split(r"([0-9.e-]*[0-9])", words)
    return [(number(part) is None, number(part) or 0.0, part) for part in parts]


def number(value: str) -> float | None:
    """The value as a finite number, else None."""
    try:
        found = float(value)
    except ValueError:
        return None
    return found if math.isfinite(found) else None
