"""Kaggle's folders and zip file are the set of the class folders, and get one sentence where they are not whole."""

import os
import shutil
import zipfile

import numpy as np
import pytest
import torch
from imagenet_forms import LABELS, WNIDS, write_folders, write_kaggle, zip_folder

from onlinenorm.data import DataError, ImageNet
from onlinenorm.data.imagenet import open_splits
from onlinenorm.data.kaggle import ZIP, load_zip

IMAGES = "ILSVRC/Data/CLS-LOC"
VAL = f"{IMAGES}/val"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def folders(tmp_path):
    return write_folders(tmp_path / "class folders")


@pytest.fixture
def kaggle(folders, tmp_path):
    return write_kaggle(folders, tmp_path / "as downloaded")


def described(root, **arguments):
    """The fingerprint of a set, its paths and what both loaders yield."""
    data = ImageNet(root=str(root), image_size=32, batch_size=5, augmentation="random_resized_crop",
                    **{"num_workers": 0, **arguments})  # fmt: skip
    data.setup()
    paths = [d.index.relative_path(i) for d in data._sets for i in range(len(d))]
    return data.fingerprint, paths, [b for loader in (data.train_dataloader(), data.val_dataloader()) for b in loader]


def assert_same(one, other):
    assert one[:2] == other[:2] and len(one[2]) == len(other[2]) > 1
    assert all(torch.equal(x, y) for a, b in zip(one[2], other[2], strict=True) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("root", ["", "ILSVRC", "ILSVRC/Data", IMAGES])
def test_the_folders_are_the_set(folders, kaggle, root):
    assert_same(described(kaggle / root), described(folders))


def test_validation_images_may_have_been_sorted(folders, kaggle):
    shutil.rmtree(kaggle / VAL)
    shutil.copytree(folders / "val", kaggle / VAL)
    (kaggle / LABELS).unlink()
    assert_same(described(kaggle), described(folders))


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
@pytest.mark.parametrize("zip64", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_zip_is_the_set(folders, kaggle, tmp_path, compression, zip64, workers):
    archive = zip_folder(kaggle, tmp_path / ZIP, compression, zip64)
    expected = described(folders)
    for root in (archive, tmp_path):
        assert_same(described(root, num_workers=workers), expected)
    train, _ = load_zip(archive)
    assert train.take(np.array([1, 7])).read(1) == train.read(7)
    assert {name for name, value in vars(train).items() if isinstance(value, list)} == {"archives", "class_names"}


def test_the_zip_may_have_any_name(folders, kaggle, tmp_path):
    (tmp_path / "alone").mkdir()
    archive = zip_folder(kaggle, tmp_path / "alone" / "my ImageNet.ZIP")
    expected = described(folders)
    for root in (archive, archive.parent):
        assert_same(described(root), expected)
    shutil.copytree(folders / "train", archive.parent / "train")
    with pytest.raises(DataError, match=r"holds no folder val but my ImageNet.ZIP\n"):
        open_splits(str(archive.parent))


def test_only_kaggle_s_images_make_a_zip_of_another_name_kaggle_s(folders, kaggle, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    archive, notes = other / "photos.zip", other / "notes.txt"
    notes.touch()
    for damaged in (False, True):
        zip_folder(folders, archive)
        if damaged:
            archive.write_bytes(archive.read_bytes()[:-100])
        with pytest.raises(DataError, match=r"^root: \S+ holds no folder train and no folder val but photos.zip\n"):
            open_splits(str(other))
        with pytest.raises(DataError, match=r"^root: \S+/notes.txt is a file, not a folder\n"):
            open_splits(str(notes))
    zip_folder(kaggle, archive)
    with pytest.raises(DataError, match=rf"^root: \S+/notes.txt is a file; name the .* data.root={other}$"):
        open_splits(str(notes))
    (other / "ILSVRC2012_devkit_t12.tar.gz").touch()
    assert len(open_splits(str(other))[0]) == 15
    archive.rename(other / ZIP)
    assert len(open_splits(str(other))[0]) == 15


def test_zip_files_joined_by_cat_are_refused(folders, kaggle, tmp_path):
    archive = zip_folder(kaggle, tmp_path / ZIP)
    expected, content = described(folders), archive.read_bytes()
    archive.write_bytes(b"#!/bin/sh" + content)  # what unpacks itself
    assert_same(described(tmp_path), expected)
    archive.write_bytes(zip_folder(folders, tmp_path / "other.zip").read_bytes() + content)
    with pytest.raises(DataError, match=rf"^root: \S+{ZIP} begins with files that its directory does not list"):
        open_splits(str(archive))


def test_of_a_set_twice_in_one_zip_none_is_taken(folders, kaggle, tmp_path):
    archive = zip_folder(kaggle, tmp_path / ZIP)
    with zipfile.ZipFile(archive, "a") as file:
        file.write(kaggle / LABELS, f"backup/{LABELS}")
    with pytest.raises(
        DataError, match=rf"^root: \S+ holds several {LABELS}: {LABELS}, backup/{LABELS}; pack it again"
    ):
        open_splits(str(archive))
    shutil.copytree(kaggle, tmp_path / "two" / "a")
    shutil.copytree(kaggle / IMAGES / "train", tmp_path / "two" / "b" / IMAGES / "train")
    zip_folder(tmp_path / "two", archive)
    with pytest.raises(DataError, match=rf"^root: \S+ holds several {IMAGES}: a/{IMAGES}, b/{IMAGES}; pack it again"):
        open_splits(str(archive))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_of_a_name_twice_in_one_zip_the_last_counts(folders, kaggle, tmp_path):
    image = f"{VAL}/ILSVRC2012_val_00000003.JPEG"
    files = {str(path.relative_to(kaggle)): path.read_bytes() for path in kaggle.rglob("*") if path.is_file()}
    with zipfile.ZipFile(tmp_path / ZIP, "w") as file:
        file.writestr(image, b"old")
        file.writestr(LABELS, b"old")
        for name, content in files.items():
            file.writestr(name, content)
        file.writestr(f"{IMAGES}/train/{WNIDS[0]}/folder.jpg/", b"")
    assert_same(described(tmp_path), described(folders))


def test_names_and_extra_fields_of_any_length(folders, tmp_path):
    long = "x" * 150 + "/" + "y" * 200
    root = write_kaggle(folders, tmp_path / "deep" / long)
    archive = zip_folder(tmp_path / "deep", tmp_path / "renamed.zip", zipfile.ZIP_STORED)
    assert str(root.relative_to(tmp_path / "deep")) == long
    assert_same(described(archive), described(folders))


def test_the_index_follows_the_zip(kaggle, tmp_path):
    archive = zip_folder(kaggle, tmp_path / ZIP)
    assert len(load_zip(archive)[0]) == 15
    (kaggle / IMAGES / "train" / WNIDS[0] / f"{WNIDS[0]}_0.JPEG").unlink()
    zip_folder(kaggle, archive)
    assert len(load_zip(archive)[0]) == 14


def test_a_damaged_image_in_a_zip_is_named(kaggle, tmp_path):
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        archive = zip_folder(kaggle, tmp_path / ZIP, compression)
        with zipfile.ZipFile(archive) as file:
            member = file.getinfo(f"{VAL}/ILSVRC2012_val_00000002.JPEG")
        content = bytearray(archive.read_bytes())
        at = member.header_offset + 30 + len(member.filename) + member.compress_size // 2
        content[at : at + 8] = b"\xff" * 8
        archive.write_bytes(content)
        data = ImageNet(root=str(tmp_path), image_size=32, batch_size=5, num_workers=0)
        message = (
            rf"{ZIP}/n01443537/ILSVRC2012_val_00000002.JPEG cannot be decoded \(OSError: .*\.JPEG is damaged in {ZIP}: "
        )
        with pytest.raises(DataError, match=rf"{message}.* Replace {archive}, or"):
            [data.on_before_batch_transfer(batch) for batch in data.val_dataloader()]
        data = ImageNet(root=str(tmp_path), image_size=32, num_workers=0, on_unreadable="skip", unreadable_limit=0.5)
        [data.on_before_batch_transfer(batch) for batch in data.val_dataloader()]
        assert data.unreadable == ["val/n01443537/ILSVRC2012_val_00000002.JPEG"]


def test_a_name_in_no_encoding_is_told(kaggle, tmp_path):
    (kaggle / "ILSVRC" / "Annotations" / "caf\u00e9.xml").touch()
    archive = zip_folder(kaggle, tmp_path / ZIP)
    archive.write_bytes(archive.read_bytes().replace(b"caf\xc3\xa9", b"caf\xff\xff"))
    with pytest.raises(DataError, match=rf"^root: .*{ZIP} is damaged or cut short \('utf-8' codec"):
        open_splits(str(archive))


def edit(old, new):
    def change(root):
        text = (root / LABELS).read_text()
        assert old in text
        (root / LABELS).write_text(text.replace(old, new))

    return change


ROW = "ILSVRC2012_val_00000003,n01440764 85 1 499 272 n01440764 2 3 4 5 \n"
CHANGES = [
    (edit(ROW, ""), rf"{LABELS} does not name 1 file of .*val/: ILSVRC2012_val_00000003.JPEG"),
    (edit(ROW, ROW + ROW), rf"{LABELS}, line 5: names ILSVRC2012_val_00000003 twice"),
    (edit(ROW, ROW.replace("3,", "9,")), rf"{LABELS} names 1 file not in .*val/: ILSVRC2012_val_00000009"),
    (edit("3,n01440764 85", "3,1 85"), rf"{LABELS}, line 4: 'ILSVRC2012_val_00000003,1 85 .* names no class such as"),
    (edit(ROW, "ILSVRC2012_val_00000003\n"), rf"{LABELS}, line 4: 'ILSVRC2012_val_00000003' names no class"),
    (edit("ImageId,", "id,"), rf"{LABELS} does not begin with ImageId,PredictionString"),
    (lambda root: (root / LABELS).write_bytes(b"ImageId,PredictionString\n\xff,n01440764"), f"{LABELS} is damaged"),
    (lambda root: (root / LABELS).write_bytes(b""), rf"{LABELS} is empty; fetch it again"),
    (lambda root: (root / LABELS).write_bytes(LFS_POINTER), rf"{LABELS} is a pointer of Git LFS .*git lfs pull"),
    (lambda root: (root / VAL / "ILSVRC2012_val_00000003.JPEG").unlink(), "names 1 file not in .*val/: ILSV"),
    (lambda root: (root / LABELS).unlink(), f"(?:{LABELS} is missing, which says|holds no {LABELS})"),
    (lambda root: [shutil.rmtree(f) for f in (root / IMAGES / "train").iterdir()],
     f"(?:train holds no class folders|holds no {IMAGES}/train)"),
]  # fmt: skip


@pytest.mark.parametrize("form", ["folders", "zip"])
@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_what_is_not_whole_gets_one_sentence(kaggle, tmp_path, form, change, message):
    change(kaggle)
    root = kaggle if form == "folders" else zip_folder(kaggle, tmp_path / ZIP)
    with pytest.raises(DataError, match=f"^root: .*{message}") as caught:
        open_splits(str(root))
    assert "\n" not in str(caught.value)


def test_other_classes_in_the_list_are_named(kaggle):
    edit("n01484850", "n09999999")(kaggle)
    with pytest.raises(DataError, match="1 only in train/: n01484850; 1 only in val/: n09999999"):
        open_splits(str(kaggle))


def test_zip_files_that_cannot_be_read_in_place(kaggle, tmp_path):
    archive = tmp_path / ZIP
    for content, message in (
        (b"x" * 5000, "damaged or cut short .*; fetch it again"),
        (b"", "empty; fetch it again"),
        (LFS_POINTER, "a pointer of Git LFS .*; run git lfs pull"),
    ):
        archive.write_bytes(content)
        with pytest.raises(DataError, match=f"^root: .*{ZIP} is {message}"):
            open_splits(str(tmp_path))
    zip_folder(kaggle, archive)
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(DataError, match=f"^root: .*{ZIP} is damaged or cut short"):
        open_splits(str(tmp_path))
    zip_folder(kaggle, archive, zipfile.ZIP_BZIP2)
    with pytest.raises(DataError, match=rf"^root: .*{IMAGES}/.*\.JPEG is compressed by method 12.*unpack it"):
        open_splits(str(archive))
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("imagenet_object_localization_patched2019.tar.gz", b"x")
    with pytest.raises(DataError, match=rf"holds no {IMAGES}/train \(it holds: imagenet_object.*tar\.gz\).*unpacked"):
        open_splits(str(archive))
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(f"{IMAGES}/train/{WNIDS[0]}/../../x.JPEG", b"x")
    with pytest.raises(DataError, match="points out of the folder"):
        open_splits(str(archive))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_zip_that_may_not_be_read(kaggle, tmp_path):
    zip_folder(kaggle, tmp_path / ZIP).chmod(0)
    with pytest.raises(DataError, match=f"{ZIP} cannot be read .*permissions"):
        open_splits(str(tmp_path))
