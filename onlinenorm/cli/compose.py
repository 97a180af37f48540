"""Overrides into configurations of plain values, by Hydra; what cannot be meant ends in one sentence."""

import functools
import itertools
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, RangeSweep
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from onlinenorm.cli.arguments import literal, quoted
from onlinenorm.cli.files import CONFIGS, GROUPS, check_experiment, check_label, group_files
from onlinenorm.cli.help import settings
from onlinenorm.errors import ConfigError
from onlinenorm.records import run_path
from onlinenorm.text import first_line
from onlinenorm.training.config_check import check_keys
from onlinenorm.training.hints import unknown_option
from onlinenorm.training.targets import targets

# Other launchers that Hydra may build for --multirun: those of hydra-submitit-launcher.
LAUNCHERS = [
    [f"hydra_plugins.hydra_submitit_launcher.submitit_launcher.{name}"] for name in ("SlurmLauncher", "LocalLauncher")
]
MOST_VALUES = 10_000  # of one key of a sweep; more are a slip


def load_config(overrides: list[str], config_dir: str | None = None) -> dict[str, Any]:
    """The composed configuration as plain values, with the chosen file of each group under `choices`.

    Args:
        overrides: KEY=VALUE, as on the command line; one value each.
        config_dir: folder of more configurations.
    """
    # without an experiment is the default, and the defaults list asks for its name
    overrides = [text for text in literal(overrides) if text.partition("=")[0] != "~experiment"]
    files = {group: group_files(group, config_dir) for group in GROUPS}
    options = {group: list(files[group]) for group in GROUPS}
    parsed = [parse_override(override) for override in overrides]
    for override in parsed:
        key = override.key_or_group
        if key == "hydra.searchpath":
            raise ConfigError(f"{key}: more configurations are given by --config-dir FOLDER")
        if override.is_sweep_override():
            raise _several_values(override, options)
        if key == "normalizer" and override.is_delete():  # the defaults list asks for its name
            raise ConfigError(f"{key}: is missing; name one, as in {key}=NAME")
        for name in _names(override) if key in GROUPS and not override.is_delete() else ():
            if name not in options[key]:
                raise unknown_option(key, name, options[key])
            if key == "experiment":
                check_experiment(files[key][name])
    groups = [override.input_line or "" for override in parsed if override.key_or_group in GROUPS]
    keys = [override.key_or_group for override in parsed if not override.is_hydra_override()]
    try:
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            search = [f"hydra.searchpath=[{quoted(str(Path(config_dir).absolute()))}]"] if config_dir else []
            written = _compose([*groups, *search]) if search else _written(tuple(groups))
            check_keys(keys, _to_plain(written), _elsewhere(config_dir))
            config = written if overrides == groups else _compose([*overrides, *search])
            values = _to_plain(config)
            _check_code(written, config, values)
            check_label(values, files["normalizer"])
            return values
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{mark.name}, line {mark.line + 1}" if mark else shlex.join(overrides)
        raise ConfigError(f"{place}: is no YAML ({error.problem}); correct it there") from None
    except MissingConfigException as error:
        group, _, name = (error.missing_cfg_file or "").rpartition("/")
        if group not in GROUPS:
            raise ConfigError(f"{shlex.join(overrides)}: {first_line(error)}") from None
        raise unknown_option(group, name, options[group]) from None
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"{shlex.join(overrides)}: {first_line(error)}") from None


def _names(override: Override) -> list[Any]:
    """The choices of a group that an override names: one, or of loggers a list."""
    value = override.value()
    return value if override.key_or_group == "logger" and isinstance(value, list) else [value]


def jobs(overrides: list[str], config_dir: str | None = None) -> list[list[str]]:
    """The overrides of each run that several values a key make of `overrides`."""
    choices = [_values(parse_override(override), config_dir) for override in literal(overrides, several=True)]
    return [list(job) for job in itertools.product(*choices)]


def parse_override(text: str) -> Override:
    """Hydra's view of KEY=VALUE, a path made literal; ConfigError, with the form that works, where it has none."""
    key, equals, value = text.partition("=")
    if not equals and not text.startswith("~"):
        raise ConfigError(f"{text!r}: is not of the form KEY=VALUE, as in recipe.epochs=10")
    if not key.strip("+~"):
        raise ConfigError(f"{text!r}: names no key; overrides are KEY=VALUE")
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException as error:
        inner = value.replace("\\", "\\\\").replace('"', '\\"')
        form = shlex.quote(f'{key}="{inner}"')
        raise ConfigError(
            f"{key}: {value!r} cannot be read ({first_line(error)}); if it is meant as a text, quote it: {form}"
        ) from None


def to_plain(config: DictConfig, choices: Mapping[str, Any], overrides: list[str]) -> dict[str, Any]:
    """A composed configuration as plain values, with `choices`; `overrides` are those that it was composed with."""
    keys = [str(key) for key in config if key != "hydra" and not (key in GROUPS and config[key] is None)]
    values: Any = OmegaConf.to_container(OmegaConf.masked_copy(config, keys), resolve=True, throw_on_missing=True)
    names = {group: choices.get(group) for group in GROUPS} | {"experiment": choices.get("experiment") or "default"}
    if names["logger"] is None:  # Hydra tells of lists nothing
        given = [override.partition("=")[2] for override in overrides if override.startswith("logger=[")]
        names["logger"] = ",".join(given[-1].strip("[] ").replace(" ", "").split(",")) if given else None
    experiment = limited_experiment(names, overrides)
    if not values["run_dir"] and experiment != names["experiment"]:
        values["run_dir"] = str(run_path({**values, "choices": {**names, "experiment": experiment}}))
    return {**values, "choices": names}


def limited_experiment(names: dict[str, str], overrides: list[str]) -> str:
    """The folder's name of an experiment, of `names` chosen: another one where the command line limits the images.

    A smoke run would otherwise take the folder of the real one, which then is refused. Sets that come with the package
    are for trials in the first place: their runs keep the name.
    """
    if names["data"] in ("embedded", "synthetic"):
        return names["experiment"]
    given = dict(override.lstrip("+").partition("=")[::2] for override in overrides)
    limits = [(key, given.get(f"data.{key}", "null")) for key in ("limit_train", "limit_val")]
    return "-".join([names["experiment"], *(f"{key}{value}" for key, value in limits if value != "null")])


def group_options(group: str, config_dir: str | None = None) -> list[str]:
    """Names of a group's files."""
    return list(group_files(group, config_dir))


def _compose(overrides: list[str]) -> DictConfig:
    return hydra.compose("train", overrides, return_hydra_config=True)


@functools.lru_cache(maxsize=64)
def _written(groups: tuple[str, ...]) -> DictConfig:
    """What the files of configs/ say for these choices: the same for most runs of a sweep."""
    return _compose([*groups])


def _to_plain(config: DictConfig) -> dict[str, Any]:
    return to_plain(config, config.hydra.runtime.choices, list(config.hydra.overrides.task))


def _check_code(written: DictConfig, config: DictConfig, values: dict[str, Any]) -> None:
    """Raises ConfigError where `config`, as plain `values`, names code that the files of `written` do not spell out."""
    texts = dict(targets(OmegaConf.to_container(written, resolve=False)))
    for key, target in targets(values):
        if texts.get(key) != target:
            group = key.partition(".")[0]
            raise ConfigError(
                f"{key}: {target!r} is refused: code is named in files alone, as it stands; write "
                f"configs/{group}/NAME.yaml, or {group}/NAME.yaml in the folder of --config-dir, and use {group}=NAME"
            )
    hydras: Any = OmegaConf.to_container(config.hydra, resolve=False)
    launcher = [target for _, target in targets(hydras["launcher"])]
    for key, value in _hydras_code().items():
        if hydras.get(key) != value and not (key == "launcher" and launcher in LAUNCHERS):
            raise ConfigError(f"hydra.{key}: is fixed, since Hydra runs code that is named there; leave it out")


@functools.cache
def _hydras_code() -> dict[str, Any]:
    """What of Hydra's own configuration names code: as it is without overrides."""
    settings = _compose([]).hydra
    keys = ("callbacks", "launcher", "sweeper", "job_logging", "hydra_logging")
    return {key: OmegaConf.to_container(settings[key], resolve=False) for key in keys}


def _several_values(override: Override, options: dict[str, list[str]]) -> ConfigError:
    key, value = override.key_or_group, (override.input_line or "").partition("=")[2]
    if key == "logger":
        form = shlex.quote(f"logger=[{value}]")
        return ConfigError(f"logger: {value!r}: several are a list: {form}, of {', '.join(options[key])}")
    if key not in GROUPS and _is_list(key):
        return ConfigError(f"{key}: {value!r} is a list; write it in brackets: {shlex.quote(f'{key}=[{value}]')}")
    return ConfigError(
        f"{key}: {value!r} are several values, and a run takes one; for a run each add -m, or use scripts/sweep.py"
    )


def _is_list(key: str) -> bool:
    group, _, leaf = key.partition(".")
    files = [settings(file) for file in (CONFIGS / group).glob("*.yaml")] if leaf else []
    return any(leaf in file and file[leaf].value.startswith("[") for file in files)


def _values(override: Override, config_dir: str | None) -> list[str]:
    """The overrides, one value each, that one of a sweep stands for."""
    key, value = override.key_or_group, override.value()
    if not override.is_sweep_override():
        return [override.input_line or ""]
    if isinstance(value, Glob):
        if key not in GROUPS:
            raise ConfigError(
                f"{key}: glob() chooses among files of a group, as normalizer=glob(*) does; list the values"
            )
        values = value.filter(group_options(key, config_dir))
    elif override.is_interval_sweep():
        raise ConfigError(f"{key}: an interval() holds no finite number of values; list them, or use range()")
    elif isinstance(value, RangeSweep) and not (value.step and math.isfinite(value.step)):
        raise ConfigError(f"{key}: a range() needs a step other than 0")
    else:
        values = list(itertools.islice(override.sweep_string_iterator(), MOST_VALUES + 1))
    if not values or len(values) > MOST_VALUES:
        count = "no value" if not values else f"more than {MOST_VALUES:,} values"
        given = (override.input_line or "").partition("=")[2]
        raise ConfigError(f"{key}: {given} gives {count}; list those that are meant, as in {key}=VALUE,VALUE")
    return [f"{override.get_key_element()}={each}" for each in values]


def _elsewhere(config_dir: str | None) -> dict[str, list[str]]:
    """Dotted key -> the choices of its group that have it."""
    choices: dict[str, list[str]] = {}
    for group in GROUPS[:-1]:
        for name, file in group_files(group, config_dir).items():
            for key in settings(file):
                choices.setdefault(f"{group}.{key}", []).append(name)
    return choices
