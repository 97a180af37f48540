"""The words of a command line: flags, overrides KEY=VALUE, and paths as the shell gave them."""

import argparse
import functools
import re
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from onlinenorm.cli.files import GROUPS
from onlinenorm.cli.help import key_names
from onlinenorm.errors import ConfigError
from onlinenorm.training.hints import SYNONYMS, nearest

# Keys whose values are paths. What other values mean to Hydra's grammar, as "=", "[", "(", "~", ",", these may contain.
PATH_KEYS = ("run_dir", "data.root")

_SWITCHES = ("--multirun", "-m", "--run", "-r", "--resolve", "--hydra-help", "--version", "--shell-completion", "-sc",
             "--help", "-h", "--info", "-i")  # fmt: skip
_WITH_VALUE = ("--config-dir", "-cd", "--cfg", "-c", "--package", "-p")
_ACTIONS = ("--multirun", "-m", "--run", "-r", "--cfg", "-c", "--info", "--hydra-help", "--shell-completion", "-sc")
_QUOTED = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\"""")
_SWEEP = re.compile(r"(choice|range|interval|glob|sort|shuffle)\(.*\)", re.DOTALL)
_PIECE = re.compile(rf"(?:{_QUOTED.pattern}|[^,])+")


class Arguments(NamedTuple):
    """A command line of train.py: its overrides, the folder of more configurations, and all flags as given."""

    overrides: list[str]
    config_dir: str | None
    flags: list[str]

    @property
    def multirun(self) -> bool:
        return bool({"-m", "--multirun"} & set(self.flags))


def parse(words: Iterable[str]) -> Arguments:
    """Flags and overrides in any order. Raises ConfigError for a flag that does not exist, naming the key it meant."""
    overrides, flags, config_dir = [], [], None
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name in _WITH_VALUE:
            if not equals:
                value = next(rest, "")
            if not value:
                raise ConfigError(f"{name}: needs a value, as in --config-dir FOLDER or --cfg job")
            flags += [name, value]
            if name in ("--config-dir", "-cd"):
                config_dir = _one_folder(config_dir, value)
        elif word in _SWITCHES or name == "--info":
            flags.append("--info=all" if word in ("--info", "-i") else word)  # which would take the next word
        elif word.startswith("-"):
            raise unknown_flag(word, rest)
        else:
            overrides.append(word)
    if len(asked := [flag for flag in flags if flag.partition("=")[0] in _ACTIONS]) > 1:
        raise ConfigError(f"{' '.join(asked)}: each asks for something else; give one of them")
    return Arguments(overrides, config_dir, flags)


def unknown_flag(word: str, rest: Iterator[str]) -> ConfigError:
    """The error for `--epochs 10`: settings are keys, and which one is meant. `rest` are the words that follow."""
    name, equals, value = word.partition("=")
    leaf = name.lstrip("-").replace("-", "_")
    leaf = SYNONYMS.get(leaf, leaf)
    if not equals:
        value = next(rest, "")
        value = "" if value.startswith("-") or "=" in value else value
    keys = key_names()
    flag = nearest(name, [flag for flag in (*_SWITCHES, *_WITH_VALUE) if flag.startswith("--")])
    exact = [key for key in (*GROUPS, *keys) if leaf in (key, key.rpartition(".")[2], key.replace(".", "_"))]
    near = exact[0] if exact else "" if flag else nearest(leaf, (*GROUPS, *keys))
    if near:
        return ConfigError(
            f"{name}: no such flag; settings are given as KEY=VALUE: did you mean {near}={value or 'VALUE'}?"
        )
    hint = f"did you mean {flag}?" if flag else "settings are given as KEY=VALUE, as in recipe.epochs=10"
    return ConfigError(f"{name}: no such flag; {hint} (train.py --help lists all)")


def parse_options(parser: argparse.ArgumentParser, words: list[str] | None) -> argparse.Namespace:
    """What a parser makes of `words` (None: of this program); an option it lacks is told before what is missing."""
    words = sys.argv[1:] if words is None else words
    if unknown := _unknown(parser, words):
        name = unknown[0].partition("=")[0]
        near = nearest(name, parser._option_string_actions)
        parser.error(f"{name}: no such option" + (f"; did you mean {near}?" if near else ""))
    return parser.parse_args(words)


def parse_script(parser: argparse.ArgumentParser, words: list[str] | None) -> argparse.Namespace:
    """The same of a parser with positional overrides, flags anywhere among them; the error is that of `unknown_flag`.

    Its --config-dir, where it has one, is of action "append".
    """
    words = sys.argv[1:] if words is None else words
    if unknown := _unknown(parser, words):
        raise unknown_flag(unknown[0], iter(unknown[1:]))
    options, unknown = parser.parse_known_intermixed_args(words)
    if isinstance(folders := getattr(options, "config_dir", None), list):
        options.config_dir = functools.reduce(_one_folder, folders, None)
    if unknown:
        raise unknown_flag(unknown[0], iter(unknown[1:]))
    return options


def _unknown(parser: argparse.ArgumentParser, words: list[str]) -> list[str]:
    """The words from the first long option on that a parser does not have, whole or shortened; [] if it has all."""
    for place, word in enumerate(words):
        name = word.partition("=")[0]
        if name == "--":
            break
        if name.startswith("--") and not any(known.startswith(name) for known in parser._option_string_actions):
            return words[place:]
    return []


def _one_folder(before: str | None, folder: str) -> str:
    if before is not None:
        raise ConfigError(f"--config-dir: {before} and {folder} are two, and one is read; put their files into one")
    return folder


def literal(overrides: Iterable[str], several: bool = False) -> list[str]:
    """Overrides with the values of `PATH_KEYS` quoted, so that Hydra takes them as they are.

    Args:
        overrides: as on the command line.
        several: whether a comma separates values, as for --multirun; else it is part of the path.
    """
    return [_literal(override, several) for override in overrides]


def quoted(text: str) -> str:
    """`text` in single quotes, as Hydra's grammar reads it back."""
    return "'" + re.sub(r"(\\*)('|\Z)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text) + "'"


def _literal(override: str, several: bool) -> str:
    key, equals, value = override.partition("=")
    if not equals or key.lstrip("+~") not in PATH_KEYS:
        return override
    if several and _SWEEP.fullmatch(value):
        return override
    pieces = _PIECE.findall(value) if several else [value]
    return f"{key}=" + ",".join(p if p in ("", "null") or _QUOTED.fullmatch(p) else quoted(_plain(p)) for p in pieces)


def _plain(text: str) -> str:
    """`text` as OmegaConf's grammar reads it back: ${ begins no interpolation."""
    return re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", text)
