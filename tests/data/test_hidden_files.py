"""Hidden files are no images in any form of a set: macOS puts ._0.JPEG, which holds no image, beside 0.JPEG."""

import itertools
import shutil
import tarfile
import zipfile

import pytest
from imagenet_forms import WNIDS, write_folders, write_kaggle, zip_folder
from official_archives import add, write_official

from onlinenorm.data.archives import TRAIN_ARCHIVE, VAL_ARCHIVE
from onlinenorm.data.datasets import fingerprint
from onlinenorm.data.imagenet import open_splits
from onlinenorm.data.kaggle import ZIP
from onlinenorm.data.prepare import pack
from onlinenorm.deploy.predict import find_images

pytestmark = pytest.mark.usefixtures("own_cache")
FORK = b"\0\5\x16\7 not an image"


@pytest.fixture
def folders(tmp_path):
    return write_folders(tmp_path / "folders")


def hide_beside(root):
    """A hidden file beside each image, and a hidden folder with a copy of one."""
    images = list(root.rglob("*.JPEG"))
    for file in images:
        file.with_name(f"._{file.name}").write_bytes(FORK)
    (images[0].parent / ".ipynb_checkpoints").mkdir()
    shutil.copy(images[0], images[0].parent / ".ipynb_checkpoints" / "copy.JPEG")
    for split in {file.parents[1] for file in images if file.parent.parent.name in ("train", "val")}:
        (split / "__MACOSX" / "inner").mkdir(parents=True)
        shutil.copy(images[0], split / "__MACOSX" / "inner" / "x.JPEG")
    return root


def tar_of(folder, archive):
    with tarfile.open(archive, "w") as tar:
        tar.add(folder, ".")


def class_folders(folders, place):
    return hide_beside(shutil.copytree(folders, place))


def shards(folders, place):
    place.mkdir()
    hidden = class_folders(folders, place.parent / "hidden")
    for split in ("train", "val"):
        tar_of(hidden / split, place / f"{split}-00000-of-00001.tar")
    return place


def kaggle(folders, place):
    return hide_beside(write_kaggle(folders, place))


def kaggle_zip(folders, place):
    place.mkdir()
    zip_folder(kaggle(folders, place.parent / "unpacked"), place / ZIP)
    return place


@pytest.mark.parametrize("form", [class_folders, shards, kaggle, kaggle_zip])
def test_hidden_files_are_no_images_and_told_once(form, folders, tmp_path, caplog):
    expected = fingerprint(list(open_splits(str(folders))))
    assert not caplog.records
    place = form(folders, tmp_path / "set")
    assert fingerprint(list(open_splits(str(place)))) == expected
    told = [record.getMessage() for record in caplog.records if " left out as no images" in record.getMessage()]
    assert 1 <= len(told) <= 2, "of each folder or archive"
    assert sum(int(text.split(" hidden file")[0].rpartition(" ")[2]) for text in told) in (21, 22, 23, 24)
    caplog.clear()
    open_splits(str(place))
    assert not caplog.records


@pytest.mark.parametrize("above", [".Trash/", "__MACOSX/", "old/.git/"])
def test_a_hidden_folder_above_all_others_is_not_read(folders, tmp_path, caplog, above):
    archive = zip_folder(write_kaggle(folders, tmp_path / "kaggle"), tmp_path / ZIP)
    with zipfile.ZipFile(archive) as file:
        whole = {f"{dots}{name}": file.read(name) for dots, name in zip(itertools.cycle(["", "./"]), file.namelist())}
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in whole.items():
            file.writestr(above + name, FORK)
            file.writestr(name, content)
    assert fingerprint(list(open_splits(str(archive)))) == fingerprint(list(open_splits(str(folders))))
    assert f"{archive}: 22 hidden files left out as no images: {above}" in caplog.text


def test_hidden_members_of_official_archives_are_no_images(tmp_path, caplog):
    official = write_official(tmp_path / "official")
    expected = fingerprint(list(open_splits(str(official))))
    with tarfile.open(official / VAL_ARCHIVE, "a") as tar:
        add(tar, "._ILSVRC2012_val_00000001.JPEG", FORK)
    with tarfile.open(official / TRAIN_ARCHIVE, "a") as tar:
        add(tar, f"._{WNIDS[0]}.tar", FORK)
    assert fingerprint(list(open_splits(str(official)))) == expected
    assert "._ILSVRC2012_val_00000001.JPEG" in caplog.text


def test_shards_are_packed_and_photographs_found_without_them(folders, tmp_path):
    hidden = class_folders(folders, tmp_path / "hidden")
    train, _ = open_splits(str(hidden))
    files = pack(train, tmp_path / "packed", "train", train.class_names)
    with tarfile.open(files[0]) as tar:
        assert len(tar.getnames()) == 15
    assert len(find_images([hidden / "val"])) == 6
