"""Predictions of files are those that the run made of the same images."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import programs
import pytest
import torch
from PIL import Image

from onlinenorm.data import CIFAR10, FashionMNIST
from onlinenorm.deploy import load_trained
from onlinenorm.deploy.predict import find_images, predict, read_image


@pytest.fixture(scope="session")
def pictures(clamp_run, tmp_path_factory):
    """Validation images 0 to 7 as PNG files."""
    folder = tmp_path_factory.mktemp("pictures")
    data = load_trained(clamp_run).data
    data.setup()
    images = data.val_dataloader().dataset.__getitems__([(0, i) for i in range(8)])[0]
    for i, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def photo_run(train_run, tmp_path_factory):
    """A network trained on class folders of JPEG files: (run, folder of the images)."""
    root = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for label, name in enumerate(("ant", "bee")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 128, (20 + i, 24, 3), dtype=np.uint8) + 127 * label
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.jpg")
    run = train_run("photos", "experiment=quickstart", "data=imagenet", f"data.root={root}", "data.image_size=16",
                    "data.num_workers=0", "recipe.epochs=1", "recipe.milestones=[]", "recipe.batch_size=8",
                    "recipe.augmentation=random_resized_crop")  # fmt: skip
    return run, root


def test_files_get_the_classes_of_the_final_validation(clamp_run, pictures, script, capsys):
    assert script("predict")(clamp_run, pictures, "--json", "--batch-size", 3) == 0
    entries = json.loads(capsys.readouterr().out)
    with np.load(clamp_run / "predictions.npz") as recorded:
        expected = recorded["with_clamp"][:8].tolist()
    assert [entry["predictions"][0]["label"] for entry in entries] == expected
    for entry in entries:
        shares = [row["probability"] for row in entry["predictions"]]
        assert len(shares) == 5 and shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1 + 1e-6
    assert entries[0]["predictions"][0]["class"] in load_trained(clamp_run).data.class_names


def test_photographs_are_seen_as_in_validation(photo_run):
    run, root = photo_run
    trained = load_trained(run)
    files = find_images([root / "val"])
    found = list(predict(trained, files, trained.data.class_names, torch.device("cpu")))
    with np.load(run / "predictions.npz") as recorded:
        assert [p.classes[0][0] for p in found] == recorded["with_clamp"].tolist()
    assert {name for p in found for _, name, _ in p.classes} == {"ant", "bee"}
    image = read_image(files[0], trained)
    assert image.shape == (3, 16, 16) and image.dtype == torch.uint8


def test_without_the_dataset_classes_are_numbers(photo_run, script, capsys, tmp_path):
    run, root = photo_run
    file = next((root / "val" / "ant").iterdir())
    assert script("predict")(run, file, "--data-root", tmp_path / "nowhere") == 0
    printed = capsys.readouterr()
    assert "class 0 (0)" in printed.out and "numbers only" in printed.err


@pytest.mark.parametrize(
    "command", [("export", "--to", "folded"), ("export", "--to", "folded", "--reestimate", 8), ("audit_clamping",)]
)
def test_data_that_fail_are_told_from_arguments_that_cannot_be_meant(photo_run, command, script, capsys, tmp_path):
    run, root = photo_run
    shutil.copytree(root, tmp_path / "set")
    for split in ("train", "val"):
        for file in (tmp_path / "set" / split / "ant").iterdir():
            file.write_bytes(b"no image")
    for place, words in (("nowhere", "does not exist"), ("set", ".jpg cannot be decoded")):
        name, *more = command
        more += ["--output", tmp_path / "new", "--data-root", tmp_path / place]
        assert script(name)(run, *more) == 1
        told = capsys.readouterr().err
        assert words in told and told.count("\n") == 1 and not (tmp_path / "new").exists()


def test_images_of_any_size_and_mode_are_read(clamp_run, tmp_path):
    trained = load_trained(clamp_run)
    for size, mode in (((28, 28), "L"), ((100, 60), "RGB"), ((7, 9), "RGBA"), ((28, 90), "P"), ((28, 28), "1")):
        Image.new(mode, size).save(tmp_path / "image.png")
        assert read_image(tmp_path / "image.png", trained).shape == (1, 28, 28)


def test_unreadable_files_are_named_and_do_not_stop_the_others(clamp_run, pictures, script, tmp_path, capsys):
    bad, missing = tmp_path / "bad.png", tmp_path / "missing.png"
    bad.write_bytes((pictures / "0.png").read_bytes()[:60])
    arguments = (clamp_run, pictures / "0.png", bad, missing, pictures / "1.png")
    assert script("predict")(*arguments, "--json") == 1
    printed = capsys.readouterr()
    entries = json.loads(printed.out)
    assert ["error" in entry for entry in entries] == [False, True, True, False]
    assert f"{bad}: cannot be read as an image" in printed.err and f"{missing}: does not exist" in printed.err
    assert script("predict")(*arguments) == 1
    assert str(pictures / "1.png") in capsys.readouterr().out


def test_nothing_readable_at_all(clamp_run, script, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert script("predict")(clamp_run, tmp_path / "empty") == 2
    assert "holds no images" in capsys.readouterr().err
    assert script("predict")(clamp_run, tmp_path / "nothing.png") == 1
    assert script("predict")(clamp_run, tmp_path / "nothing.png", "--top", 0) == 2


def test_folders_are_searched_below_in_order(tmp_path):
    for name in ("b.JPG", "a/c.png", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert find_images([tmp_path]) == [tmp_path / "a" / "c.png", tmp_path / "b.JPG"]


@pytest.mark.gpu
def test_gpu_and_cpu_agree(clamp_run, pictures):
    found = {}
    for device in ("cuda", "cpu"):
        trained = load_trained(clamp_run)
        files = find_images([pictures])
        rows = predict(trained, files, trained.data.class_names, torch.device(device), top=10)
        found[device] = [{label: share for label, _, share in row.classes} for row in rows]
    for on_gpu, on_cpu in zip(found["cuda"], found["cpu"], strict=True):
        assert on_gpu == pytest.approx(on_cpu, abs=1e-2)


def test_script_as_a_program(clamp_run, pictures, root, tmp_path):
    script = root / "scripts" / "predict.py"
    done = programs.call(script, clamp_run, pictures / "0.png", "--top", "2", folder=tmp_path)
    assert done.returncode == 0 and done.stdout.count("%") == 2, done.stderr


def test_files_get_the_size_of_the_set_s_own_images_which_the_device_scales(tmp_path):
    Image.new("RGB", (50, 40)).save(tmp_path / "photo.png")
    for data, shape in ((CIFAR10(image_size=64), (3, 32, 32)), (FashionMNIST(image_size=64), (1, 28, 28))):
        assert read_image(tmp_path / "photo.png", SimpleNamespace(data=data)).shape == shape
