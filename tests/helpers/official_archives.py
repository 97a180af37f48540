"""ImageNet's official files in small: same names, same structure, few classes."""

import io
import tarfile
from pathlib import Path

import numpy as np
from image_folders import write_image
from scipy.io import savemat

WNIDS = ("n01440764", "n01443537", "n01484850")


def write_official(folder: Path, train: int = 5, val: int = 6, size: tuple[int, int] = (50, 40)) -> Path:
    """The three archives in `folder`: `train` images a class, `val` in all, labels not in the order of the classes."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as outer:
        for c, wnid in enumerate(reversed(WNIDS)):
            packed = io.BytesIO()
            with tarfile.open(fileobj=packed, mode="w") as inner:
                for k in range(train):
                    path = write_image(folder / "images" / f"{wnid}_{k}.JPEG", 1000 * c + k, size)
                    inner.add(path, path.name)
            add(outer, f"{wnid}.tar", packed.getvalue())
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as tar:
        for k in range(val):
            path = write_image(folder / "images" / f"ILSVRC2012_val_{k + 1:08d}.JPEG", 500 + k, size)
            tar.add(path, path.name)
    write_devkit(folder, train, val)
    return folder


def write_devkit(folder: Path, train: int, val: int) -> None:
    """ILSVRC2012 ids begin at 1 and do not follow the names' order; an inner node of the tree comes last."""
    kind = [(name, object) for name in (
        "ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height", "num_train_images"
    )]  # fmt: skip
    rows = [(i + 1, wnid, "a fish", "it swims", 0, np.array([]), 0, train) for i, wnid in enumerate(WNIDS[::-1])]
    rows.append((len(rows) + 1, "n00001740", "entity", "a thing", 3, np.array([1, 2, 3]), 1, 0))
    content = io.BytesIO()
    savemat(content, {"synsets": np.array(rows, dtype=kind)})
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/readme.txt", b"about")
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", content.getvalue())
        truth = "".join(f"{k % len(WNIDS) + 1}\n" for k in range(val)).encode()
        add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth)


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """A file of this name and content."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
