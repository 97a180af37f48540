"""Loader processes: stop signals are blocked, shared memory is checked, and the death of one is a DataError."""

import contextlib
import errno
import gc
import multiprocessing.queues
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from onlinenorm.errors import DataError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)  # what asks a run to save itself
PREFETCHED = 4  # batches that a worker holds ready
SHARED_MEMORY = "/dev/shm"
_NO_ROOM = 75  # exit code of a worker that could not hand its batch over

_MORE_ROOM = "give a container more with --ipc=host or --shm-size=8g, or use data.num_workers=0"


class WorkerLoader(DataLoader):
    """A DataLoader whose workers never see a stop signal, also not one to their whole process group or job step."""

    def __iter__(self):
        # workers are born with the signals blocked, so that none reaches them before `start_worker`
        former = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, former)

    def check_worker_number_rationality(self) -> None:
        """Says nothing, where torch warns of more workers than cores at each start: a run says so once."""


def _ready(batch: Any) -> Any:
    return batch  # datasets make whole batches; nothing is left to collate


def worker_loader(
    dataset: Dataset,
    batch_sampler: Iterable[list],
    workers: int,
    ahead: int = PREFETCHED,
    send: Callable[[Any], Any] = _ready,
) -> WorkerLoader:
    """A loader of the batches that `dataset.__getitems__` makes of the sampler's lists.

    Args:
        dataset: makes whole batches.
        batch_sampler: the lists.
        workers: processes that make them; 0: this one does.
        ahead: batches that a worker holds ready.
        send: what a worker hands over of a batch.
    """
    return WorkerLoader(
        dataset,
        batch_sampler=batch_sampler,
        collate_fn=send,
        worker_init_fn=start_worker,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        prefetch_factor=ahead if workers > 0 else None,
        # forked workers share the index and die with this process, however it ends
        multiprocessing_context="fork" if workers > 0 and sys.platform == "linux" else None,
        # a generator of its own: else each epoch's start would move torch's global one
        generator=torch.Generator(),
    )


def share_of_cores(processes: int) -> int:
    """Workers of each of so many processes of a machine where none are asked for: its share of the cores, 1 to 16."""
    return max(1, min(16, cores() // processes))


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_worker(worker: int) -> None:
    """`worker_init_fn` of a WorkerLoader."""
    gc.freeze()  # a collection would write to, and so copy, every page of objects inherited from the main process
    setattr(multiprocessing.queues.Queue, "_on_queue_feeder_error", staticmethod(_leave_unsent))  # noqa: B010
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()


def _obey_parent(parent: int) -> None:
    # terminate() of the loader itself and multiprocessing's at exit must still end a worker that hangs
    while True:
        if signal.sigwaitinfo(STOP_SIGNALS).si_pid == parent:
            os._exit(0)


def _leave_unsent(error: Exception, batch: object) -> None:
    # Python's own answer is to print a traceback and to drop the batch, for which the main process then waits for ever
    no_room = getattr(error, "errno", None) == errno.ENOSPC or "shared memory" in str(error) or "shm" in str(error)
    os._exit(_NO_ROOM if no_room else 1)


def check_shared_memory(dataset, batch_size: int, workers: int, processes: int, ahead: int = PREFETCHED) -> None:
    """Raises DataError where the batches that the workers of a machine hold ready exceed the free shared memory.

    Args:
        dataset: what the workers read; one image of it is made.
        batch_size: images of a batch on each process.
        workers: of each process.
        processes: on this machine.
        ahead: batches that a worker holds ready.
    """
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:  # a system that shares memory in another way
        return
    free = status.f_bavail * status.f_frsize
    image = sum(part.nbytes for part in dataset.__getitems__([(0, 0)]) if isinstance(part, torch.Tensor))
    batch = image * min(batch_size, len(dataset))
    if batch * ahead * workers * processes > free:
        most = free // (batch * ahead * processes)
        fewer = f"data.num_workers={most}" if most else "data.num_workers=0"
        raise DataError(
            f"{workers} loader workers hold up to {ahead * workers} batches of {batch / 1e6:.1f} MB "
            f"ready{f' on each of {processes} processes' if processes > 1 else ''}, and {SHARED_MEMORY} has "
            f"{free / 1e6:.1f} MB free; {_MORE_ROOM.replace('data.num_workers=0', fewer)}",
            key="num_workers",
        )


@contextlib.contextmanager
def explain_worker_deaths() -> Iterator[None]:
    """Context in which the end of a loader worker becomes a DataError that says what to do.

    One that a worker has raised, which torch hands over with the traceback of that process for a message, is as it was.
    """
    try:
        yield
    except DataError as error:
        if not (told := re.search(r"^Caught .*^onlinenorm\.errors\.\w+: (?:(\w+): )?(.*)", str(error), re.M | re.S)):
            raise
        raise type(error)(told[2].strip(), key=told[1]) from error
    except RuntimeError as error:
        # torch raises it from a SIGCHLD handler, wherever the main process is just then; while waiting for a batch it
        # catches that and raises another that knows less
        causes: list[BaseException] = [error]
        while cause := causes[-1].__cause__ or causes[-1].__context__:
            causes.append(cause)
        found = [
            m for cause in causes if (m := re.search(r"DataLoader worker \(pid(?:\(s\))? (.*?)\) (.*)", str(cause)))
        ]
        if not found:
            raise
        pid, text = found[-1][1], found[-1][2].split(".")[0]
        advice = "data.num_workers=0 shows where"
        if "Bus error" in text or f"exit code {_NO_ROOM}" in text:
            text, advice = f"found no room in {SHARED_MEMORY} for its batch", _MORE_ROOM
        elif "Killed" in text:
            advice = "often for want of memory (dmesg tells): use a smaller data.num_workers"
        raise DataError(
            f"data.num_workers: loader worker {pid} {text}; {advice}; "
            "the same command continues from the last checkpoint"
        ) from error
