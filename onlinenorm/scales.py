"""Labels of image sets, which stand on every figure that is reported of a run on them, and of rows in tables."""

import re
from typing import Any

COMPARABLE = "imagenet"  # the one that the published figures are of
LABEL = "a text of at most 40 letters, digits, spaces and . , _ + - ( )"
COLOUR = 'a colour such as "#0072B2", in quotes'
UNKNOWN = "unknown"


def is_label(value: Any) -> bool:
    """Whether a data set or normalizer of the user's own may be labelled so: `LABEL`."""
    return isinstance(value, str) and value != UNKNOWN and re.fullmatch(r"\w[\w .,+()-]{0,39}", value) is not None


def is_colour(value: Any) -> bool:
    """Whether a row may be drawn so: `COLOUR`."""
    return isinstance(value, str) and re.fullmatch(r"#[0-9A-Fa-f]{6}", value) is not None
