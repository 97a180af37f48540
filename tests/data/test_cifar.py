"""CIFAR in each of its forms, as miniatures: the same images, and one sentence for what is not CIFAR."""

import gzip
import hashlib
import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from onlinenorm.cli.compose import load_config
from onlinenorm.data import CIFAR10, CIFAR100, DataError
from onlinenorm.training.config_check import check_config

KINDS = [CIFAR10, CIFAR100]


@pytest.fixture(autouse=True)
def small(own_cache, monkeypatch):
    """Archives of 200 training images a file and 100 test images, and a cache of the test's own."""
    for kind in KINDS:
        files = kind.binary
        files = files._replace(train=dict.fromkeys(files.train, 200), test=dict.fromkeys(files.test, 100))
        monkeypatch.setattr(kind, "binary", files)


def contents(kind):
    """File -> its bytes: random images, every class as often."""
    generator, files = np.random.default_rng(7), kind.binary
    made = {}
    for name, count in {**files.train, **files.test}.items():
        labels_N = generator.permutation(np.arange(count) % len(kind.classes)).astype(np.uint8)
        coarse = np.full((count, files.label_bytes - 1), 19, np.uint8)
        pixels_NB = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
        made[name] = np.concatenate([coarse, labels_N[:, None], pixels_NB], axis=1).tobytes()
    return made


def write_files(kind, folder):
    folder.mkdir(parents=True)
    for name, content in contents(kind).items():
        (folder / name).write_bytes(content)
    return folder


def write_archive(kind, folder, monkeypatch):
    folder.mkdir(parents=True)
    with tarfile.open(folder / kind.binary.archive, "w:gz") as tar:
        for name, content in {"readme.html": b"x", **contents(kind)}.items():
            member = tarfile.TarInfo(f"{kind.binary.folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(kind, "binary", kind.binary._replace(md5=md5(folder / kind.binary.archive)))
    return folder


def md5(file):
    return hashlib.md5(file.read_bytes()).hexdigest()


def write_folders(kind, folder, val="test", suffix="png"):
    """The images by class, numbered as in their files."""
    made = contents(kind)
    for split, names in (("train", kind.binary.train), (val, kind.binary.test)):
        for k, record in enumerate(b for name in names for b in np.frombuffer(made[name], np.uint8).reshape(
            -1, kind.binary.label_bytes + 3072
        )):  # fmt: skip
            label, pixels = record[kind.binary.label_bytes - 1], record[kind.binary.label_bytes :]
            file = folder / split / kind.classes[label] / f"{k:05d}.{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.reshape(3, 32, 32).transpose(1, 2, 0)).save(file)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_all_forms_hold_the_same_images(kind, tmp_path, monkeypatch):
    roots = [
        write_files(kind, tmp_path / "flat"),
        write_files(kind, tmp_path / "unpacked" / kind.binary.folder).parent,
        write_archive(kind, tmp_path / "archive", monkeypatch),
        write_folders(kind, tmp_path / "folders"),
        write_folders(kind, tmp_path / "val", val="val"),
    ]
    sets = [kind(root=str(root)) for root in roots]
    assert len({data.fingerprint for data in sets}) == 1 and {data.name for data in sets} == {kind.label}
    whole = contents(kind)
    for dataset, names in zip(sets[0]._sets, (kind.binary.train, kind.binary.test), strict=True):
        records = np.frombuffer(b"".join(whole[n] for n in names), np.uint8).reshape(len(dataset), -1)
        labels = records[:, kind.binary.label_bytes - 1]
        first = int(np.flatnonzero(labels == 0)[0])
        images, labels_N = dataset.originals(np.arange(len(dataset)))
        assert labels_N.tolist() == sorted(labels.tolist())
        assert images[0].numpy().tobytes() == records[first, kind.binary.label_bytes :].tobytes()


def test_only_the_published_number_of_images_has_the_set_s_label(tmp_path, monkeypatch):
    data = CIFAR10(root=str(write_folders(CIFAR10, tmp_path / "a")))
    assert data.scale == "cifar10-subset"
    monkeypatch.setattr("onlinenorm.data.cifar.TRAIN_IMAGES", 1000)
    monkeypatch.setattr("onlinenorm.data.cifar.TEST_IMAGES", 100)
    assert data.scale == "cifar10" and CIFAR10(root=data.root, limit_train=50).scale == "cifar10-subset"


def test_jpeg_files_are_told_by_the_name(tmp_path):
    data = CIFAR10(root=str(write_folders(CIFAR10, tmp_path / "a", suffix="jpg")))
    assert (data.train_images, data.val_images) == (1000, 100) and data.name == "cifar10 (JPEG)"


def test_classes_are_the_published_ones():
    for kind, count in zip(KINDS, (10, 100), strict=True):
        assert len(kind.classes) == count and list(kind.classes) == sorted(set(kind.classes))
    assert CIFAR100.classes[19] == "cattle" and CIFAR100.classes[99] == "worm"  # labels of the published list
    assert CIFAR10().mean_std != CIFAR100().mean_std and "imagenet" not in (CIFAR10.label, CIFAR100.label)


@pytest.mark.parametrize("plan", ["pad_crop", "none", "random_resized_crop"])
def test_batches_on_the_device_are_those_of_the_loader(tmp_path, plan):
    root = str(write_files(CIFAR10, tmp_path / "a"))
    for decoder in ("pillow", "torchvision", "nvjpeg"):
        arguments = {"root": root, "decoder": decoder, "augmentation": plan, "batch_size": 100}
        there, here = (CIFAR10(**arguments, on_device=value) for value in (True, False))
        for a, b in zip(there.train_dataloader(), here.train_dataloader(), strict=True):
            assert all((x == y).all() for x, y in zip(a, b, strict=True))


def test_missing_data_is_told_on_one_screen(tmp_path):
    for root in (None, tmp_path / "nowhere", tmp_path):
        with pytest.raises(DataError, match=r"^root: CIFAR-100: ") as caught:
            CIFAR100(root=root and str(root)).setup()
        text = str(caught.value)
        assert len(text.splitlines()) < 12
        for part in (
            "cifar-100-binary.tar.gz",
            "cs.toronto.edu",
            "train/CLASS",
            "from apple to worm",
            "data.root=ROOT",
        ):
            assert part in text


def test_the_archive_of_another_set_is_not_told_to_be_unpacked(tmp_path):
    (tmp_path / CIFAR100.binary.archive).touch()
    with pytest.raises(DataError, match=rf"^root: CIFAR-10: {tmp_path} holds no CIFAR-10 but cifar-100-\S+.gz\n"):
        CIFAR10(root=tmp_path).setup()


@pytest.mark.parametrize("kind", KINDS)
def test_pickles_are_refused(kind, tmp_path):
    for name in kind.pickled:
        root = tmp_path / f"with {name}"
        root.mkdir()
        (root / name).touch()
        with pytest.raises(DataError, match=f"^root: .*{name} is the version .* for Python.*{kind.binary.archive}"):
            kind(root=str(root)).setup()


def cut(root):
    file = root / "data_batch_3.bin"
    file.write_bytes(file.read_bytes()[:-1])


def relabel(root):
    file = root / "test_batch.bin"
    file.write_bytes(b"\x0a" + file.read_bytes()[1:])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "data_batch_4.bin").write_bytes(b""), "data_batch_4.bin is empty; fetch it again"),
        (cut, r"data_batch_3.bin has 614,599 bytes and not 614,600; it is cut short"),
        (relabel, "test_batch.bin: label 10 is none of 0 to 9"),
        (lambda root: (root / "data_batch_2.bin").unlink(), "a part of CIFAR-10 only; missing: data_batch_2.bin"),
    ],
)
def test_damaged_files_get_one_sentence(tmp_path, damage, message):
    root = write_files(CIFAR10, tmp_path / "a")
    damage(root)
    refused(root, message)


def refused(root, message):
    with pytest.raises(DataError, match=f"^root: .*{message}") as caught:
        CIFAR10(root=str(root)).setup()
    assert "\n" not in str(caught.value)


def test_damaged_archives_get_one_sentence(tmp_path, monkeypatch):
    root = write_archive(CIFAR10, tmp_path / "a", monkeypatch)
    archive = root / CIFAR10.binary.archive
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    refused(root, "damaged, cut short or not the published one")
    archive.write_bytes(b"")
    refused(root, f"{archive.name} is empty; fetch it again$")
    archive.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refused(root, f"{archive.name} is a pointer of Git LFS .*; run git lfs pull where it was cloned$")
    for content, message in (
        (whole[: len(whole) // 2], "is damaged"),
        (gzip.compress(bytes(10240)), "does not hold data_batch_1.bin"),
    ):
        archive.write_bytes(content)
        monkeypatch.setattr(CIFAR10, "binary", CIFAR10.binary._replace(md5=md5(archive)))
        refused(root, message)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("notes", "is a file; name the folder that holds it: data.root={}\n"),
        ("nowhere", "nowhere does not exist\n"),
        ("", r"holds no CIFAR-10 \(it holds: notes\)\n"),
    ],
)
def test_a_root_without_the_set_tells_its_forms(tmp_path, name, message):
    (tmp_path / "notes").touch()
    with pytest.raises(DataError, match=f"^root: .*{message.format(tmp_path)}Expected in ROOT"):
        CIFAR10(root=str(tmp_path / name)).setup()


def test_folders_that_are_not_cifar_s_get_one_sentence(tmp_path):
    root = write_folders(CIFAR10, tmp_path / "a")
    (root / "train" / "bird").rename(root / "train" / "birds")
    refused(root, "train does not hold the 10 classes of CIFAR-10; missing: bird; unknown: birds")
    (root / "train" / "birds").rename(root / "train" / "bird")
    file = sorted((root / "test" / "cat").iterdir())[0]
    content = file.read_bytes()
    file.write_bytes(content[:100])
    refused(root, f"{file.name} cannot be decoded .*replace the file: all images of CIFAR are read at the start")
    Image.new("RGB", (33, 32)).save(file)
    refused(root, f"{file.name} has 33 x 32 pixels and not 32 x 32")
    (root / "test").rename(root / "tests")
    refused(root, "holds train/ and no test/ or val/")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"image_size": 31}, "^image_size: 31 is below 32"), ({"in_channels": 1}, "^in_channels: 1 is not 3")],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        CIFAR10(**arguments)


@pytest.mark.parametrize(
    ("name", "forward", "backward"), [("cifar10", 1023 / 1024, 127 / 128), ("cifar100", 511 / 512, 15 / 16)]
)
def test_experiments_are_the_published_recipe_with_the_row_s_own_settings(name, forward, backward):
    for row in ("online_clamp", "online_layer_scaling", "online_none"):
        config = load_config([f"experiment={name}", f"normalizer={row}"])
        check_config(config)
        assert (config["normalizer"]["alpha_fwd"], config["normalizer"]["alpha_bkw"]) == (forward, backward)
        assert config["normalizer"]["error_compensation"] == load_config([f"normalizer={row}"])["normalizer"][
            "error_compensation"
        ]  # fmt: skip
    for row in ("batch", "batch_renorm", "group", "layer", "instance", "none"):  # keys of others are not carried
        config = load_config([f"experiment={name}", f"normalizer={row}"])
        check_config(config)
        assert "alpha_fwd" not in config["normalizer"]
    given = load_config([f"experiment={name}", "normalizer=online_clamp", "normalizer.alpha_fwd=0.5"])
    assert given["normalizer"]["alpha_fwd"] == 0.5
    assert config["recipe"] == load_config(["recipe=cifar"])["recipe"] and config["recipe"]["epochs"] == 250
    assert load_config([f"experiment={name}", "normalizer=group"])["normalizer"]["num_groups"] == 8
    assert config["choices"]["data"] == name and config["choices"]["model"] == "cifar_resnet20"
    assert load_config(["normalizer=online_clamp"])["normalizer"]["alpha_fwd"] == 0.999


def test_files_without_permission_get_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "cifar-10-binary.tar.gz").touch()

    def deny(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("onlinenorm.data.missing.open_regular", deny)
    with pytest.raises(DataError, match=r"^root: .*tar\.gz cannot be read \(Permission denied\); correct its perm"):
        CIFAR10(root=str(tmp_path)).setup()
