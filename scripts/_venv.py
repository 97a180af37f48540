"""How every command starts and ends: in .venv where the calling Python lacks packages, and without tracebacks."""

from __future__ import annotations  # so that an older Python gets as far as to say that it is one

import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".venv" / "bin" / "python"
OLDEST = (3, 11)  # as pyproject.toml has it
# The modules of the extras train, report and deploy, which scripts/environment.sh installs.
NEEDED = (
    "torch", "torchvision", "pytorch_lightning", "hydra", "wandb", "tensorboard", "rich", "platformdirs", "yaml",
    "matplotlib", "scipy", "pandas", "jinja2", "safetensors",
)  # fmt: skip

_former: dict[int, Any] = {}  # signal -> its handler before `enter`


def enter() -> None:
    """Ends a command that is asked to stop during its imports without a word, and starts it in the right Python.

    Replaces train.py or a script by itself under .venv's Python, where this one is too old or lacks packages.

    Without a .venv it goes on, for a command needs but some of the packages; one that is missing ends it in a line. A
    module that is imported changes nothing.
    """
    program = Path(sys.argv[0]).resolve()
    if ROOT / "scripts" not in program.parents and program != ROOT / "train.py":
        return
    if hasattr(sys.modules["__main__"], "__file__"):  # else a worker of it, which is spawned and imports it
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            if signal.getsignal(number) != signal.SIG_IGN:
                _former[number] = signal.signal(number, lambda signum, _: os._exit(128 + signum))
    lacking = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    old = sys.version_info < OLDEST
    if not (lacking or old):
        return
    if PYTHON.exists() and Path(sys.prefix) != PYTHON.parents[1]:
        os.execv(PYTHON, [str(PYTHON), *sys.argv])
    if old:
        found = sys.version.split()[0]
        sys.exit(
            f"{program.name}: Python {'.'.join(map(str, OLDEST))} or newer is needed, and this is {found}; run "
            "PYTHON=/path/to/python3 scripts/environment.sh, which makes .venv of that one"
        )
    sys.excepthook = _tell_missing
    if "torch" in lacking:
        raise ModuleNotFoundError(name="torch")


def _tell_missing(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """The hook for what ends the process: a package that is not installed is a line, anything else a traceback."""
    if not isinstance(error, ModuleNotFoundError) or not error.name or error.name.startswith(("onlinenorm", "scripts")):
        sys.__excepthook__(kind, error, traceback)
        return
    print(
        f"{Path(sys.argv[0]).name}: {sys.executable} has no {error.name.partition('.')[0]}; run "
        "scripts/environment.sh, which makes .venv, or pip install -e '.[train,report,deploy]'",
        file=sys.stderr,
    )


def run_main(main: Callable[[], int | None]) -> None:
    """Ends the process with `main`'s exit code; a deliberate error is one line."""
    from onlinenorm.errors import cli_errors

    with cli_errors():
        for number, handler in _former.items():
            signal.signal(number, handler)
        sys.exit(main())


enter()
