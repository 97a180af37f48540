import itertools
import shutil
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from image_folders import write_image, write_tree
from PIL import Image

from onlinenorm.data import DataError, ImageNet, UnreadableImageError
from onlinenorm.data.imagenet_classes import WNIDS
from onlinenorm.data.index import FolderIndex, load_index, pack_names
from onlinenorm.data.prepare import pack
from onlinenorm.data.verify import verify


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "set")


def module(tree, **arguments):
    return ImageNet(**{"root": str(tree), "num_workers": 0, "image_size": 32, "batch_size": 5, **arguments})


def hooked(data, loader):
    for batch in loader:
        yield data.on_after_batch_transfer(data.on_before_batch_transfer(batch))


def test_description(tree):
    data = module(tree)
    data.setup()
    assert (data.num_classes, data.class_names, data.scale) == (3, ["ant", "bee", "cat"], "folder")
    assert (data.train_images, data.val_images, data.name, data.in_channels) == (15, 6, "set", 3)
    assert module(tree, limit_train=7, limit_val=2).describe()["train_images"] == 7
    assert module(tree, limit_train=7).fingerprint != data.fingerprint == module(tree).fingerprint


def sized(folder, classes, images, kilobytes):
    labels = np.arange(images) * len(classes) // images
    arrays = {"names": np.empty(0, np.uint8), "offsets": np.zeros(images + 1, np.int64), "labels": labels}
    return FolderIndex(folder, classes, sizes=np.full(images, 1000 * kilobytes), **arrays)


OURS, OTHERS = sorted(WNIDS), [f"n{c:08d}" for c in range(1000)]


@pytest.mark.parametrize(
    ("classes", "images", "kilobytes", "scale"),
    [
        (OURS, (1281167, 50000), (115, 134), "imagenet"),
        (OURS, (1281166, 50000), (115, 134), "imagenet-subset"),
        (OURS[:10], (9469, 3925), (90, 100), "imagenet-subset"),  # imagenette2
        (OURS[:10], (9469, 3925), (30, 30), "folder"),  # imagenette2-320
        ([*OURS[:9], "n00000001"], (9469, 3925), (115, 134), "folder"),
        (OURS, (1281167, 50000), (24, 24), "imagenet-resized"),
        (OURS, (1281167, 50000), (115, 24), "imagenet-resized"),
        (OTHERS, (1281167, 50000), (115, 134), "folder"),
    ],
)
def test_only_imagenets_classes_in_files_of_its_sizes_are_called_so(
    tmp_path, monkeypatch, classes, images, kilobytes, scale
):
    splits = tuple(sized(tmp_path, classes, *split) for split in zip(images, kilobytes, strict=True))
    monkeypatch.setattr(ImageNet, "open_splits", lambda self: splits)
    data = ImageNet(root=str(tmp_path))
    data.setup()
    assert data.scale == scale
    assert data.name == ("imagenet" if scale in ("imagenet", "imagenet-subset") else tmp_path.name)
    part = "folder" if scale in ("folder", "imagenet-resized") else "imagenet-subset"
    assert ImageNet(root=str(tmp_path), limit_train=9000).scale == part
    problems = verify(splits, decode=0)["problems"]
    assert any("resized or compressed anew" in problem for problem in problems) == (scale == "imagenet-resized")


def test_a_folder_of_imagenets_name_does_not_make_imagenet(tree):
    data = module(tree.rename(tree.with_name("imagenet")))
    data.setup()
    assert (data.name, data.scale) == ("folder imagenet", "folder")


def test_a_thousand_classes_of_ones_own_are_not_held_against_imagenet(tmp_path):
    names = [f"word{c:04d}" for c in range(1000)]
    arrays = {**pack_names([f"{name}/0.jpg" for name in names]), "labels": np.arange(1000), "sizes": np.ones(1000)}
    index = FolderIndex(tmp_path, names, **arrays)
    assert verify((index, index), decode=0)["problems"] == []


@pytest.mark.parametrize("decoder", ["pillow", "torchvision"])
@pytest.mark.parametrize("augmentation", ["random_resized_crop", "scale_jitter", "pad_crop", "none"])
def test_training_batches(tree, decoder, augmentation):
    data = module(tree, decoder=decoder, augmentation=augmentation)
    raw = next(iter(data.train_dataloader()))
    assert raw[0].shape == (5, 3, 32, 32) and raw[0].dtype == torch.uint8
    assert raw[0].is_contiguous(memory_format=torch.channels_last)
    images, labels, indices = data.on_after_batch_transfer(data.on_before_batch_transfer(raw))
    assert images.dtype == torch.float32 and images.shape == (5, 3, 32, 32)
    assert labels.dtype == indices.dtype == torch.int64
    assert labels.tolist() == [data._sets[0].index.labels[i] for i in indices.tolist()]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in data.mean_std)
    shift = images * std + mean - raw[0] / 255
    assert (len(raw) == 4) == (augmentation == "scale_jitter")
    expected = raw[3] if len(raw) == 4 else torch.zeros(5, 3)
    torch.testing.assert_close(shift, expected[:, :, None, None].expand_as(shift), atol=1e-6, rtol=0)


def test_ten_crop(tree):
    data = module(tree, evaluation="ten_crop", val_batch_size=4)
    batches = list(hooked(data, data.val_dataloader()))
    assert [tuple(b[0].shape) for b in batches] == [(4, 10, 3, 32, 32), (2, 10, 3, 32, 32)]
    centre = torch.cat([b[0] for b in hooked(data, module(tree).val_dataloader())])
    torch.testing.assert_close(torch.cat([b[0] for b in batches])[:, 4], centre)


@pytest.mark.parametrize("augmentation", ["random_resized_crop", "scale_jitter"])
def test_pixels_depend_on_seed_epoch_and_index_only(tree, augmentation):
    def pixels(epoch=1, **arguments):
        data = module(tree, augmentation=augmentation, **arguments)
        loader = data.train_dataloader()
        loader.batch_sampler.set_epoch(epoch)
        return {int(i): x for images, _, indices in hooked(data, loader) for i, x in zip(indices, images, strict=True)}

    base = pixels()
    for same in (pixels(num_workers=2), pixels(batch_size=3)):
        assert same and all(torch.equal(x, base[i]) for i, x in same.items())
    for other in (pixels(seed=1), pixels(epoch=2)):
        both = base.keys() & other.keys()
        assert both and not any(torch.equal(other[i], base[i]) for i in both)


@pytest.fixture
def damaged(tree):
    """Training images 3 and 4 and validation image 5, the last, are damaged: half, empty, missing behind a link."""
    half = tree / "train" / "ant" / "3.JPEG"
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    (tree / "train" / "ant" / "4.JPEG").write_bytes(b"")
    (tree / "val" / "cat" / "1.JPEG").unlink()
    (tree / "val" / "cat" / "1.JPEG").symlink_to("nowhere.JPEG")
    return tree


@pytest.mark.parametrize("decoder", ["pillow", "torchvision"])
@pytest.mark.parametrize("workers", [0, 1])
def test_skip_replaces_in_training_and_marks_in_validation(damaged, decoder, workers):
    data = module(damaged, on_unreadable="skip", unreadable_limit=0.5, decoder=decoder, val_decoder=decoder,
                  num_workers=workers)  # fmt: skip
    found = {int(i): (x, int(y)) for b in hooked(data, data.train_dataloader()) for x, y, i in zip(*b, strict=True)}
    assert sorted(found) == list(range(15))
    for replaced in (3, 4):
        assert torch.equal(found[replaced][0], found[5][0]) and found[replaced][1] == found[5][1] == 1
    labels = {int(i): int(y) for b in hooked(data, data.val_dataloader()) for _, y, i in zip(*b, strict=True)}
    assert labels == {0: 0, 1: 0, 2: 1, 3: 1, 4: 2, 5: -1}
    assert sorted(data.unreadable) == ["train/ant/3.JPEG", "train/ant/4.JPEG", "val/cat/1.JPEG"]
    list(hooked(data, data.train_dataloader()))
    assert len(data.unreadable) == 3, "an image is counted once"
    restored = module(damaged)
    restored.load_state_dict(data.state_dict())
    assert restored.unreadable == data.unreadable


def test_raise_names_file_cause_and_remedy(damaged):
    data = module(damaged)
    with pytest.raises(UnreadableImageError, match=r"(?s)^on_unreadable: .*ant/[34]\.JPEG .*Error.*on_unreadable=skip"):
        list(hooked(data, data.train_dataloader()))
    with pytest.raises(UnreadableImageError, match=r"cat/1\.JPEG .*FileNotFoundError"):
        list(hooked(data, data.val_dataloader()))
    assert data.unreadable == []


def test_too_many_unreadable_images_raise(damaged):
    data = module(damaged, on_unreadable="skip", unreadable_limit=0.07)  # 1 of 15 is allowed
    with pytest.raises(
        UnreadableImageError, match=r"^unreadable_limit: 2 of 15 images in train/.* fraction 0\.07 allo"
    ):
        list(hooked(data, data.train_dataloader()))
    assert len(data.unreadable) == 1, "the second one may be replaced, and is not left out"


def test_skip_leaves_one_image_out_of_any_set(damaged):
    (damaged / "train" / "ant" / "4.JPEG").unlink()  # of 14 one is damaged, of 6 for validation another
    data = module(damaged, on_unreadable="skip")
    assert len(list(hooked(data, data.train_dataloader()))) and len(list(hooked(data, data.val_dataloader())))
    assert sorted(data.unreadable) == ["train/ant/3.JPEG", "val/cat/1.JPEG"]
    with pytest.raises(UnreadableImageError, match=r"1 of 14 images .* the fraction 0 allows 0"):
        list(hooked(nothing := module(damaged, on_unreadable="skip", unreadable_limit=0), nothing.train_dataloader()))


def test_a_vanished_disk_ends_the_search_for_replacements(tree):
    data = module(tree, on_unreadable="skip")
    data.setup()
    shutil.rmtree(tree / "train")
    with pytest.raises(DataError, match="none of 15 images in a row can be read"):
        next(iter(data.train_dataloader()))


@pytest.mark.parametrize("on_device", [False, True])
def test_an_image_that_memory_does_not_hold_is_named(tree, monkeypatch, on_device):
    monkeypatch.setattr("onlinenorm.data.decoders.open_rgb", Mock(side_effect=MemoryError))
    data = module(tree, on_unreadable="skip", on_device=on_device)
    with pytest.raises(DataError, match=r"^num_workers: .*/train/.*JPEG takes more memory to decode than is left; use"):
        next(iter(data.train_dataloader()))


def test_no_root():
    with pytest.raises(DataError) as caught:
        ImageNet().setup()
    text = str(caught.value)
    assert text.startswith("root: no ImageNet folder is given") and len(text.splitlines()) < 15
    forms = ("ROOT/train/CLASS", "(or test/)", "imagenet-object-localization-challenge.zip", "train-*.parquet", ".tar")
    for part in (*forms, "image-net.org", "kaggle.com", "huggingface.co", "data.root=", "experiment=quickstart"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 120


def test_a_labelled_test_set_stands_in_for_validation(tree):
    def content():
        data = module(tree)
        data.setup()
        return data.fingerprint, torch.cat([batch[0] for batch in data.val_dataloader()])

    digest, pixels = content()
    (tree / "val").rename(tree / "test")
    same, found = content()
    assert same == digest and torch.equal(found, pixels)
    shutil.copytree(tree / "test", tree / "val")
    (tree / "test" / "bee").rename(tree / "test" / "boa")
    assert module(tree).class_names == ["ant", "bee", "cat"], "val/ is read where it is there"
    shutil.rmtree(tree / "val")
    with pytest.raises(DataError, match=r"train/ and test/ in .* 1 only in train/: bee; 1 only in test/: boa"):
        module(tree).setup()
    shutil.rmtree(tree / "test")
    write_image(tree / "test" / "1.JPEG", 0)
    with pytest.raises(DataError, match=r"holds no folder val \(it holds: test, train\)"):
        module(tree).setup()


def test_nothing_stands_in_for_broken_links(tree, caplog):
    (tree / "val").rename(tree / "test")
    (tree / "val").symlink_to("unmounted")
    with pytest.raises(DataError, match=r"^root: \S+/val is a link that leads nowhere; mend what it leads to, or rem"):
        module(tree).setup()
    (tree / "val").unlink()
    index = load_index((tree / "train").rename(tree / "moved"))
    (tree / "train").symlink_to("train")
    with pytest.raises(
        DataError, match=r"holds no folder train and .* \(it holds: moved, test, the broken link train\)"
    ):
        module(tree).setup()
    for split in ("train", "val"):
        pack(index, tree, split, index.class_names)
    (tree / "train-x.tar").symlink_to("unmounted")
    with pytest.raises(DataError, match=r"^root: \S+/train-x.tar is a link that leads nowhere"):
        module(tree).setup()
    assert not caplog.records


def test_of_several_forms_one_is_named_and_read(tree, caplog):
    expected = module(tree)
    expected.setup()
    assert "several forms" not in caplog.text
    for split in ("train", "val"):
        index = load_index(tree / split)
        pack(index, tree, split, index.class_names[:2])
    (tree / "ILSVRC2012_img_val.tar").touch()
    data = module(tree)
    assert data.fingerprint == expected.fingerprint
    assert (
        "holds images in several forms, class folders, tar shards, official archives: read are the class f"
        in caplog.text
    )


def test_a_folder_that_may_not_be_read_is_named(tree, monkeypatch):
    def scandir(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("onlinenorm.data.index.os.scandir", scandir)
    with pytest.raises(
        DataError, match=r"^root: .*/train cannot be read \(Permission denied\); correct its permissions"
    ):
        module(tree).setup()


def test_paths_of_any_kind(tree, tmp_path):
    expected = module(tree)
    expected.setup()
    moved = tree.rename(tmp_path / "a set, with = and 'ü'")
    (tmp_path / "link").symlink_to(moved)
    for root in (moved, tmp_path / "link"):
        assert module(root).fingerprint == expected.fingerprint
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("gone")
    for name in ("loop", "nowhere"):
        with pytest.raises(DataError, match=f"^root: .*{name} is a link that leads nowhere"):
            module(tmp_path / name).setup()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: shutil.rmtree(t / "val"), r"holds no folder val \(it holds: train\)"),
        (lambda t: (t / "val" / "bee").rename(t / "val" / "boa"), "1 only in train/: bee; 1 only in val/: boa"),
        (lambda t: shutil.rmtree(t / "train" / "bee"), "1 only in val/: bee"),
        (lambda t: [(t / "val" / f"x{k}").mkdir() for k in range(8)], "8 only in val/: x0, x1, x2, x3, x4 and 3 more"),
        (lambda t: (shutil.rmtree(t / "val"), write_image(t / "val" / "1.JPEG", 0)), "no class folders; its 1 images"),
        (lambda t: [(t / s / "dog").mkdir() for s in ("train", "val")], "1 class folder without an image .*: dog"),
        (lambda t: [shutil.rmtree(t / s / c) for s in ("train", "val") for c in ("bee", "cat")], "one class, ant,"),
        (lambda t: (shutil.rmtree(t / "val"), (t / "val.tgz").touch()), r"val but val.tgz; unpack it: tar xf \S+ -C"),
    ],
)
def test_broken_layouts_are_explained(tree, change, message):
    change(tree)
    with pytest.raises(DataError, match=f"(?s)^root: .*{message}") as caught:
        module(tree).setup()
    assert len(str(caught.value).splitlines()) <= 3, "nothing of how ImageNet is to be had"


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("nowhere", [], "nowhere does not exist"),
        ("", [], r"holds no folder train and no folder val \(it holds: nothing\)"),
        ("notes.txt", ["notes.txt"], "notes.txt is a file, not a folder"),
        ("", ["train.tar.gz", "val.TGZ"], r"val.TGZ; unpack train.tar.gz: tar xf (\S+)/train.tar.gz -C \1\n"),
        ("", ["a.tar", "train.tgz"], r"but train.tgz, a.tar; unpack train.tgz: tar xf (\S+)/train.tgz -C \1\n"),
        (
            "a set.zip.tar",
            ["a set.zip.tar"],
            r"is an archive; unpack it: tar xf '\S+/a set.zip.tar' -C (\S+), and .*=\1\n",
        ),
        ("", ["a.zip", "b.ZIP"], r"but a.zip, b.ZIP\n"),
    ],
)
def test_a_root_without_images_tells_all_forms_on_one_screen(tmp_path, name, files, message):
    for file in files:
        (tmp_path / file).touch()
    with pytest.raises(DataError, match=f"^root: .*{message}") as caught:
        module(tmp_path / name).setup()
    text = str(caught.value)
    assert len(text.splitlines()) < 20
    for part in ("image-net.org", "kaggle.com", "huggingface.co", "ROOT/train/CLASS", "train-*.tar"):
        assert part in text


def test_a_file_of_a_set_is_answered_by_its_folder(tree, tmp_path):
    for split in ("train", "val"):
        index = load_index(tree / split)
        pack(index, tmp_path / "packed", split, index.class_names)
    shard = next((tmp_path / "packed").glob("train*.tar"))
    with pytest.raises(DataError, match=rf"is a file; name the folder that holds it: data.root={shard.parent}$"):
        module(shard).setup()
    shard.rename(shard.with_suffix(".TAR"))
    assert module(tmp_path / "packed").train_images == 15


def test_photographs_of_ones_own_are_not_under_imagenet_s_terms(tree):
    assert "ImageNet" not in module(tree).licence
    for split, wnid in itertools.product(("train", "val"), range(3)):
        name = ("ant", "bee", "cat")[wnid]
        (tree / split / name).rename(tree / split / sorted(WNIDS)[wnid])
    assert "non-commercial" in module(tree).licence


def test_gray_input_is_refused(tree):
    with pytest.raises(ValueError, match=r"^in_channels: 1 is not 3"):
        module(tree, in_channels=1)


def test_decoders_give_nearly_the_same_training_pixels(tree):
    def pixels(decoder):
        loader = module(tree, decoder=decoder, augmentation="random_resized_crop").train_dataloader()
        return np.concatenate([batch[0].numpy().astype(int) for batch in loader])

    assert np.abs(pixels("pillow") - pixels("torchvision")).mean() < 1


def test_damaged_exif_data_is_told_with_the_file(tree, caplog):
    file = tree / "train" / "bee" / "0.JPEG"
    exif = b"Exif\0\0II*\0\x08\0\0\0\x20\0" + b"\x1a\x01\x05\0\x01\0\0\0\xff\xff\0\0"  # cut short
    with Image.open(file) as image:
        image.save(file, "JPEG", exif=exif)
    data = module(tree)
    list(data.train_dataloader())
    assert "train/bee/0.JPEG: " in caplog.text
