"""What the `_target_` of a configuration's node may name: what configs/ names of ours, or a class of the user's own."""

import contextlib
import importlib
import importlib.util
import inspect
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onlinenorm.errors import ArgumentError, ConfigError, RunError
from onlinenorm.text import first_line

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# Where this project's code of a group lies: what a file of configs/ names of it may be built.
PLACES = {
    "normalizer": ("onlinenorm.normalizers.", "torch.nn."),
    "model": ("onlinenorm.models.",),
    "data": ("onlinenorm.data.",),
}


def _written(group: str) -> tuple[str, ...]:
    """What the files of a group in configs/ name of this project's code, each in full."""
    texts = [file.read_text(encoding="utf-8") for file in sorted((CONFIGS / group).glob("*.yaml"))]
    named = [name for text in texts for name in re.findall(r"^_target_: ([\w.]+)", text, re.MULTILINE)]
    return tuple(dict.fromkeys(name for name in named if name.startswith(PLACES[group])))


# By group of configs/: every name in full, since a module that may be named leads to all that it imports.
NAMED = {
    "normalizer": (*_written("normalizer"), "torch.nn.SyncBatchNorm"),
    "model": (*_written("model"), "onlinenorm.models.resnet", "onlinenorm.models.cifar_resnet"),
    "data": _written("data"),
    "recipe": ("onlinenorm.training.recipe.Recipe",),
    "trainer": ("onlinenorm.training.build_trainer",),
    "logger": (
        "onlinenorm.training.loggers.open_loggers",
        # as runs of version 0.1.0 recorded them
        "onlinenorm.training.loggers.csv_only",
        "onlinenorm.training.loggers.tensorboard_logger",
        "onlinenorm.training.loggers.wandb_logger",
    ),
    "classifier": ("onlinenorm.training.ImageClassifier",),
}
# Groups that also take a class or function of the user's own package -> what such a class must be one of.
OWN = {
    "normalizer": "torch.nn.Module",
    "model": "torch.nn.Module",
    "data": "onlinenorm.data.ImageDataModule",
}
_INSTALLED = {"site-packages", "dist-packages"}
# Python's own packages, of which sys.stdlib_module_names leaves out test, and this project's commands and tests.
_OURS = (
    *(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")),
    *(CONFIGS.parent / name for name in ("train.py", "scripts", "tests")),
)


def targets(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every `_target_` in a tree of plain values, at any depth."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key == "_target_":
                yield f"{prefix}{key}", value
            yield from targets(value, f"{prefix}{key}.")
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from targets(value, f"{prefix}{index}.")


def locate(group: str, name: Any) -> Any:
    """What the `_target_` of a group's node names. Raises ConfigError for what is none of `NAMED` or `OWN`.

    A package of the user's own is neither Python's nor installed beside others (an editable install is no such), and
    what is taken from it is a class or function that it defines itself.
    """
    if not isinstance(name, str):
        raise refused(group, name)
    module, _, attribute = name.rpartition(".")
    is_own = name not in NAMED.get(group, ())
    if is_own and not (group in OWN and module and attribute and _is_own(name.partition(".")[0], group, name)):
        raise refused(group, name)
    try:
        target = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and not module.startswith(error.name or "?"):
            raise RunError(
                f"{group}: {name} needs the package {error.name}, which is not installed; pip install {error.name}"
            ) from None
        raise ConfigError(f"{group}._target_: {name!r} does not exist ({error}); correct the name") from None
    except Exception as error:
        if not is_own:
            raise
        raise _failed(group, name, "could not be imported", error) from error
    if is_own:
        _check_own(group, name, target)
    return target


@contextlib.contextmanager
def own_errors(group: str, name: str, doing: str, hint: str = "") -> Iterator[None]:
    """Context in which a class of the user's own is used: an error of its code becomes a sentence with its line.

    Errors that are sentences stay as they are, and so does whatever is wrong with this project's own classes.

    Args:
        group, name: of configs/ and of the class, in full.
        doing: what could not be done, as "could not be built".
        hint: what to do, at the end of the sentence.
    """
    try:
        yield
    except Exception as error:
        if name in NAMED[group] or hasattr(error, "exit_code") or isinstance(error, ArgumentError):
            raise
        raise _failed(group, name, doing, error, hint) from error


def _failed(group: str, name: str, doing: str, error: Exception, hint: str = "") -> ConfigError:
    kind, text = type(error).__name__, first_line(error)
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        places.append((error.filename or "", error.lineno))
    ours = str(CONFIGS.parent / "onlinenorm")
    users = [f"{file}, line {line}" for file, line in places if is_users(file) and not file.startswith(("<", ours))]
    words = [kind if text == kind else f"{kind}: {text}", *users[-1:]]
    return ConfigError(f"{group}._target_: {name} {doing} ({'; '.join(words)}){hint}")


def refused(group: str, name: Any) -> ConfigError:
    """The error for a `_target_` that is not built."""
    more = f", and of a package of your own a {OWN[group]} or a function that makes one" if group in OWN else ""
    package, dot, _ = name.partition(".") if isinstance(name, str) else ("", "", "")
    if group in OWN and dot and package in sys.stdlib_module_names:
        more += f"; {package} is a module of Python itself: give yours another name"
    return ConfigError(f"{group}._target_: {name!r} is refused; there are {', '.join(NAMED.get(group, ()))}{more}")


def _is_own(package: str, group: str, name: str) -> bool:
    if package in {*sys.stdlib_module_names, "__main__", "onlinenorm"}:
        return False
    try:
        spec = importlib.util.find_spec(package)  # imports nothing: the name has no dots
    except (ImportError, ValueError):
        return False
    if spec is None:
        raise ConfigError(
            f"{group}._target_: {name!r} does not exist (no module named {package}); install its package with "
            "pip install -e, or put the folder that holds it on PYTHONPATH"
        )
    places = [spec.origin] if spec.has_location and spec.origin else list(spec.submodule_search_locations or [])
    return bool(places) and all(map(is_users, places))


def is_users(place: str) -> bool:
    """Whether a file or folder is neither Python's, nor of an installed package, nor a command or test of this project.

    An editable install is the user's own folder.
    """
    path = Path(place).resolve()
    return _INSTALLED.isdisjoint(path.parts) and not any(path.is_relative_to(ours) for ours in _OURS)


def _check_own(group: str, name: str, found: Any) -> None:
    package = name.partition(".")[0]
    defined = str(getattr(found, "__module__", "")).partition(".")[0]
    if not (inspect.isclass(found) or inspect.isfunction(found)) or defined != package:
        raise ConfigError(f"{group}._target_: {name!r} is no class or function that {package} defines itself; refused")
    module, _, attribute = OWN[group].rpartition(".")
    base = getattr(importlib.import_module(module), attribute)
    if inspect.isclass(found) and not issubclass(found, base):
        raise ConfigError(f"{group}._target_: {name!r} is refused; a class named here is a subclass of {OWN[group]}")
