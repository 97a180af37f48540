#!/usr/bin/env python3
"""Makes configs/README.md: its template, README.md.j2, with tables of choices and keys from the files' comments.

scripts/dev/config_page.py            # writes configs/README.md
scripts/dev/config_page.py --check    # exit code 1 where it differs from what the files say
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts._venv import run_main

from jinja2 import Environment, StrictUndefined

from onlinenorm.cli import help
from onlinenorm.cli.files import CONFIGS, GROUPS, group_files

TEMPLATE, PAGE = CONFIGS / "README.md.j2", CONFIGS / "README.md"
SHOWN = ("normalizer", "model", "data", "recipe", "trainer")  # what an experiment is made of


def table(*rows: tuple[str, ...]) -> str:
    """Rows as a table of Markdown, the first its head."""
    lines = [" | ".join(cell.replace("|", r"\|") for cell in row) for row in rows]
    return "\n".join(f"| {line} |" for line in [lines[0], " | ".join(["---"] * len(rows[0])), *lines[1:]])


def plain(comment: str) -> str:
    """A comment as text of Markdown, where <name> would be a tag."""
    return re.sub(r"<(?!br>)(?=\w)", "&lt;", comment)


def files_of(group: str) -> dict[str, Path]:
    """The files of a group by name, the default one first, numbers in their order."""

    def place(name: str) -> tuple:
        return name != default, [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts(name)]

    default, parts = help.defaults()[0].get(group), re.compile(r"(\d+)").split
    files = group_files(group)
    return {name: files[name] for name in sorted(files, key=place)}


def choices(group: str) -> str:
    """The files of a group, the default one first: what each is and what it builds."""
    rows = [(f"`{name}`", plain(help.about(file)), f"`{help.target(file)}`") for name, file in files_of(group).items()]
    return table(("choice", "what it is", "builds"), *rows)


def keys(group: str) -> str:
    """Every key of the files of a group: its values, and what the first file that has it says, with what others add."""
    files = files_of(group)
    found = {name: help.settings(file) for name, file in files.items()}
    rows = []
    for key in dict.fromkeys(key for settings in found.values() for key in settings):
        having = {name: settings[key] for name, settings in found.items() if key in settings}
        first, *others = dict.fromkeys(setting.value for setting in having.values())
        values, said = [f"`{first}`"], [having[next(iter(having))].comment or help.meaning(key, files)]
        for value in others:
            names = [name for name, setting in having.items() if setting.value == value]
            values.append(f"`{value}` {', '.join(names)}")
            if (comment := having[names[0]].comment) and comment not in said[0]:
                said.append(f"{names[0]}: {comment}")
        lacking = [name for name in files if name not in having]
        if lacking:
            few = f"of {', '.join(having)}" if len(having) <= len(lacking) else f"not of {', '.join(lacking)}"
            said.append(f"({few})")
        rows.append((f"`{group}.{key}`", "<br>".join(values), plain("<br>".join(said))))
    return table(("key", "value", "meaning and range"), *rows) if rows else ""


def top_keys() -> str:
    """The keys of train.yaml itself."""
    rows = [
        (f"`{key}`", f"`{value}`", plain(comment))
        for key, (value, comment) in help.settings(CONFIGS / "train.yaml").items()
    ]
    return table(("key", "value", "meaning and range"), *rows)


def experiments() -> str:
    """Every experiment with the files that it chooses and the keys that it sets."""
    rows = []
    for name, file in group_files("experiment").items():
        chosen, values = help.defaults(name)
        made_of = ", ".join(f"{group}=`{chosen[group]}`" for group in SHOWN[1:])
        rows.append((f"`{name}`", help.about(file), made_of, ", ".join(f"`{k}={v}`" for k, v in values.items())))
    return table(("experiment", "what it is", "chooses", "sets"), *rows)


def own_settings() -> str:
    """What experiments set for one normalizer alone, in a file of its own."""
    rows = [
        (
            f"`{file.parent.name}`",
            f"`{file.stem}`",
            ", ".join(f"`{k}={v.value}`" for k, v in help.settings(file).items()),
        )
        for file in sorted((CONFIGS / "experiment").glob("*/*.yaml"))
    ]
    return table(("experiment", "normalizer", "sets"), *rows)


def page() -> str:
    """The page as it should be."""
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    names = {function.__name__: function for function in (choices, keys, top_keys, experiments, own_settings)}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(groups=GROUPS, **names)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where the page is stale")
    options = parser.parse_args(arguments)
    if options.check:
        stale = not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page()
        if stale:
            print("configs/README.md differs from what the files say; run scripts/dev/config_page.py", file=sys.stderr)
        return int(stale)
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_main(main)
