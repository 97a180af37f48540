"""Labels of image sets, which stand on every figure that is reported of a run on them, and of rows in tables."""

import functools
import re
from pathlib import Path
from typing import Any

import yaml

COMPARABLE = "imagenet"  # the one that the published figures are of
LABEL = "a text of at most 40 letters, digits, spaces and . , _ + - ( )"
COLOUR = 'a colour such as "#0072B2", in quotes'
UNKNOWN = "unknown"
_PUBLISHED = Path(__file__).parent / "report" / "published.yaml"


def is_label(value: Any) -> bool:
    """Whether a data set or normalizer of the user's own may be labelled so: `LABEL`."""
    return isinstance(value, str) and value != UNKNOWN and re.fullmatch(r"\w[\w .,+()-]{0,39}", value) is not None


def is_colour(value: Any) -> bool:
    """Whether a row may be drawn so: `COLOUR`."""
    return isinstance(value, str) and re.fullmatch(r"#[0-9A-Fa-f]{6}", value) is not None


def published_label(section: str, name: str) -> str:
    """The key in a section of report/published.yaml ("scales", "rows", ...) that `name` would be taken for, or "".

    Keys, labels and short forms are compared by their letters and digits alone: ImageNet is imagenet.
    """
    return _published(section).get(plain(name), "")


def plain(name: str) -> str:
    """The letters and digits of a label, in one case."""
    return re.sub(r"[\W_]+", "", name).casefold()


@functools.cache
def _published(section: str) -> dict[str, str]:
    entries = yaml.safe_load(_PUBLISHED.read_text(encoding="utf-8"))[section]
    return {
        plain(text): key
        for key, entry in entries.items()
        for text in (key, *(entry[word] for word in ("label", "short") if word in entry))
    }
