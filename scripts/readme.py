#!/usr/bin/env python3
"""Puts recorded tables into the README: each block names a Markdown file and receives that file's first table.

<!-- table: results/quickstart/table1.md -->
...
<!-- end -->

scripts/readme.py            # rewrites README.md
scripts/readme.py --check    # exit code 1 where README.md differs from the recorded tables
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def first_table(markdown: str) -> str:
    """The first run of lines that start with a bar."""
    found = re.search(r"(?:^\|.*\n)+", markdown, re.MULTILINE)
    if found is None:
        raise ValueError("no table in this file")
    return found.group()


def filled(readme: str, root: Path) -> str:
    """README text with every block filled from its file below `root`."""
    return BLOCK.sub(lambda m: m[1] + first_table((root / m[2]).read_text(encoding="utf-8")) + m[3], readme)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where README.md is stale")
    options = parser.parse_args(arguments)
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    new = filled(text, ROOT)
    if options.check:
        if new != text:
            print("README.md differs from the recorded tables; run scripts/readme.py", file=sys.stderr)
        return int(new != text)
    path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
