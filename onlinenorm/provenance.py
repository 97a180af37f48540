"""What figures were made with: commit, versions, hardware and command."""

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PROJECT = Path(__file__).resolve().parents[1]  # of a checkout; installed, the folder of all packages
PACKAGE = Path(__file__).parent.name


def environment(world_size: int, own: Sequence[Path] = ()) -> dict[str, Any]:
    """What a run was computed with: command, git state (see there of `own`), versions, hardware, processes."""
    packages = ("torch", "torchvision", "pytorch-lightning", "triton", "numpy", "onlinenorm")
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda or "none"}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "none"
    return {
        "command": " ".join([Path(sys.executable).name, os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "git": git_state(own=own),
        "versions": versions,
        "hardware": hardware(),
        "world_size": world_size,
    }


def git_state(project: Path = PROJECT, own: Sequence[Path] = ()) -> dict[str, Any]:
    """{"commit", "dirty"} of the repository that keeps `project`; without one $GIT_COMMIT, else "unknown", and None.

    Dirty are changed files, and files that are not tracked where code and configurations of a run are: package,
    configs/, train.py and `own`. A package that the repository ignores, as an environment within it, is not kept there.
    """

    def git(*arguments: str, check: bool = True) -> str:
        done = subprocess.run(["git", *arguments], cwd=project, capture_output=True, text=True, check=check)
        return done.stdout.strip()

    try:
        top = Path(git("rev-parse", "--show-toplevel")).resolve()
        if git("check-ignore", PACKAGE, check=False):
            raise FileNotFoundError
        code = [PACKAGE, "configs", "train.py", *(str(file) for file in own if file.is_relative_to(top))]
        untracked = git("ls-files", "--others", "--exclude-standard", "--", *code)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(untracked or git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": os.environ.get("GIT_COMMIT", "unknown"), "dirty": None}


def hardware() -> str:
    """GPUs, or the processor and the number of cores this process may use."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {device_name(on_gpu=True)}"
    return device_name(on_gpu=False)


def device_name(on_gpu: bool) -> str:
    """The name of the first GPU, or that of the processor and the number of cores this process may use."""
    if on_gpu:
        return torch.cuda.get_device_name(0)
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    return f"{model}, {len(os.sched_getaffinity(0))} cores"
