"""How every command starts and ends: in .venv where the calling Python lacks packages, and with errors in a line."""

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".venv" / "bin" / "python"
NEEDED = ("torch", "torchvision", "pytorch_lightning", "hydra", "matplotlib", "scipy", "rich", "yaml")


def enter() -> None:
    """Replaces a command of this folder by itself under .venv's Python, where this one lacks packages and there is one.

    Ends it where torch is missing and there is no .venv. A module that is imported changes nothing.
    """
    program = Path(sys.argv[0]).resolve()
    lacking = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if not lacking or ROOT / "scripts" not in program.parents:
        return
    if PYTHON.exists() and Path(sys.prefix) != PYTHON.parents[1]:
        os.execv(PYTHON, [str(PYTHON), *sys.argv])
    if "torch" in lacking:
        sys.exit(
            f"{program.name}: {sys.executable} has no torch, and {PYTHON} is not there; run scripts/environment.sh"
        )


def run_main(main: Callable[[], int | None]) -> None:
    """Ends the process with `main`'s exit code; a deliberate error is one line."""
    from onlinenorm.errors import cli_errors

    with cli_errors():
        sys.exit(main())


enter()
