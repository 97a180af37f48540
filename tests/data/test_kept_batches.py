"""Validation images are decoded once where there is room for them, and each time where there is none."""

import gc
import os
from pathlib import Path

import pytest
import torch
from image_folders import write_tree

from onlinenorm.data import ImageNet, Synthetic, kept_batches
from onlinenorm.data.decoders import DECODERS
from onlinenorm.data.kept_batches import KeptBatches, fits

pytestmark = pytest.mark.usefixtures("own_cache")
CPU = torch.device("cpu")
BYTES = 9 * 3 * 32 * 32  # of the validation images


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "set", val=3)


@pytest.fixture
def decoded(monkeypatch):
    """Counts what this process decodes."""
    calls, decode = [], DECODERS["pillow"]
    monkeypatch.setitem(DECODERS, "pillow", lambda *arguments: calls.append(1) or decode(*arguments))
    return calls


@pytest.fixture
def room(monkeypatch):
    """Bytes that seem to be free: room[0]."""
    free = [4 * BYTES]
    monkeypatch.setattr(kept_batches, "free_memory", lambda device: free[0])
    return free


def module(tree, **arguments):
    options = {"image_size": 32, "batch_size": 4, "val_batch_size": 4, "num_workers": 0, **arguments}
    return ImageNet(root=str(tree), **options)


def equal(one, other):
    assert len(one) == len(other) > 1
    return all(torch.equal(x, y) for a, b in zip(one, other, strict=True) for x, y in zip(a, b, strict=True))


def children():
    return Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()


@pytest.mark.parametrize("workers", [0, 2])
def test_images_are_decoded_once_and_the_workers_leave(tree, decoded, room, workers):
    data, before = module(tree, num_workers=workers), children()
    first = list(data.val_dataloader())
    gc.collect()
    assert children() == before
    again = [list(data.val_dataloader()) for _ in range(2)]  # as the validations at the end of a run ask for it
    assert all(equal(first, batches) for batches in again)
    assert [len(images) for images, *_ in first] == [4, 4, 1] == [len(images) for images, *_ in again[1]]
    assert len(decoded) == (9 if workers == 0 else 1), "one to see whether shared memory is large enough"
    assert equal(first, list(module(tree).val_dataloader()))
    assert not any(part.is_shared() for batch in again[0] for part in batch), "shared memory is small"


def test_where_there_is_no_room_they_are_decoded_each_time(tree, decoded, room):
    room[0] -= 1
    data = module(tree)
    assert equal(*(list(data.val_dataloader()) for _ in range(2)))
    assert len(decoded) == 18 and data.val_dataloader().loader is not None


def test_who_takes_some_batches_gets_them_all_later(tree, decoded, room):
    loader = module(tree).val_dataloader()
    assert len(next(iter(loader))[0]) == 4
    taken = iter(loader)
    first = [next(taken) for _ in range(len(loader))]  # and never asks whether there are more, as a trainer does
    assert equal(first, list(loader)) and len(decoded) == 4 + 9


def test_an_image_that_could_not_be_read_is_tried_again(tree, room):
    file = tree / "val" / "bee" / "0.JPEG"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    data = module(tree, on_unreadable="skip", unreadable_limit=1.0)
    labels = torch.cat([labels for _, labels, _ in data.val_dataloader()])
    assert (labels == -1).sum() == 1
    file.write_bytes(content)
    assert equal(list(data.val_dataloader()), list(module(tree).val_dataloader()))


def test_other_batches_are_made_anew(tree, room):
    data = module(tree)
    list(data.val_dataloader())
    data.val_batch_size = 3
    assert [len(images) for images, *_ in data.val_dataloader()] == [3, 3, 3]


def test_sets_in_memory_and_on_the_device_are_not_kept_twice(tree):
    assert not isinstance(Synthetic().val_dataloader(), KeptBatches)
    on_device = module(tree, on_device=True)
    assert on_device.val_dataloader() is on_device.val_dataloader(), "whose images are decoded once"
    assert not isinstance(on_device.val_dataloader(), KeptBatches)


def test_a_quarter_of_what_is_free_may_be_taken(monkeypatch):
    monkeypatch.setattr(kept_batches, "free_memory", lambda device: 400)
    assert fits(100, CPU) and not fits(101, CPU)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80, 1000))
    assert fits(20, torch.device("cuda")) and not fits(21, torch.device("cuda"))
    monkeypatch.setattr(kept_batches, "free_memory", lambda device: None)
    assert not fits(1, CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_batches_stay_on_the_gpu_with_the_pixels_of_the_cpu(tree):
    data = module(tree)
    data.feeds = torch.device("cuda", 0)
    loader = data.val_dataloader()
    first, again = list(loader), list(loader)
    assert loader.loader is None and all(images.is_cuda for images, *_ in again)
    expected = list(module(tree).val_dataloader())
    for batches in (first, again):
        assert all(torch.equal(a[0].cpu(), b[0]) for a, b in zip(batches, expected, strict=True))
