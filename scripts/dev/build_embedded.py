"""Builds onlinenorm/data/embedded/ from the full Fashion-MNIST: its first 10,000 training and 2,000 test images.

    python scripts/dev/build_embedded.py [--root FOLDER] [--output FOLDER] [--check]

Gzip time stamps are 0 and the level is fixed, so that the files come out byte for byte. --check writes nothing and
compares; where another zlib compresses to other bytes, it says so and compares the images instead.
"""

import argparse
import gzip
import struct
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts._venv import run_main

from onlinenorm.data.fashion_mnist import EMBEDDED, EMBEDDED_FOLDER, FILES, FULL, find_full_set, read_split
from onlinenorm.errors import DataError


def build(root: str | None) -> dict[str, bytes]:
    """File name -> content of the four embedded files."""
    folder = find_full_set(root)
    files = {}
    for split, names in FILES.items():
        for name, array in zip(names, read_split(folder, split, FULL[split]), strict=True):
            kept = array[: EMBEDDED[split]]
            header = bytes([0, 0, 8, kept.ndim]) + struct.pack(f">{kept.ndim}I", *kept.shape)
            files[f"{name}.gz"] = pack(header + kept.tobytes())
    return files


def pack(data: bytes) -> bytes:
    """gzip file with time 0 and unknown system; the header that gzip.compress writes varies with Python's version."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    header = bytes.fromhex("1f8b08000000000002ff")
    return header + deflate.compress(data) + deflate.flush() + struct.pack("<II", zlib.crc32(data), len(data))


def compare(files: dict[str, bytes], folder: Path) -> tuple[bool, list[str]]:
    """Whether `folder` holds the same images, and a line a file."""
    good, lines = True, []
    for name, content in files.items():
        path = folder / name
        if not path.is_file():
            good, verdict = False, "is missing"
        elif (stored := path.read_bytes()) == content:
            verdict = "is equal byte for byte"
        elif _unpacked(stored) == gzip.decompress(content):
            verdict = f"holds equal images, compressed by another zlib than this Python's {zlib.ZLIB_RUNTIME_VERSION}"
        else:
            good, verdict = False, "DIFFERS"
        lines.append(f"{path} {verdict}")
    return good, lines


def _unpacked(data: bytes) -> bytes | None:
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error):
        return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder of the full set; else Debian's package, else a download")
    parser.add_argument("--output", type=Path, default=EMBEDDED_FOLDER, help="folder of the embedded set")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    options = parser.parse_args(arguments)
    try:
        files = build(options.root)
    except DataError as error:
        print(error, file=sys.stderr)
        return 1
    if options.check:
        good, lines = compare(files, options.output)
        print("\n".join(lines))
        return 0 if good else 1
    options.output.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (options.output / name).write_bytes(content)
        print(f"{options.output / name}: {len(content):,} bytes")
    return 0


if __name__ == "__main__":
    run_main(main)
