"""What ends a command on purpose: errors with exit codes, and the context that prints them."""

import contextlib
import errno
import io
import json
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn, TextIO

from onlinenorm.text import first_line

RANK_ZERO_SECONDS = 3.0  # for which the other processes leave the word to the first


class ArgumentError(ValueError):
    """An argument that cannot be meant: `key` names it, the message says why and what can be."""

    def __init__(self, key: str, message: str):
        super().__init__(key, message)
        self.key = key

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.args[1]}"


class ConfigError(ValueError):
    """A configuration that cannot be meant; the message starts with the key."""

    exit_code = 2


class RunError(RuntimeError):
    """A run that cannot start or go on; the message says what happened, where, and what to do."""

    exit_code = 1


class Diverged(RunError):
    """A loss or the network stopped being finite, at `step` of the run, in `epoch`; both count from 1."""

    def __init__(self, message: str, step: int | None = None, epoch: int | None = None):
        super().__init__(message)
        self.step, self.epoch = step, epoch


class FolderInUse(RunError):
    """Another run is writing to the run folder: nothing was begun, and nothing has failed."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h


class Interrupted(RunError):
    """The run was asked to stop by a signal, and has saved itself if training had begun."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.exit_code = 128 + signum


class DataError(ValueError):
    """A dataset that is missing, partial or inconsistent; the message says what, where and what to do.

    Args:
        message: after the key, where there is one.
        key: the argument that names the cause, as "root", or None.
    """

    exit_code = 1
    on_all_processes = False  # of a run: each raises it at the same step

    def __init__(self, message: str, key: str | None = None):
        super().__init__(f"{key}: {message}" if key else message)
        self.key = key


class UnreadableImageError(DataError):
    """An image that no decoder can read, or more of them than `unreadable_limit` allows."""


class DeployError(ValueError):
    """An input that is missing, damaged or refused, or a form that cannot hold the network; says which and why."""

    exit_code = 2


class VerificationError(DeployError):
    """An export that does not compute what its source computes; it is not written."""

    exit_code = 1


class ReportError(ValueError):
    """A run folder is missing, damaged or belongs into another table; the message names the file and the fix."""

    exit_code = 1


@contextlib.contextmanager
def cli_errors(prefix: str = ""):
    """Context of a command: a deliberate error, one with an `exit_code`, ends it with its message alone and that code.

    Of several processes that end for the same reason one says so. A reader of the output that leaves early, as in
    `| head`, ends the command without a word. `prefix` goes before messages.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_left():
            raise
        drop_output(sys.stdout)
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        _end(f"{prefix}Ctrl-C", 128 + signal.SIGINT)
    except Exception as error:
        if hasattr(error, "exit_code"):
            _end(f"{prefix}{error}", error.exit_code, isinstance(error, Interrupted), _on_all_processes(error))
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            _end(f"{prefix}{error.filename}: {error.strerror}; choose a shorter path", ConfigError.exit_code)
        if not _out_of_memory(error):
            raise
        advice = (
            "try trainer.accumulate_grad_batches=2: the same run, its batches in smaller parts (but for BatchNorm, "
            "whose statistics are then of the parts: another run, in another run_dir)"
        )
        _end(f"{prefix}{first_line(error)}\nThe GPU's memory is too small for this batch; {advice}", 1)


def _on_all_processes(error: BaseException | None) -> bool:
    """Whether all processes of a run end with an error, which may have been given a key since."""
    return error is not None and (getattr(error, "on_all_processes", False) or _on_all_processes(error.__cause__))


def _end(message: str, exit_code: int, interrupted: bool = False, together: bool = False) -> NoReturn:
    rank_zero, child = _place()
    if not rank_zero:
        # and the first process says it; Lightning's launcher kills it when a child reports a failure
        if interrupted or (together and child):
            sys.exit(0 if child else exit_code)
        # The first process says it, and its launcher ends this one; if not, the trouble is here alone.
        parent, deadline = os.getppid(), time.monotonic() + RANK_ZERO_SECONDS
        while time.monotonic() < deadline:
            if os.getppid() != parent:
                sys.exit(exit_code)
            time.sleep(0.05)
    if (file := os.environ.get("TORCHELASTIC_ERROR_FILE")) and not interrupted:  # what torchrun's table shows
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}), encoding="utf-8")
    try:
        print(message, file=sys.stderr, flush=True)
    except BrokenPipeError:  # its reader has left too
        drop_output(sys.stderr)
    sys.exit(exit_code)


def drop_output(stream: TextIO) -> None:
    """From here on what is written to a stream goes nowhere, and so does what it still holds, which would raise at
    exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _place() -> tuple[bool, bool]:
    """Whether this process is the first of its run, and whether Lightning's launcher started it beside the first."""
    if not any(name.endswith(("RANK", "PROCID")) for name in os.environ):
        return True, False  # without what takes seconds to load
    from onlinenorm.training.launch import is_child, is_rank_zero  # which raises the errors of this module

    with contextlib.suppress(ConfigError):  # a set-up that is only half described
        return is_rank_zero(), is_child()
    return True, False


def _reader_left() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # not imported for this: --help and the like do without
    return torch is not None and isinstance(error, torch.OutOfMemoryError)
