"""What is said of images that cannot be decoded: an error for one, or for more than the allowed share of a split."""

from onlinenorm.errors import UnreadableImageError


def unreadable_image(cause: str, file: str) -> UnreadableImageError:
    """The error of on_unreadable="raise".

    Args:
        cause: which image, and why.
        file: what to replace.
    """
    return UnreadableImageError(
        f"{cause}. Replace {file}, or go on without it with data.on_unreadable=skip, which counts and lists such "
        "images.",
        key="on_unreadable",
    )


def check_share(unreadable: list[str], split: str, images: int, limit: float, last: str) -> None:
    """Raises UnreadableImageError where more than the share `limit` of a split's images are unreadable.

    Args:
        unreadable: paths of both splits, each below its split's name.
        split: "train" or "val".
        images: of the split.
        limit: from 0 to 1.
        last: the image that was met last.
    """
    count = sum(path.startswith(f"{split}/") for path in unreadable)
    if count > limit * images:
        raise UnreadableImageError(
            f"{count} of {images} images in {split}/ cannot be decoded, more than the allowed fraction {limit:g}; the "
            f"last is {last}. Repair the dataset, or raise data.unreadable_limit.",
            key="unreadable_limit",
        )
