"""Tiny ImageNet and Imagenette, as miniatures: the images of class folders, and one sentence for what is neither."""

import shutil

import numpy as np
import pytest
from image_folders import write_tree

from onlinenorm.data import DataError, ImageNet, Imagenette, TinyImageNet
from onlinenorm.data.imagenette import CLASSES

WNIDS = ["n01443537", "n01629819", "n02056570"]
LOADING = {"image_size": 32, "batch_size": 5, "num_workers": 0}


pytestmark = pytest.mark.usefixtures("own_cache")


def as_downloaded(folders, target):
    """Class folders moved into the layout of tiny-imagenet-200.zip."""
    shutil.copytree(folders, target)
    for wnid in WNIDS:
        images = [file for file in (target / "train" / wnid).iterdir()]
        (target / "train" / wnid / "images").mkdir()
        for file in images:
            file.rename(file.parent / "images" / file.name)
        (target / "train" / wnid / f"{wnid}_boxes.txt").write_text("0\t0\t1\t1\n")
    (target / "val" / "images").mkdir()
    lines = []
    for k, wnid in enumerate(WNIDS):
        for file in (target / "val" / wnid).iterdir():
            file.rename(target / "val" / "images" / file.name)
            lines.insert(k % 2, f"{file.name}\t{wnid}\t0\t32\t44\t62\n")
        (target / "val" / wnid).rmdir()
    (target / "val" / "val_annotations.txt").write_text("".join(lines))
    (target / "wnids.txt").write_text("\n".join(reversed(WNIDS)) + "\n")
    (target / "words.txt").write_text(
        "n00001740\tentity\nn01443537\tgoldfish, Carassius auratus\nn02056570\tking penguin\n"
    )
    return target


@pytest.fixture
def folders(tmp_path):
    """Class folders whose file names are unique, as in the published set."""
    root = write_tree(tmp_path / "folders", WNIDS)
    for wnid in WNIDS:
        for split in ("train", "val"):
            for file in list((root / split / wnid).iterdir()):
                file.rename(file.with_name(f"{wnid}_{file.name}"))
    return root


@pytest.fixture
def tiny(folders, tmp_path):
    return as_downloaded(folders, tmp_path / "tiny-imagenet-200")


def batches(data):
    return [*data.train_dataloader(), *data.val_dataloader()]


def same_batches(one, other):
    pairs = list(zip(batches(one), batches(other), strict=True))
    return bool(pairs) and all((x == y).all() for a, b in pairs for x, y in zip(a, b, strict=True))


def test_tiny_imagenet_is_what_its_class_folders_are(tiny, folders):
    whole = ImageNet(root=str(folders), **LOADING)
    for root in (tiny, tiny.parent):
        data = TinyImageNet(root=str(root), **LOADING)
        assert data.fingerprint == whole.fingerprint and same_batches(data, whole)
    assert (data.train_images, data.val_images) == (15, 6) and data.replaced_since(whole.files()) == []
    assert np.concatenate([dataset.labels() for dataset in data._sets]).tolist() == [
        *np.repeat(range(3), 5), *np.repeat(range(3), 2)
    ]  # fmt: skip
    part, rest = (
        TinyImageNet(root=str(tiny), limit_val=3, **LOADING),
        ImageNet(root=str(folders), limit_val=3, **LOADING),
    )
    assert part.fingerprint == rest.fingerprint and same_batches(part, rest)


@pytest.mark.parametrize("split", ["val", "test"])
def test_tiny_imagenet_in_class_folders(tiny, folders, split):
    shutil.rmtree(tiny / "val")
    shutil.copytree(folders / "val", tiny / split)
    data = TinyImageNet(root=str(tiny), **LOADING)
    assert data.fingerprint == ImageNet(root=str(folders), **LOADING).fingerprint


def test_tiny_imagenet_has_its_own_label_and_names(tiny, monkeypatch):
    data = TinyImageNet(root=str(tiny))
    assert data.class_names == ["goldfish, Carassius auratus", "n01629819", "king penguin"]
    assert (data.scale, data.name, data.num_classes) == ("tiny_imagenet-subset", "tiny_imagenet", 3)
    monkeypatch.setattr("onlinenorm.data.tiny_imagenet.PUBLISHED", (3, 15, 6))
    assert data.scale == "tiny_imagenet"
    assert TinyImageNet(root=str(tiny), on_device=True, augmentation="pad_crop").train_images == 15
    (tiny / "words.txt").unlink()
    assert TinyImageNet(root=str(tiny)).class_names == WNIDS


def test_the_set_stands_without_readable_names_and_with_byte_order_marks(tiny):
    for content in ("n01443537\tcaf\xe9\n".encode("latin-1"), "n1\tx".encode("utf-16"), b"\xff\xfe\0"):
        (tiny / "words.txt").write_bytes(content)
        assert TinyImageNet(root=str(tiny)).class_names == WNIDS
    (tiny / "words.txt").write_bytes(b"\xef\xbb\xbfn01443537\tgoldfish\n")
    for file in (tiny / "wnids.txt", tiny / "val" / "val_annotations.txt"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert TinyImageNet(root=str(tiny)).class_names == ["goldfish", *WNIDS[1:]]


def annotate(text):
    def damage(root):
        file = root / "val" / "val_annotations.txt"
        file.write_text(file.read_text() + text)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (annotate("val_9.JPEG\tn01443537\t0\t0\t1\t1\n"), "names 1 file not in images/: val_9.JPEG"),
        (annotate("no tab\n"), "has a line that is no FILE, tab, CLASS"),
        (annotate("n01443537_0.JPEG\tn01629819\n"), "names 1 file twice"),
        (lambda root: (root / "val" / "images" / "x.JPEG").touch(), "does not name 1 file of images/: x.JPEG"),
        (
            lambda root: shutil.rmtree(root / "train" / WNIDS[1]),
            "train does not hold the 3 classes.*missing: n01629819",
        ),
        (lambda root: (root / "val" / "val_annotations.txt").unlink(), "val_annotations.txt is missing, which says"),
        (lambda root: (root / "wnids.txt").unlink(), "wnids.txt cannot be read"),
        (lambda root: (root / "wnids.txt").write_text("\n"), "wnids.txt names no class"),
        (lambda root: (root / "wnids.txt").write_text("n01443537 n01629819"), "unknown: n02056570"),
        (
            lambda root: (shutil.rmtree(root / "val"), (root / "test" / "images").mkdir(parents=True)),
            "holds no val/, and the published test images have no labels",
        ),
        (lambda root: shutil.rmtree(root / "val"), "holds train/ and no val/ or test/"),
    ],
)
def test_damage_to_tiny_imagenet_gets_one_sentence(tiny, damage, message):
    damage(tiny)
    with pytest.raises(DataError, match=f"^root: .*{message}") as caught:
        TinyImageNet(root=str(tiny)).setup()
    assert "\n" not in str(caught.value)


def test_a_class_without_validation_images_is_named(tiny):
    file = tiny / "val" / "val_annotations.txt"
    file.write_text(file.read_text().replace(WNIDS[1] + "\t", WNIDS[0] + "\t"))
    with pytest.raises(DataError, match=r"val_annotations.txt does not hold the 3 classes.*missing: n01629819"):
        TinyImageNet(root=str(tiny)).setup()


def test_a_file_cut_short_is_told_when_its_turn_comes(tiny):
    file = tiny / "val" / "images" / f"{WNIDS[0]}_0.JPEG"
    file.write_bytes(file.read_bytes()[:50])
    data = TinyImageNet(root=str(tiny), **LOADING)
    with pytest.raises(DataError, match=f"{file} cannot be decoded"):
        [data.on_before_batch_transfer(batch) for batch in data.val_dataloader()]


@pytest.fixture
def nette(tmp_path):
    return write_tree(tmp_path / "sets" / "imagenette2-160", CLASSES, train=2, val=1)


@pytest.mark.parametrize("split", ["val", "test"])
def test_imagenette_is_what_its_class_folders_are(nette, split, monkeypatch):
    whole = ImageNet(root=str(shutil.copytree(nette, nette.parent / "copy")), **LOADING)
    (nette / "val").rename(nette / split)
    for root in (nette, nette.parent):
        data = Imagenette(root=str(root), **LOADING)
        assert data.fingerprint == whole.fingerprint and same_batches(data, whole)
    assert (data.name, data.scale, data.num_classes) == ("imagenette2-160", "imagenette-subset", 10)
    assert data.class_names[0] == "tench" and data.class_names[9] == "parachute"
    monkeypatch.setattr("onlinenorm.data.imagenette.PUBLISHED", (20, 10))
    assert data.scale == "imagenette"


def test_imagenette_that_is_not_whole_gets_one_sentence(nette):
    shutil.copytree(nette, nette.parent / "imagenette2")
    with pytest.raises(DataError, match=r"^root: .* holds several sets: .*imagenette2, .*imagenette2-160; name one"):
        Imagenette(root=str(nette.parent)).setup()
    shutil.rmtree(nette / "val" / "n03028079")
    with pytest.raises(DataError, match=r"^root: .*val does not hold the 10 classes of Imagenette; missing: n03028079"):
        Imagenette(root=str(nette)).setup()
    shutil.rmtree(nette / "val")
    with pytest.raises(DataError, match=r"^root: .*holds train/ and no val/ or test/"):
        Imagenette(root=str(nette)).setup()


@pytest.mark.parametrize(
    ("kind", "address"), [(TinyImageNet, "cs231n.stanford.edu"), (Imagenette, "fastai/imagenette")]
)
def test_missing_data_is_told_on_one_screen(kind, address, tmp_path):
    for root in (None, tmp_path / "nowhere", tmp_path):
        with pytest.raises(DataError, match=r"^root: ") as caught:
            kind(root=root and str(root)).setup()
        text = str(caught.value)
        assert len(text.splitlines()) < 12 and address in text
        name = {TinyImageNet: "tiny_imagenet", Imagenette: "imagenette"}[kind]
        assert f"python train.py experiment={name} data.root=ROOT" in text


@pytest.mark.parametrize(
    ("kind", "archive", "command"),
    [(TinyImageNet, "tiny-imagenet-200.zip", "unzip"), (Imagenette, "imagenette2-160.tgz", "tar xf")],
)
def test_the_set_s_own_archive_is_named_with_what_unpacks_it(kind, archive, command, tmp_path):
    (tmp_path / archive).touch()
    unpacked = f"{command} {tmp_path}/{archive} -. {tmp_path}"
    for root in (tmp_path, tmp_path / archive):
        with pytest.raises(DataError, match=rf"^root: .*; unpack it: {unpacked}[,\n]"):
            kind(root=str(root)).setup()
    (tmp_path / "a_backup.zip").touch()
    with pytest.raises(DataError, match=rf" but {archive}, a_backup.zip; unpack {archive}: {unpacked}\n"):
        kind(root=str(tmp_path)).setup()
