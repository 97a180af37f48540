import copy
import pickle
import shutil
import subprocess
import tarfile
from io import BytesIO

import numpy as np
import pytest
import torch
from image_folders import write_tree
from official_archives import WNIDS, add, write_official
from scipy.io import savemat

from onlinenorm.data import DataError, ImageNet, archives, devkit
from onlinenorm.data.archives import load_official, load_shards
from onlinenorm.data.datasets import fingerprint
from onlinenorm.data.devkit import read_devkit
from onlinenorm.data.imagenet import open_splits
from onlinenorm.data.index import load_index
from onlinenorm.data.prepare import chosen_classes, extract, pack

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    return write_official(tmp_path_factory.mktemp("official"))


def contents(index):
    return {index.relative_path(i): (int(index.labels[i]), index.read(i)) for i in range(len(index))}


def test_official_archives_are_read_in_place(official):
    train, val = load_official(official)
    assert train.class_names == val.class_names == list(WNIDS)
    images = official / "images"
    assert contents(train) == {
        f"{wnid}/{wnid}_{k}.JPEG": (c, (images / f"{wnid}_{k}.JPEG").read_bytes())
        for c, wnid in enumerate(WNIDS) for k in range(5)
    }  # fmt: skip
    # the ids of the ground truth count the classes from the last name to the first
    assert contents(val) == {
        f"{WNIDS[2 - k % 3]}/ILSVRC2012_val_{k + 1:08d}.JPEG":
        (2 - k % 3, (images / f"ILSVRC2012_val_{k + 1:08d}.JPEG").read_bytes()) for k in range(6)
    }  # fmt: skip


def test_all_layouts_are_the_same_dataset(official, tmp_path):
    splits = load_official(official)
    classes = chosen_classes(splits, None)
    for split, index in zip(("train", "val"), splits, strict=True):
        extract(index, tmp_path / "tree" / split, classes)
        pack(index, tmp_path / "packed", split, classes, shard_bytes=1)
    assert len(list((tmp_path / "packed").glob("train-*-of-00003.tar"))) == 3

    def batches(root):
        data = ImageNet(root=str(root), image_size=32, batch_size=5, augmentation="random_resized_crop")
        data.setup()
        return data.fingerprint, [b for loader in (data.train_dataloader(), data.val_dataloader()) for b in loader]

    digest, expected = batches(tmp_path / "tree")
    for root in (tmp_path / "packed", official):
        same, found = batches(root)
        assert same == digest and len(expected) > 1
        assert all(torch.equal(x, y) for b, e in zip(found, expected, strict=True) for x, y in zip(b, e, strict=True))


def test_shards_of_a_folder_tree_keep_its_order(tmp_path):
    tree = write_tree(tmp_path / "set")
    (tree / "train" / "bee" / "nested").mkdir()
    (tree / "train" / "bee" / "0.JPEG").rename(tree / "train" / "bee" / "nested" / "0.JPEG")
    index = load_index(tree / "train")
    shards = pack(index, tmp_path / "packed", "train", index.class_names)
    packed = load_shards(shards, "train")
    assert fingerprint([packed]) == fingerprint([index]) and contents(packed) == contents(index)
    assert contents(packed.take(np.arange(3, 9, 2))) == contents(index.take(np.arange(3, 9, 2)))


def test_an_index_of_archives_can_be_copied_and_sent(official):
    train, _ = load_official(official)
    expected = train.read(3)
    for twin in (copy.copy(train), pickle.loads(pickle.dumps(train)), train.take(np.arange(4))):
        assert twin._open == {} and twin.read(3) == expected
    held = [k for k, v in vars(train).items() if isinstance(v, list)]
    assert sorted(held) == ["archives", "class_names"]


def test_the_index_follows_the_archive(official, tmp_path):
    shard = tmp_path / "train.tar"
    for number in (1, 2):
        with tarfile.open(shard, "w") as tar:
            for k in range(number):
                add(tar, f"ant/{k}.jpg", b"x" * 10)
        assert len(load_shards([shard], "train")) == number


def test_shards_are_read_by_workers(official, tmp_path):
    data = ImageNet(root=str(official), image_size=32, batch_size=5, num_workers=2)
    data.setup()
    first = next(iter(data.val_dataloader()))[0]  # opens the archive in this process, before workers are forked
    data.num_workers = 0
    assert torch.equal(first, next(iter(data.val_dataloader()))[0])


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def overwrite(path, at, data):
    content = bytearray(path.read_bytes())
    content[at : at + len(data)] = data
    path.write_bytes(content)


def second_class(path):
    with tarfile.open(path) as tar:
        return tar.getmembers()[1]


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / DEVKIT).unlink(), f"{DEVKIT} is missing: .*image-net.org.* labels of the validation images"),
        (lambda f: cut(f / DEVKIT, 0), f"{DEVKIT} is empty; fetch it again"),
        (lambda f: (f / DEVKIT).write_bytes(LFS_POINTER), f"{DEVKIT} is a pointer of Git LFS .*git lfs pull"),
        (lambda f: cut(f / DEVKIT, 300), f"{DEVKIT} is damaged or cut short"),
        (lambda f: (f / VAL).unlink(), f"{VAL} is missing"),
        (lambda f: (f / TRAIN).unlink(), f"{TRAIN} is missing; download it"),
        (lambda f: [(f / n).unlink() for n in (TRAIN, VAL)], f"{TRAIN} and /.*/{VAL} are missing; download them .*org"),
        (lambda f: cut(f / TRAIN, 20_000), f"{TRAIN} is damaged or cut short .*checksum"),
        (lambda f: cut(f / TRAIN, second_class(f / TRAIN).offset), f"{TRAIN} is damaged .*no tar header and no end"),
        (lambda f: overwrite(f / TRAIN, second_class(f / TRAIN).offset, b"junk" * 128), f"{TRAIN} is damaged"),
        (lambda f: overwrite(f / TRAIN, second_class(f / TRAIN).offset_data, b"junk" * 128),
         f"{TRAIN}: its member n01443537.tar is damaged"),
        (lambda f: (f / VAL).write_bytes(b"x" * 5000), f"{VAL} is damaged or cut short"),
        (lambda f: write_official(f, val=5) and write_official(f / "b", val=6) and
         (f / "b" / DEVKIT).rename(f / DEVKIT), f"{VAL}: holds 5 images and the devkit labels 6"),
        (lambda f: write_official(f / "b", train=6) and (f / "b" / DEVKIT).rename(f / DEVKIT),
         f"{TRAIN}: 3 classes do not hold .* devkit counts: n01484850 5 of 6"),
        (lambda f: (f / VAL).write_bytes(b""), f"{VAL} is empty; fetch it again"),
        (lambda f: (f / VAL).write_bytes(LFS_POINTER), f"{VAL} is a pointer of Git LFS .*git lfs pull"),
        (lambda f: (f / VAL).write_bytes((f / VAL).read_bytes() * 2), f"{VAL} goes on behind its end"),
        (lambda f: shutil.copy(f / VAL, f / TRAIN), "holds no class archives .* is it the training archive"),
    ],
)  # fmt: skip
def test_damage_is_named(tmp_path, change, message):
    folder = write_official(tmp_path / "official")
    change(folder)
    with pytest.raises(DataError, match=f"(?s)^root: (?!.*\n).*{message}"):
        open_splits(str(folder))


def mat(**arrays):
    content = BytesIO()
    savemat(content, arrays)
    return content.getvalue()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "meta",
    [
        b"",
        bytes(5000),
        b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM" + bytes(500),
        np.random.default_rng(0).bytes(100),
        mat(other=1),
        mat(synsets=np.arange(3)),
        mat(synsets=np.array([(1, 2)], dtype=[("a", object), ("b", object)])),
    ],
    ids=["empty", "zeros", "7.3", "noise", "no synsets", "numbers", "other fields"],
)
def test_a_damaged_devkit_gets_one_sentence(official, tmp_path, meta, packed):
    folder = tmp_path / "official"
    folder.mkdir()
    for name in (TRAIN, VAL):
        (folder / name).symlink_to(official / name)
    with tarfile.open(official / DEVKIT) as tar:
        tar.extractall(folder, filter="data")
    kit = folder / "ILSVRC2012_devkit_t12"
    (kit / "data" / "meta.mat").write_bytes(meta)
    if packed:
        with tarfile.open(folder / DEVKIT, "w:gz") as tar:
            tar.add(kit, kit.name)
    message = r"^root: .*devkit_t12(\S* is not the development kit of ILSVRC 2012, or dam|/data/meta.mat is empty)"
    with pytest.raises(DataError, match=message) as found:
        open_splits(str(folder))
    assert "\n" not in str(found.value)


def test_incomplete_shards_are_named(official, tmp_path):
    train, val = load_official(official)
    pack(train, tmp_path, "train", list(WNIDS), shard_bytes=1)
    pack(val, tmp_path, "val", list(WNIDS))
    (tmp_path / "train-00001-of-00003.tar").unlink()
    with pytest.raises(DataError, match=r"holds 2 tar files of train, and their names announce 3.*--packed again"):
        open_splits(str(tmp_path))


@pytest.mark.parametrize(("name", "message"), [("a.jpg", "outside class folders: a.jpg"), ("a/b.txt", "no image")])
def test_foreign_tars_are_explained(tmp_path, name, message):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        add(tar, name, b"x")
    with pytest.raises(DataError, match=message):
        load_shards([tmp_path / "train.tar"], "train")


def test_a_shard_cut_after_indexing_is_unreadable_not_wrong(tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        add(tar, "ant/0.jpg", b"x" * 100_000)
    index = load_shards([tmp_path / "train.tar"], "train")
    cut(tmp_path / "train.tar", 2000)
    with pytest.raises(OSError, match=r"ends within ant/0\.jpg"):
        index.read(0)
    assert np.array_equal(index.sizes, [100_000])


def link(tar, name, target, kind):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    tar.addfile(member)


def test_links_are_followed_and_the_last_of_a_name_counts(tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for data in (b"old", b"newer"):
            add(tar, "ant/0.jpg", data)
        link(tar, "./bee/1.jpg", "../ant/0.jpg", tarfile.SYMTYPE)
        link(tar, "bee/2.jpg", "bee/1.jpg", tarfile.LNKTYPE)
    index = load_shards([tmp_path / "train.tar"], "train")
    assert contents(index) == {"ant/0.jpg": (0, b"newer"), "bee/1.jpg": (1, b"newer"), "bee/2.jpg": (1, b"newer")}


def test_a_hard_link_is_to_the_file_before_it(tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        add(tar, "ant/0.jpg", b"old")
        link(tar, "ant/1.jpg", "ant/0.jpg", tarfile.LNKTYPE)
        link(tar, "ant/0.jpg", "ant/0.jpg", tarfile.LNKTYPE)  # as tar stores a file that it is given twice
        add(tar, "ant/2.jpg", b"first")
        link(tar, "ant/3.jpg", "ant/2.jpg", tarfile.LNKTYPE)
        add(tar, "ant/2.jpg", b"last")
    expected = {"0": b"old", "1": b"old", "2": b"last", "3": b"first"}
    subprocess.run(["tar", "-xf", tmp_path / "train.tar", "-C", tmp_path], check=True)
    assert {path.stem: path.read_bytes() for path in (tmp_path / "ant").iterdir()} == expected
    index = load_shards([tmp_path / "train.tar"], "train")
    assert contents(index) == {f"ant/{name}.jpg": (0, data) for name, data in expected.items()}


def test_labels_of_an_unpacked_devkit_are_read_again_once_they_change(tmp_path):
    folder = write_official(tmp_path / "official")
    with tarfile.open(folder / DEVKIT) as tar:
        tar.extractall(folder, filter="data")
    (folder / DEVKIT).unlink()
    before = load_official(folder)[1]
    truth = folder / "ILSVRC2012_devkit_t12" / "data" / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("3\n" * 3 + "1\n" * 2 + "2\n")
    after = load_official(folder)[1]
    assert [np.bincount(index.labels).tolist() for index in (before, after)] == [[2, 2, 2], [3, 1, 2]]


def test_a_file_without_permission_is_not_called_damaged(official, monkeypatch):
    def deny(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(archives, "open", deny, raising=False)
    with pytest.raises(DataError, match=r"train\.tar cannot be read \(Permission denied\); correct its permissions"):
        load_official(official)
    monkeypatch.setattr(devkit.tarfile, "open", deny)
    with pytest.raises(DataError, match=r"devkit_t12\.tar\.gz cannot be read \(Permission denied\); correct"):
        load_official(official)


def test_a_devkit_holds_files(official, tmp_path):
    with tarfile.open(tmp_path / DEVKIT, "w:gz") as tar:
        link(tar, "kit/data/meta.mat", "nowhere", tarfile.SYMTYPE)
        link(tar, "kit/otherdata/meta.mat", "", tarfile.DIRTYPE)
    with pytest.raises(DataError, match=f"{DEVKIT}: holds no data/meta.mat"):
        read_devkit(tmp_path / DEVKIT)


def test_a_path_in_two_shards_counts_once(tmp_path):
    shards = [tmp_path / f"train-{n}.tar" for n in range(2)]
    for n, shard in enumerate(shards):
        with tarfile.open(shard, "w") as tar:
            add(tar, "ant/0.jpg", b"x%d" % n)
    assert contents(load_shards(shards, "train")) == {"ant/0.jpg": (0, b"x1")}


@pytest.mark.parametrize(
    ("name", "kind", "target", "message"),
    [
        ("a/../../../../escaped.jpg", tarfile.REGTYPE, "", "escaped.jpg points out of the folder"),
        ("/tmp/absolute.jpg", tarfile.REGTYPE, "", "absolute.jpg points out of the folder"),
        ("ant/0.jpg", tarfile.CHRTYPE, "", "is a device"),
        ("ant/0.jpg", tarfile.FIFOTYPE, "", "is a device"),
        ("ant/0.jpg", tarfile.SYMTYPE, "/etc/passwd", "a link to /etc/passwd, which is no file of this archive"),
        ("ant/0.jpg", tarfile.SYMTYPE, "0.jpg", "a link to 0.jpg, which is no file"),
        ("ant/0.jpg", tarfile.LNKTYPE, "ant", "a link to ant, which is no file"),
    ],
)
def test_members_that_reach_out_are_refused(tmp_path, name, kind, target, message):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        add(tar, "ant/good.jpg", b"x")
        link(tar, name, target, kind)
    with pytest.raises(DataError, match=message):
        load_shards([tmp_path / "train.tar"], "train")


def test_a_member_of_less_than_nothing_is_damage(tmp_path):
    header = bytearray(tarfile.TarInfo("ant/9.jpg").tobuf())
    header[124:136] = b"\xff" * 11 + b"\0"  # a size in two's complement
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "train.tar").write_bytes(bytes(header) + bytes(2048))
    with pytest.raises(DataError, match=r"train.tar is damaged .*ant/9.jpg has -\d+ bytes.*fetch it again"):
        load_shards([tmp_path / "train.tar"], "train")


def test_nothing_but_zeros_follows_the_end_mark(tmp_path):
    one, other = tmp_path / "train.tar", tmp_path / "b.tar"
    for archive, name in ((one, "ant/0.jpg"), (other, "ant/1.jpg")):
        with tarfile.open(archive, "w") as tar:
            add(tar, name, b"x")
    content = one.read_bytes()
    one.write_bytes(content + bytes(3_000_000))  # large records, as for tapes
    assert len(load_shards([one], "train")) == 1
    for zeros in (0, 3_000_000):
        one.write_bytes(content + bytes(zeros) + other.read_bytes())
        with pytest.raises(DataError, match=r"^root: \S+/train.tar goes on behind its end mark, .*tar --ignore-zeros$"):
            load_shards([one], "train")
    one.write_bytes(content)
    subprocess.run(["tar", "--concatenate", "-f", one, other], check=True)
    assert len(load_shards([one], "train")) == 2


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_compressed_tars_are_named(tmp_path, kind):
    with tarfile.open(tmp_path / "train.tar", f"w:{kind}") as tar:
        add(tar, "ant/0.jpg", b"x")
    with pytest.raises(DataError, match=r"^root: .*train.tar is compressed \((gzip|bzip2|xz)\)") as found:
        load_shards([tmp_path / "train.tar"], "train")
    subprocess.run(str(found.value).partition("run ")[2], shell=True, check=True)
    assert len(load_shards([tmp_path / "train.tar"], "train")) == 1


@pytest.mark.parametrize("name", ["PK zoo", "BZhang", "(\u00b5/\u00fd"])
def test_a_plain_tar_is_not_taken_for_a_compressed_one_by_its_first_name(tmp_path, name):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        add(tar, f"{name}/0.jpg", b"x")
    assert len(load_shards([tmp_path / "train.tar"], "train")) == 1


@pytest.mark.parametrize("top", ["set", "data/imagenet/train"])
def test_folders_above_the_classes_are_no_classes(tmp_path, top):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for name in ("ant", "bee"):
            add(tar, f"{top}/{name}/0.jpg", name.encode())
    index = load_shards([tmp_path / "train.tar"], "train")
    assert contents(index) == {"ant/0.jpg": (0, b"ant"), "bee/0.jpg": (1, b"bee")}
