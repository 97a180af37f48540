"""Sets of decoded images on the device give the batches of the workers, bit for bit; here the CPU is the device."""

import copy
import os
import pickle
import threading

import numpy as np
import pytest
import torch
from image_folders import write_image, write_tree

from onlinenorm.data import DataError, FashionMNIST, ImageNet, Synthetic, UnreadableImageError, decoded, gpu_cache
from onlinenorm.data.gpu_cache import GpuCacheLoader
from onlinenorm.data.imagenet import open_splits
from onlinenorm.data.index import FolderIndex
from onlinenorm.data.prefetch import THREAD
from onlinenorm.data.prepare import chosen_classes, pack

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
SIZES = [(50, 40), (40, 50), (64, 64), (31, 90), (120, 33), (1, 1)]


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def tree(tmp_path):
    """Files of unequal sizes and of every kind: baseline, gray, CMYK and progressive JPEG, and PNG."""
    root = write_tree(tmp_path / "set", train=6)
    for split in ("train", "val"):
        for n, path in enumerate(sorted((root / split).rglob("*.JPEG"))):
            write_image(path, n, SIZES[n % len(SIZES)], "CMYK" if n == 3 else "L" if n == 4 else "RGB", format="JPEG")
    write_image(root / "train" / "ant" / "1.JPEG", 2, (64, 50), format="PNG")
    write_image(root / "train" / "ant" / "2.JPEG", 3, (64, 50), progressive=True)
    return root


def folders(tree, **arguments):
    settings = {"num_workers": 0, "image_size": 32, "batch_size": 4, "crop_padding": 3}
    return ImageNet(root=str(tree), **{**settings, **arguments})


def batches(data, split="train_dataloader", epoch=0):
    loader = getattr(data, split)()
    if split == "train_dataloader":
        loader.batch_sampler.set_epoch(epoch)
    return list(loader)


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs) > 1
    for a, b in zip(ours, theirs, strict=True):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert x.dtype == y.dtype and x.shape == y.shape and torch.equal(x.cpu(), y)
        assert a[2].device.type == "cpu" and a[0].device.type == DEVICE


@pytest.mark.parametrize("decoder", ["pillow", "torchvision"])
@pytest.mark.parametrize("augmentation", ["random_resized_crop", "scale_jitter", "pad_crop", "none"])
def test_training_batches_are_those_of_the_workers(tree, augmentation, decoder):
    for epoch in (0, 3):
        ours, theirs = (
            batches(folders(tree, augmentation=augmentation, decoder=decoder, on_device=flag), epoch=epoch)
            for flag in (True, False)
        )
        assert_equal(ours, theirs)


@pytest.mark.parametrize("val_decoder", ["pillow", "torchvision"])
@pytest.mark.parametrize("evaluation", ["center_crop", "ten_crop"])
def test_validation_batches_are_those_of_the_workers(tree, evaluation, val_decoder):
    ours, theirs = (
        batches(
            folders(tree, evaluation=evaluation, val_decoder=val_decoder, val_batch_size=4, on_device=flag),
            "val_dataloader",
        )
        for flag in (True, False)
    )
    assert_equal(ours, theirs)
    assert ours[0][0].dim() == (5 if evaluation == "ten_crop" else 4)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("augmentation", ["random_resized_crop", "pad_crop", "none"])
def test_sets_in_memory_give_the_batches_of_the_workers(augmentation, channels):
    def both(split, **arguments):
        settings = {"num_train": 40, "num_val": 30, "batch_size": 10, "in_channels": channels, "image_size": 24}
        return (
            batches(Synthetic(**settings, **arguments, val_batch_size=7, on_device=flag), split)
            for flag in (True, False)
        )

    assert_equal(*both("train_dataloader", augmentation=augmentation))
    assert_equal(*both("val_dataloader", evaluation="ten_crop"))
    if channels == 3:
        assert_equal(*both("train_dataloader", augmentation="scale_jitter"))


def test_neither_chunks_nor_batches_nor_workers_matter(tree, monkeypatch):
    def by_index(data):
        return {int(i): x.cpu() for b in data.train_dataloader() for x, i in zip(b[0], b[2], strict=True)}

    arguments = {"augmentation": "random_resized_crop", "on_device": True}
    base = by_index(folders(tree, **arguments, batch_size=18))
    monkeypatch.setattr("onlinenorm.data.gpu_cache._CHUNK", 1)
    for other in ({"batch_size": 3}, {"batch_size": 6, "num_workers": 2}):
        found = by_index(folders(tree, **arguments, **other))
        assert found.keys() == base.keys() and all(torch.equal(x, base[i]) for i, x in found.items())


def test_it_continues_where_a_run_stopped(tree):
    data = folders(tree, augmentation="random_resized_crop", on_device=True)
    whole = batches(data, epoch=2)
    data.resume(2, 2)
    rest = list(data.train_dataloader())
    assert len(rest) == len(whole) - 2
    for a, b in zip(rest, whole[2:], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def break_files(tree):
    for name, content in (("ant/5", b""), ("bee/0", b"no image"), ("cat/5", b"\xff\xd8\xff")):  # cat/5 is the last
        (tree / "train" / f"{name}.JPEG").write_bytes(content)
    write_image(tree / "train" / "ant" / "2.JPEG", 5, (1200, 1))  # a line
    (tree / "val" / "ant" / "1.JPEG").write_bytes(b"")


def test_what_stands_in_for_unreadable_images_is_the_same(tree):
    break_files(tree)
    arguments = {"augmentation": "random_resized_crop", "on_unreadable": "skip", "unreadable_limit": 0.5}
    for split in ("train_dataloader", "val_dataloader"):
        ours, theirs = (
            batches(folders(tree, **arguments, val_batch_size=3, on_device=flag), split) for flag in (True, False)
        )
        assert_equal(ours, theirs)
        assert any((batch[2] < 0).any() for batch in ours)
    data = folders(tree, **arguments, batch_size=18, on_device=True)
    for batch in data.train_dataloader():
        data.on_before_batch_transfer(batch)
    assert sorted(data.unreadable) == [f"train/{name}.JPEG" for name in ("ant/2", "ant/5", "bee/0", "cat/5")]
    strict = folders(tree, batch_size=18, on_device=True)
    with pytest.raises(UnreadableImageError, match=r"(ant/5|bee/0|cat/5)\.JPEG cannot be decoded"):
        for batch in strict.train_dataloader():
            strict.on_before_batch_transfer(batch)


def test_a_set_without_one_readable_image_is_told(tree):
    for path in (tree / "train").rglob("*.JPEG"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="none of 18 images in a row can be read"):
        batches(folders(tree, on_device=True))


def test_decoded_files_are_kept_until_something_changes(tree, own_cache, monkeypatch):
    arguments = {"augmentation": "random_resized_crop", "on_device": True}
    expected = batches(folders(tree, **arguments))

    def kept():
        return {path.name: path.stat().st_mtime_ns for path in own_cache.glob("decoded-*.u8")}

    assert not kept()
    data = folders(tree, **arguments, keep_decoded=True)
    data.prepare_data()
    written = kept()
    assert len(written) == 2 and {name.split("-")[1] for name in written} == {"train", "val"}
    monkeypatch.setattr(decoded, "decode_images", lambda *_: pytest.fail("decoded again"))
    for again in (data, folders(tree, **arguments, keep_decoded=True)):
        for a, b in zip(batches(again), expected, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert kept() == written
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(own_cache.parent))
    write_image(tree / "train" / "bee" / "1.JPEG", 77, (33, 44))
    changed = batches(folders(tree, **arguments, keep_decoded=True))
    assert len(kept()) == 2 and len(kept().keys() & written.keys()) == 1, "the former file is gone"
    for a, b in zip(changed, batches(folders(tree, augmentation="random_resized_crop")), strict=True):
        assert torch.equal(a[0].cpu(), b[0])


def test_a_set_is_decoded_once_for_all_loaders(tree, monkeypatch):
    whole, files = decoded.decode_whole, []
    monkeypatch.setattr(decoded, "decode_whole", lambda data, decoder: files.append(data) or whole(data, decoder))
    ours, theirs = (folders(tree, augmentation="random_resized_crop", on_device=value) for value in (True, False))
    assert_equal(batches(ours), batches(theirs))
    ours.resume(3, 1)
    assert_equal(batches(ours, epoch=3), batches(theirs, epoch=3)[1:])
    assert len(files) == ours.train_images
    batches(ours, "val_dataloader")
    assert len(files) == ours.train_images + ours.val_images


def test_threads_that_come_first_together_decode_once(tree, monkeypatch):
    together, loads = threading.Barrier(2), []

    def slow(*arguments):
        loads.append(arguments)
        if len(loads) == 2:
            both.set()
        both.wait(0.2)  # holds the first until a second would be in here
        return load(*arguments)

    def ask():
        together.wait()
        found.append(loader._cache())

    load, both, found = gpu_cache.load, threading.Event(), []
    monkeypatch.setattr(gpu_cache, "load", slow)
    loader = folders(tree, on_device=True).train_dataloader()
    threads = [threading.Thread(target=ask) for _ in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(loads) == 1 and found[0] is found[1]


def test_a_data_module_is_pickled_without_what_it_has_decoded(tree, monkeypatch):
    data = folders(tree, augmentation="random_resized_crop", on_device=True)
    expected = [batches(data, split) for split in ("train_dataloader", "val_dataloader")]
    loads, load = [], gpu_cache.load
    monkeypatch.setattr(gpu_cache, "load", lambda *arguments: loads.append(arguments) or load(*arguments))
    for twin in (pickle.loads(pickle.dumps(data)), copy.deepcopy(data)):
        for split, ours in zip(("train_dataloader", "val_dataloader"), expected, strict=True):
            for a, b in zip(batches(twin, split), ours, strict=True):
                assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert len(twin._cached) == 2
    assert len(loads) == 4, "each split of each twin once"


def test_one_gpu_has_one_set_whatever_it_is_called(tree, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    data = folders(tree, on_device=True)
    data._fits, caches = True, []
    for name in ("cuda", "cuda:1", "cuda:0"):
        monkeypatch.setattr(data, "_device", lambda name=name: torch.device(name))
        caches.append(data.train_dataloader()._cache)
    assert caches[0] is caches[1] and caches[0] is not caches[2]


def test_what_could_not_be_read_is_tried_again(tree, own_cache, monkeypatch):
    def out_of_reach(index, i):
        if index.relative_path(i) == "bee/1.JPEG":
            raise PermissionError(13, "Permission denied")
        return read(index, i)

    read = FolderIndex.read
    training, _ = folders(tree)._sets
    for reads, unreadable in ((out_of_reach, 1), (out_of_reach, 1), (read, 0)):
        monkeypatch.setattr(FolderIndex, "read", reads)
        kept = decoded.kept_images(training, 0, torch.device("cpu"))
        assert (kept.sizes_N2 == 0).any(axis=1).sum() == unreadable


def test_runs_of_other_limits_and_killed_ones_leave_each_other_alone(tree, own_cache, monkeypatch):
    folders(tree, on_device=True, keep_decoded=True).prepare_data()
    (first,) = own_cache.glob("decoded-train-*.u8")
    partial = own_cache / f".{first.name}.0123abcd.partial"
    partial.touch()
    stored = decoded.cached_arrays

    def removed_meanwhile(*arguments):
        arrays = stored(*arguments)
        for file in own_cache.glob("decoded-train-*.u8"):
            file.unlink()
        return arrays

    monkeypatch.setattr(decoded, "cached_arrays", removed_meanwhile)
    for _ in range(2):  # from the file, and decoded anew
        assert_equal(batches(folders(tree, on_device=True, keep_decoded=True)), batches(folders(tree)))
    assert not partial.exists()


def test_archives_of_both_splits_are_kept_side_by_side(tree, own_cache, tmp_path, monkeypatch):
    packed = tmp_path / "packed"
    splits = open_splits(str(tree))
    for split, index in zip(("train", "val"), splits, strict=True):
        pack(index, packed, split, chosen_classes(splits, None))
    arguments = {"augmentation": "random_resized_crop", "on_device": True, "keep_decoded": True}
    for again in (False, True):
        if again:
            monkeypatch.setattr(decoded, "decode_images", lambda *_: pytest.fail("decoded again"))
        data = folders(packed, **arguments)
        data.prepare_data()
        assert_equal(batches(data), batches(folders(tree, augmentation="random_resized_crop")))
        assert len(list(own_cache.glob("decoded-*.u8"))) == 2


def test_a_file_that_cannot_be_kept_is_told(tree, own_cache, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DataError, match=r"keep_decoded: .*\.u8 cannot be written \(No space left on device\); make"):
        batches(folders(tree, on_device=True, keep_decoded=True))
    assert not list(own_cache.glob("decoded-*"))


def test_a_set_larger_than_the_memory_is_refused_before_decoding(tree, monkeypatch):
    monkeypatch.setattr(decoded, "free_memory", lambda device: 100_000)
    monkeypatch.setattr(decoded, "decode_images", lambda *_: pytest.fail("decoded"))
    message = r"on_device: the 24 decoded images of .* take about 0\.0 GB and .* has 0\.0 GB free; use data\.on_device"
    for keep in (False, True):
        data = folders(tree, on_device=True, keep_decoded=keep)
        with pytest.raises(ValueError, match=message):
            data.prepare_data()
            data.train_dataloader()
    with pytest.raises(ValueError, match=r"on_device: the 2,560 decoded images of synthetic take"):
        Synthetic(on_device=True).val_dataloader()


def test_main_memory_is_asked_too(tree, monkeypatch):
    assert 0 < decoded.free_memory(torch.device("cpu")) < 1 << 50
    monkeypatch.setattr(decoded, "decoded_bytes", lambda sets: 1 << 50)
    with pytest.raises(ValueError, match=r"on_device: .* take about 1,125,899\.9 GB and cpu has"):
        decoded.check_fits(folders(tree)._sets, torch.device("cpu"), "set")


def test_sizes_of_a_sample_stand_for_all(tree, monkeypatch):
    data = folders(tree)
    exact = sum(decoded._bytes(decoded.header_sizes(one, np.arange(len(one)))) for one in data._sets)
    monkeypatch.setattr(decoded, "free_memory", lambda device: exact)
    decoded.check_fits(data._sets, torch.device(DEVICE), "set")
    monkeypatch.setattr(decoded, "free_memory", lambda device: exact - 1)
    with pytest.raises(ValueError, match="on_device"):
        decoded.check_fits(data._sets, torch.device(DEVICE), "set")


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_nvjpeg_decodes_what_it_would_decode_in_training(tree, own_cache, monkeypatch, fraction):
    break_files(tree)
    monkeypatch.setattr(ImageNet, "_gpu", lambda self: torch.device(DEVICE))
    arguments = {"decoder": "nvjpeg", "device_fraction": fraction, "augmentation": "random_resized_crop"}
    ours = batches(folders(tree, **arguments, on_device=True))
    for a, b in zip(ours, batches(folders(tree, **arguments)), strict=True):
        assert torch.equal(a[1].cpu(), b[1].cpu()) and torch.equal(a[2], b[2])
        # What stands in for a damaged file is decoded by the CPU while training, and by the GPU with all others here.
        own = a[2] >= 0
        assert own.any() and torch.equal(a[0].cpu()[own], b[0].cpu()[own])
    kept = batches(folders(tree, **arguments, on_device=True, keep_decoded=True))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(ours, kept, strict=True))
    assert list(own_cache.glob("decoded-train-nvjpeg-*.u8"))


def test_nvjpeg_needs_a_gpu_to_decode_once_too(tree):
    if not ON_GPU:
        with pytest.raises(ValueError, match=r"^decoder: nvjpeg decodes on an NVIDIA GPU"):
            folders(tree, decoder="nvjpeg", on_device=True).train_dataloader()


def test_how_far_decoding_is_is_shown(tree, capfd):
    batches(folders(tree, on_device=True))
    assert "decoding train/, once: 18 of 18 (100.0%)" in capfd.readouterr().err


def test_leaving_early_ends_the_thread():
    iterator = iter(FashionMNIST(embedded=True, batch_size=10, on_device=True).train_dataloader())
    next(iterator)
    assert [t for t in threading.enumerate() if t.name == THREAD]
    iterator.close()
    assert not [t for t in threading.enumerate() if t.name == THREAD]


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("augmentation", ["random_resized_crop", "pad_crop"])
def test_a_gpu_gives_the_batches_of_the_workers(tmp_path, augmentation):
    """At the sizes of photographs, over batches that wait for nothing."""
    root = write_tree(tmp_path / "photographs", train=40, val=4, size=(500, 375))
    arguments = {"augmentation": augmentation, "image_size": 224, "batch_size": 24}
    assert_equal(batches(folders(root, **arguments, on_device=True)), batches(folders(root, **arguments)))
    loader = folders(root, **arguments, on_device=True).train_dataloader()
    assert isinstance(loader, GpuCacheLoader)
    list(loader)  # loads the set, compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in loader._batches():
            assert batch[0].is_cuda
    finally:
        torch.cuda.set_sync_debug_mode("default")
