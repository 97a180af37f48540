"""The processes that a run's first one starts on its machine, and what is said when a process dies or hangs."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytorch_lightning as pl
from pytorch_lightning.strategies.launchers.subprocess_script import (
    _set_num_threads_if_needed,
    _SubprocessScriptLauncher,
)

from onlinenorm.errors import RANK_ZERO_SECONDS, RunError
from onlinenorm.normalizers import exchange
from onlinenorm.text import first_line

FIRST = "ONLINENORM_FIRST_PROCESS"  # its PID, for those that it starts
POLL_SECONDS = 0.2
PATIENCE_SECONDS = RANK_ZERO_SECONDS + 2.0  # in which a process says why it ends, and the first may notice by itself


class WatchingLauncher(_SubprocessScriptLauncher):
    """Lightning's launcher; where a process dies, the first one says which and how, ends the others, and exits with 1.

    Lightning's own would kill the first by SIGKILL, without a word. Where the first one dies, those that it has started
    say so and end too. Where a kernel has waited for another process in vain, each process says so and exits, before
    that kernel fails: after it NCCL would abort the process, whatever Python is about to say. So it is from the first
    launch to the end of `watching`, as a run's processes meet outside of Lightning's loops too.
    """

    said = False  # what is to be said of a dead one
    watched = False
    judged: Exception | None = None  # not due to another process

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        # in a venv of Windows a process's parent is the launcher of its Python, whose PID says nothing
        self.first = 0 if sys.platform == "win32" else int(os.environ.get(FIRST, 0))

    def launch(self, function: Callable, *args: Any, trainer=None, **kwargs: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
        if not self.watched:
            self.watched = True
            threading.Thread(target=self._watch, daemon=True, name="process-observer").start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        with self.explaining():
            return function(*args, **kwargs)

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """Context in which an error that is due to a dead or stuck process becomes a RunError that says so."""
        try:
            yield
        except Exception as error:
            if error is self.judged or hasattr(error, "exit_code"):  # which says what is wrong
                raise
            deadline = time.monotonic() + (PATIENCE_SECONDS if self.procs else POLL_SECONDS if self.first else 0.0)
            while not (lost := self._lost()) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
            if not (reason := lost or stuck_process(error)):
                self.judged = error
                raise
            self.said = True
            self._end_others()
            raise RunError(reason) from error

    def _watch(self) -> None:
        """Ends this process where it waits for one that is gone, in a collective or kernel no exception reaches."""
        while not (lost := self._lost()):
            if late := late_process():
                self._end(late)
            if not self.watched or (self.procs and all(process.returncode == 0 for process in self.procs)):
                return
            time.sleep(POLL_SECONDS)
        time.sleep(PATIENCE_SECONDS)
        if self.watched:  # else this process had nothing left to wait for
            self._end("" if self.said else lost)

    def _call_children_scripts(self) -> None:
        os.environ[FIRST] = str(os.getpid())
        try:
            super()._call_children_scripts()
        finally:
            del os.environ[FIRST]

    def _lost(self) -> str:
        return lost_process(self.procs) or lost_first(self.first)

    def _end(self, message: str) -> NoReturn:
        if message:
            print(message, file=sys.stderr, flush=True)
        self._end_others()
        os._exit(RunError.exit_code)

    def _end_others(self) -> None:
        for process in self.procs:
            process.kill()  # what hangs in a collective hears nothing else


@contextlib.contextmanager
def watching(trainer: pl.Trainer) -> Iterator[None]:
    """Context in which a run's processes wait for each other; behind it, one that has done its work is not missed."""
    launcher = trainer.strategy.launcher
    if not isinstance(launcher, WatchingLauncher):
        yield
        return
    with launcher.explaining():
        yield
    launcher.watched = bool(launcher.procs)


def lost_process(processes: list[subprocess.Popen]) -> str:
    """What to say of the first of these that has failed, or ""; they are a machine's, in order, without its first."""
    for number, process in enumerate(processes, 1):
        code = process.poll()
        if not code:
            continue
        how = f"has ended with exit code {code}; its own words are above"
        if code < 0:
            name = signal.Signals(-code).name
            how = f"was killed by {name}" + (", as a system short of memory does" if name == "SIGKILL" else "")
        return (
            f"process {number} of 0 to {len(processes)} on this machine (PID {process.pid}) {how}. The others end too; "
            "the same command continues the run from its last checkpoint"
        )
    return ""


def lost_first(first: int) -> str:
    """What to say where the process that has started this one, of PID ``first``, is gone, or ""; 0: there is none."""
    if first in (0, os.getppid()):
        return ""
    return (
        f"process 0 on this machine (PID {first}) is gone; its own words, if any, are above. Those that it has started "
        "end too; the same command continues the run from its last checkpoint"
    )


def late_process() -> str:
    """What to say of a process that a kernel of this one has waited for in vain, or ""."""
    rank = exchange.late()
    if rank is None:
        return ""
    return (
        f"process {rank} did not come to a layer that another had reached, for as long as they wait: it is stuck or "
        "dead, and its own output may say why. The same command continues the run from its last checkpoint"
    )


def stuck_process(error: Exception) -> str:
    """What to say of an error of gloo, in which a process has waited for another in vain, or "" of any other."""
    if "Timed out waiting" not in str(error):
        return ""
    return (
        f"another process did not come to where this one has waited for it ({first_line(error)}): it is stuck or dead, "
        "and its own output may say why. The same command continues the run from its last checkpoint"
    )
