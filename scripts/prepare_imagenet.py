#!/usr/bin/env python3
"""ImageNet from its archives, in any form, to folders or a few large files; and a check of any such folder.

    scripts/prepare_imagenet.py ARCHIVES ROOT             class folders: ROOT/train/CLASS/*, ROOT/val/CLASS/*
    scripts/prepare_imagenet.py ARCHIVES ROOT --packed    a few large tar files, for network filesystems
    scripts/prepare_imagenet.py --verify ROOT             counts, classes, fingerprint; decodes 1,000 images of a split

ARCHIVES holds ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz, or ImageNet in any
other form that data=imagenet reads: Kaggle's zip file or folders, the hub's Parquet files, class folders (to be
packed), shards (to be unpacked). All can also be trained from as they are: data.root=ARCHIVES. Images go straight from
the archives to their place, so nothing is on disk twice but the archives.
The same command again continues where it was interrupted, and changes nothing where all is done.
The fingerprint is of names, labels and sizes; --verify --decode all reads every image besides.

Exit code 0: done and, with --verify, found good; 1: what is wrong is printed; 2: wrong usage.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts._venv import run_main

from onlinenorm.cli.arguments import parse_options
from onlinenorm.data.archives import TRAIN_ARCHIVE
from onlinenorm.data.imagenet import open_splits
from onlinenorm.data.index import list_classes, name_few
from onlinenorm.data.prepare import SHARD_BYTES, check_archives, chosen_classes, extract, pack
from onlinenorm.data.progress import Progress
from onlinenorm.data.verify import record, verify
from onlinenorm.errors import DataError
from onlinenorm.files import locked


def prepare(options: argparse.Namespace, progress: Progress) -> None:
    """Checks the archives and writes folders or shards, in one process at a time."""
    archives, root = options.folders
    if archives.resolve() == root.resolve():
        raise DataError(f"{root}: is ARCHIVES and ROOT; name another ROOT, or train from it as it is: data.root={root}")
    in_use = DataError(f"{root}: another process is preparing this folder; wait for it, or choose another ROOT")
    root.mkdir(parents=True, exist_ok=True)
    with locked(root / ".onlinenorm-lock", in_use):
        _prepare(options, archives, root, progress)


def _prepare(options: argparse.Namespace, archives: Path, root: Path, progress: Progress) -> None:
    if options.checksum and (archives / TRAIN_ARCHIVE).exists():
        check_archives(archives, root / ".onlinenorm-checksums.json", progress)
    splits = open_splits(str(archives), progress)
    classes = chosen_classes(splits, options.classes)
    for split, index in zip(("train", "val"), splits, strict=True):
        if options.packed and (root / split).is_dir():
            raise DataError(
                f"{root / split}: holds class folders, which are read in place of shards; choose another ROOT"
            )
        if options.packed:
            shards = pack(index, root, split, classes, int(options.shard_gb * 2**30), progress)
            print(f"{root}: {split} lies in {len(shards)} tar file(s)")
        else:
            written = extract(index, root / split, classes, progress)
            others = sorted(set(list_classes(root / split)) - set(classes))
            more = f"; other classes are there too: {name_few(others)}" if others else ""
            found = f"{len(classes)} class{'es' * (len(classes) > 1)}"
            print(f"{root / split}: {found}, {written} of them written now{more}")

    if len(classes) == 1:
        print(f"{root}: one class is no set to train on; --classes takes several, as n01440764,n01443537")


def check(root: Path, decode: int | None, progress: Progress) -> bool:
    """Verifies `root`, prints and keeps what was found; whether it is good."""
    found = verify(open_splits(str(root), progress), decode, progress)
    file = record(root, found)
    print(
        f"{root}: {found['classes']:,} classes, {found['train_images']:,} training and {found['val_images']:,} "
        f"validation images ({found['scale']}); {found['decoded']:,} decoded, {len(found['unreadable'])} unreadable\n"
        f"fingerprint {found['fingerprint']}, kept in {file}"
    )
    for path in found["unreadable"]:
        print(f"  unreadable: {path}")
    for problem in found["problems"]:
        print(f"  PROBLEM: {problem}")
    return not found["problems"]


def _folder(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("a folder's name is empty, as of a shell variable that is not set")
    return Path(text)


def _count(text: str) -> int | None:
    return None if text == "all" else int(text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=_folder, metavar="ARCHIVES ROOT", help="ROOT will do with --verify")
    parser.add_argument("--packed", action="store_true", help="write tar shards instead of class folders")
    parser.add_argument("--shard-gb", type=float, default=SHARD_BYTES / 2**30, help="size of a shard (%(default)g GB)")
    parser.add_argument("--classes", type=lambda text: text.split(","), help="only these, e.g. n01440764,n01443537")
    parser.add_argument("--no-checksum", dest="checksum", action="store_false", help="don't compare MD5 sums")
    parser.add_argument("--verify", action="store_true", help="check ROOT, after preparing it where ARCHIVES is given")
    told = "images of a split that --verify decodes (1000)"
    parser.add_argument("--decode", type=_count, default=1000, metavar="all|N", help=told)
    options = parse_options(parser, arguments)
    if len(options.folders) > 2 or (len(options.folders) == 1 and not options.verify):
        parser.error("give ARCHIVES and ROOT, or --verify ROOT")
    progress = Progress()
    try:
        if len(options.folders) == 2:
            prepare(options, progress)
        return 0 if not options.verify or check(options.folders[-1], options.decode, progress) else 1
    except OSError as error:
        place, reason = error.filename or options.folders[-1], error.strerror or error
        print(f"prepare_imagenet.py: {place}: {reason}; mend that, and the same command continues", file=sys.stderr)
        return 1
    except (DataError, json.JSONDecodeError) as error:
        print(f"prepare_imagenet.py: {str(error).removeprefix('root: ')}", file=sys.stderr)  # a key of train.py's
        return 1
    except KeyboardInterrupt:
        print("prepare_imagenet.py: interrupted; the same command continues", file=sys.stderr)
        return 130


if __name__ == "__main__":
    run_main(main)
