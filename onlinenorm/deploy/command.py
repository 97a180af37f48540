"""What the deployment scripts share: an error is one line and an exit code."""

import sys
from collections.abc import Callable

from onlinenorm.data import DataError
from onlinenorm.errors import ConfigError, DeployError, RunError

ALLOW = "build this class of a package of your own that the run names, which runs its code; may be repeated"


def exit_code(name: str, program: Callable[[], int]) -> int:
    """The exit code of `program`; a deliberate error becomes one line on stderr and its own code."""
    try:
        return program()
    except (DeployError, ConfigError, RunError, DataError) as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
