"""Several processes of one job on this machine, without a launcher's start-up time."""

import io
import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch

# One server imports these once; the processes are forked from it, free of the tests' threads and state.
PRELOADED = ["torch", "pytorch_lightning", "wandb", "onlinenorm.training.run", "tests.helpers.composed"]


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _answer(pipe, function: Callable, *arguments: Any) -> None:
    try:
        result = io.BytesIO()  # by value: a tensor sent as such lives in memory that goes with this process
        torch.save(function(*arguments), result)
        pipe.send_bytes(pickle.dumps((True, result.getvalue())))
    except BaseException as error:
        pipe.send_bytes(pickle.dumps((False, (type(error).__name__, str(error), traceback.format_exc()))))


def _target(function: Callable, rank: int, environment: dict[str, str], arguments: tuple, pipe) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    # as in a run of its own: loader workers of a nested server would outlive a killed process
    multiprocessing.set_start_method("fork", force=True)
    _answer(pipe, function, rank, *arguments)


def start(processes: int, function: Callable, *arguments: Any) -> list[tuple[Any, Any]]:
    """Starts function(rank, *arguments) in processes with torchrun's environment; returns (process, pipe) of each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "TORCHELASTIC_RUN_ID": "test",
    }
    started = []
    for rank in range(processes):
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_target, args=(function, rank, environment, arguments, there), daemon=False)
        process.start()
        there.close()
        started.append((process, here))
    return started


def _answers(pipes: list[Any], seconds: float) -> list[tuple[bool, Any]]:
    found: list[tuple[bool, Any]] = []
    for pipe in pipes:
        try:
            if not pipe.poll(seconds):
                found.append((False, ("Timeout", f"{seconds} s", "")))
                continue
            succeeded, result = pickle.loads(pipe.recv_bytes())
            result = torch.load(io.BytesIO(result), weights_only=False) if succeeded else result
            found.append((succeeded, result))
        except EOFError:
            found.append((False, ("Died", "without a word", "")))
    return found


def finish(started: list[tuple[Any, Any]], seconds: float = 120) -> list[tuple[bool, Any]]:
    """(True, result) or (False, (error's type, message, traceback)) of each process; those still alive are killed."""
    try:
        return _answers([pipe for _, pipe in started], seconds)
    finally:
        for process, _ in started:
            process.join(10)
            if process.is_alive():
                process.kill()


def _results(found: list[tuple[bool, Any]]) -> list[Any]:
    for succeeded, result in found:
        assert succeeded, result[2] or result
    return [result for _, result in found]


def run(processes: int, function: Callable, *arguments: Any, seconds: float = 120) -> list[Any]:
    """The results of function(rank, *arguments) on each process; fails where one does."""
    return _results(finish(start(processes, function, *arguments), seconds))


def _serve(rank: int, pipes: list[Any]) -> None:
    while (order := pipes[rank].recv()) is not None:
        function, arguments = order
        _answer(pipes[rank], function, rank, *arguments)


class Pool:
    """Processes that run one function after the other: what is slow to begin is begun once, until a function fails."""

    def __init__(self, processes: int):
        self.processes = processes
        self.started: list[tuple[Any, Any]] = []
        self.pipes: list[Any] = []

    def run(self, function: Callable, *arguments: Any, seconds: float = 120) -> list[Any]:
        """As `run` of this module."""
        if not self.started:
            ends = [multiprocessing.get_context("forkserver").Pipe() for _ in range(self.processes)]
            self.pipes = [here for here, _ in ends]
            self.started = start(self.processes, _serve, [there for _, there in ends])
            for _, there in ends:
                there.close()
        for pipe in self.pipes:
            pipe.send((function, arguments))
        found = _answers(self.pipes, seconds)
        if not all(succeeded for succeeded, _ in found):
            self.kill()  # one waits for another, perhaps, or holds what has failed
        return _results(found)

    def kill(self) -> None:
        for process, _ in self.started:
            process.kill()
        self.started = []

    def close(self) -> None:
        """Ends the processes."""
        for pipe in self.pipes if self.started else ():
            pipe.send(None)
        finish(self.started, 30)
        self.started = []


def dealt(x: torch.Tensor, counts: tuple[int, ...]) -> list[torch.Tensor]:
    """A global batch as each process holds it: dealt out sample by sample, passing over those that have theirs."""
    turns = [rank for n in range(max(counts)) for rank, count in enumerate(counts) if n < count]
    return [x[[position for position, owner in enumerate(turns) if owner == rank]] for rank in range(len(counts))]
