"""The errors that data raise."""


class DataError(ValueError):
    """A dataset that is missing, partial or inconsistent; the message says what, where and what to do."""

    exit_code = 1


class UnreadableImageError(DataError):
    """An image that no decoder can read, or more of them than `unreadable_limit` allows."""
