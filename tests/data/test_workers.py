"""Loader workers: deaf to stop signals, short of shared memory, or dead."""

import os
import signal
import time

import pytest
import torch

from onlinenorm.data import DataError, Synthetic, workers
from onlinenorm.data.workers import STOP_SIGNALS, explain_worker_deaths


def module(**options):
    data = Synthetic(num_train=64, num_val=16, image_size=8, batch_size=8, num_workers=2, **options)
    data.setup("fit")
    return data


def children():
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(pid) for pid in file.read().split()]


def test_stop_signals_are_left_to_the_run():
    expected = [indices.tolist() for _, _, indices in module().train_dataloader()]
    before = set(children())
    loader = module().train_dataloader()
    found = []
    for _, _, indices in loader:
        found.append(indices.tolist())
        for worker in set(children()) - before:
            for number in STOP_SIGNALS:
                # from a process that is not the workers' parent
                os.waitpid(os.posix_spawnp("kill", ["kill", f"-{int(number)}", str(worker)], os.environ), 0)
    assert found == expected
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set(), "this process hears them"


def test_the_loader_itself_can_end_its_workers():
    loader = module().train_dataloader()
    iterator = iter(loader)
    next(iterator)
    assert iterator._workers
    for worker in iterator._workers:
        worker.terminate()
        worker.join(30)
        assert worker.exitcode == 0


class Fails(torch.utils.data.Dataset):
    """Its third batch does `what`."""

    def __init__(self, what):
        self.what = what

    def __len__(self):
        return 64

    def __getitems__(self, requests):
        if requests[0][1] >= 16:
            return self.what()
        return torch.zeros(len(requests)), torch.zeros(len(requests)), torch.zeros(len(requests))


class NoRoom:
    """A batch that cannot be handed over."""

    def __reduce__(self):
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)"
        )


@pytest.mark.parametrize(
    "what, says",
    [
        (NoRoom, r"found no room in /dev/shm for its batch; .*--ipc=host or --shm-size"),
        (lambda: os.kill(os.getpid(), signal.SIGBUS), r"found no room in /dev/shm for its batch; .*--ipc=host"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), r"is killed by signal: Killed; often for want of memory"),
        (lambda: os._exit(3), r"exited unexpectedly with exit code 3; data.num_workers=0 shows where"),
        # a batch that cannot be pickled
        (lambda: lambda: None, r"exited unexpectedly with exit code 1; data.num_workers=0 shows where"),
    ],
)
def test_a_worker_that_dies_is_told_at_once(what, says, monkeypatch):
    data = module()
    monkeypatch.setattr(data, "_sets", (Fails(what), data._sets[1]))
    with (
        pytest.raises(DataError, match=rf"^data.num_workers: loader worker \d+ {says}.*continues"),
        explain_worker_deaths(),
    ):
        for _ in data.train_dataloader():
            time.sleep(0.01)


def test_an_error_of_the_data_in_a_worker_is_as_it_was(monkeypatch):
    def fail():
        raise DataError("none can be read;\nis the disk still mounted?", key="root")

    data = module()
    monkeypatch.setattr(data, "_sets", (Fails(fail), data._sets[1]))
    with (
        pytest.raises(DataError, match=r"^root: none can be read;\nis .*\?$") as raised,
        explain_worker_deaths(),
    ):
        list(data.train_dataloader())
    assert raised.value.key == "root"


def test_other_errors_pass_unchanged():
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), explain_worker_deaths():
        raise RuntimeError("shapes differ")


@pytest.fixture
def free(monkeypatch):
    """free(bytes): that much shared memory is left."""

    def pretend(size):
        status = os.statvfs_result((4096, 1, size, size, size, 0, 0, 0, 0, 255))
        monkeypatch.setattr(workers.os, "statvfs", lambda path: status)

    return pretend


def test_too_little_shared_memory_is_told_before_the_start(free):
    image = 3 * 8 * 8 + 2 * 8  # bytes, with label and index
    train = 8 * image * workers.PREFETCHED * 2
    free(train)
    module().train_dataloader()
    free(train - 1)
    with pytest.raises(
        DataError, match=r"^num_workers: 2 loader workers .*--ipc=host or --shm-size=8g, or use data.num_w"
    ) as e:
        module().train_dataloader()
    assert str(e.value).endswith("data.num_workers=1")
    with pytest.raises(DataError, match=r"^num_workers: "):
        module(val_batch_size=16).val_dataloader()
    free(0)
    with pytest.raises(DataError, match=r"data.num_workers=0$"):
        module().train_dataloader()
    data = module()
    data.num_workers = 0
    data.train_dataloader()
