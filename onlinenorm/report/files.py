"""Writes a set of files so that a reader sees each either as it was or complete."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from onlinenorm.errors import ReportError


def write_all(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Writes all files beside their places, renames when all are on disk; raises ReportError if it cannot."""
    staged: list[tuple[Path, Path]] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=folder)
            staged.append((Path(temporary), folder / name))
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
        for temporary, final in staged:
            os.replace(temporary, final)
    except OSError as error:
        raise ReportError(f"{folder}: cannot write the report: {error}. Name another folder with --output") from error
    finally:
        for temporary, _ in staged:
            temporary.unlink(missing_ok=True)
