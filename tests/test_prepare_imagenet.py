import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import programs
import pytest
from PIL import Image

sys.path.append(str(Path(__file__).parent / "data"))

from image_folders import write_tree
from imagenet_forms import rows_of, write_folders, write_kaggle, write_parquet, zip_folder
from official_archives import WNIDS, add, write_official

from onlinenorm.data import ImageNet, prepare
from onlinenorm.data.archives import ArchiveIndex
from scripts import prepare_imagenet


@pytest.fixture
def main(own_cache, monkeypatch):
    monkeypatch.setattr("onlinenorm.data.verify.FILE_BYTES", (1000, 1000))  # of the images here
    return lambda *arguments: prepare_imagenet.main([str(argument) for argument in arguments])


@pytest.fixture
def official(tmp_path):
    return write_official(tmp_path / "official")


def tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".onlinenorm")
    }  # fmt: skip


def test_official_archives_become_a_tree_that_is_verified(main, official, tmp_path, capsys):
    root = tmp_path / "root"
    assert main(official, root, "--no-checksum", "--verify", "--decode", "all") == 0
    printed = capsys.readouterr().out
    assert "3 classes, 15 training and 6 validation images (imagenet-subset); 21 decoded, 0 unreadable" in printed
    data = ImageNet(root=str(root))
    data.setup()
    assert data.fingerprint in printed and data.class_names == list(WNIDS)
    verified = data.describe()["verified"]
    assert verified["decoded"] == 21 and verified["problems"] == []
    changed = root / "train" / WNIDS[0] / "new.JPEG"
    changed.write_bytes(b"x")
    data = ImageNet(root=str(root))
    assert data.describe()["verified"] is None


def test_one_class_is_told_and_an_empty_name_refused(main, official, tmp_path, capsys):
    assert main(official, tmp_path / "root", "--no-checksum", "--classes", WNIDS[0]) == 0
    assert "train: 1 class, 1 of them written now" in (said := capsys.readouterr().out)
    assert "root: one class is no set to train on" in said
    assert main(official, tmp_path / "root", "--no-checksum", "--classes", ",".join(WNIDS[:2])) == 0
    assert "no set to train on" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main("", tmp_path / "new")
    assert "a folder's name is empty" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_a_damaged_devkit_is_one_sentence(main, official, tmp_path, capsys):
    kit = official / "ILSVRC2012_devkit_t12.tar.gz"
    with tarfile.open(kit, "w:gz") as tar:
        for name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt"):
            add(tar, f"kit/data/{name}", b"")
    assert main(official, tmp_path / "root", "--no-checksum") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"prepare_imagenet.py: {kit} is not the development kit of ILSVRC 2012, or damaged (MatRead")


def test_an_interrupted_preparation_continues_to_the_same_tree(main, official, tmp_path, monkeypatch, capsys):
    assert main(official, tmp_path / "whole", "--no-checksum") == 0
    calls, real = [], ArchiveIndex.read

    def fails(self, index):
        calls.append(index)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(self, index)

    monkeypatch.setattr(ArchiveIndex, "read", fails)
    root = tmp_path / "again"
    assert main(official, root, "--no-checksum") == 130
    assert "the same command continues" in capsys.readouterr().err
    assert [path.name for path in (root / "train").iterdir() if not path.name.startswith(".")] == [WNIDS[0]]
    assert main(official, root, "--no-checksum") == 0
    assert "2 of them written now" in capsys.readouterr().out
    assert tree(root) == tree(tmp_path / "whole")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert main(official, root, "--no-checksum") == 0
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_a_class_cut_short_by_a_crash_is_written_again(main, official, tmp_path, capsys):
    root = tmp_path / "root"
    main(official, root, "--no-checksum")
    expected = tree(root)
    (root / "train" / WNIDS[1] / f"{WNIDS[1]}_2.JPEG").write_bytes(b"")
    (root / "val" / WNIDS[2] / "ILSVRC2012_val_00000001.JPEG").unlink()
    capsys.readouterr()
    assert main(official, root, "--no-checksum") == 0
    assert capsys.readouterr().out.count(" 1 of them written now") == 2
    assert tree(root) == expected


def test_packed_again_and_back(main, official, tmp_path, monkeypatch):
    assert main(official, tmp_path / "packed", "--no-checksum", "--packed", "--shard-gb", "1e-5", "--verify") == 0
    shards = {path.name: path.read_bytes() for path in (tmp_path / "packed").glob("*.tar")}
    assert len(shards) == 5
    (tmp_path / "packed" / "train-00001-of-00003.tar").unlink()
    assert main(official, tmp_path / "packed", "--no-checksum", "--packed", "--shard-gb", "1e-5") == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "packed").glob("*.tar")} == shards
    assert main(official, tmp_path / "direct", "--no-checksum") == 0
    assert main(tmp_path / "packed", tmp_path / "unpacked") == 0
    assert tree(tmp_path / "unpacked") == tree(tmp_path / "direct")
    assert main(official, tmp_path / "packed", "--no-checksum", "--packed") == 1  # another division


@pytest.mark.parametrize("form", ["kaggle", "zip", "parquet"])
def test_every_form_becomes_a_tree_and_shards(main, tmp_path, capsys, form):
    folders, source = write_folders(tmp_path / "folders"), tmp_path / "a source"
    if form == "parquet":
        pytest.importorskip("pyarrow")
        for split, name in (("train", "train"), ("val", "validation")):
            write_parquet(source, name, rows_of(folders / split))
    else:
        write_kaggle(folders, source)
        source = zip_folder(source, tmp_path / "images.zip") if form == "zip" else source
    for _ in range(2):
        assert main(source, tmp_path / "root") == 0 and main(source, tmp_path / "packed", "--packed", "--verify") == 0
        assert tree(tmp_path / "root") == tree(folders)
    assert "3 classes, 0 of them written now" in capsys.readouterr().out
    assert main("--verify", source, "--decode", "all") == 0
    printed = capsys.readouterr().out
    data, packed = ImageNet(root=str(source)), ImageNet(root=str(tmp_path / "packed"))
    assert data.fingerprint == packed.fingerprint == ImageNet(root=str(folders)).fingerprint
    assert data.fingerprint in printed and "(imagenet-subset); 21 decoded, 0 unreadable" in printed
    assert data.describe()["verified"]["decoded"] == 21 and packed.describe()["verified"]["problems"] == []


def test_chosen_classes_only(main, official, tmp_path, capsys):
    assert main(official, tmp_path / "root", "--no-checksum", "--classes", f"{WNIDS[2]},{WNIDS[0]}", "--verify") == 0
    assert sorted(path.name for path in (tmp_path / "root" / "train").iterdir()) == [WNIDS[0], WNIDS[2]]
    assert main(official, tmp_path / "root", "--no-checksum", "--classes", "n99") == 1
    assert "not in both training and validation archive: n99" in capsys.readouterr().err


def test_checksums(main, official, tmp_path, monkeypatch, capsys):
    assert main(official, tmp_path / "root") == 1
    assert "its MD5 is" in (told := capsys.readouterr().err) and "1d675b47d978889d74fa0da5fadfb00e" in told
    taken = []
    md5 = prepare._md5
    sums = {name: md5(official / name, lambda *_: None) for name in prepare.PUBLISHED_MD5}
    monkeypatch.setattr(prepare, "PUBLISHED_MD5", sums)
    monkeypatch.setattr(prepare, "_md5", lambda path, report: taken.append(path.name) or md5(path, report))
    assert main(official, tmp_path / "root") == 0 and len(taken) == 3
    assert main(official, tmp_path / "root") == 0 and len(taken) == 3, "sums of unchanged files are kept"
    for content in ("", "[1]", '{"x": 1}'):
        (tmp_path / "root" / ".onlinenorm-checksums.json").write_text(content)
        assert main(official, tmp_path / "root") == 1
        assert "/.onlinenorm-checksums.json: is damaged" in (told := capsys.readouterr().err) and "delete it" in told
    (tmp_path / "root" / ".onlinenorm-checksums.json").unlink()
    (official / "ILSVRC2012_img_val.tar").write_bytes(b"")
    assert main(official, tmp_path / "root") == 1
    assert "ILSVRC2012_img_val.tar is empty; fetch it again" in capsys.readouterr().err


def test_errors_are_told_without_a_trace(root, official, tmp_path):
    (official / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    script = root / "scripts" / "prepare_imagenet.py"
    done = programs.call(script, official, tmp_path / "root", "--no-checksum")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "ILSVRC2012_devkit_t12.tar.gz is missing" in done.stderr


def test_a_full_disk_is_told_before_writing(main, official, tmp_path, monkeypatch, capsys):
    usage = prepare.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert main(official, tmp_path / "root", "--no-checksum") == 1
    assert "are still to be written and 0.0 GB are free" in capsys.readouterr().err


def test_verify_names_unreadable_images_and_wrong_counts(main, official, tmp_path, capsys, monkeypatch):
    root = tmp_path / "root"
    main(official, root, "--no-checksum")
    (root / "train" / WNIDS[1] / f"{WNIDS[1]}_2.JPEG").write_bytes(b"\xff\xd8\xff junk")
    assert main("--verify", root, "--decode", "all") == 1
    printed = capsys.readouterr().out
    assert f"unreadable: train/{WNIDS[1]}/{WNIDS[1]}_2.JPEG" in printed and "1 of 21 images decoded" in printed
    monkeypatch.setattr("onlinenorm.data.verify.PUBLISHED", (3, 15, 7))
    assert main("--verify", root, "--decode", "0") == 1
    printed = capsys.readouterr().out
    assert "6 validation images, not 7" in printed and "3 classes without 50 validation images" in printed


@pytest.mark.parametrize("arguments", [["only_one"], ["a", "b", "c"]])
def test_usage(main, arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(*arguments)
    assert end.value.code == 2


def test_verification_is_kept_as_json(main, official, tmp_path):
    main(official, tmp_path / "root", "--no-checksum", "--verify")
    found = json.loads((tmp_path / "root" / ".onlinenorm-verified.json").read_text())
    assert found["scale"] == "imagenet-subset" and len(found["fingerprint"]) == 64


def test_shards_of_other_classes_or_changed_images_are_not_taken_for_done(main, tmp_path, capsys):
    source, root = write_tree(tmp_path / "set"), tmp_path / "root"
    assert main(source, root, "--packed", "--classes", "ant") == 0
    before = tree(root)
    assert main(source, root, "--packed", "--classes", "bee") == 1
    assert "holds other images than those to be packed now" in capsys.readouterr().err and tree(root) == before
    assert main(source, root, "--packed", "--classes", "ant") == 0
    file = source / "train" / "ant" / "0.JPEG"
    content = bytearray(file.read_bytes())
    file.write_bytes(content)
    assert main(source, root, "--packed", "--classes", "ant") == 0, "rewritten with the same bytes"
    content[-9] ^= 1
    file.write_bytes(content)
    assert main(source, root, "--packed", "--classes", "ant") == 1 and tree(root) == before


def test_what_is_not_from_the_archives_is_never_overwritten(main, tmp_path, capsys):
    source, root = write_tree(tmp_path / "set"), tmp_path / "root"
    assert main(source, root) == 0
    before = tree(root)
    for file in (root / "train" / "ant" / "mine.txt", root / "val" / "bee" / "deep" / "mine.JPEG"):
        file.parent.mkdir(exist_ok=True)
        file.write_text("precious")
        (file.parents[2 if file.parent.name == "deep" else 1] / "cat" / "0.JPEG").unlink()
        (root / "train" / "ant" / "0.JPEG").unlink(missing_ok=True)
        assert main(source, root) == 1
        assert f"not come from the archives, or was changed since: {file}; move" in capsys.readouterr().err
        assert file.read_text() == "precious"
        file.unlink()
    assert main(source, root) == 0 and tree(root) == before
    edited = root / "train" / "ant" / "0.JPEG"
    edited.write_bytes(b"edited")
    assert main(source, root) == 1 and edited.read_bytes() == b"edited"
    edited.unlink()
    assert main(source, root) == 0 and tree(root) == before


def test_images_touched_since_are_compared_and_changed_ones_told(main, tmp_path, capsys):
    source, root = write_tree(tmp_path / "set"), tmp_path / "root"
    assert main(source, root) == 0
    file = source / "train" / "ant" / "0.JPEG"
    file.chmod(0o600)
    capsys.readouterr()
    assert main(source, root) == 0 and "3 classes, 0 of them written now" in capsys.readouterr().out
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    assert main(source, root) == 1 and str(root / "train" / "ant" / "0.JPEG") in capsys.readouterr().err
    (root / "train" / "ant" / "0.JPEG").unlink()
    assert main(source, root) == 0 and (root / "train" / "ant" / "0.JPEG").read_bytes() == content


@pytest.mark.parametrize("packed", [[], ["--packed"]])
def test_one_process_at_a_time_prepares_a_folder(main, tmp_path, capsys, packed):
    source, root = write_tree(tmp_path / "set"), tmp_path / "root"
    assert main(source, source, *packed) == 1 and "is ARCHIVES and ROOT" in capsys.readouterr().err
    root.mkdir()
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'a+'); fcntl.lockf(file, fcntl.LOCK_EX); print(1, flush=True); "
        "sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, root / ".onlinenorm-lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline()
        assert main(source, root, *packed) == 1 and tree(root) == {}
        assert "another process is preparing this folder" in capsys.readouterr().err
        other.stdin.close()
    assert main(source, root, *packed) == 0 and tree(root)


def test_other_classes_and_other_forms_in_the_folder_are_told(main, tmp_path, capsys):
    source, root = write_tree(tmp_path / "set"), tmp_path / "root"
    assert main(source, root, "--classes", "ant") == 0 and "other classes" not in capsys.readouterr().out
    assert main(source, root, "--classes", "bee") == 0
    assert "1 of them written now; other classes are there too: ant" in capsys.readouterr().out
    assert main(source, root, "--packed") == 1 and not list(root.glob("*.tar"))
    assert "which are read in place of shards; choose another ROOT" in capsys.readouterr().err


@pytest.mark.parametrize("packed", [[], ["--packed"]])
def test_a_file_overwritten_by_one_of_its_size_is_not_verified(main, tmp_path, packed, caplog):
    source, root = write_tree(tmp_path / "set"), tmp_path / "root"
    assert main(source, root, "--verify", *packed) == 0

    def verified():
        return ImageNet(root=str(root)).verified

    assert verified()["problems"] == []
    file = next(root.glob("train-*.tar" if packed else "train/bee/*"))
    file.write_bytes(file.read_bytes()[:-600] + bytes(600))
    later = file.stat().st_mtime_ns + 10**9
    os.utime(file, ns=(later, later))
    assert verified() is None
    assert main("--verify", root, "--decode", "0") == 0 and verified()["decoded"] == 0
    for content in ("null", "[1]", '{"fingerprint": 1}', "["):
        (root / ".onlinenorm-verified.json").write_text(content)
        assert verified() is None and "verified.json: is damaged" in caplog.text
        caplog.clear()


def test_a_verification_is_of_one_folder_and_of_its_files_times(main, tmp_path):
    source = write_kaggle(write_folders(tmp_path / "folders"), tmp_path / "kaggle") and tmp_path / "kaggle"
    archive = zip_folder(source, tmp_path / "images.zip")
    assert main("--verify", archive) == 0 and ImageNet(root=str(archive)).verified
    copy = tmp_path / "copy.zip"
    copy.write_bytes(archive.read_bytes())
    os.utime(copy, (1.7e9, 1.7e9))
    assert ImageNet(root=str(copy)).verified is None
    os.utime(archive, (1.7e9, 1.7e9))
    assert ImageNet(root=str(archive)).verified is None, "older, and another file"


def test_a_partial_shard_of_two_names_is_written_anew(main, tmp_path):
    source, root = write_tree(tmp_path / "set"), tmp_path / "root"
    root.mkdir()
    (tmp_path / "elsewhere").write_bytes(b"precious")
    os.link(tmp_path / "elsewhere", root / "train-00000-of-00001.partial")
    assert main(source, root, "--packed") == 0
    assert (tmp_path / "elsewhere").read_bytes() == b"precious"


def test_a_damaged_shard_is_told(main, tmp_path, capsys):
    source, root = write_tree(tmp_path / "set"), tmp_path / "root"
    assert main(source, root, "--packed") == 0
    for damaged in (b"", b"junk" * 1000):
        (root / "train-00000-of-00001.tar").write_bytes(damaged)
        assert main(source, root, "--packed") == 1
        assert "train-00000-of-00001.tar: is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("option", [[], ["--packed"]])
def test_an_image_that_cannot_be_read_is_named_with_what_to_do(main, official, tmp_path, capsys, monkeypatch, option):
    monkeypatch.setattr(ArchiveIndex, "read", Mock(side_effect=OSError("its bytes are not those of its checksum")))
    folders, archive = write_tree(tmp_path / "set"), official / "ILSVRC2012_img_train.tar"
    (image := folders / "train" / "bee" / "1.JPEG").unlink()
    image.symlink_to("nowhere")
    for source, told in (
        (official, f"{archive}/.*.JPEG cannot be read .its bytes are .* checksum.; fetch {archive} again, and the sa"),
        (folders, f"{image} cannot be read .No such file or directory.; replace or remove it, and the same command"),
    ):
        assert main(source, tmp_path / f"root {source.name}", "--no-checksum", *option) == 1
        assert re.search(f"{told}.*data.root=ARCHIVES data.on_unreadable=skip", capsys.readouterr().err)


def test_what_may_not_be_read_or_written_is_named(main, tmp_path, capsys, monkeypatch):
    source, forbidden = write_tree(tmp_path / "set"), Mock(side_effect=PermissionError(13, "Permission denied", "/x"))
    monkeypatch.setattr(Path, "write_bytes", forbidden)
    assert main(source, tmp_path / "root") == 1
    assert "/x: Permission denied; mend that, and the same command continues" in capsys.readouterr().err
    monkeypatch.setattr("onlinenorm.data.index.os.scandir", forbidden)
    assert main(source, tmp_path / "root") == 1
    assert "/x cannot be read (Permission denied); correct its permissions" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train", "train/.ant.partial", "train-00000-of-00001.partial"])
def test_nothing_is_written_through_links(main, tmp_path, capsys, name):
    source, root, elsewhere = write_tree(tmp_path / "set"), tmp_path / "root", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (root / name).parent.mkdir(parents=True)
    (root / name).symlink_to(elsewhere)
    assert main(source, root, *["--packed"] * name.endswith("1.partial")) == 1
    assert "is a symbolic link, and nothing is written outside" in capsys.readouterr().err
    assert not list(elsewhere.iterdir())


def test_a_verification_is_not_written_through_a_link(main, tmp_path):
    root, elsewhere = write_tree(tmp_path / "set"), tmp_path / "elsewhere.json"
    elsewhere.write_text("mine")
    (root / ".onlinenorm-verified.json").symlink_to(elsewhere)
    assert main("--verify", root) == 0
    assert elsewhere.read_text() == "mine" and "fingerprint" in (root / ".onlinenorm-verified.json").read_text()


def test_verify_reads_16_bit_gray_and_names_pixels_of_unknown_range(main, tmp_path, capsys):
    root = write_tree(tmp_path / "set")
    Image.fromarray(np.full((40, 50), 30000, np.uint16)).save(root / "train" / "ant" / "deep.png")
    assert main("--verify", root) == 0
    Image.fromarray(np.ones((40, 50), np.float32)).save(root / "train" / "ant" / "float.tif")
    assert main("--verify", root) == 1
    told = capsys.readouterr().out
    assert "unreadable: train/ant/float.tif (ValueError: its pixels are floating-point numbers" in told
    assert "deep.png" not in told and "BytesIO" not in told
