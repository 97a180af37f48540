"""ImageNet in small, in the forms in which people have it: class folders, Kaggle's folders and zip, Parquet files."""

import json
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from image_folders import write_image

WNIDS = ("n01440764", "n01443537", "n01484850")
NAMES = ("tench, Tinca tinca", "goldfish, Carassius auratus", "great white shark, white shark")
LABELS = "LOC_val_solution.csv"


def write_folders(root: Path, train: int = 5, val: int = 2) -> Path:
    """Class folders with ImageNet's file names; validation images are numbered across the classes."""
    for c, wnid in enumerate(WNIDS):
        for k in range(train):
            write_image(root / "train" / wnid / f"{wnid}_{k}.JPEG", 1000 * c + k, (50 + k, 40))
        for k in range(val):
            number = k * len(WNIDS) + (2 - c) + 1
            write_image(root / "val" / wnid / f"ILSVRC2012_val_{number:08d}.JPEG", 1000 * c + k + 500)
    return root


def write_kaggle(folders: Path, root: Path) -> Path:
    """What imagenet-object-localization-challenge.zip unpacks to, with the images of class folders."""
    images = root / "ILSVRC" / "Data" / "CLS-LOC"
    shutil.copytree(folders / "train", images / "train")
    rows = ["ImageId,PredictionString"]
    for file in sorted((folders / "val").rglob("*.JPEG"), key=lambda file: file.name):
        (images / "val").mkdir(exist_ok=True)
        shutil.copy(file, images / "val")
        rows.append(f"{file.stem},{file.parent.name} 85 1 499 272 {file.parent.name} 2 3 4 5 ")
    write_image(images / "test" / "ILSVRC2012_test_00000001.JPEG", 77)
    (root / LABELS).write_text("\n".join(rows) + "\n")
    (root / "LOC_synset_mapping.txt").write_text("".join(f"{w} {n}\n" for w, n in zip(WNIDS, NAMES, strict=True)))
    (root / "ILSVRC" / "Annotations").mkdir()
    (root / "ILSVRC" / "Annotations" / "a.xml").write_text("<annotation/>")
    return root


def zip_folder(folder: Path, archive: Path, compression: int = zipfile.ZIP_DEFLATED, zip64: bool = False) -> Path:
    """All files of a folder in a zip file; zip64: with the long form of their sizes."""
    with zipfile.ZipFile(archive, "w", compression) as file:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                with file.open(str(path.relative_to(folder)), "w", force_zip64=zip64) as member:
                    member.write(path.read_bytes())
    return archive


def rows_of(folder: Path, named: bool = True) -> list[dict[str, Any]]:
    """Rows as in the hub's imagenet-1k of the class folders in `folder`, in no order of classes."""
    files = sorted(folder.rglob("*.JPEG"), key=lambda file: file.name[::-1])
    return [
        {
            "image": {
                "bytes": file.read_bytes(),
                "path": f"{file.stem}_{file.parent.name}.JPEG" if named else None,
            },
            "label": WNIDS.index(file.parent.name),
        }
        for file in files
    ]


def write_parquet(root: Path, split: str, rows: list[dict[str, Any]], files: int = 2, names: Sequence[str] = (),
                  **options: Any) -> list[Path]:  # fmt: skip
    """SPLIT-00000-of-00002.parquet ...; names: of the labels, in the metadata. options: of pyarrow's writer."""
    import pyarrow
    import pyarrow.parquet

    root.mkdir(parents=True, exist_ok=True)
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if names else None
    schema = pyarrow.schema([("image", image), ("label", pyarrow.int64())], metadata)
    written = []
    for n in range(files):
        path = root / f"{split}-{n:05d}-of-{files:05d}.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[n::files], schema), path, **options)
        written.append(path)
    return written
