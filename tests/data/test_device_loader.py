"""Batches that are put together on the device from parts: those of the dataset itself, bit for bit."""

import contextlib
import threading

import pytest
import torch
from image_folders import write_tree

from onlinenorm.data import ImageNet, Synthetic, device_loader
from onlinenorm.data.device_loader import DeviceLoader, Parts, part_size
from onlinenorm.data.prefetch import THREAD, prefetch
from onlinenorm.data.workers import worker_loader

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(device_loader, "_PART", 2)


def folders(tmp_path, **arguments):
    root = tmp_path / "set"
    if not root.exists():
        write_tree(root, train=6, size=(50, 40))
    settings = {"image_size": 32, "batch_size": 5, "augmentation": "random_resized_crop"}
    return ImageNet(root=str(root), num_workers=0, **{**settings, **arguments})


def synthetic(tmp_path, **arguments):
    return Synthetic(num_train=40, num_val=31, image_size=24, batch_size=9, val_batch_size=7, **arguments)


def both(data, split, workers, epoch=0):
    """The loader for the device, and the dataset's own batches."""
    dataset = data._sets[0 if split == "train" else 1]
    sampler = getattr(data, f"{split}_dataloader")().batch_sampler
    if split == "train":
        sampler.set_epoch(epoch)
    return DeviceLoader(dataset, sampler, DEVICE, workers), list(worker_loader(dataset, sampler, 0))


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs) > 1
    for a, b in zip(ours, theirs, strict=True):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert x.dtype == y.dtype and torch.equal(x.cpu(), y)
        assert a[0].stride() == b[0].stride(), "in the memory format that workers give"
        assert a[0].device.type == a[1].device.type == DEVICE.type and a[2].device.type == "cpu"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("make", [folders, synthetic])
@pytest.mark.parametrize("augmentation", ["random_resized_crop", "scale_jitter", "pad_crop"])
def test_batches_are_those_of_the_dataset(make, augmentation, workers, tmp_path):
    loader, theirs = both(make(tmp_path, augmentation=augmentation), "train", workers, epoch=3)
    assert len(loader) == len(theirs)
    assert_equal(list(loader), theirs)
    loader.batch_sampler.set_epoch(4)  # by the same workers
    assert_equal(list(loader), both(make(tmp_path, augmentation=augmentation), "train", 0, epoch=4)[1])


@pytest.mark.parametrize("evaluation", ["center_crop", "ten_crop"])
def test_validation_ends_with_a_shorter_batch(evaluation, tmp_path):
    loader, theirs = both(synthetic(tmp_path, evaluation=evaluation), "val", 2)
    assert len(theirs[-1][0]) == 31 % 7
    assert_equal(list(loader), theirs)


def test_reports_of_unreadable_images_come_through(tmp_path):
    data = folders(tmp_path)
    (tmp_path / "set" / "train" / "ant" / "1.JPEG").write_bytes(b"no image")
    loader, theirs = both(data, "train", 2)
    assert_equal(list(loader), theirs)
    assert any((indices < 0).any() for _, _, indices in theirs)


def test_it_continues_where_a_run_stopped_and_starts_anew_where_it_was_left(tmp_path):
    data = synthetic(tmp_path)
    loader, theirs = both(data, "train", 2, epoch=2)
    iterator = iter(loader)
    next(iterator)
    iterator.close()
    assert not [t for t in threading.enumerate() if t.name == THREAD]
    assert_equal(list(loader), theirs)
    loader.batch_sampler.start_at(2, 2)
    assert_equal(list(loader), theirs[2:])


def test_batches_are_cut_over_the_workers():
    assert part_size(256, 16) == 16 and part_size(256, 1) == 256 and part_size(7, 0) == 7
    assert part_size(3, 16) == 2, "not below the least"
    parts = Parts([[(0, i) for i in range(5)], [(0, 5)]], 2)
    assert [len(part) for part in parts] == [2, 2, 1, 1]
    made = (len(part) for part in parts)
    assert list(parts.together(made)) == [[2, 2, 1], [1]]


def test_who_gets_batches_on_the_device(tmp_path):
    """A Trainer on a GPU, and whoever asks for it."""
    data = folders(tmp_path)
    assert isinstance(data.train_dataloader(), torch.utils.data.DataLoader)
    data.feeds = torch.device("cpu")
    assert isinstance(data.val_dataloader().loader, torch.utils.data.DataLoader)
    data.feeds = torch.device("cuda")
    assert isinstance(data.train_dataloader(), DeviceLoader) and isinstance(data.val_dataloader().loader, DeviceLoader)


def test_errors_of_workers_are_raised_where_the_batches_are_taken(tmp_path):
    class Fails(torch.utils.data.Dataset):
        def __getitems__(self, requests):
            raise ZeroDivisionError("of a worker")

    loader = DeviceLoader(Fails(), synthetic(tmp_path).train_dataloader().batch_sampler, DEVICE, 1)
    with pytest.raises(ZeroDivisionError, match="of a worker"):
        next(iter(loader))
    assert not [t for t in threading.enumerate() if t.name == THREAD]


def test_epochs_share_a_stream_and_its_memory_but_loaders_at_work_do_not(monkeypatch):
    streams = []

    class Stream:
        def __init__(self, *_, **__):
            streams.append(self)

        def record_event(self):
            return self

        def wait_event(self, event):
            pass

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    current = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    device = torch.device("cuda", 99)
    for _ in range(3):
        assert list(prefetch(iter([(1,), (2,)]), device)) == [(1,), (2,)]
    assert len(streams) == 2  # the current one, and that of the thread
    for _ in range(2):
        assert len(list(zip(*(prefetch(iter([(1,)] * 9), device) for _ in range(2)), strict=True))) == 9
    assert len(streams) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("on_device", [False, True])
def test_nothing_waits_for_the_gpu_and_no_batch_is_written_over(on_device):
    """Copies run beside steps that take longer; a wait of either thread for the device is an error here."""
    data = Synthetic(num_train=8192, image_size=64, batch_size=256, augmentation="pad_crop", on_device=on_device)
    data.feeds = DEVICE
    loader = data.train_dataloader()
    assert on_device or isinstance(loader, DeviceLoader)
    expected = [images.cpu().double().sum() for images, *_ in loader]
    busy = torch.randn(4096, 4096, device=DEVICE)
    torch.cuda.synchronize()
    sums = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in loader:
            images, labels, indices = (tensor.to(DEVICE, non_blocking=True) for tensor in batch)
            for _ in range(20):
                busy = (busy @ busy).clamp(-1, 1)
            sums.append(images.double().sum())
            del images, labels, indices, batch  # its memory may be taken for the next batches only after the sum
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(torch.stack(sums).cpu(), torch.stack(expected))
