"""What ends a run on purpose, and how the user is told."""

import contextlib
import sys

import torch

from onlinenorm.data import DataError


class ConfigError(ValueError):
    """A configuration that cannot be meant; the message starts with the key."""

    exit_code = 2


class RunError(RuntimeError):
    """A run that cannot start or go on; the message says what happened, where, and what to do."""

    exit_code = 1


class Interrupted(RunError):
    """The run was asked to stop by a signal and has saved itself."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.exit_code = 128 + signum


@contextlib.contextmanager
def told():
    """Context whose deliberate errors end the program with their message alone and their exit code."""
    try:
        yield
    except (ConfigError, RunError, DataError) as error:
        print(error, file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 1))
    except torch.OutOfMemoryError as error:
        advice = (
            "try trainer.accumulate_grad_batches=2: the same run, its batches in smaller parts (but for BatchNorm, "
            "whose statistics are then of the parts)"
        )
        print(f"{str(error).splitlines()[0]}\nThe GPU's memory is too small for this batch; {advice}", file=sys.stderr)
        sys.exit(1)
