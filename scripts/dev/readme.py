#!/usr/bin/env python3
"""Puts recorded results into the README: a block names a Markdown file and receives its first table, or its whole text.

<!-- table: results/study/quickstart/table1.md -->
...
<!-- end -->
<!-- text: results/README.md -->
...
<!-- end -->

A text comes without its first heading, its links made relative to the README.

scripts/dev/readme.py            # rewrites README.md
scripts/dev/readme.py --check    # exit code 1 where README.md differs from what is recorded
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts._venv import ROOT, run_main

BLOCK = re.compile(r"(<!-- (table|text): (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def first_table(markdown: str) -> str:
    """The first run of lines that start with a bar."""
    found = re.search(r"(?:^\|.*\n)+", markdown, re.MULTILINE)
    if found is None:
        raise ValueError("no table in this file")
    return found.group()


def whole_text(markdown: str, folder: str) -> str:
    """The text without its first heading; links to files beside it lead through `folder`."""
    body = re.sub(r"\A# .*\n+", "", markdown)
    return re.sub(r"(?<=\]\()(?!https?:|/|#)", f"{folder}/", body)


def filled(readme: str, root: Path) -> str:
    """README text with every block filled from its file below `root`."""

    def content(match: re.Match) -> str:
        head, kind, name, end = match.groups()
        markdown = (root / name).read_text(encoding="utf-8")
        return (
            head
            + (first_table(markdown) if kind == "table" else whole_text(markdown, Path(name).parent.as_posix()))
            + end
        )

    return BLOCK.sub(content, readme)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where README.md is stale")
    options = parser.parse_args(arguments)
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    new = filled(text, ROOT)
    if options.check:
        if new != text:
            print("README.md differs from what is recorded; run scripts/dev/readme.py", file=sys.stderr)
        return int(new != text)
    path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_main(main)
