"""Labels of image sets, which stand on every figure that is reported of a run on them."""

import re
from typing import Any

COMPARABLE = "imagenet"  # the one that the published figures are of
LABEL = "a short text of letters, digits, spaces and . , _ + -"
UNKNOWN = "unknown"


def is_label(value: Any) -> bool:
    """Whether a data set of the user's own may be labelled so: `LABEL`, at most 40 characters."""
    return isinstance(value, str) and value != UNKNOWN and re.fullmatch(r"\w[\w .,+-]{0,39}", value) is not None
