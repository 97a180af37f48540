import functools
import sys
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from onlinenorm import data as onlinenorm_data
from onlinenorm.cli.compose import load_config
from onlinenorm.data import (
    CIFAR10,
    CIFAR100,
    DataError,
    FashionMNIST,
    ImageDataModule,
    ImageNet,
    Imagenette,
    Synthetic,
    TinyImageNet,
)
from onlinenorm.data.gpu_cache import GpuCacheLoader
from onlinenorm.errors import ArgumentError


def embedded(**arguments):
    return FashionMNIST(**{"embedded": True, "limit_train": 300, "limit_val": 101, "batch_size": 32, **arguments})


def pixels(data, epoch):
    loader = data.train_dataloader()
    loader.batch_sampler.set_epoch(epoch)
    return {int(i): x.cpu() for batch in loader for i, x in zip(batch[2], batch[0], strict=True)}


@pytest.mark.parametrize("kind", [embedded, functools.partial(Synthetic, batch_size=32)])
def test_same_pixels_for_the_same_seed_epoch_and_index(kind):
    base = pixels(kind(augmentation="pad_crop"), 3)
    for same in ({"num_workers": 2}, {"batch_size": 25}, {"on_device": True}):
        found = pixels(kind(augmentation="pad_crop", **same), 3)
        shared = set(found) & set(base)
        assert len(shared) > 100 and all(torch.equal(found[i], base[i]) for i in shared)
    for other in (pixels(kind(augmentation="pad_crop", seed=1), 3), pixels(kind(augmentation="pad_crop"), 4)):
        shared = set(other) & set(base)
        assert np.mean([torch.equal(other[i], base[i]) for i in shared]) < 0.1


def test_resident_batches_are_those_of_the_loader():
    arguments = {"augmentation": "pad_crop", "batch_size": 7}
    for split in ("train_dataloader", "val_dataloader"):
        plain, resident = (getattr(embedded(**arguments, on_device=flag), split)() for flag in (False, True))
        assert isinstance(resident, GpuCacheLoader) and len(resident) == len(plain)
        resident_batches = list(resident)
        assert len(resident_batches) == len(plain) > 1
        for a, b in zip(plain, resident_batches, strict=True):
            assert all(torch.equal(x, y.cpu()) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


def test_resident_chunks_hold_all_batches_in_order(monkeypatch):
    monkeypatch.setattr(onlinenorm_data.gpu_cache, "_CHUNK", 64 * 28 * 28)
    chunked = embedded(batch_size=25, on_device=True).train_dataloader()
    whole = embedded(batch_size=25).train_dataloader()
    found, expected = ([batch[2].tolist() for batch in loader] for loader in (chunked, whole))
    assert found == expected


def test_resident_continues_where_a_run_stopped():
    data = embedded(batch_size=30, on_device=True)
    all_batches = [batch[2].tolist() for batch in data.train_dataloader()]
    data.resume(0, 4)
    assert [batch[2].tolist() for batch in data.train_dataloader()] == all_batches[4:]


def test_global_random_state_neither_matters_nor_moves():
    def run(seed):
        torch.manual_seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state()
        batches = list(embedded(augmentation="random_resized_crop").train_dataloader())
        assert torch.equal(torch.get_rng_state(), before)
        return batches

    first, second = run(1), run(2)
    assert len(first) > 1
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_processes_together_see_the_batches_of_one():
    class Process:
        world_size, accumulate_grad_batches = 3, 1

        def __init__(self, rank):
            self.global_rank = rank

    def loaders(rank):
        data = embedded(augmentation="pad_crop", batch_size=30)
        data.trainer = Process(rank)
        return data.train_dataloader(), data.val_dataloader()

    ranks = [loaders(rank) for rank in range(3)]
    for whole, *parts in zip(
        embedded(augmentation="pad_crop", batch_size=30).train_dataloader(), *(train for train, _ in ranks), strict=True
    ):
        for tensor, pieces in zip(whole, zip(*parts, strict=True), strict=True):
            assert torch.equal(tensor, torch.stack(pieces, 1).flatten(0, 1))  # dealt out
    for rank, (_, val) in enumerate(ranks):
        assert torch.cat([b[2] for b in val]).tolist() == list(range(rank, 101, 3))


@pytest.mark.parametrize("evaluation", ["center_crop", "ten_crop"])
def test_validation_is_the_same_whatever_the_augmentation(evaluation):
    one, other = {"augmentation": "none", "seed": 0}, {"augmentation": "pad_crop", "seed": 1}
    loaders = [embedded(evaluation=evaluation, **arguments).val_dataloader() for arguments in (one, other)]
    assert len(loaders[0]) > 1
    for a, b in zip(*loaders, strict=True):
        assert len(a) == 3 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    if evaluation == "center_crop":
        source = embedded()._sets[1].source
        assert torch.equal(torch.cat([b[0] for b in loaders[0]]), torch.from_numpy(source.images(np.arange(101))))


def test_normalisation_upscaling_and_channels_on_the_device():
    raw = next(iter(embedded().val_dataloader()))
    plain, labels, indices = embedded().on_after_batch_transfer(raw)
    torch.testing.assert_close(plain, (raw[0] / 255 - 0.2860) / 0.3530)
    assert torch.equal(labels, raw[1]) and torch.equal(indices, raw[2]) and raw[0].dtype == torch.uint8
    large, _, _ = embedded(image_size=224, in_channels=3).on_after_batch_transfer(raw)
    assert large.shape == (64, 3, 224, 224)
    assert torch.equal(large[:, 0], large[:, 2])
    torch.testing.assert_close(torch.nn.functional.avg_pool2d(large, 8)[:, :1].mean(), plain.mean(), atol=1e-3, rtol=0)
    ten = embedded(image_size=56, in_channels=3, evaluation="ten_crop")
    batch = ten.on_after_batch_transfer(next(iter(ten.val_dataloader())))
    assert batch[0].shape[1:] == (10, 3, 56, 56)


def test_no_python_runs_for_each_image_of_a_set_in_memory():
    """What makes it fast: as many calls for a batch of 512 images as for one of 16."""

    def calls(batch_size):
        data = FashionMNIST(embedded=True, augmentation="pad_crop", batch_size=batch_size)
        data.setup()
        batches, counted = iter(data.train_dataloader()), []
        next(batches)
        former = sys.getprofile()
        sys.setprofile(lambda frame, event, _: counted.append(event) if event in ("call", "c_call") else None)
        try:
            next(batches)
        finally:
            sys.setprofile(former)
        return len(counted)

    assert 0 < calls(16) == calls(512)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decoder": "pilow"}, "^decoder: 'pilow' is not one of pillow, torchvision, nvjpeg; did you mean pillow\\?"),
        ({"val_decoder": "nvjpeg"}, "^val_decoder: 'nvjpeg' is not one of pillow, torchvision"),
        ({"device_fraction": 1.5}, "^device_fraction: 1.5 is not a fraction"),
        ({"on_unreadable": "ignore"}, "^on_unreadable: 'ignore' is not one of raise, skip"),
        ({"unreadable_limit": 2}, "^unreadable_limit: 2 is not a fraction from 0 to 1"),
        ({"augmentation": "pad_crob"}, "^augmentation: .* did you mean pad_crop"),
        ({"evaluation": "five_crop"}, "^evaluation: 'five_crop' is not one of center_crop, ten_crop"),
        ({"num_workers": -1}, "^num_workers: -1 is not a whole number 0 or larger \\(or null\\)"),
        ({"limit_train": 0}, "^limit_train: 0 is not"),
        ({"limit_val": 1.5}, "^limit_val: 1.5 is not"),
        ({"batch_size": "32"}, "^batch_size: '32' is not"),
        ({"val_batch_size": 0}, "^val_batch_size: 0 is not"),
        ({"image_size": 4}, "^image_size: 4 is not"),
        ({"seed": True}, "^seed: True is not"),
        ({"crop_padding": -1}, "^crop_padding: -1 is not"),
        ({"classes": 1}, "^classes: 1 is not"),
        ({"augmentation": "scale_jitter", "in_channels": 1}, "^augmentation: scale_jitter .* in_channels 3"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Synthetic(**arguments)


def test_a_set_of_ones_own_takes_a_root_unless_it_says_that_it_reads_none():
    class Reading(ImageDataModule):
        pass

    class Making(ImageDataModule):
        reads_root = False

    assert Reading(root="/photos").root == "/photos" and Making().root is None
    with pytest.raises(ValueError, match=r"^root: /photos would not be read"):
        Making(root="/photos")


@pytest.mark.parametrize("kind", [CIFAR10, CIFAR100, FashionMNIST, Imagenette, ImageNet, TinyImageNet])
def test_every_set_takes_a_path_object_as_text(kind, tmp_path):
    class Place:
        def __fspath__(self):
            return str(tmp_path)

    for root in (tmp_path, Place(), str(tmp_path)):
        data = kind(root=root)
        assert data.root == str(tmp_path)
        with pytest.raises(DataError, match=rf"(?s)^root: .*{tmp_path}"):
            data.setup()
    for root, message in ((Path(" "), "is empty, as of a shell variable"), (2026, "2026 is neither text nor a path")):
        with pytest.raises(ArgumentError, match=f"^root: {message}"):
            kind(root=root)


def test_a_batch_larger_than_the_set_is_refused():
    with pytest.raises(ValueError, match=r"^batch_size: 512 exceeds the 300 training images"):
        embedded(batch_size=512).train_dataloader()


@pytest.mark.parametrize(
    "name", ["embedded", "fashion_mnist", "synthetic", "imagenet", "cifar10", "cifar100", "imagenette", "tiny_imagenet"]
)
def test_configs_are_constructor_calls(name):
    config = load_config([f"data={name}"])["data"]
    chosen = {key for key, value in config.items() if value == "auto"}  # before the call, by the device
    assert chosen <= {"decoder", "on_device"}
    config = {key: value for key, value in config.items() if key not in chosen}
    kind = getattr(onlinenorm_data, config.pop("_target_").rpartition(".")[2])
    data = kind(**config, batch_size=16, seed=1, augmentation="none", evaluation="center_crop")
    assert isinstance(data, ImageDataModule) and data.name == name
    for key, value in config.items():
        assert getattr(kind(batch_size=16), key) == value or key == "embedded", "yaml and class agree on defaults"


def test_synthetic_images_can_be_learnt():
    data = Synthetic(num_train=600, num_val=300, batch_size=600, in_channels=1, image_size=33, classes=7)
    (train,), (val, *_) = list(data.train_dataloader()), list(data.val_dataloader())
    assert train[0].shape == (600, 1, 33, 33) and data.num_classes == 7 and data.scale == "synthetic"
    x, y = train[0].flatten(1).float(), train[1]
    centres = torch.stack([x[y == c].mean(0) for c in range(7)])
    guesses = torch.cdist(val[0].flatten(1).float(), centres).argmin(1)
    assert (guesses == val[1]).float().mean() > 0.95
    assert torch.unique(x, dim=0).shape[0] > 590, "images of a class differ"
    images = data.on_after_batch_transfer(train)[0]
    assert abs(images.mean()) < 0.3 and 0.5 < images.std() < 2


def test_synthetic_content_is_independent_of_the_run_seed():
    assert Synthetic(seed=0).fingerprint == Synthetic(seed=1).fingerprint
    others = [Synthetic(content_seed=1), Synthetic(image_size=16), Synthetic(num_train=99), Synthetic(classes=9)]
    assert len({d.fingerprint for d in [Synthetic(), *others]}) == 5
    assert Synthetic(limit_train=10, limit_val=5).describe()["val_images"] == 5


class Recorder(pl.LightningModule):
    """Trains nothing; notes (epoch, indices) of every batch."""

    def __init__(self, save_after=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.validated, self.save_after = [], [], save_after

    def training_step(self, batch, _):
        images, _, indices = batch
        assert images.dtype == torch.float32
        self.seen.append((self.current_epoch, indices.tolist()))
        return self.weight * images.mean()

    def on_train_batch_end(self, *_):
        if self.save_after == len(self.seen):
            self.trainer.save_checkpoint(self.checkpoint)

    def validation_step(self, batch, _):
        self.validated += batch[2].tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's advice on loggers and numbers of workers
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning_sees_each_epochs_order_and_resumes_inside_an_epoch(tmp_path, accumulate):
    def fit(save_after=None, resume=None, checkpoint=None, workers=0):
        data = Synthetic(num_train=50, num_val=13, batch_size=8, image_size=8, num_workers=workers)
        if resume:
            data.resume(*resume)
        model = Recorder(save_after)
        model.checkpoint = tmp_path / "middle.ckpt"
        pl.Trainer(
            accelerator="cpu", max_epochs=3, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, use_distributed_sampler=False, accumulate_grad_batches=accumulate,
            num_sanity_val_steps=0,
        ).fit(model, data, ckpt_path=checkpoint)  # fmt: skip
        return model

    whole = fit(save_after=9 * accumulate)
    assert [e for e, _ in whole.seen] == [e for e in range(3) for _ in range(6 * accumulate)]
    sampler = onlinenorm_data.GlobalBatchSampler(50, 8, seed=0, accumulate=accumulate)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert [i for e, i in whole.seen if e == epoch] == [[i for _, i in batch] for batch in sampler]
    assert whole.validated == list(range(13)) * 3
    rest = fit(resume=(1, 3), checkpoint=whole.checkpoint, workers=1)
    assert rest.seen == whole.seen[9 * accumulate :]
    assert rest.validated == list(range(13)) * 2
