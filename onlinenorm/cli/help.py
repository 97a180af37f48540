"""train.py --help, from the comments of the files in configs/, without a library that takes long to load."""

import re
import shutil
import textwrap
from pathlib import Path
from typing import NamedTuple

from onlinenorm.cli.files import CONFIGS, GROUPS, group_files

USAGE = """\
python train.py [KEY=VALUE ...]              a run: started, continued where it was stopped, reprinted where it is done
python train.py -m KEY=VALUE,VALUE ...       a run for each combination; or scripts/sweep.py, which can be repeated
python train.py --cfg job [KEY=VALUE ...]    prints the whole configuration and runs nothing
python train.py --help [KEY=VALUE ...]       this page for other choices, as in --help normalizer=batch
--config-dir DIR                             configurations of your own, in folders named as those of configs/; for
                                             classes of your own see CONTRIBUTING.md

A path may hold any character; quote for the shell alone. Another text with = [ ( , or spaces: 'KEY="TEXT"'.
Exit code 0: done; 1: the run failed; 2: the configuration cannot be meant; 128 + signal: stopped and saved.
"""
_INHERITED = re.compile(r"  - (?P<file>[\w/]+)(@_here_)?(?: +#.*)?")
_LINE = re.compile(r"(?P<indent> *)(?P<key>\w+):(?: +(?P<value>[^#\s].*?))?(?: +# ?(?P<comment>.*))?")


class Setting(NamedTuple):
    """A key's value in a file and what is said of it there."""

    value: str
    comment: str


def about(file: Path) -> str:
    """The first sentence of the comment at the head of a configuration file."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line[1:].strip())
    text = " ".join(lines)
    return re.split(r"(?<!et al)\.(?: |$)|: python ", text)[0]


def settings(file: Path) -> dict[str, Setting]:
    """Dotted key -> `Setting` of a configuration file and those it inherits, but for Hydra's and what names code.

    Its own come first.
    """
    entries: dict[str, Setting] = {}
    inherited: dict[str, Setting] = {}
    path: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if path == ["defaults"] and (base := _INHERITED.fullmatch(line)):
            inherited |= _inherited(file, base["file"])
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            continue
        path = [*path[: len(match["indent"]) // 2], match["key"]]
        if path == ["defaults"]:  # [base, _self_] in a line
            for name in re.findall(r"[\w/]+", match["value"] or ""):
                inherited |= _inherited(file, name)
        if match["value"] is not None and path[0] not in ("defaults", "hydra") and not match["key"].startswith("_"):
            entries[".".join(path)] = Setting(match["value"], match["comment"] or "")
    return entries | {key: setting for key, setting in inherited.items() if key not in entries}


def _inherited(file: Path, name: str) -> dict[str, Setting]:
    """The settings of another file of a group, which may be one of configs/; {} of what is none, as _self_."""
    places = [folder / f"{name}.yaml" for folder in (file.parent, CONFIGS / file.parent.name)]
    return next((settings(place) for place in places if place.is_file()), {})


def target(file: Path) -> str:
    """The class or function that a file, or the one that it builds on, names in full; "" where none does."""
    text = file.read_text(encoding="utf-8")
    if named := re.search(r"^_target_: +(\S+)", text, re.MULTILINE):
        return named[1]
    bases = re.findall(r"^  - (\w+)$", text, re.MULTILINE)
    return next((target(file.with_name(f"{base}.yaml")) for base in bases if base != "_self_"), "")


def key_names() -> list[str]:
    """All keys of all choices, dotted."""
    names = dict.fromkeys(settings(CONFIGS / "train.yaml"))
    for group in GROUPS[:-1]:
        for file in group_files(group).values():
            names |= dict.fromkeys(f"{group}.{key}" for key in settings(file))
    return list(names)


def defaults(experiment: str | None = None, config_dir: str | None = None) -> tuple[dict[str, str], dict[str, str]]:
    """(group -> choice, key -> value) of train.yaml, changed by an experiment."""
    choices: dict[str, str] = {}
    values: dict[str, str] = {}
    file = group_files("experiment", config_dir)[experiment] if experiment else CONFIGS / "train.yaml"
    for entry, choice in re.findall(r"^  - (?:override /)?(\w+)(?:: (\w+))?", file.read_text("utf-8"), re.MULTILINE):
        if choice:
            choices[entry] = choice
        elif experiment and entry != "_self_":
            choices, values = defaults(entry, config_dir)
    if experiment:
        base, _ = defaults()
        values |= {key: setting.value for key, setting in settings(file).items()}
        return base | choices | {"experiment": experiment}, values
    return choices, values


def render(overrides: list[str], width: int | None = None, config_dir: str | None = None) -> str:
    """The page, for the choices among `overrides`, those of the folder `config_dir` among them."""
    width = width or max(shutil.get_terminal_size((120, 0)).columns, 80)
    given = dict(override.partition("=")[::2] for override in overrides)
    named = given.get("experiment")
    files_of = {group: group_files(group, config_dir) for group in GROUPS}
    choices, values = defaults(named if named in files_of["experiment"] else None, config_dir)
    choices |= {group: given[group] for group in GROUPS if given.get(group) in files_of[group]}
    lines = [USAGE]
    for key, setting in settings(CONFIGS / "train.yaml").items():
        lines += _setting(key, setting, width)
    for group in GROUPS:
        files = files_of[group]
        lines += ["", f"{group}={choices.get(group, 'null')}    of:"]
        lines += [_row(f"  {name}", about(file), width) for name, file in files.items()]
        chosen = settings(files[choices[group]]) if group != "experiment" else {}
        elsewhere = {k: s for name, file in files.items() for k, s in settings(file).items() if group != "experiment"}
        for key, setting in chosen.items():
            comment = setting.comment or meaning(key, files)
            lines += _setting(f"{group}.{key}", Setting(values.get(f"{group}.{key}", setting.value), comment), width)
        if others := {key: setting for key, setting in elsewhere.items() if key not in chosen}:
            lines.append("  of other choices:")
            for key, setting in others.items():
                lines += _setting(f"{group}.{key}", Setting(setting.value, meaning(key, files)), width)
    return "\n".join(lines) + "\n"


def meaning(key: str, files: dict[str, Path]) -> str:
    """What any file of a group says of a key: the longest, which explains where the others note."""
    return max((settings(file)[key].comment for file in files.values() if key in settings(file)), key=len)


def _setting(key: str, setting: Setting, width: int) -> list[str]:
    return [_row(f"  {key}={setting.value}", setting.comment, width)]


def _row(left: str, right: str, width: int) -> str:
    column = 44
    first = f"{left:<{column - 2}}  " if len(left) <= column - 2 else f"{left}\n{'':{column}}"
    return (first + f"\n{'':{column}}".join(textwrap.wrap(right, width - column))).rstrip()
