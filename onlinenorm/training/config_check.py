"""Checks a composed configuration, as plain values, before anything is built from it, and builds its nodes."""

import contextlib
import functools
import inspect
import itertools
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from onlinenorm.arguments import flatten
from onlinenorm.errors import ArgumentError, ConfigError, DataError
from onlinenorm.scales import COLOUR, LABEL, is_colour, is_label
from onlinenorm.training.hints import PROVIDED, nearest, unknown_key
from onlinenorm.training.targets import OWN, locate, own_errors, targets

KNOWN = (*PROVIDED, "experiment", "seed", "run_dir")  # keys at the top, beside the names of the chosen files
# Keys that may be "auto" -> their value where speed is not sought; what auto stands for is `fast_path`'s to say.
AUTO_KEYS: dict[str, Any] = {
    "model.compile": False,
    "trainer.cuda_graph": False,
    "data.decoder": "pillow",
    "data.on_device": False,
}
AUTO = "auto"
_MARKS = ("_target_", "_partial_")
# How a normalizer's row is called and drawn, where its file says so.
_SHOWN = {"_label_": (is_label, LABEL), "_colour_": (is_colour, COLOUR)}


def check_keys(keys: Iterable[str], config: dict[str, Any], elsewhere: dict[str, list[str]] | None = None) -> None:
    """Raises ConfigError for the first of `keys` (dotted) that is neither a value nor a node of `config`.

    `elsewhere` names the choices of a key's group that have it, for those that the one of `config` lacks.
    """
    known = set(flatten({key: value for key, value in config.items() if key != "choices"})) | set(KNOWN)
    known |= {node for key in known for node in itertools.accumulate(key.split("."), "{}.{}".format)}
    for key in keys:
        if key not in known:
            raise unknown_key(key, known, elsewhere)


def check_config(config: dict[str, Any]) -> None:
    """Raises ConfigError for the first missing or unknown key, foreign target or value of the wrong kind.

    Every node with a `_target_` is held against the signature of what it names.
    """
    for key in PROVIDED:
        if not isinstance(config.get(key), dict) or "_target_" not in config[key]:
            if name := config.get("choices", {}).get(key):
                raise ConfigError(
                    f"{key}._target_: {key}/{name}.yaml does not name a class; add the line '_target_: MODULE.CLASS'"
                )
            example = "csv, which is metrics.csv alone" if key == "logger" else "NAME"
            raise ConfigError(f"{key}: is missing; name one, as in {key}={example}")
    for key, value in config.items():
        if key not in KNOWN and key != "choices":
            raise unknown_key(key, KNOWN)
        if key in PROVIDED:
            _check_node(key, value)
    seed = config.get("seed")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ConfigError(f"seed: {seed!r} is not a whole number from 0 to {2**32 - 1}")


def build(config: dict[str, Any], path: str, /, **provided: Any) -> Any:
    """Calls the target of `config[path]` with the node's values and `provided`; for a normalizer its factory.

    An ArgumentError of the target about one of the node's keys becomes a ConfigError naming the full key.
    """
    node = config[path]
    target = locate(path, node["_target_"])
    arguments = {key: value for key, value in node.items() if key not in (*_MARKS, *_SHOWN)}
    if path == "normalizer":
        from onlinenorm.training.roles import make_normalizer  # not above: wrong keys come before torch is loaded

        return functools.partial(make_normalizer, target, **arguments, **provided)
    try:
        with full_keys(config, path), _sentences(path, node["_target_"]):
            return target(**arguments, **provided)
    except ArgumentError as error:  # about a key that the file leaves to the class
        if error.key in provided:
            raise
        raise ConfigError(f"{path}.{error}") from error


def _sentences(path: str, target: str) -> contextlib.AbstractContextManager:
    return own_errors(path, target, "could not be built") if path in OWN else contextlib.nullcontext()


@contextlib.contextmanager
def full_keys(config: Mapping[str, Any], *paths: str) -> Iterator[None]:
    """Context in which an error about a key of a node `config[path]` ("eps: ...") names it in full ("path.eps: ...").

    An ArgumentError becomes a ConfigError: the value cannot be meant. A DataError stays one: the data failed. The first
    of `paths` whose node has the key is named.
    """
    try:
        yield
    except (ArgumentError, DataError) as error:
        for path in paths:
            if error.key in config[path]:
                if isinstance(error, ArgumentError):
                    raise ConfigError(f"{path}.{error}") from error
                raise type(error)(f"{path}.{error}") from error
        raise


def made_by(target: Any) -> Any:
    """The class of what a class or function makes; of a function as its annotation says, or None."""
    return target if inspect.isclass(target) else _hints(target).get("return")


def _check_node(path: str, node: dict[str, Any]) -> None:
    target = locate(path, node["_target_"])
    parameters = inspect.signature(target).parameters
    if path == "normalizer":
        _check_normalizer(node, parameters)
    else:
        _check_called(path, node, parameters)
    hints = _hints(target)
    provided = PROVIDED.get(path, ())
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for key, value in node.items():
        if key in _MARKS or (key in _SHOWN and path == "normalizer"):
            continue
        if key in provided or (key not in parameters and (str(key).startswith("_") or not takes_all)):
            options = [p for p in parameters if p not in provided]
            options += _SHOWN if path == "normalizer" and str(key).startswith("_") else ()
            raise unknown_key(f"{path}.{key}", [f"{path}.{option}" for option in options])
        if any(targets(value)):
            raise ConfigError(f"{path}.{key}: a node within a node would be built once and shared; use plain values")
        if key in hints and not (value == AUTO and f"{path}.{key}" in AUTO_KEYS):
            _check_type(f"{path}.{key}", value, hints[key])
    for key, parameter in parameters.items():
        plain = parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if plain and parameter.default is parameter.empty and key not in node and key not in provided:
            raise ConfigError(f"{path}.{key}: is missing; {node['_target_']} needs it: set {path}.{key}=VALUE")


def _check_normalizer(node: dict[str, Any], parameters: Mapping[str, inspect.Parameter]) -> None:
    name = node["_target_"]
    if node.get("_partial_") is not True:
        raise ConfigError(
            f"normalizer._partial_: is missing beside _target_: {name}; add the line '_partial_: true': the network "
            "builds the layers, each with its own num_features"
        )
    for key, (fits, words) in _SHOWN.items():
        if key in node and not fits(node[key]):
            raise ConfigError(f"normalizer.{key}: {node[key]!r} is not {words}; leave it out for the row's own")
    if not _takes("num_features", parameters):
        raise ConfigError(
            f"normalizer._target_: {name} takes no num_features, the argument that says how many channels a layer has "
            f"(it takes {', '.join(parameters) or 'nothing'}); name a function that does and calls {name}"
        )


def _check_called(path: str, node: dict[str, Any], parameters: Mapping[str, inspect.Parameter]) -> None:
    """Raises ConfigError for a node that is not called once, with all that train.py hands to its target."""
    if node.get("_partial_", False) is not False:
        raise ConfigError(f"{path}._partial_: is for normalizers, of which a network builds many; leave it out")
    for key in PROVIDED[path]:
        if not _takes(key, parameters):
            raise ConfigError(
                f"{path}._target_: {node['_target_']} takes no {key}; train.py calls it with "
                f"{', '.join(PROVIDED[path])}, and it must take each (it takes {', '.join(parameters) or 'nothing'})"
            )


def _takes(key: str, parameters: Mapping[str, inspect.Parameter]) -> bool:
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return (key in parameters and parameters[key].kind in by_name) or any(
        parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()
    )


def _hints(target: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(_function_of(target))
    except (
        NameError,
        TypeError,
        AttributeError,
    ):  # names that are there for type checkers only
        return {}


def _function_of(target: Any) -> Any:
    while isinstance(target, functools.partial):
        target = target.func
    return target.__init__ if inspect.isclass(target) else target


_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list: "a list",
    dict: "a mapping",
}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of the annotated kind; annotations beyond plain values accept anything."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin in (list, tuple) or hint in (list, tuple):
        kind = arguments[0] if arguments else Any
        return isinstance(value, list | tuple) and all(_fits(item, kind) for item in value)
    if hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str)
    return True


def _describe(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(part) for part in arguments)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (list, tuple):
        if not arguments:
            return "a list"
        each = _describe(arguments[0])
        any_of = typing.get_origin(arguments[0]) is typing.Literal
        return f"a list of any {each.removeprefix('one ')}" if any_of else f"a list of {each.removeprefix('a ')}s"
    return "null" if hint is type(None) else _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def _check_type(key: str, value: Any, hint: Any) -> None:
    if not _fits(value, hint):
        near = nearest(str(value), map(str, typing.get_args(hint))) if typing.get_origin(hint) is typing.Literal else ""
        kind = _describe(hint) + f" or {AUTO}" * (key in AUTO_KEYS)
        shown = "null" if value is None else repr(value)
        raise ConfigError(f"{key}: {shown} is not {kind}" + (f"; did you mean {near}?" if near else ""))
