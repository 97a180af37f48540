import os

import numpy as np
import pytest
from image_folders import write_image, write_tree
from torchvision.datasets import ImageFolder

from onlinenorm.data import index as index_module
from onlinenorm.data import index_cache
from onlinenorm.data.datasets import fingerprint
from onlinenorm.data.errors import DataError
from onlinenorm.data.index import FolderIndex, build_index, list_classes, load_index


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "onlinenorm"


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


def test_a_damaged_cache_is_built_anew(tree):
    expected = fingerprint([load_index(tree / "train")])
    (file,) = tree.glob(".onlinenorm-index-train.npz")
    file.write_bytes(file.read_bytes()[:100])
    assert fingerprint([load_index(tree / "train")]) == expected
    assert not list(tree.glob("*.tmp"))


def test_a_read_only_dataset_is_cached_for_the_user(tree, cache, monkeypatch):
    store = index_cache._store

    def read_only(file, *rest):
        if file.parent == tree:
            raise PermissionError("read-only")
        store(file, *rest)

    monkeypatch.setattr(index_cache, "_store", read_only)
    calls = count_builds(monkeypatch)
    load_index(tree / "train")
    load_index(tree / "train")
    assert len(calls) == 1 and len(list(cache.glob("index-*-train.npz"))) == 1
    monkeypatch.setattr(index_cache, "_store", lambda *a: (_ for _ in ()).throw(OSError("full")))
    write_image(tree / "train" / "cat" / "new.jpg", 9)
    assert len(load_index(tree / "train")) == 16


def test_fingerprint_sees_names_sizes_labels_and_limits(tree):
    base = load_index(tree / "train")
    prints = {fingerprint([base]), fingerprint([base.take(np.arange(7))])}
    (tree / "train" / "ant" / "0.JPEG").rename(tree / "train" / "ant" / "0b.JPEG")
    prints.add(fingerprint([load_index(tree / "train")]))
    file = tree / "train" / "ant" / "1.JPEG"
    file.write_bytes(file.read_bytes() + b"x")
    classes = list_classes(tree / "train")
    prints.add(fingerprint([FolderIndex(tree / "train", classes, **build_index(tree / "train", classes))]))
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
    with pytest.raises(DataError, match=r"^root: 2 class folders in .*train hold no image: dog, elk"):
        load_index(tree / "train")


def test_names_that_are_no_unicode_survive(tree):
    raw = os.fsencode(tree / "train" / "ant") + b"/\xff\xfe.jpg"
    os.rename(tree / "train" / "ant" / "0.JPEG", raw)
    found = load_index(tree / "train")
    assert raw in [os.fsencode(found.path(i)) for i in range(len(found))]
    assert len(found) > 1 and all(found.read(i) for i in range(len(found)))


def test_an_index_of_imagenets_length_loads_fast(tmp_path):
    import time

    n = 1_281_167
    names = np.frombuffer(b"n01440764/n01440764_10026.JPEG" * n, dtype=np.uint8)
    lengths = {"labels": np.zeros(n, dtype=np.int32), "sizes": np.zeros(n, dtype=np.int64)}
    built = {"names": names, "offsets": np.arange(n + 1) * 30, **lengths}
    index_cache.cached_arrays(tmp_path, "big", "key", lambda: built)
    start = time.process_time()
    loaded = FolderIndex(tmp_path, ["n01440764"], **index_cache.cached_arrays(tmp_path, "big", "key", dict))
    assert loaded.relative_path(n - 1) == "n01440764/n01440764_10026.JPEG"
    assert time.process_time() - start < 2
