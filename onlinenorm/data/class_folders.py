"""What sets with classes of their own ask of class folders, and images that a list sorts into them."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onlinenorm.data.index import FolderIndex, name_few, pack_names
from onlinenorm.errors import DataError
from onlinenorm.text import plural


class MovedIndex(FolderIndex):
    """A FolderIndex whose images are named as in class folders, CLASS/FILE, and lie elsewhere below `folder`.

    Args:
        place: where, of `{wnid}` and `{file}`. Others as FolderIndex.
    """

    def __init__(self, folder: Path, place: str, class_names: list[str], **arrays: Any):
        super().__init__(folder, class_names, **arrays)
        self.place = place

    def path(self, index: int) -> Path:
        wnid, _, file = self.relative_path(index).partition("/")
        return self.folder / self.place.format(wnid=wnid, file=file)


def sorted_by_list(index: FolderIndex, wnids: Mapping[str, str], source: Path) -> MovedIndex:
    """Images that lie together, all in one folder, sorted into classes.

    Args:
        index: of one class, that folder.
        wnids: file -> class.
        source: the list that says so, for messages.

    Raises DataError for files that it does not name, and the reverse.
    """
    place = index.class_names[0]
    sizes = {index.relative_path(i).removeprefix(f"{place}/"): size for i, size in enumerate(index.sizes.tolist())}
    check_listed(source, wnids, sizes, f"{place}/")
    classes = sorted(set(wnids.values()))
    order = sorted(wnids, key=lambda name: (wnids[name], name))
    labels = {wnid: label for label, wnid in enumerate(classes)}
    return MovedIndex(
        index.folder,
        f"{place}/{{file}}",
        classes,
        **pack_names([f"{wnids[name]}/{name}" for name in order]),
        labels=np.array([labels[wnids[name]] for name in order], dtype=np.int32),
        sizes=np.array([sizes[name] for name in order], dtype=np.int64),
    )


def check_listed(source: Path, named: Collection[str], present: Collection[str], place: str) -> None:
    """Raises DataError, with the names, where the files that the list `source` names are not those `present`."""
    for names, what in ((set(named) - set(present), "names {} not in"),
                        (set(present) - set(named), "does not name {} of")):  # fmt: skip
        if names:
            raise DataError(
                f"{source} {what.format(plural(len(names), 'file'))} {place}: {name_few(sorted(names))}; unpack the "
                "set again",
                key="root",
            )


def refuse_broken(path: Path) -> None:
    """Raises DataError for a link that leads nowhere."""
    if path.is_symlink() and not path.exists():
        raise DataError(f"{path} is a link that leads nowhere; mend what it leads to, or remove it", key="root")


def validation_folder(folder: Path, names: Sequence[str] = ("val", "test")) -> Path:
    """The first of the folders `names` that is there; DataError, with what is there instead, if none is."""
    for name in names:
        if (folder / name).is_dir():
            return folder / name
        refuse_broken(folder / name)
    raise DataError(f"{folder} holds train/ and no {'/ or '.join(names)}/; add the validation images", key="root")


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
