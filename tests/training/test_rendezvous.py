"""Processes of a run that wait for each other: told for whom, stopped together."""

import queue
import signal
import socket
import threading

import pytest

from onlinenorm.errors import ConfigError, Interrupted, RunError
from onlinenorm.training import rendezvous
from onlinenorm.training.interruption import StopSignals
from onlinenorm.training.launch import RANKS


@pytest.fixture
def port(monkeypatch):
    for name in (*RANKS, "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Process(threading.Thread):
    """A thread that stands for a process of a run."""

    def __init__(self, port, rank, world_size, devices=1, kind="cpu"):
        super().__init__(daemon=True)
        self.stop, self.outcome = StopSignals(), None
        self.arguments = "127.0.0.1", port, rank, world_size, devices, self.stop, kind
        self.start()

    def run(self):
        try:
            self.outcome = rendezvous.meet(*self.arguments)
        except (ConfigError, RunError) as error:
            self.outcome = error

    def end(self):
        self.join(60)
        assert not self.is_alive()
        return self.outcome


@pytest.fixture
def said(monkeypatch):
    lines = queue.Queue()
    monkeypatch.setattr(rendezvous, "print", lambda line, flush: lines.put(line), raising=False)
    return lines


def test_all_go_on_when_all_are_there(port):
    processes = [Process(port, rank, 3) for rank in (2, 0, 1)]
    stores = [process.end() for process in processes]
    stores[0].set("key", "value")
    assert [store.get("key") for store in stores] == [b"value"] * 3
    assert all(process.stop._deferred for process in processes)


def test_one_that_waits_says_for_whom_and_can_be_stopped(port, said):
    process = Process(port, 0, 4, devices=2)
    line = said.get(timeout=60)
    assert line.startswith(f"waiting at 127.0.0.1:{port} for 3 of 4 processes: rank 1, 2, 3, of machine 0, 1")
    assert "NODE_RANK=1 MASTER_ADDR=" in line and f"MASTER_PORT={port}" in line
    process.stop.signum = signal.SIGTERM
    error = process.end()
    assert isinstance(error, Interrupted) and error.exit_code == 143
    assert "SIGTERM: stopped before training had begun; nothing is lost" in str(error)


def test_the_others_wait_for_the_first(port, said):
    second = Process(port, 1, 2)
    assert said.get(timeout=60) == f"waiting for the first process of 2, at 127.0.0.1:{port}"
    first = Process(port, 0, 2)
    assert all(not isinstance(process.end(), Exception) for process in (first, second))


@pytest.mark.parametrize("told", [0, 1])
def test_who_is_told_to_stop_takes_the_others_along(port, said, told):
    first = Process(port, 0, 3)
    said.get(timeout=60)
    processes = first, Process(port, 1, 3)
    if told == 1:
        while not processes[1].stop._deferred:
            processes[1].join(0.01)
    processes[told].stop.signum = signal.SIGTERM
    assert {type(process.end()) for process in processes} == {Interrupted}
    assert {process.outcome.exit_code for process in processes} == {143}


def test_processes_on_other_devices_than_the_first_do_not_go_on(port):
    """As where one machine's driver is broken, and trainer.accelerator is auto."""
    processes = [Process(port, rank, 3, kind=kind) for rank, kind in enumerate(["cuda", "cuda", "cpu"])]
    said = [str(process.end()) for process in processes]
    assert {type(process.outcome) for process in processes} == {ConfigError} and len(set(said)) == 1
    assert said[0].startswith("trainer.accelerator: process 0 is on cuda, process 2 on cpu; see")


def test_a_port_that_is_taken_is_told(port):
    with socket.socket() as other:
        other.bind(("", port))
        other.listen()
        with pytest.raises(RunError, match=rf"^MASTER_PORT: 127.0.0.1:{port} cannot be used .*another MASTER_PORT"):
            rendezvous.meet("127.0.0.1", port, 0, 2, 1, StopSignals())


def test_a_first_machine_that_is_not_found_is_told(port):
    with pytest.raises(RunError, match=r"^MASTER_ADDR: no-such-host.invalid is not found .* unset it$"):
        rendezvous.meet("no-such-host.invalid", port, 0, 2, 1, StopSignals())
