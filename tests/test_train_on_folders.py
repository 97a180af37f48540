"""train.py on class folders, shards and archives: from files to results.json."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent / "training"))
sys.path.insert(0, str(Path(__file__).parent / "data"))
from image_folders import write_tree
from imagenet_forms import rows_of, write_folders, write_kaggle, write_parquet, zip_folder
from official_archives import write_official
from tests_training import load_train_module

from onlinenorm.data import ImageNet
from onlinenorm.data.decoders import DECODERS
from onlinenorm.data.fashion_mnist import EMBEDDED, EMBEDDED_FOLDER, read_split
from onlinenorm.data.imagenet import open_splits
from onlinenorm.data.kaggle import ZIP
from onlinenorm.data.prepare import chosen_classes, extract, pack
from onlinenorm.errors import ConfigError, DataError
from onlinenorm.training.checkpoint import read

train = load_train_module()
TINY = [
    "data=imagenet",
    "data.num_workers=0",
    "data.image_size=16",
    "recipe=cifar",
    "recipe.epochs=1",
    "recipe.milestones=[]",
    "recipe.batch_size=5",
    "recipe.augmentation=random_resized_crop",
    "model=cifar_resnet8",
    "trainer=cpu",
]


@pytest.fixture(autouse=True)
def small_files(own_cache, monkeypatch):
    monkeypatch.setattr("onlinenorm.data.verify.FILE_BYTES", (1000, 1000))  # of the images here


def run(folder, root, *overrides):
    train.train(train.load_config([*TINY, f"data.root={root}", f"run_dir={folder}", *overrides]))
    return json.loads((folder / "results.json").read_text())


def test_damaged_files_are_counted_in_the_results(tmp_path):
    tree = write_tree(tmp_path / "set")
    (tree / "train" / "ant" / "3.JPEG").write_bytes(b"")
    (tree / "train" / "cat" / "0.JPEG").write_bytes((tree / "train" / "cat" / "0.JPEG").read_bytes()[:200])
    (tree / "val" / "bee" / "1.JPEG").write_bytes(b"no image at all")
    with pytest.raises(DataError, match=r"^data\.on_unreadable: .*cannot be decoded .*on_unreadable=skip"):
        run(tmp_path / "strict", tree)
    found = run(tmp_path / "lenient", tree, "data.on_unreadable=skip", "data.unreadable_limit=0.2")
    assert found["unreadable"]["count"] == 3
    assert sorted(found["unreadable"]["files"]) == ["train/ant/3.JPEG", "train/cat/0.JPEG", "val/bee/1.JPEG"]
    assert found["dataset"]["val_images"] == 6 and (found["scale"], found["dataset"]["name"]) == ("folder", "set")


def test_a_run_goes_on_after_a_damaged_file_was_replaced(tmp_path, caplog):
    tree, folder = write_tree(tmp_path / "set"), tmp_path / "run"
    damaged = tree / "val" / "bee" / "1.JPEG"
    good = damaged.read_bytes()
    damaged.write_bytes(good[:200])
    with pytest.raises(DataError, match=r"Replace the file"):
        run(folder, tree)
    assert read(folder / "checkpoints" / "last.ckpt")["position"] == {"epoch": 0, "step": 3, "global_step": 3}
    others = write_tree(tmp_path / "others", size=(64, 64))
    with pytest.raises(ConfigError, match=r"data.root: holds other images than those that .*last.ckpt was trained on"):
        run(folder, others)
    damaged.unlink()
    damaged.write_bytes(good)
    found = run(folder, tree)
    assert found["resumed"] == 1 and found["dataset"]["replaced"] == {"count": 1, "files": ["val/bee/1.JPEG"]}
    assert "files of another size than before count as replaced (1): val/bee/1.JPEG" in caplog.text
    undisturbed = run(tmp_path / "undisturbed", tree)
    assert all(found[key] == undisturbed[key] for key in ("parameters_sha256", "last"))


@pytest.mark.parametrize("keep", ["false", "true"])
def test_a_decoder_that_needs_a_gpu_is_refused_on_the_cpu_before_it_is_told_of(tmp_path, capsys, keep):
    options = "data.decoder=nvjpeg", "data.on_device=true", f"data.keep_decoded={keep}"
    with pytest.raises(ConfigError, match=r"^data\.decoder: nvjpeg decodes on an NVIDIA GPU, and this process has"):
        run(tmp_path / "run", write_tree(tmp_path / "set"), *options)
    assert len(capsys.readouterr().out.splitlines()) == 2, "what is announced"
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_not_reprinted_for_other_images(tmp_path, capsys):
    tree, folder = write_tree(tmp_path / "set"), tmp_path / "run"
    found = run(folder, tree)
    capsys.readouterr()
    assert run(folder, write_tree(tmp_path / "copy")) == found
    assert "not compared" not in capsys.readouterr().out
    others = write_tree(tmp_path / "others", size=(64, 64))
    told = r"^data.root: holds other images than those that .*results.json tells of \(set, 15 training and 6 validation"
    with pytest.raises(ConfigError, match=told):
        run(folder, others)
    assert run(folder, tmp_path / "nowhere") == found
    shown = capsys.readouterr().out
    assert f"of set, 15 training and 6 validation images, those at data.root={tree} as it was then; not comp" in shown


def test_official_archives_train_the_same_in_every_layout(tmp_path):
    official = write_official(tmp_path / "official")
    splits = open_splits(str(official))
    classes = chosen_classes(splits, None)
    for split, index in zip(("train", "val"), splits, strict=True):
        extract(index, tmp_path / "tree" / split, classes)
        pack(index, tmp_path / "packed", split, classes)
    roots = {name: tmp_path / name for name in ("official", "tree", "packed")}
    found = {name: run(tmp_path / f"run-{name}", root) for name, root in roots.items()}
    for key in ("parameters_sha256", "last", "dataset"):
        assert found["tree"][key] == found["packed"][key] == found["official"][key]
    assert found["tree"]["dataset"]["decoder"] == "pillow" and found["tree"]["dataset"]["val_decoder"] == "pillow"


def test_imagenet_trains_the_same_in_every_form(tmp_path):
    folders = write_folders(tmp_path / "folders")
    write_kaggle(folders, tmp_path / "kaggle")
    (tmp_path / "zip").mkdir()
    zip_folder(tmp_path / "kaggle", tmp_path / "zip" / ZIP)
    shutil.copytree(folders / "train", tmp_path / "test" / "train")
    shutil.copytree(folders / "val", tmp_path / "test" / "test")
    forms = ["folders", "kaggle", "zip", "test"]
    if importlib.util.find_spec("pyarrow"):
        forms.append("parquet")
        for split, name in (("train", "train"), ("val", "validation")):
            write_parquet(tmp_path / "parquet" / "data", name, rows_of(folders / split))
    found = {form: run(tmp_path / f"run-{form}", tmp_path / form) for form in forms}
    for form, results in found.items():
        for key in ("parameters_sha256", "last", "dataset", "scale"):
            assert results[key] == found["folders"][key], (form, key)
    assert (found["zip"]["scale"], found["zip"]["dataset"]["name"]) == ("imagenet-subset", "imagenet")


def test_sets_on_the_device_train_the_same(tmp_path):
    tree, found = write_tree(tmp_path / "set"), {}
    for name, on_device in (("workers", "false"), ("device", "true"), ("kept", "true"), ("again", "true")):
        kept = str(name in ("kept", "again")).lower()
        found[name] = run(tmp_path / name, tree, f"data.on_device={on_device}", f"data.keep_decoded={kept}")
    for results in found.values():
        assert all(results[key] == found["workers"][key] for key in ("parameters_sha256", "last", "dataset"))
    assert len(list((tmp_path / "cache").rglob("decoded-*.u8"))) == 2


def write_photographs(root: Path, train_images: int, val_images: int) -> Path:
    """Fashion-MNIST as colour JPEG files of 96 x 80, class folders."""
    for split, count in (("train", train_images), ("val", val_images)):
        images_NHW, labels_N = read_split(EMBEDDED_FOLDER, split, EMBEDDED[split])
        for n in range(count):
            path = root / split / f"class{labels_N[n]}" / f"{n:05d}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            grown = Image.fromarray(images_NHW[n]).resize((96, 80), Image.Resampling.BICUBIC)
            tinted = np.asarray(grown)[..., None] * np.array([1.0, 0.8, 0.6])
            Image.fromarray(tinted.astype(np.uint8)).save(path, quality=90)
    return root


@pytest.mark.slow
def test_accuracy_does_not_depend_on_the_decoder_of_validation(tmp_path):
    tree = write_photographs(tmp_path / "set", 3000, 2000)
    settings = ["data.image_size=28", "recipe.batch_size=50", "recipe.augmentation=none"]
    found = {}
    for decoder in ("pillow", "torchvision"):
        # training sees the same pixels both times
        found[decoder] = run(tmp_path / decoder, tree, *settings, f"data.val_decoder={decoder}")
    assert found["pillow"]["parameters_sha256"] == found["torchvision"]["parameters_sha256"]
    top1 = {decoder: results["last"]["val_top1"] for decoder, results in found.items()}
    print(top1)
    assert top1["pillow"] > 0.3 and abs(top1["pillow"] - top1["torchvision"]) <= 0.001

    def pixels(decoder):
        data = ImageNet(root=str(tree), image_size=28, val_decoder=decoder)
        data.setup()
        return torch.cat([batch[0] for batch in data.val_dataloader()]).int()

    difference = (pixels("pillow") - pixels("torchvision")).abs().float()
    print(f"grey levels: mean {difference.mean():.4f}, largest {difference.max():.0f}")
    assert difference.mean() <= 1


def test_validation_images_are_decoded_once_a_run(tmp_path, monkeypatch):
    """Three epochs, and at the end with the clamp and without; where there is no room, each time, to the same end."""
    tree = write_tree(tmp_path / "set")
    three = "recipe.epochs=3", "data.decoder=torchvision", "normalizer=online_clamp"
    calls, decode = [], DECODERS["pillow"]
    monkeypatch.setitem(DECODERS, "pillow", lambda *arguments: calls.append(1) or decode(*arguments))
    once = run(tmp_path / "once", tree, *three)
    assert len(calls) == once["dataset"]["val_images"] == 6
    monkeypatch.setattr("onlinenorm.data.kept_batches.free_memory", lambda device: 0)
    each_time = run(tmp_path / "each_time", tree, *three)
    assert len(calls) == 6 + 5 * 6
    assert all(once[key] == each_time[key] for key in ("parameters_sha256", "last", "clamping"))
