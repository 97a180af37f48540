"""What sets with classes of their own ask of class folders."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from onlinenorm.data.index import name_few
from onlinenorm.errors import DataError


def validation_folder(folder: Path, names: Sequence[str] = ("val", "test")) -> Path:
    """The first of the folders `names` that is there; DataError, with what is there instead, if none is."""
    for name in names:
        if (folder / name).is_dir():
            return folder / name
    raise DataError(f"{folder} holds train/ and neither {'/ nor '.join(names)}/; add the validation images", key="root")


def check_classes(where: Path, found: Iterable[str], expected: Iterable[str], title: str) -> None:
    """Raises DataError, with the names, where the classes `found` at `where` are not those of the set `title`."""
    found, expected = set(found), set(expected)
    differences = (("missing", expected - found), ("unknown", found - expected))
    if told := [f"{what}: {name_few(sorted(names))}" for what, names in differences if names]:
        raise DataError(
            f"{where} does not hold the {len(expected)} classes of {title}; {'; '.join(told)}. A label is a position "
            "in their sorted list: unpack the set again",
            key="root",
        )
