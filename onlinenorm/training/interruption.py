"""What asks a run to stop, a signal or data that fail: once training has begun all processes agree at a step."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from onlinenorm.data.workers import STOP_SIGNALS
from onlinenorm.errors import DataError, Interrupted, drop_output
from onlinenorm.training.launch import is_rank_zero


class StopSignals:
    """Context in which the signals set `signum`; the former handlers come back at its end.

    Until `defer` there is nothing to save, and the first signal raises Interrupted at once. After a first Ctrl-C the
    second ends the process at once. A reader of the output that leaves, as in `| head`, asks like SIGPIPE. `failure` is
    what has gone wrong with the data that this one of several processes would need in a later step.

    Args:
        folder: of the run, for messages.
    """

    def __init__(self, folder: Path = Path()):
        self.signum, self.folder = 0, folder
        self._deferred = False
        self._former: dict[int, Any] = {}
        self.failure: DataError | None = None
        self._own_group: Any = None
        self._pending: tuple[Any, torch.Tensor] | None = None

    def __enter__(self) -> "StopSignals":
        self._former = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or self._former[number] != signal.SIG_IGN:  # nohup
                signal.signal(number, self._remember)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        if isinstance(sys.stdout, Output):
            sys.stdout = sys.stdout.stream

    def defer(self) -> None:
        """From here on signals wait for the next look at `signum`."""
        self._deferred = True

    def watch_output(self) -> None:
        """From here on a reader of the output that leaves asks to stop."""  # before, there is no run to be lost
        if sys.stdout is not None:
            sys.stdout = Output(sys.stdout, lambda: self._remember(signal.SIGPIPE))

    def _remember(self, signum: int, frame=None) -> None:
        if self.signum == 0 or signum != signal.SIGPIPE:
            self.signum = signum
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if not self._deferred:
            self.raise_interrupted_early()
        if signum == signal.SIGINT and is_rank_zero():  # of the processes that a terminal asks
            # not print, which may be what has been interrupted; the cursor is shown, for the bar cannot when killed
            cursor = b"\x1b[?25h" if os.isatty(1) else b""
            with contextlib.suppress(OSError):  # Ctrl-C also ends what reads a pipe
                told = b"\nCtrl-C: saving at the end of this step; again: leave at once, without saving\n"
                os.write(2, cursor + told)

    def stop_requested(self, trainer) -> bool:
        """Whether to stop at this step; the same answer on every process. To be called by all, once a step.

        Across processes the flags of one step are exchanged in the background, on the CPU, and looked at in the next:
        no step waits for the exchange, and all act on the same step. Raises the `failure` of one on all.
        """
        if trainer.world_size == 1:
            return self.signum != 0
        seen = 0
        if self._pending is not None:
            work, flags = self._pending
            work.wait()
            seen, failed = flags.tolist()
            self._raise_failure_of(failed)
        self._pending = self._exchange()
        self.signum = self.signum or seen
        return seen != 0

    def raise_failure(self) -> None:
        """Raises, on every process, the `failure` of one, at once; to be called by all."""
        work, flags = self._exchange()
        work.wait()
        self._raise_failure_of(int(flags[1]))

    def _exchange(self) -> tuple[Any, torch.Tensor]:
        """What is under way, and where the largest flags of all processes will be: signal, rank + 1 of a failure."""
        flags = torch.tensor([self.signum, dist.get_rank() + 1 if self.failure else 0])
        return dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group, async_op=True), flags

    def _raise_failure_of(self, failed: int) -> None:
        if failed:
            told = [self.failure]
            dist.broadcast_object_list(told, src=failed - 1, group=self._group)
            error = told[0]
            assert error is not None
            error.on_all_processes = True
            raise error

    @property
    def _group(self) -> Any:
        if self._own_group is None:
            self._own_group = dist.new_group(backend="gloo")
        return self._own_group

    def raise_interrupted(self, epoch: int, step: int) -> None:
        """Raises Interrupted after a save."""
        raise Interrupted(f"{self.name}: {self.saved_at(epoch, step)}", self.signum)

    def saved_at(self, epoch: int, step: int) -> str:
        """What is said after a save at a step of an epoch, counted from 0; step 0: at the end of the one before."""
        where = f"step {step} of epoch {epoch + 1}" if step else f"the end of epoch {epoch}"
        return f"saved at {where}; the same command continues from there ({self.folder})"

    def raise_interrupted_early(self) -> None:
        """Raises Interrupted before training."""
        raise Interrupted(
            f"{self.name}: stopped before training had begun; nothing is lost, the same command starts again "
            f"({self.folder})",
            self.signum,
        )

    @property
    def name(self) -> str:
        """Of the signal, as its sender knows it."""
        names: dict[int, str] = {signal.SIGINT: "Ctrl-C", signal.SIGPIPE: "the reader of the output has left"}
        return names.get(self.signum) or signal.Signals(self.signum).name


class Output:
    """A stream whose reader may leave, which is told once by a call of `left`; what is written from then on is dropped.

    Args:
        stream: of text.
    """

    def __init__(self, stream: Any, left: Callable[[], None]):
        self.stream, self._left = stream, left

    def write(self, text: str) -> int:
        return self._until_left(self.stream.write, text) or len(text)

    def flush(self) -> None:
        self._until_left(self.stream.flush)

    def _until_left(self, function: Callable, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except BrokenPipeError:
            drop_output(self.stream)
            self._left()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
