"""The hub's Parquet files are the set of the class folders, read image by image, and damage gets one sentence."""

import copy
import pickle

import numpy as np
import programs
import pytest
import torch
from imagenet_forms import NAMES, WNIDS, rows_of, write_folders, write_parquet

from onlinenorm.data import DataError, ImageNet, parquet
from onlinenorm.data.imagenet import open_splits
from onlinenorm.data.parquet import CODECS, load_tables

pyarrow = pytest.importorskip("pyarrow")  # the extra `parquet`, which the tests' extra brings


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("sets") / "class folders", train=8, val=3)


def write_set(root, folders, named=True, **options):
    for split, name in (("train", "train"), ("val", "validation")):
        write_parquet(root, name, rows_of(folders / split, named), **options)
    return root


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


@pytest.mark.parametrize("folder", ["a set", "a set/data"])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_files_are_the_set(folders, tmp_path, folder, workers):
    write_set(tmp_path / folder, folders)
    assert_same(described(tmp_path / "a set", num_workers=workers), described(folders))


@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "brotli", "zstd", "lz4"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_every_way_of_writing_them(folders, tmp_path, codec, version, dictionary):
    options = {"compression": codec, "data_page_version": version, "use_dictionary": dictionary, "row_group_size": 5}
    write_set(tmp_path, folders, **options)
    for index, split in zip(open_splits(str(tmp_path)), ("train", "val"), strict=True):
        paths = [index.relative_path(i) for i in range(len(index))]
        assert [index.read(i) for i in range(len(index))] == [(folders / split / path).read_bytes() for path in paths]
        assert set(index.codecs.tolist()) == {CODECS.index({"none": "", "lz4": "lz4_raw"}.get(codec, codec))}


def test_images_given_twice_under_two_names(folders, tmp_path):
    rows = rows_of(folders / "train")
    again = [{**row, "image": {**row["image"], "path": f"copy_{row['image']['path']}"}} for row in rows]
    train = write_parquet(tmp_path, "train", rows + again[::-1], files=1)
    index, _ = load_tables(train, write_parquet(tmp_path, "validation", rows))
    content = {index.relative_path(i): index.read(i) for i in range(len(index))}
    assert len(content) == 2 * len(rows)
    for row in rows:
        wnid, name = WNIDS[row["label"]], row["image"]["path"].replace(f"_{WNIDS[row['label']]}.", ".")
        assert content[f"{wnid}/{name}"] == content[f"{wnid}/copy_{name}"] == row["image"]["bytes"]


def photographs():
    """Rows of what cannot be compressed, as photographs, and has their sizes; the beginnings are alike, as theirs."""
    sizes = np.random.default_rng(0).integers(60_000, 160_000, 60)
    contents = [bytes(range(256)) * 2 + np.random.default_rng(n).bytes(size) for n, size in enumerate(sizes.tolist())]
    return [{"image": {"bytes": c, "path": f"{WNIDS[0]}_{n}.JPEG"}, "label": 0} for n, c in enumerate(contents)]


@pytest.mark.parametrize(("codec", "most"), [("none", 1.0), ("snappy", 1.7), ("zstd", 100)])
def test_an_image_is_read_without_its_row_group(tmp_path, caplog, codec, most):
    rows, options = photographs(), {"compression": codec, "row_group_size": 100, "files": 1}
    train = write_parquet(tmp_path, "train", rows, **options)
    index, _ = load_tables(train, write_parquet(tmp_path, "validation", rows[:1], **options))
    for i in np.random.default_rng(1).permutation(len(index)).tolist():
        number = int(index.relative_path(i).split("_")[-1].removesuffix(".JPEG"))
        assert index.read(i) == rows[number]["image"]["bytes"]
    assert index.stored.sum() <= most * index.sizes.sum()
    told = (
        f"an image reads 60 times its bytes; faster are shards of them: python scripts/prepare_imagenet.py {tmp_path} "
    )
    assert (told in caplog.text) == (codec == "zstd")


def test_an_index_can_be_copied_and_sent(folders, tmp_path):
    write_set(tmp_path, folders)
    train, _ = open_splits(str(tmp_path))
    expected = train.read(3)
    for twin in (copy.copy(train), pickle.loads(pickle.dumps(train)), train.take(np.arange(4))):
        assert twin._open == {} and twin.read(3) == expected
    assert {name for name, value in vars(train).items() if isinstance(value, list)} == {"archives", "class_names"}


def test_the_index_is_made_once_and_follows_the_files(folders, tmp_path, monkeypatch):
    write_set(tmp_path, folders)
    first = open_splits(str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr("onlinenorm.data.parquet._read_table", None)
        again = open_splits(str(tmp_path))
        assert again[0].names_digest == first[0].names_digest
    write_parquet(tmp_path, "train", rows_of(folders / "train")[1:])
    assert len(open_splits(str(tmp_path))[0]) == len(first[0]) - 1


def test_without_names_of_files_the_set_is_not_called_imagenet(folders, tmp_path):
    write_set(tmp_path / "named", folders, named=False, names=NAMES)
    data = ImageNet(root=str(tmp_path / "named"))
    data.setup()
    assert (data.scale, data.name) == ("folder", "named")
    assert data.class_names == [f"{n} {name}" for n, name in enumerate(NAMES)]
    write_set(tmp_path / "imagenet", folders, named=False)
    data = ImageNet(root=str(tmp_path / "imagenet"))
    data.setup()
    assert (data.scale, data.name, data.class_names) == ("folder", "folder imagenet", ["0", "1", "2"])
    train, _ = open_splits(str(tmp_path / "imagenet"))
    rows = rows_of(folders / "train")[0::2]
    first = next(n for n, row in enumerate(rows) if row["label"] == 0)
    assert train.read(0) == rows[first]["image"]["bytes"]
    assert train.relative_path(0) == f"0/train-00000-of-00002_{first:06d}.JPEG"


def test_classes_of_images_whose_names_do_not_say_are_those_of_their_labels(folders, tmp_path):
    write_parquet(tmp_path, "train", rows_of(folders / "train"))
    rows = rows_of(folders / "val")
    for row in rows:
        row["image"]["path"] = row["image"]["path"][: len("ILSVRC2012_val_00000001")] + ".JPEG"
    write_parquet(tmp_path, "val", rows)
    assert_same(described(tmp_path), described(folders))


def test_a_labelled_test_set_stands_in(folders, tmp_path):
    for split, name in (("train", "train"), ("val", "test")):
        write_parquet(tmp_path, name, rows_of(folders / split))
    assert_same(described(tmp_path), described(folders))


def relabel(root, folders, **labels):
    rows = rows_of(folders / "train")
    write_parquet(root, "train", [{**row, "label": labels.get(f"l{row['label']}", row["label"])} for row in rows])


def change_paths(root, folders, old, new):
    rows = rows_of(folders / "train")
    for row in rows:
        row["image"]["path"] = row["image"]["path"].replace(old, new)
    write_parquet(root, "train", rows)


def rewrite(root, folders, **image):
    """The training files with these values in their images, in columns of the values' types."""
    import pyarrow.parquet

    rows = [{**row, "image": row["image"] | image} for row in rows_of(folders / "train")]
    for path in sorted(root.glob("train-*")):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def spoil(path):
    content = bytearray(path.read_bytes())
    content[4:40] = b"\xff" * 36  # the header of the first page
    path.write_bytes(content)


def drop_column(path, name):
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.parquet.read_table(path).drop_columns([name]), path)


def without_validation(root, folders):
    for path in root.glob("validation-*"):
        path.unlink()
    write_parquet(root, "test", [{**row, "label": -1} for row in rows_of(folders / "val")])


TRAIN = "train-00000-of-00002.parquet"
CHANGES = [
    (lambda root, _: cut(root / TRAIN, 5000), f"{TRAIN} is damaged or cut short .*download it again"),
    (lambda root, _: cut(root / TRAIN, 0), f"{TRAIN} is empty; fetch it again"),
    (lambda root, _: (root / TRAIN).write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    (lambda root, _: spoil(root / TRAIN), f"{TRAIN} is damaged or cut short"),
    (lambda root, _: (root / TRAIN).unlink(), r"holds 1 parquet file of train, and their names announce 2; download"),
    (lambda root, _: drop_column(root / TRAIN, "label"), rf"{TRAIN} holds the columns image.bytes, image.path; expec"),
    (lambda root, folders: relabel(root, folders, l2=1000), "labels are 0 to 999; a set of more classes"),
    (lambda root, folders: relabel(root, folders, l2=-7), r"holds the label -7, and labels are 0 to 999; download"),
    (lambda root, folders: relabel(root, folders, l2=None), r"parquet, row group 0, row 0: holds no label; give it"),
    (lambda root, folders: rewrite(root, folders, bytes=None),
     r"row 0: holds the path 'n0\d+_\d_n0\d+.JPEG' and no image; write the files with the images' bytes in them"),
    (lambda root, folders: rewrite(root, folders, bytes="text"),
     "the column image.bytes holds str such as 'text'; write it as binary"),
    (lambda root, folders: rewrite(root, folders, path=0), "the column image.path holds int such as '0'; write it as"),
    (lambda root, folders: rewrite(root, folders, path=b"a"), r"image.path holds bytes such as \"b'a'\"; write it as"),
    (lambda root, folders: relabel(root, folders, l2=1), r"has the label 1, and other images of .* or of that label"),
    (without_validation, r"test-00000-of-00002.parquet holds images without labels \(-1\), as the hub's test set; val"),
    (lambda root, folders: write_parquet(root, "train", rows_of(folders / "train") + rows_of(folders / "train")[:2]),
     "hold 2 images twice: n0"),
    (lambda root, folders: write_parquet(root, "train", []), "Parquet files of train hold no image"),
    (lambda root, folders: change_paths(root, folders, WNIDS[0], "n00000001"), "n00000001_.* has the label 0|of n0"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_what_is_not_right_gets_one_sentence(folders, tmp_path, change, message):
    change(write_set(tmp_path, folders), folders)
    with pytest.raises(DataError, match=f"^root: .*{message}") as caught:
        open_splits(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_what_is_whole_and_not_read_in_place_is_not_called_damaged(folders, tmp_path, monkeypatch):
    write_set(tmp_path, folders)
    monkeypatch.setattr(parquet, "CODECS", ("", "gzip"))
    with pytest.raises(
        DataError, match=r"^root: .* is not read in place \(it is compressed by snappy.*pyarrow's default"
    ):
        open_splits(str(tmp_path))


def test_a_nul_byte_in_a_name_is_no_name():
    assert parquet._split_name("a\0b.JPEG") == (None, None)


def test_labels_that_are_no_whole_numbers_are_told(folders, tmp_path):
    import pyarrow.parquet

    path = write_set(tmp_path, folders) / TRAIN
    table = pyarrow.parquet.read_table(path)
    for change, told in (
        (float, None), (lambda label: label + 0.5, r"the label \d.5 is no whole number; the column label has to count"),
        ("n{}".format, r"the label 'n\d' is no whole number; the column label has to count"),
    ):  # fmt: skip
        labels = pyarrow.array([change(label) for label in table.column("label").to_pylist()])
        pyarrow.parquet.write_table(table.set_column(table.schema.get_field_index("label"), "label", labels), path)
        if told is None:
            open_splits(str(tmp_path))
        else:
            with pytest.raises(DataError, match=told):
                open_splits(str(tmp_path))


def test_a_label_beyond_the_names_is_told(folders, tmp_path):
    write_set(tmp_path, folders, names=NAMES[:2])
    with pytest.raises(DataError, match="holds the label 2, and labels are 0 to 1"):
        open_splits(str(tmp_path))


def test_damage_after_indexing_is_an_unreadable_image(folders, tmp_path):
    write_set(tmp_path, folders)
    train, _ = open_splits(str(tmp_path))
    path = train.archives[0]
    content = bytearray(path.read_bytes())
    content[100 : len(content) // 2] = bytes(len(content) // 2 - 100)
    path.write_bytes(content)
    with pytest.raises(OSError):
        [train.read(i) for i in range(len(train))]


@pytest.mark.parametrize("checked", [True, False])
def test_checksums_of_pages_are_compared_where_files_have_them(folders, tmp_path, checked):
    path = write_set(tmp_path, folders, compression="none", write_page_checksum=checked) / TRAIN
    rows = rows_of(folders / "train")
    content = bytearray(path.read_bytes())
    content[content.index(rows[0]["image"]["bytes"]) + 300] ^= 1
    path.write_bytes(content)
    if not checked:
        open_splits(str(tmp_path))
        return
    with pytest.raises(DataError, match=f"^root: .*{TRAIN} is damaged or cut short .*download it again"):
        open_splits(str(tmp_path))


WITHOUT = """
import sys
sys.modules["pyarrow"] = None
from onlinenorm.data.imagenet import open_splits
try:
    open_splits(sys.argv[1])
except ValueError as error:
    print(error)
"""


def test_without_pyarrow_one_sentence_says_what_to_install(folders, tmp_path):
    write_set(tmp_path, folders)
    shown = programs.call("-c", WITHOUT, tmp_path)
    assert shown.stdout.startswith("root: Parquet files are read by pyarrow, which is not installed: pip install")
    assert len(shown.stdout.splitlines()) == 1
