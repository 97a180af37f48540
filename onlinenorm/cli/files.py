"""The files that a command line chooses from: those of configs/, and those of the folder of --config-dir."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onlinenorm.errors import ConfigError
from onlinenorm.scales import plain, published_label

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
GROUPS = ("normalizer", "model", "data", "recipe", "trainer", "logger", "experiment")
_GLOBAL = re.compile(r"^# *@package +_global_ *$", re.MULTILINE)
_LABEL = re.compile(r"^_label_: *(?P<label>[^#\n]+)", re.MULTILINE)


def folders(config_dir: str | None) -> list[Path]:
    """configs/ and `config_dir`. Raises ConfigError for one that is no folder of groups, or names a file of ours.

    Hydra takes the first of two files of a name, so that the user's own would be left unread.
    """
    if config_dir is None:
        return [CONFIGS]
    own = Path(config_dir)
    if not own.is_dir():
        raise ConfigError(
            f"--config-dir: {config_dir} is no folder; name the one that holds your own normalizer/, data/ or others"
        )
    groups = [folder for group in GROUPS if (folder := own / group).is_dir()]
    if not groups:
        place = own.resolve()
        above = f"; give the folder above it: --config-dir {own.parent}" if place.name in GROUPS else ""
        raise ConfigError(f"--config-dir: {config_dir} holds none of the folders {'/, '.join(GROUPS)}/{above}")
    if other := next((file for folder in groups for file in folder.glob("*.yml")), None):
        raise ConfigError(f"--config-dir: {other} is not read: names of files end in .yaml; rename it")
    for file in (*own.glob("train.yaml"), *(file for folder in groups for file in folder.rglob("*.yaml"))):
        name = file.relative_to(own)
        if (CONFIGS / name).is_file() and not (CONFIGS / name).samefile(file):
            group, choice = name.parent, name.stem
            raise ConfigError(f"{group}: {choice} is also in configs/, which would be taken; rename {file}")
    return [CONFIGS, own]


def group_files(group: str, config_dir: str | None = None) -> dict[str, Path]:
    """Name -> file of each choice of a group."""
    files = {file.stem: file for folder in folders(config_dir) for file in (folder / group).glob("*.yaml")}
    return dict(sorted(files.items()))


def check_label(config: Mapping[str, Any], files: Mapping[str, Path]) -> None:
    """Raises ConfigError where the row of the normalizer that is chosen would be taken for that of another one.

    Args:
        config: composed.
        files: the normalizers to choose from.
    """
    label, chosen = config.get("normalizer", {}).get("_label_"), config["choices"]["normalizer"]
    if not isinstance(label, str):
        return
    texts = {name: _LABEL.search(file.read_text(encoding="utf-8")) for name, file in files.items()}
    names = [name for name, found in texts.items() if found and plain(found["label"]) == plain(label)]
    names += [name for section in ("rows", "further_rows") if (name := published_label(section, label))]
    if taken := next((name for name in names if name != chosen), ""):
        raise ConfigError(
            f"normalizer._label_: {label!r} is what the row of normalizer={taken} is called; write a _label_ of its "
            f"own into {files.get(chosen, 'its file')}"
        )


def check_experiment(file: Path) -> None:
    """Raises ConfigError for an experiment whose keys would be those of a node `experiment`, and not of the run."""
    if not _GLOBAL.search(file.read_text(encoding="utf-8")):
        raise ConfigError(
            f"{file}: sets nothing as it is: the keys of an experiment are those of the whole run; write "
            "'# @package _global_' as its first line"
        )
