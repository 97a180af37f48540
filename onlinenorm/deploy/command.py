"""What the deployment scripts share: one line for an error, files that appear whole or not at all."""

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from onlinenorm.data import DataError
from onlinenorm.errors import ConfigError, DeployError, RunError

ALLOW = "build this class of a package of your own that the run names, which runs its code; may be repeated"


def told(name: str, program: Callable[[], int]) -> int:
    """The exit code of `program`; a deliberate error becomes one line on stderr and its own code, or 2."""
    try:
        return program()
    except (DeployError, ConfigError, RunError, DataError) as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code if isinstance(error, DeployError) else 2


@contextlib.contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A folder for the files of `output`: moved there together when the block succeeds, dropped when it does not.

    Raises DeployError where `output` cannot be written.
    """
    missing = [folder for folder in (output, *output.parents) if not folder.exists()]
    try:
        output.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".partial-", dir=output))
    except OSError as error:
        raise DeployError(
            f"{output}: cannot be written to ({error.strerror}); name another folder with --output"
        ) from error
    try:
        yield work
        for file in sorted(work.iterdir()):
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        for file in sorted(work.iterdir()):
            os.chmod(file, 0o644)
            os.replace(file, output / file.name)
    except OSError as error:
        raise DeployError(
            f"{output}: could not be written ({error}); free some space or name another --output"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        for folder in missing:  # of a folder made here for nothing, nothing stays
            with contextlib.suppress(OSError):
                folder.rmdir()
