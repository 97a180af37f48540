"""The path of decoder nvjpeg with the CPU as its device: only the decoder's own arithmetic differs from a GPU's."""

import contextlib
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from image_folders import write_image, write_tree

from onlinenorm.data import ImageNet, UnreadableImageError, nvjpeg_loader
from onlinenorm.data.jpeg_header import read_frame
from onlinenorm.data.nvjpeg_dataset import NvjpegDataset, suits_device
from onlinenorm.data.prefetch import THREAD

CPU = torch.device("cpu")


@pytest.fixture
def tree(tmp_path):
    root = write_tree(tmp_path / "set", size=(70, 60))
    write_image(root / "train" / "ant" / "0.JPEG", 1, (64, 50), "CMYK", format="JPEG")
    write_image(root / "train" / "ant" / "1.JPEG", 2, (64, 50), format="PNG")
    write_image(root / "train" / "ant" / "2.JPEG", 3, (64, 50), progressive=True)
    write_image(root / "train" / "bee" / "0.JPEG", 4, (64, 50), "L")
    return root


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(ImageNet, "_gpu", lambda self: CPU)


def module(tree, decoder="nvjpeg", **arguments):
    settings = {"num_workers": 0, "image_size": 32, "batch_size": 5, "augmentation": "random_resized_crop"}
    return ImageNet(root=str(tree), decoder=decoder, **{**settings, **arguments})


def by_index(data):
    return {int(i): (x, int(y)) for b in data.train_dataloader() for x, y, i in zip(*b[:3], strict=True)}


@pytest.mark.parametrize("augmentation", ["random_resized_crop", "scale_jitter", "pad_crop", "none"])
def test_boxes_mirrors_labels_and_order_are_those_of_the_other_decoders(tree, augmentation):
    ours, theirs = (module(tree, d, augmentation=augmentation).train_dataloader() for d in ("nvjpeg", "torchvision"))
    assert len(ours) == len(theirs) == 3
    for a, b in zip(ours, theirs, strict=True):
        assert len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a[1:], b[1:], strict=True))
        assert a[0].dtype == torch.uint8 and a[0].shape == b[0].shape
        assert a[0].is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(a[0], b[0])


def test_pixels_do_not_depend_on_workers_or_batches(tree):
    base = by_index(module(tree))
    for other in (module(tree, num_workers=2), module(tree, batch_size=3)):
        found = by_index(other)
        assert found.keys() == base.keys() and all(torch.equal(x, base[i][0]) for i, (x, _) in found.items())


def test_a_share_of_the_images_is_decoded_by_the_workers(tree):
    data = module(tree, device_fraction=0.5, batch_size=15)
    data.setup()
    (batch,) = list(data.train_dataloader().loader)
    sent = (batch.bounds.diff() > 0).sum().item()
    assert 0 < sent < 12 and len(batch.rows) == 15 - sent  # 3 of the 15 are never for the device
    shared, alone = by_index(data), by_index(module(tree))
    assert all(torch.equal(shared[i][0], alone[i][0]) for i in range(15))


def test_only_what_gpus_decode_is_sent_to_them(tree):
    index = module(tree)._sets[0].index
    suited = [suits_device(read_frame(index.read(i))) for i in range(6)]
    assert suited == [False, False, False, True, True, True]
    whole = index.read(3)
    assert read_frame(whole) == (0xC0, 8, 70, 60, 3)
    assert read_frame(whole[:-2]) is None and read_frame(b"") is None and read_frame(b"\xff\xd8\xff\xd9") is None
    assert read_frame(whole + b"\0" * 8) is not None, "bytes after the end are common"


def break_entropy_data(path):
    content = bytearray(path.read_bytes())
    at = content.rindex(b"\xff\xda") + 14
    content[at : at + 200] = b"\xff\xc4" * 100
    path.write_bytes(content)


def test_damage_follows_the_policy(tree):
    (tree / "train" / "bee" / "1.JPEG").write_bytes((tree / "train" / "bee" / "1.JPEG").read_bytes()[:-300])
    (tree / "train" / "bee" / "2.JPEG").unlink()
    (tree / "train" / "bee" / "2.JPEG").symlink_to("nowhere.JPEG")
    write_image(tree / "train" / "cat" / "3.JPEG", 5, (1, 1200))  # a line
    break_entropy_data(tree / "train" / "cat" / "1.JPEG")  # its header is whole: the device finds it
    data = module(tree, on_unreadable="skip", unreadable_limit=0.5)
    found = {}
    for batch in data.train_dataloader():
        _, labels, indices = data.on_after_batch_transfer(data.on_before_batch_transfer(batch))
        found |= {int(i): int(y) for y, i in zip(labels, indices, strict=True)}
    assert sorted(data.unreadable) == [f"train/{name}.JPEG" for name in ("bee/1", "bee/2", "cat/1", "cat/3")]
    assert found == {i: i // 5 for i in range(15)}
    strict = module(tree)
    with pytest.raises(UnreadableImageError, match=r"(bee/[12]|cat/[13])\.JPEG cannot be decoded"):
        for batch in strict.train_dataloader():
            strict.on_before_batch_transfer(batch)


def test_leaving_early_and_errors_end_the_thread(tree, monkeypatch):
    loader = module(tree, batch_size=1).train_dataloader()
    for _ in zip(range(2), loader, strict=False):
        pass
    iterator = iter(loader)
    next(iterator)
    iterator.close()
    for stage in ("make_batch", "decode"):
        monkeypatch.setattr(nvjpeg_loader, stage, lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next(iter(loader))
    assert not [t for t in threading.enumerate() if t.name == THREAD]


def test_each_thread_keeps_its_stream_and_the_memory_of_it_where_an_epoch_is_left_early(tree, monkeypatch):
    """Also where crops end before decoding does, as then."""
    here, done = threading.local(), []

    class Stream:
        def __init__(self, *_, **__):
            pass

        def record_event(self):
            return self

        def wait_event(self, event):
            pass

    @contextlib.contextmanager
    def stream(chosen):
        here.stream = chosen
        yield

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    for name in ("decode", "make_batch"):
        monkeypatch.setattr(
            nvjpeg_loader, name, lambda part, *_, name=name: done.append((name, here.stream)) or (part,)
        )
    loader = nvjpeg_loader.NvjpegLoader(module(tree).train_dataloader().loader, torch.device("cuda", 98))
    for _ in range(4):
        batches = iter(loader)
        next(batches)
        batches.close()
    assert {name for name, _ in done} == {"decode", "make_batch"}
    assert len(set(done)) == 2, "a stream has done the work of both"


def test_epoch_and_resume_reach_the_sampler(tree):
    data = module(tree)
    loader = data.train_dataloader()
    loader.batch_sampler.sampler.set_epoch(3)
    theirs = module(tree, "torchvision").train_dataloader()
    theirs.batch_sampler.set_epoch(3)
    assert [b[2].tolist() for b in loader] == [b[2].tolist() for b in theirs]
    data.resume(3, 2)
    assert [b[2].tolist() for b in loader] == [b[2].tolist() for b in theirs][2:]


def test_validation_keeps_its_own_decoder(tree):
    data = module(tree, val_decoder="torchvision")
    ours, val = data._sets
    assert isinstance(ours, NvjpegDataset) and val.decoder == "torchvision"
    described = data.describe()
    assert (described["decoder"], described["val_decoder"]) == ("nvjpeg", "torchvision")
    same = [next(iter(module(tree, d).val_dataloader()))[0] for d in ("nvjpeg", "torchvision", "pillow")]
    assert torch.equal(same[0], same[1]) and torch.equal(same[1], same[2])


def test_without_a_gpu_it_is_refused(tree, monkeypatch):
    monkeypatch.undo()
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"^decoder: nvjpeg decodes on an NVIDIA GPU.*; use torchvision"):
            module(tree).train_dataloader()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_next_batch_is_not_decoded_over_one_that_is_still_read(tmp_path, monkeypatch):
    """The stream that reads is kept busy, so that a decoder that does not wait would be ahead of it."""
    monkeypatch.undo()
    data = module(write_tree(tmp_path / "set", train=20, size=(500, 375)), image_size=224, batch_size=10)
    dataset = data._sets[0]
    encoded = [dataset.__getitems__([(0, 6 * k + i) for i in range(6)]) for k in range(10)]
    device = torch.device("cuda", 0)

    def made(batch):
        return nvjpeg_loader.make_batch(nvjpeg_loader.decode(batch, device), dataset, device)[0]

    expected = []
    for batch in encoded:
        expected.append(made(batch).clone())
        torch.cuda.synchronize()
    found = []
    with torch.cuda.stream(torch.cuda.Stream(device)):
        for batch in encoded:
            torch.cuda._sleep(20_000_000)
            found.append(made(batch))
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_gpu_gives_the_pixels_of_the_cpu(tmp_path, monkeypatch):
    monkeypatch.undo()
    root = write_tree(tmp_path / "set", train=20, size=(500, 375))
    data = module(root, image_size=224, batch_size=60)
    ours, theirs = (next(iter(module(root, d, image_size=224, batch_size=60).train_dataloader()))
                    for d in ("nvjpeg", "torchvision"))  # fmt: skip
    assert ours[0].is_cuda and data.train_images == 60
    off = np.abs(ours[0].cpu().numpy().astype(int) - theirs[0].numpy().astype(int))
    print(f"equal {(off == 0).mean():.1%}, at most one grey level off {(off <= 1).mean():.1%}, at most {off.max()}")
    assert off.mean() < 1


DECODING_BESIDE_A_STEP = """
import torch
from torchvision.io import encode_jpeg
from onlinenorm.data.nvjpeg_loader import decode_all, more_work_queues

more_work_queues()
device = torch.device("cuda", 0)
files = [encode_jpeg(torch.randint(256, (3, 64, 64), dtype=torch.uint8)) for _ in range(64)]
decode_all(files, device)  # starts the decoder
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    for _ in range(50):
        torch.cuda._sleep(100_000_000)  # clock cycles: 50 ms and more
graph.replay()
step = torch.cuda.current_stream().record_event()
stream = torch.cuda.Stream()
with torch.cuda.stream(stream):
    images = decode_all(files, device)
    stream.synchronize()
print("decoded", len(images), "beside" if not step.query() else "after")
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_decoding_does_not_wait_for_a_captured_step():
    """In a process of its own, as queues are made when CUDA starts."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_DEVICE_MAX_CONNECTIONS"}
    done = subprocess.run(
        [sys.executable, "-c", DECODING_BESIDE_A_STEP], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["decoded", "64", "beside"], done.stderr
