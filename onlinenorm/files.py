"""Files that appear whole or not at all: who reads one sees the former content or the new, never a part of it."""

import os
from pathlib import Path

from onlinenorm.errors import RunError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces `path` by a file with `content`: readers see the old content or the new, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RunError(
            f"{path}: could not be written ({error}); free some space and run the same command again"
        ) from error
