"""Compiling Triton kernels for a GPU on a machine that has none."""

import os
import subprocess
import sys
from pathlib import Path


def printed_by(source: str, folder: Path) -> list[str]:
    """Lines that a program prints in a process where Triton compiles, which it does not where it interprets."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    script = folder / "compile_kernels.py"  # Triton reads the source of what it compiles
    script.write_text(source)
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()
