"""Whether a run that goes on finds the files it began with, of which a few damaged ones may have been replaced."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from onlinenorm.data.index import FolderIndex

_REPLACED = 0.01  # share of the files that may have another size in a run that is continued


def described_files(indexes: Sequence[FolderIndex]) -> dict[str, Any]:
    """What a checkpoint keeps of the files of both splits: their sizes one by one, names in a digest."""
    sizes = torch.from_numpy(np.concatenate([index.sizes for index in indexes]))
    return {"names": [index.names_digest for index in indexes], "sizes": sizes}


def replaced_files(before: dict[str, Any], indexes: Sequence[FolderIndex]) -> list[str] | None:
    """Paths of the files whose size differs from that in `before`, of `described_files`; None for other images.

    The same images are those of the same names and labels, of which at most `_REPLACED` (or three) have another size.
    """
    now = described_files(indexes)
    if before["names"] != now["names"]:
        return None
    changed = (before["sizes"] != now["sizes"]).nonzero().flatten().tolist()
    if len(changed) > max(3, int(_REPLACED * len(now["sizes"]))):
        return None
    train, val = indexes
    return [
        f"train/{train.relative_path(i)}" if i < len(train) else f"val/{val.relative_path(i - len(train))}"
        for i in changed
    ]
