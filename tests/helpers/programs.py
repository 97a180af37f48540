"""Programs in processes of their own, forked from one that has loaded torch and the like, which takes seconds."""

import contextlib
import io
import multiprocessing
import os
import runpy
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from process_groups import PRELOADED


class Program:
    """`python WORDS`, where WORDS begin with a file, with -m MODULE or with -c CODE; its output goes to files.

    Args:
        words: as strings or paths.
        folder: where it runs.
        environment: of the process; None: this one's.
        alone: in a session, and so a process group, of its own.
        log: a file or named pipe for all output, which `wait` then does not tell.
    """

    def __init__(
        self, *words, folder=".", environment: Mapping[str, str] | None = None, alone: bool = False, log: str = ""
    ):
        self.log, self._files = log, [log, log] if log else [_new_file() for _ in range(2)]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        arguments = list(map(str, words)), str(folder), dict(os.environ if environment is None else environment), alone
        self.process = context.Process(target=_main, args=(*arguments, self._files))
        self.process.start()

    def wait(self, seconds: float = 120) -> subprocess.CompletedProcess:
        """What `subprocess.run` would give; one that does not end is killed, and fails."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        done = subprocess.CompletedProcess([], self.process.exitcode)
        if not self.log:
            done.stdout, done.stderr = (Path(file).read_text(errors="replace") for file in self._files)
            for file in self._files:
                os.unlink(file)
        return done


def call(*words, **options) -> subprocess.CompletedProcess:
    """A `Program`, waited for."""
    return Program(*words, **options).wait()


@contextlib.contextmanager
def running(folder: Path, *words) -> Iterator[tuple[multiprocessing.Process, io.RawIOBase]]:
    """Context with a program that runs in `folder`, and the pipe that it and all that it starts write to."""
    os.mkfifo(pipe := folder / "words")
    program = Program(*words, folder=folder, log=str(pipe))
    with open(pipe, "rb", buffering=0) as written:
        yield program.process, written
    program.process.kill()
    program.process.join()


def read_to_end(pipe: io.RawIOBase, seconds: float = 60) -> str:
    """What is written to a pipe until all that write to it have ended."""
    words, deadline = b"", time.monotonic() + seconds
    while select.select([pipe], [], [], max(0, deadline - time.monotonic()))[0]:
        if not (more := pipe.read(10_000)):
            return words.decode()
        words += more
    raise TimeoutError(f"after {seconds} s something writes there still: {words!r}")


def _new_file() -> str:
    number, path = tempfile.mkstemp()
    os.close(number)
    return path


def _main(words: list[str], folder: str, environment: dict[str, str], alone: bool, files: list[str]) -> None:
    if alone:
        os.setsid()
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    for name, number in (("stdout", 1), ("stderr", 2)):  # which knew whether another file could be sought in
        setattr(sys, name, os.fdopen(number, "w", buffering=1, closefd=False))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(words[1], {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv = [words[1], *words[2:]]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
