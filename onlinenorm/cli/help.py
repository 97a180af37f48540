"""train.py --help, from the comments of the files in configs/, without a library that takes long to load."""

import re
import shutil
import textwrap
from pathlib import Path
from typing import NamedTuple

from onlinenorm.cli.files import CONFIGS, GROUPS, group_files
from onlinenorm.training.hints import unknown_option

USAGE = """\
python train.py [KEY=VALUE ...]              a run: started, continued where it was stopped, reprinted where it is done
python train.py -m KEY=VALUE,VALUE ...       a run for each combination; or scripts/sweep.py, which can be repeated
python train.py --cfg job [KEY=VALUE ...]    prints the whole configuration and runs nothing
--config-dir DIR                             configurations of your own, in folders named as those of configs/; for
                                             classes of your own see CONTRIBUTING.md

For example
  python train.py experiment=quickstart normalizer=batch seed=1                      minutes on two CPU cores
  python train.py experiment=quickstart normalizer.clamp_value=3 run_dir=runs/c3     a key changed, in its own folder
  python train.py experiment=table1 data.root=/data/imagenet                         a row of the published table
  python train.py data=imagenet data.root=photos recipe.epochs=30 recipe.milestones=[9,18,24,27]   folders of your own
  torchrun --nproc-per-node 8 train.py trainer=ddp experiment=table1 data.root=/data/imagenet
"""
MORE = """\
Every key
  python train.py --help GROUP=NAME            those of a choice, with values and ranges, as in --help normalizer=batch
  python train.py --help experiment=NAME       all of an experiment
  configs/README.md                            all there are, and recipes

A path may hold any character; quote for the shell alone. Another text with = [ ( , or spaces: 'KEY="TEXT"'.
Exit code 0: done; 1: the run failed; 2: the configuration cannot be meant; 128 + signal: stopped and saved.
"""
MOST_USED = (
    "seed", "run_dir", "data.root", "data.limit_train", "recipe.epochs", "recipe.batch_size", "recipe.lr",
    "normalizer.clamp_value", "trainer.devices", "trainer.precision",
)  # fmt: skip
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
    """The page: an overview, or what is asked about by `overrides`.

    Named groups, and those of named keys, are told with every key; an experiment is told with all groups. `config_dir`
    is a folder of more choices. Raises ConfigError for a choice that there is not.
    """
    width = width or max(shutil.get_terminal_size((120, 0)).columns, 80)
    given = dict(override.lstrip("+").partition("=")[::2] for override in overrides)
    files_of = {group: group_files(group, config_dir) for group in GROUPS}
    for group, name in given.items():
        if group in GROUPS and name.isidentifier() and name not in files_of[group] and name != "null":
            raise unknown_option(group, name, files_of[group])
    named = given.get("experiment")
    choices, values = defaults(named if named in files_of["experiment"] else None, config_dir)
    choices |= {group: given[group] for group in GROUPS if given.get(group) in files_of[group]}
    asked = {key.partition(".")[0] for key in given}
    groups = GROUPS if "experiment" in asked else [group for group in GROUPS if group in asked]
    if not groups:
        return "\n".join([USAGE, *_overview(files_of, choices, width), "", MORE])
    lines = ["train.yaml"]
    lines += [_row(f"  {key}={s.value}", s.comment, width) for key, s in settings(CONFIGS / "train.yaml").items()]
    for group in groups:
        files = files_of[group]
        lines += ["", f"{group}={choices.get(group, 'null')}    of:"]
        lines += [_row(f"  {name}", about(file), width) for name, file in files.items()]
        chosen = settings(files[choices[group]]) if group != "experiment" else {}
        elsewhere = {k: s for name, file in files.items() for k, s in settings(file).items() if group != "experiment"}
        for key, setting in chosen.items():
            value, comment = values.get(f"{group}.{key}", setting.value), setting.comment or meaning(key, files)
            lines.append(_row(f"  {group}.{key}={value}", comment, width))
        if others := {key: setting for key, setting in elsewhere.items() if key not in chosen}:
            lines.append("  of other choices:")
            lines += [_row(f"  {group}.{k}={s.value}", meaning(k, files), width) for k, s in others.items()]
    return "\n".join(lines) + "\n"


def _overview(files_of: dict[str, dict[str, Path]], choices: dict[str, str], width: int) -> list[str]:
    """Groups with their choices, the default one first, and the keys that are used most."""
    lines = ["Groups, the default first"]
    for group, files in files_of.items():
        names = sorted(files, key=lambda name: name != choices.get(group))
        lines.append(_row(f"  {group}=", " ".join(names), width, 16))
    lines += ["", "Keys that are used most, with their values where nothing else is chosen"]
    for key in MOST_USED:
        group, _, leaf = key.rpartition(".")
        file = files_of[group][choices[group]] if group else CONFIGS / "train.yaml"
        setting = settings(file)[leaf]
        lines.append(_row(f"  {key}={setting.value}", setting.comment, width, 30))
    return lines


def meaning(key: str, files: dict[str, Path]) -> str:
    """What any file of a group says of a key: the longest, which explains where the others note."""
    return max((settings(file)[key].comment for file in files.values() if key in settings(file)), key=len)


def _row(left: str, right: str, width: int, column: int = 44) -> str:
    first = f"{left:<{column - 2}}  " if len(left) <= column - 2 else f"{left}\n{'':{column}}"
    return (first + f"\n{'':{column}}".join(textwrap.wrap(right, width - column, break_on_hyphens=False))).rstrip()
