import gzip
import importlib.util
import struct

import numpy as np
import pytest
import torchvision

from onlinenorm.data import DataError, FashionMNIST
from onlinenorm.data import fashion_mnist as fm
from onlinenorm.errors import ArgumentError


@pytest.fixture(autouse=True)
def nowhere(own_cache, tmp_path, monkeypatch):
    """No Debian package, an empty cache, no network."""
    monkeypatch.setattr(fm, "DEBIAN_FOLDER", tmp_path / "debian")

    def download(*_, **__):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", download)


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_set(folder, compressed=True, train=60_000, val=10_000):
    """A set of the right shape, all black."""
    folder.mkdir(parents=True, exist_ok=True)
    for (images, labels), count in zip(fm.FILES.values(), (train, val), strict=True):
        for name, shape in ((images, (count, 28, 28)), (labels, (count,))):
            data = idx(np.zeros(shape, dtype=np.uint8))
            path = folder / (f"{name}.gz" if compressed else name)
            path.write_bytes(gzip.compress(data, 1) if compressed else data)
    return folder


def test_embedded_set():
    data = FashionMNIST(embedded=True)
    data.setup()
    assert (data.scale, data.num_classes, data.train_images, data.val_images) == ("embedded", 10, 10_000, 2_000)
    assert data.describe() == {
        "name": "embedded",
        "train_images": 10_000,
        "val_images": 2_000,
        "fingerprint": "8792003cec9d7a14a9efa8668123ba42393dd9cf7ab614152bf0687e537a81c2",
        "licence": "MIT (Zalando SE, 2017)",
    }
    train = data._sets[0].source
    images, labels = train.images(np.arange(10_000)), train.labels(np.arange(10_000))
    assert labels[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]  # the published set begins so
    assert np.bincount(labels).min() > 900 and abs(images.mean() / 255 - 0.286) < 0.002


def test_limits_change_the_fingerprint_and_are_told():
    whole, part = FashionMNIST(embedded=True), FashionMNIST(embedded=True, limit_train=300, limit_val=50)
    assert (part.train_images, part.val_images) == (300, 50) and part.fingerprint != whole.fingerprint
    rule = "classes in proportion, evenly spaced in each in index order"
    assert part.describe()["limited"] == {"train_images": "300 of 10000", "val_images": "50 of 2000", "rule": rule}
    assert "limited" not in whole.describe()
    assert FashionMNIST(embedded=True, limit_train=99_999).train_images == 10_000


@pytest.mark.parametrize("place", ["root", "root/FashionMNIST/raw", "debian", "cache/onlinenorm/fashion_mnist"])
@pytest.mark.parametrize("compressed", [True, False])
def test_full_set_is_found(tmp_path, place, compressed):
    folder = write_set(tmp_path / place, compressed)
    root = str(tmp_path / "root") if place.startswith("root") else None
    assert fm.find_full_set(root) == folder
    data = FashionMNIST(root=root)
    assert (data.scale, data.train_images, data.val_images) == ("fashion_mnist", 60_000, 10_000)


def test_missing_set_says_where_it_was_sought_and_what_to_do(tmp_path):
    with pytest.raises(DataError) as caught:
        FashionMNIST().setup()
    text = str(caught.value)
    for part in (
        "root: ",
        str(tmp_path / "debian"),
        str(tmp_path / "cache"),
        "failed (Error d",
    ):
        assert part in text
    for remedy in ("apt install dataset-fashion-mnist", "data.root=", "data=embedded"):
        assert remedy in text


def test_a_folder_that_was_given_is_the_only_one(tmp_path):
    write_set(tmp_path / "debian")
    with pytest.raises(DataError, match=rf"(?s)^root: {tmp_path}/photos does not exist\n.*Then: python train.py"):
        FashionMNIST(root=str(tmp_path / "photos")).setup()
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match=r"(?s)^root: .* none of\n  \S+photos\n.*Then: python train.py"):
        FashionMNIST(root=str(tmp_path / "photos")).setup()
    with pytest.raises(ArgumentError, match=r"^root: /photos would not be read: .*data=imagenet"):
        FashionMNIST(root="/photos", embedded=True)


def test_partial_set_names_the_missing_files(tmp_path):
    write_set(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(
        DataError, match=r"^root: .* a part .* missing: t10k-labels-idx1-ubyte.gz. Complete the four files$"
    ):
        FashionMNIST(root=str(tmp_path)).setup()


def test_damaged_files_are_named(tmp_path):
    write_set(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte.gz"
    whole = file.read_bytes()
    for content, message in [
        (whole[: len(whole) // 2], "train-images.* is damaged or cut short"),
        (b"", "train-images.* is empty; fetch it again"),
        (gzip.compress(b""), r"train-images.* is no IDX file .*begins with nothing"),
        (b"<html>404</html>", "train-images.* is damaged or cut short"),
        (gzip.compress(b"\0\0\x0d\x03"), "train-images.* is no IDX file"),
        (gzip.compress(idx(np.zeros((60_000, 28, 28), np.uint8))[:-1], 1), "announces .* values and holds"),
        (gzip.compress(idx(np.zeros((500, 28, 28), np.uint8))), r"\(500, 28, 28\).*another dataset"),
        (gzip.compress(idx(np.zeros((60_000, 32, 32), np.uint8)), 1), r"\(60000, 32, 32\).*another dataset"),
    ]:
        file.write_bytes(content)
        with pytest.raises(DataError, match=f"(?s)^root: .*{message}"):
            FashionMNIST(root=str(tmp_path)).setup()


def test_labels_out_of_range_are_refused(tmp_path):
    write_set(tmp_path)
    with gzip.open(tmp_path / "t10k-labels-idx1-ubyte.gz", "wb") as file:
        file.write(idx(np.full(10_000, 10, np.uint8)))
    with pytest.raises(DataError, match="holds the label 10; labels are 0 to 9"):
        FashionMNIST(root=str(tmp_path)).setup()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 27}, "^image_size: 27 is below 28"),
        ({"in_channels": 2}, "^in_channels: 2 is not 1 or 3"),
        ({"augmentation": "scale_jitter"}, "^augmentation: scale_jitter .* use pad_crop"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        FashionMNIST(embedded=True, **arguments)


@pytest.fixture
def build_embedded(root):
    spec = importlib.util.spec_from_file_location("build_embedded", root / "scripts" / "dev" / "build_embedded.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DEBIAN = fm.DEBIAN_FOLDER


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="the full set (Debian's dataset-fashion-mnist) is not installed")
def test_embedded_files_are_rebuilt_byte_for_byte(build_embedded, capsys, tmp_path, monkeypatch):
    files = build_embedded.build(str(DEBIAN))
    monkeypatch.setattr(build_embedded, "build", lambda _: files)
    assert build_embedded.main(["--check"]) == 0
    text = capsys.readouterr().out
    assert text.count("is equal byte for byte") + text.count("holds equal images") == 4
    assert build_embedded.main(["--output", str(tmp_path), "--check"]) == 1
    assert capsys.readouterr().out.count("is missing") == 4
    assert build_embedded.main(["--output", str(tmp_path)]) == 0
    assert build_embedded.main(["--output", str(tmp_path), "--check"]) == 0


def test_comparison_tells_other_images_from_other_compression(build_embedded, tmp_path):
    packed = build_embedded.pack(b"abc" * 1000)
    assert gzip.decompress(packed) == b"abc" * 1000
    for stored, good, verdict in [
        (packed, True, "byte for byte"),
        (gzip.compress(b"abc" * 1000, 1), True, "another zlib"),
        (gzip.compress(b"abd" * 1000), False, "DIFFERS"),
        (packed[:-9], False, "DIFFERS"),
    ]:
        (tmp_path / "a.gz").write_bytes(stored)
        found, (line,) = build_embedded.compare({"a.gz": packed}, tmp_path)
        assert found == good and verdict in line
