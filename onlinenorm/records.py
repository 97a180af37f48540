"""The records of a run folder: where it lies, what they are called and what each holds, read without trust."""

import csv
import io
import json
import math
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, Self

import yaml

from onlinenorm.errors import Diverged, RunError
from onlinenorm.files import open_regular
from onlinenorm.scales import LABEL, is_label
from onlinenorm.text import first_line

CONFIG, ENVIRONMENT = "config.yaml", "environment.json"
METRICS, CLAMPING = "metrics.csv", "clamping.csv"
FAILURE, FAILURE_TEXT = "failed.json", "failed.txt"  # for programs, and for people
ATTEMPTS = "attempts"

# Keys of a configuration that runs of older versions lack, and how those trained, or what gives the same values.
ADDED: dict[str, dict[str, Any]] = {
    "recipe": {
        "warmup_epochs": 0, "warmup_lr": 0.0, "label_smoothing": 0.0, "clamp_raise_epochs": 0, "clamp_off_epochs": 0,
        "removal_every_epoch": False, "reestimate_images": 0,
    },
    "model": {"compile": False, "stem": "auto", "fuse_max_pool": True, "fuse_shortcut": True},
    "trainer": {"cuda_graph": False, "disabled_optimizations": []},
    "data": {"decoder": "pillow", "val_decoder": "pillow", "device_fraction": 1.0},
}  # fmt: skip

_DIVERGED = re.compile(r"became NaN or infinite at step (\d+)(?: \(epoch (\d+))?")


def run_path(config: dict[str, Any], runs: str | Path = "runs", between: Iterable[str] = ()) -> Path:
    """The folder of the run of a configuration: its `run_dir`, else RUNS/EXPERIMENT/[BETWEEN/]NORMALIZER/seedK."""
    names = config["choices"]
    if config["run_dir"]:
        return Path(str(config["run_dir"])).expanduser()  # 2026 is a number to YAML
    return Path(runs, names["experiment"], *between, names["normalizer"], f"seed{config['seed']}")


def with_added_keys(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration of any version with the keys of `ADDED`."""
    nodes = {key: added | config[key] for key, added in ADDED.items() if isinstance(config.get(key), dict)}
    return config | nodes


@dataclass(frozen=True)
class Failure:
    """What ended a run: that a loss or the network stopped being finite, or any other error.

    Args:
        kind: "diverged" or "failed".
        step, epoch: where it was seen, from 1; None where that is not known.
        message: for people.
    """

    kind: Literal["diverged", "failed"]
    step: int | None = None
    epoch: int | None = None
    message: str = ""

    @classmethod
    def of(cls, error: Exception) -> Self:
        """The record of an error that ended a run."""
        if isinstance(error, Diverged):
            return cls("diverged", error.step, error.epoch, first_line(error))
        return cls("failed", message=first_line(error))

    @classmethod
    def from_text(cls, text: str) -> Self:
        """That of a failed.txt: what runs left from before failed.json, and the last output of one that was killed."""
        message = (text.splitlines() or [""])[-1]
        if found := _DIVERGED.search(text):
            return cls("diverged", int(found[1]), int(found[2]) if found[2] else None, message)
        return cls("failed", message=message)


def read_failure(folder: Path, error: type[Exception] = RunError) -> Failure | None:
    """What ended the run of a folder, or None where nothing has. Raises `error` where it is damaged."""
    if (folder / FAILURE).exists():
        record = read_record(folder / FAILURE, error)
        return Failure(record["kind"], record.get("step"), record.get("epoch"), record.get("message", ""))
    if (folder / FAILURE_TEXT).exists():
        return Failure.from_text((folder / FAILURE_TEXT).read_text(encoding="utf-8", errors="replace"))
    return None


_AGAIN = "delete it{}, and the same command writes it again from the last checkpoint"
CURES = {
    "config.yaml": "nobody can tell whose checkpoints and figures lie beside it: put it back, or delete the folder to "
    "start over",
    "environment.json": "delete it, and the same command goes on without what it told of former starts",
    "failed.json": "delete it, and failed.txt beside it counts",
    "results.json": _AGAIN.format(""),
    "metrics.csv": _AGAIN.format(" and results.json"),
    "predictions.npz": _AGAIN.format(" and results.json"),
}
_ATTEMPT = {"folder": str, "epochs": int, "failure": (str, type(None))}
_WORDS = {dict: "a mapping", list: "a list", str: "a text", int: "a whole number", float: "a number"}
_DEEPEST = 100
_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_LARGEST = sys.float_info.max
SHAPES: dict[str, Any] = {
    "environment.json": {
        "starts?": [dict],
        "own_code?": {str: {str: str}},
        "statistics?": {str: int},
        "git?": dict,
        "versions?": {str: str},
        "world_size?": int,
    },
    "config.yaml": {"choices?": {str: (str, type(None))}},
    "failed.json": {"kind": str, "step?": (int, type(None)), "epoch?": (int, type(None)), "message?": str},
}


def read_record(path: Path, error: type[Exception] = RunError, shape: Any = None, cure: str = "") -> dict[str, Any]:
    """The mapping that a .json or .yaml file holds.

    Args:
        path: of the file.
        error: what to raise where it is missing or damaged, or holds something else than it should.
        shape: what it should hold (`misfit`); None for a record of a run folder, known by its name.
        cure: what to do then; likewise.
    """
    cure = cure or CURES.get(path.name, "put a whole one there")
    try:
        with open_regular(path) as file:
            text = file.read().decode()
        content = parse_yaml(text) if path.suffix == ".yaml" else json.loads(text)
        if not isinstance(content, dict):
            raise ValueError(f"it holds {'nothing' if content is None else 'no mapping'}")
        if problem := misfit(content, SHAPES.get(path.name, {}) if shape is None else shape):
            raise ValueError(problem)
        if path.name == "results.json":
            check_results(content)
        if path.name == FAILURE and content["kind"] not in ("diverged", "failed"):
            raise ValueError(f"kind is {content['kind']!r}")
    except FileNotFoundError:
        raise error(f"{path}: is missing; {cure}") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as cause:  # RecursionError: 100,000 brackets
        raise damaged(path, cause, error, cure) from None
    return content


def parse_yaml(text: str) -> Any:
    """The plain content of a YAML file. Raises ValueError or yaml.YAMLError where it is none."""
    depth = 0
    for event in yaml.parse(text, Loader=_YAML):  # libyaml's loader recurses, and overflows the stack of the process
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise ValueError(f"it is nested more than {_DEEPEST} deep")
    return yaml.load(text, Loader=_YAML)


def read_rows(path: Path, error: type[Exception] = RunError) -> list[dict[str, float]]:
    """The rows of a metrics.csv, without empty fields; [] where there is no file. Raises `error` if it is damaged."""
    try:
        with io.TextIOWrapper(open_regular(path), newline="", encoding="utf-8") as file:
            return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, csv.Error) as cause:  # TypeError: more fields than columns
        raise damaged(path, cause, error) from None


def damaged(path: Path, cause: Exception, error: type[Exception], cure: str = "") -> Exception:
    """The `error` for a file that `cause` keeps from being read; `cure` as in `read_record`."""
    cure = cure or CURES.get(path.name, "put a whole one there")
    return error(f"{path}: is damaged ({' '.join(str(cause).split())}); {cure}")


def misfit(value: Any, shape: Any, key: str = "") -> str:
    """What in a tree of plain values is not of a shape, by its dotted key; "" where all is.

    Args:
        value: the tree.
        shape: of a leaf its type, or several; [shape] of a list; {str: shape} of a mapping; {"key": shape} of one with
            these keys, those that end in ? may be missing, and others are not looked at.
        key: of `value`.
    """
    kinds = shape if isinstance(shape, tuple) else (shape if isinstance(shape, type) else type(shape),)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        shown = repr(value) if len(repr(value)) < 80 else f"{repr(value)[:80]}..."
        words = " or ".join(_WORDS.get(kind, "null") for kind in kinds)
        return f"{key or 'it'} is {shown}, not {words}"
    parts: list[tuple[Any, Any, Any]] = []
    if isinstance(shape, list):
        parts = [(index, item, shape[0]) for index, item in enumerate(value)]
    elif isinstance(shape, dict):
        for name, inner in shape.items():
            if name is str:
                parts += [(each, item, inner) for each, item in value.items()]
            elif (bare := name.removesuffix("?")) in value:
                parts.append((bare, value[bare], inner))
            elif bare == name:
                return f"{key}.{name} is missing".lstrip(".")
    return next(filter(None, (misfit(item, inner, f"{key}.{name}".lstrip(".")) for name, item, inner in parts)), "")


def lookup(tree: dict[str, Any], dotted: str, default: Any = None) -> Any:
    """tree["a"]["b"] for "a.b", or `default` where a part is missing."""
    for part in dotted.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return default
        tree = tree[part]
    return tree


def check_results(results: dict[str, Any]) -> None:
    """Raises ValueError for a figure of results.json of another type, or out of its range."""

    def fail(key: str, problem: str) -> NoReturn:
        raise ValueError(f"{key} {problem}")

    def number(key: str, low: float, high: float, kind: type | tuple = (int, float)) -> None:
        value = lookup(results, key)
        of_kind = isinstance(value, kind) and not isinstance(value, bool)
        if value is None:
            fail(key, "is missing")
        if not of_kind or not -math.inf < value < math.inf:
            fail(key, f"is {value!r}, not a finite {'whole ' if kind is int else ''}number")
        if not low <= value <= min(high, _LARGEST):  # an int of 400 digits is finite, and no float
            fail(
                key, f"is {value!r}, outside [{low}, {high}]" + (" (accuracies are fractions)" if "top" in key else "")
            )

    def tried(key: str) -> None:  # null: of a network that is not finite without its clamp, or on other statistics
        if lookup(results, key, math.nan) is not None:
            number(key, 0, math.inf)

    if results.get("schema") != 1:
        fail("schema", f"is {results.get('schema')!r}; this version reads schema 1")
    for key in ("experiment", "normalizer", "dataset.name"):
        if not isinstance(lookup(results, key), str):
            fail(key, "is missing or not a text")
    if not is_label(results.get("scale")):
        fail("scale", f"is {results.get('scale')!r}; it must be {LABEL}")
    for key in ("seed", "dataset.train_images", "dataset.val_images"):
        number(key, 0, math.inf, int)
    for key in ("epochs", "last.epoch", "best_loss.epoch", "best_top1.epoch"):
        number(key, 1, math.inf, int)
    for key in ("last.val_loss", "best_loss.val_loss"):
        number(key, 0, math.inf)
    for key in ("last.val_top1", "best_top1.val_top1"):
        number(key, 0, 1)
    kinds = {"attempts?": [_ATTEMPT], "exchange?": (dict, type(None)), "parameters_sha256?": str}
    if problem := misfit(results, kinds):
        raise ValueError(problem)
    if results.get("reestimated") is not None:
        number("reestimated.images", 1, math.inf, int)
        tried("reestimated.val_loss")
        number("reestimated.val_top1", 0, 1)
        number("reestimated.changed_predictions", 0, results["dataset"]["val_images"], int)
    if results.get("clamping") is not None:
        for side in ("with", "without"):
            tried(f"clamping.{side}.val_loss")
            number(f"clamping.{side}.val_top1", 0, 1)
        number("clamping.layers", 0, math.inf, int)
        number("clamping.changed_predictions", 0, results["dataset"]["val_images"], int)
        number("clamping.clamp_value", 0, math.inf)
        number("clamping.clamped_fraction", 0, 1)
        tried("clamping.max_abs_activation")
