"""What is said of images that cannot be decoded: an error for one, or for more than the allowed share of a split."""

from pathlib import Path

from onlinenorm.errors import DataError, UnreadableImageError

# What is to be done about one, where none is to be left out
CURE = (
    "go on without it with data.on_unreadable=skip, which counts and lists such images: one of a split, or more up to "
    "the fraction data.unreadable_limit"
)


def unreadable_image(cause: str, file: str) -> UnreadableImageError:
    """The error of on_unreadable="raise".

    Args:
        cause: which image, and why.
        file: what to replace.
    """
    return UnreadableImageError(f"{cause}. Replace {file}, or {CURE}.", key="on_unreadable")


def no_memory(path: Path) -> DataError:
    """The error of an image that is too large to decode: no other would take its place for long."""
    return DataError(
        f"{path} takes more memory to decode than is left; use fewer data.num_workers, or a smaller copy of the image",
        key="num_workers",
    )


def allowed(images: int, limit: float) -> int:
    """How many of a split's images may be unreadable: the share `limit`, and one at least unless that is 0.

    Without that one nothing could be skipped in sets of less than 1 / `limit` images.
    """
    return max(int(limit * images), 1) if limit > 0 else 0


def check_share(unreadable: list[str], split: str, images: int, limit: float, last: str) -> None:
    """Raises UnreadableImageError where more of a split's images are unreadable than `allowed`.

    Args:
        unreadable: paths of both splits, each below its split's name.
        split: "train" or "val".
        images: of the split.
        limit: from 0 to 1.
        last: the image that was met last.
    """
    count = sum(path.startswith(f"{split}/") for path in unreadable)
    if count > (most := allowed(images, limit)):
        raise UnreadableImageError(
            f"{count} of {images} images in {split}/ cannot be decoded, and the fraction {limit:g} allows {most}; the "
            f"last is {last}. Repair the dataset, or raise data.unreadable_limit.",
            key="unreadable_limit",
        )
