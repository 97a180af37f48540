"""What ends a run on purpose, and how the user is told."""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch

from onlinenorm.data import DataError

LEADER_SECONDS = 3.0  # for which the other processes leave the word to the first


class ConfigError(ValueError):
    """A configuration that cannot be meant; the message starts with the key."""

    exit_code = 2


class RunError(RuntimeError):
    """A run that cannot start or go on; the message says what happened, where, and what to do."""

    exit_code = 1


class Interrupted(RunError):
    """The run was asked to stop by a signal, and has saved itself if training had begun."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.exit_code = 128 + signum


@contextlib.contextmanager
def told():
    """Context whose deliberate errors end the program with their message alone and their exit code.

    Of several processes that end for the same reason one says so.
    """
    try:
        yield
    except (ConfigError, RunError, DataError) as error:
        _end(str(error), getattr(error, "exit_code", 1), isinstance(error, Interrupted))
    except torch.OutOfMemoryError as error:
        advice = (
            "try trainer.accumulate_grad_batches=2: the same run, its batches in smaller parts (but for BatchNorm, "
            "whose statistics are then of the parts)"
        )
        _end(f"{str(error).splitlines()[0]}\nThe GPU's memory is too small for this batch; {advice}", 1)
    except KeyboardInterrupt:
        _end("Ctrl-C", 128 + signal.SIGINT)


def _end(message: str, exit_code: int, interrupted: bool = False) -> NoReturn:
    from onlinenorm.training.launch import is_child, is_leader  # which raises the errors of this module

    leader, child = True, False
    with contextlib.suppress(ConfigError):  # a set-up that is only half described
        leader, child = is_leader(), is_child()
    if not leader:
        if interrupted:  # and the first process says it; Lightning's launcher kills it when a child reports a failure
            sys.exit(0 if child else exit_code)
        # The first process says it, and its launcher ends this one; if not, the trouble is here alone.
        parent, deadline = os.getppid(), time.monotonic() + LEADER_SECONDS
        while time.monotonic() < deadline:
            if os.getppid() != parent:
                sys.exit(exit_code)
            time.sleep(0.05)
    if (file := os.environ.get("TORCHELASTIC_ERROR_FILE")) and not interrupted:  # what torchrun's table shows
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}), encoding="utf-8")
    print(message, file=sys.stderr)
    sys.exit(exit_code)
