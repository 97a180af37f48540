import os
import sys

import numpy as np
import pytest
from image_folders import write_image, write_tree
from torchvision.datasets import ImageFolder

from onlinenorm.data import index as index_module
from onlinenorm.data import index_cache
from onlinenorm.data.datasets import fingerprint
from onlinenorm.data.index import FolderIndex, build_index, load_index
from onlinenorm.errors import DataError

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "set")


def count_builds(monkeypatch):
    calls = []
    monkeypatch.setattr(index_module, "build_index", lambda *a: calls.append(a) or build_index(*a))
    return calls


def test_order_and_labels_are_those_of_image_folder(tree):
    write_image(tree / "train" / "bee" / "nested" / "a.png", 1)
    write_image(tree / "train" / "bee" / "nested-2" / "b.jpeg", 2)
    (tree / "train" / "bee" / "notes.txt").write_text("no image")
    found, expected = load_index(tree / "train"), ImageFolder(str(tree / "train"))
    assert found.class_names == expected.classes == ["ant", "bee", "cat"]
    assert [(str(found.path(i)), int(found.labels[i])) for i in range(len(found))] == expected.samples
    assert [int(size) for size in found.sizes] == [os.path.getsize(path) for path, _ in expected.samples]


def test_paths_are_held_in_flat_arrays(tree):
    found = load_index(tree / "train")
    held = [found.names, found.offsets, found.labels, found.sizes]
    assert all(isinstance(a, np.ndarray) and a.dtype != object for a in held)
    assert [k for k, v in vars(found).items() if isinstance(v, list)] == ["class_names"]


def test_it_is_built_once_and_again_when_the_tree_changes(tree, monkeypatch):
    calls = count_builds(monkeypatch)
    first = load_index(tree / "train")
    again = load_index(tree / "train")
    assert len(calls) == 1 and fingerprint([first]) == fingerprint([again])
    write_image(tree / "train" / "cat" / "new.jpg", 9)
    assert len(load_index(tree / "train")) == len(first) + 1 and len(calls) == 2
    (tree / "train" / "cat").rename(tree / "train" / "cow")
    assert load_index(tree / "train").class_names == ["ant", "bee", "cow"] and len(calls) == 3
    assert len(load_index(tree / "val")) == 6 and len(calls) == 4


def test_files_changed_in_place_and_folders_within_classes_are_seen(tree, monkeypatch):
    nested = write_image(tree / "train" / "bee" / "one" / "two" / "a.jpg", 1)
    calls = count_builds(monkeypatch)
    prints = [fingerprint([load_index(tree / "train")])]

    def seen(length):
        found = load_index(tree / "train")
        assert len(found) == length and fingerprint([found]) not in prints
        assert [int(size) for size in found.sizes] == [os.path.getsize(found.path(i)) for i in range(length)]
        prints.append(fingerprint([found]))

    nested.write_bytes(nested.read_bytes() + b"x" * 21)
    seen(16)
    write_image(nested.with_name("b.jpg"), 2)
    seen(17)
    nested.unlink()
    seen(16)
    write_image(nested.parents[1] / "c.jpg", 3)
    seen(17)
    load_index(tree / "train")
    assert len(calls) == 5


def test_of_very_large_sets_some_sizes_are_asked(tree, monkeypatch):
    monkeypatch.setattr(index_module, "SIZES_ASKED", 4)
    asked = []
    load_index(tree / "train")
    size = index_module._size
    monkeypatch.setattr(index_module, "_size", lambda path: asked.append(path) or size(path))
    load_index(tree / "train")
    assert len(asked) == 4


def test_a_link_that_leads_back_is_told(tree):
    (tree / "train" / "bee").rename(tree / "bee")
    (tree / "train" / "bee").symlink_to("../bee")  # which may be
    (tree / "bee" / "loop").symlink_to(".")
    with pytest.raises(
        DataError, match=r"^root: \S+/train/bee/loop is a link that leads back to a folder above it; rem"
    ):
        load_index(tree / "train")


@pytest.mark.parametrize(
    ("link", "target"),
    # in a class, or in place of one; with a name of which few make a path too long
    [("bee/loop", ".."), ("loop", ".."), ("loop", "."), ("bee/" + "x" * 200, "."), ("bee/" + "x" * 200, "..")],
)
def test_links_that_lead_back_are_named_and_no_folder(tree, link, target):
    (tree / "train" / link).symlink_to(target)
    with pytest.raises(
        DataError, match=rf"^root: \S+/train/{link} is a link that leads back to a folder above it; rem"
    ):
        load_index(tree / "train")


def test_an_image_that_is_a_link_to_itself_is_unreadable(tree):
    (tree / "train" / "bee" / "9.jpg").symlink_to("9.jpg")
    found = load_index(tree / "train")
    assert len(found) == 16 and found.relative_path(10) == "bee/9.jpg" and found.sizes[10] == -1
    assert found.newest([9, 10]) == found.newest([9]) and found.times_digest
    with pytest.raises(OSError, match=r"Too many levels of symbolic links: '\S+/bee/9\.jpg'"):
        found.read(10)


@pytest.mark.parametrize("target", ["x", "nowhere", "0.JPEG/x", "y" * 300])
def test_broken_links_are_left_out_and_told(tree, target, caplog):
    (tree / "train" / "bee" / "x").symlink_to(target)
    (tree / "train" / "dog").symlink_to("dog" if target == "x" else target)
    found = load_index(tree / "train")
    assert found.class_names == ["ant", "bee", "cat"] and len(found) == 15
    assert [record.getMessage() for record in caplog.records] == [
        f"{tree / 'train'}: 1 broken link left out: {name}" for name in ("dog", "bee/x")
    ]


def test_a_folder_that_may_not_be_read_is_named(tree, monkeypatch):
    real = os.scandir

    def scandir(path):
        if str(path).endswith("cat"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(index_module.os, "scandir", scandir)
    with pytest.raises(DataError, match=r"train/cat cannot be read \(Permission denied\); correct its permissions"):
        load_index(tree / "train")


def test_nothing_is_written_to_the_dataset(tree, own_cache, tmp_path):
    (tmp_path / "link").symlink_to(tree)
    before = sorted(tree.rglob("*"))
    load_index(tmp_path / "link" / "train")
    assert sorted(tree.rglob("*")) == before and len(list(own_cache.glob("index-*-train.npz"))) == 1


def test_an_index_that_holds_a_pickle_is_built_anew(tree, own_cache, tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    expected = fingerprint([load_index(tree / "train")])
    (file,) = own_cache.glob("index-*-train.npz")
    with np.load(file) as stored:
        arrays = {name: stored[name] for name in stored.files}
    np.savez(file, **{**arrays, "labels": np.array([Evil()], dtype=object)})
    assert fingerprint([load_index(tree / "train")]) == expected and not (tmp_path / "ran").exists()


def test_a_damaged_cache_is_built_anew(tree, own_cache):
    expected = fingerprint([load_index(tree / "train")])
    (file,) = own_cache.glob("index-*-train.npz")
    file.write_bytes(file.read_bytes()[:100])
    assert fingerprint([load_index(tree / "train")]) == expected
    assert not list(own_cache.glob("*.tmp"))


def test_without_a_cache_folder_it_is_built_every_time(tree, monkeypatch):
    monkeypatch.setattr(index_cache, "_store", lambda *a: (_ for _ in ()).throw(OSError("full")))
    calls = count_builds(monkeypatch)
    assert len(load_index(tree / "train")) == len(load_index(tree / "train")) == 15 and len(calls) == 2


def test_fingerprint_sees_names_sizes_labels_and_limits(tree):
    base = load_index(tree / "train")
    prints = {fingerprint([base]), fingerprint([base.take(np.arange(7))])}
    (tree / "train" / "ant" / "0.JPEG").rename(tree / "train" / "ant" / "0b.JPEG")
    prints.add(fingerprint([load_index(tree / "train")]))
    file = tree / "train" / "ant" / "1.JPEG"
    file.write_bytes(file.read_bytes() + b"x")
    prints.add(fingerprint([load_index(tree / "train")]))
    assert len(prints) == 4


def test_some_of_an_index(tree):
    found, chosen = load_index(tree / "train"), np.array([1, 4, 5, 14])
    taken = found.take(chosen)
    assert [taken.relative_path(i) for i in range(4)] == [found.relative_path(i) for i in chosen.tolist()]
    assert [taken.read(i) for i in range(4)] == [found.read(i) for i in chosen.tolist()]
    assert taken.labels.tolist() == [0, 0, 1, 2] and len(found) == 15


def test_empty_classes_are_named(tree):
    for split in ("train", "val"):
        for name in ("dog", "elk"):
            (tree / split / name).mkdir()
    with pytest.raises(DataError, match=r"^root: 2 class folders without an image in .*train: dog, elk"):
        load_index(tree / "train")


def test_names_that_are_no_unicode_survive(tree):
    raw = os.fsencode(tree / "train" / "ant") + b"/\xff\xfe.jpg"
    os.rename(tree / "train" / "ant" / "0.JPEG", raw)
    found = load_index(tree / "train")
    assert raw in [os.fsencode(found.path(i)) for i in range(len(found))]
    assert len(found) > 1 and all(found.read(i) for i in range(len(found)))


def test_an_index_of_imagenets_length_makes_no_objects_an_image(tmp_path):
    n = 1_281_167
    names = np.frombuffer(b"n01440764/n01440764_10026.JPEG" * n, dtype=np.uint8)
    lengths = {"labels": np.zeros(n, dtype=np.int32), "sizes": np.zeros(n, dtype=np.int64)}
    built = {"names": names, "offsets": np.arange(n + 1) * 30, **lengths}
    index_cache.cached_arrays(tmp_path, "big", "key", lambda: built)
    before = sys.getallocatedblocks()
    loaded = FolderIndex(tmp_path, ["n01440764"], **index_cache.cached_arrays(tmp_path, "big", "key", dict))
    assert loaded.relative_path(n - 1) == "n01440764/n01440764_10026.JPEG"
    assert sys.getallocatedblocks() - before < 10_000
