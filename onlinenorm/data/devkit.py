"""What ImageNet's development kit says: the classes, how many training images each has, and the validation labels."""

import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from onlinenorm.data.missing import check_content
from onlinenorm.errors import DataError
from onlinenorm.text import first_line

NAME = "ILSVRC2012_devkit_t12"
META, GROUND_TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"


@dataclass(frozen=True)
class Devkit:
    """train_images: class folder (n01440764) -> training images. val_classes: class folder of each validation image."""

    train_images: dict[str, int]
    val_classes: list[str]


def find_devkit(folder: Path) -> Path:
    """The devkit's archive or unpacked folder in `folder`; DataError if there is neither."""
    for path in (folder / f"{NAME}.tar.gz", folder / NAME):
        if path.exists():
            return path
    raise DataError(
        f"{folder / NAME}.tar.gz is missing: the development kit (2.5 MB, beside the archives on image-net.org) "
        "holds the labels of the validation images",
        key="root",
    )


def read_devkit(path: Path) -> Devkit:
    """Reads the archive (.tar.gz) or the folder it unpacks to. Raises DataError if it is damaged or incomplete."""
    from io import BytesIO

    from scipy.io import loadmat  # here: only preparation and verification need it

    meta, truth = (_content(path, name) for name in (META, GROUND_TRUTH))
    try:
        synsets = loadmat(BytesIO(meta), squeeze_me=True, struct_as_record=True)["synsets"].reshape(-1)
        # inner nodes of the WordNet tree have children; the classes of the challenge are its leaves
        leaves = [s for s in synsets if int(s["num_children"]) == 0]
        by_id = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in leaves}
        counts = {str(s["WNID"]): int(s["num_train_images"]) for s in leaves}
        val_classes = [by_id[int(line)] for line in truth.split()]
    except Exception as error:  # a damaged file makes scipy raise almost anything, a foreign one numpy
        raise DataError(
            f"{path} is not the development kit of ILSVRC 2012, or damaged ({type(error).__name__}: "
            f"{first_line(error)}); fetch it again from https://image-net.org",
            key="root",
        ) from error
    return Devkit(counts, val_classes)


def _content(path: Path, name: str) -> bytes:
    file = path / name if path.is_dir() else path
    try:
        check_content(file)
        if path.is_dir():
            return file.read_bytes()
        with tarfile.open(file, "r:gz") as tar:
            for member in tar:
                wanted = member.isfile() and f"/{member.name}".endswith(f"/{name}")
                if wanted and (content := tar.extractfile(member)) is not None:
                    return content.read()
    except PermissionError as error:
        raise DataError(
            f"{error.filename} cannot be read ({error.strerror}); correct its permissions", key="root"
        ) from error
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged or cut short ({error}); fetch it again", key="root") from error
    raise DataError(f"{path}: holds no {name}; is it the development kit {NAME}?", key="root")
