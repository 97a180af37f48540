"""A limited number of images that stands for the whole set: the classes keep their shares."""

from typing import Any

import numpy as np

RULE = "classes in proportion, evenly spaced in each in index order"


def proportional(labels: np.ndarray, limit: int | None) -> np.ndarray | None:
    """Rising indices of `limit` images, or None where that is all of them.

    Systematic sampling: the middles of `limit` equal parts of the images sorted by class (then by index). A class of n
    of N images gets n * limit / N of them, rounded down or up, and nothing is drawn at random.
    """
    count = len(labels)
    if limit is None or limit >= count:
        return None
    by_class = np.argsort(labels, kind="stable")
    return np.sort(by_class[(2 * np.arange(limit) + 1) * count // (2 * limit)])


class LimitedSource:
    """Some images of a `PixelSource`.

    Args:
        source: the whole.
        chosen: int64, the indices in it.
    """

    def __init__(self, source: Any, chosen: np.ndarray):
        self._source, self._chosen = source, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def images(self, indices: np.ndarray) -> np.ndarray:
        return self._source.images(self._chosen[indices])

    def labels(self, indices: np.ndarray) -> np.ndarray:
        return self._source.labels(self._chosen[indices])

    def update_digest(self, digest: Any) -> None:
        """Feeds the whole and which images of it are taken."""
        self._source.update_digest(digest)
        digest.update(self._chosen.astype(np.int64))
