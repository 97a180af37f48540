"""What a wrong key or choice was most likely meant to be."""

import difflib
from collections.abc import Iterable, Mapping

from onlinenorm.errors import ConfigError

# What train.py hands to a node itself, so that a config cannot set it.
PROVIDED = {
    "normalizer": ("num_features",),
    "model": ("normalizer", "num_classes", "in_channels"),
    "data": ("batch_size", "seed", "augmentation", "evaluation"),
    "logger": ("folder", "name", "config", "resumed_step"),
    "recipe": (),
    "classifier": ("network", "recipe"),
    "trainer": ("max_epochs", "folder", "epoch_log", "stop", "loggers"),
}
# What other programs call a key of ours.
SYNONYMS = {
    "arch": "model",
    "bs": "batch_size",
    "dataset": "data",
    "gpus": "devices",
    "learning_rate": "lr",
    "max_epochs": "epochs",
    "network": "model",
    "norm": "normalizer",
    "num_epochs": "epochs",
    "optim": "optimizer",
    "output": "run_dir",
    "output_dir": "run_dir",
    "path": "root",
    "warmup": "warmup_epochs",
    "wd": "weight_decay",
    "workers": "num_workers",
}
_OPTIMIZER = "the optimizer is SGD with momentum, of recipe.lr, recipe.momentum and recipe.weight_decay"


def nearest(word: str, options: Iterable[str]) -> str:
    """The option that `word` was most likely meant to be, or "".

    Last parts of dotted names are compared first. A word that is part of an option, or has one in it, is nearer than
    one that is spelt alike: resnet20 is cifar_resnet20 rather than resnet50.
    """
    leaf = word.rpartition(".")[2]

    def likeness(option: str) -> tuple[bool, float, float]:
        end = option.rpartition(".")[2]
        shorter, longer = sorted((leaf, end), key=len)
        ratio = difflib.SequenceMatcher(None, leaf, end).ratio()
        return len(shorter) > 3 and shorter in longer, ratio, difflib.SequenceMatcher(None, word, option).ratio()

    scored = [(*likeness(option), option) for option in options]
    contained, alike, _, best = max(scored, default=(False, 0.0, 0.0, ""))
    return best if contained or alike >= 0.6 else ""


def unknown_key(key: str, options: Iterable[str], elsewhere: Mapping[str, list[str]] | None = None) -> ConfigError:
    """The error for a key that does not exist, with what it was meant to be.

    Args:
        key: dotted.
        options: the keys that exist.
        elsewhere: key -> the choices of its group that have it, as {"normalizer.clamp_value": ["online_clamp"]}.
    """
    options, (group, _, leaf) = sorted(options), key.rpartition(".")
    if leaf in PROVIDED.get(group, ()):
        return ConfigError(f"{key}: is set by train.py itself; leave it out")
    if choices := (elsewhere or {}).get(key):
        return ConfigError(
            f"{key}: no such key of the {group} chosen; it belongs to {', '.join(f'{group}={c}' for c in choices)}"
        )
    parts = [SYNONYMS.get(part, part) for part in key.split(".")]
    if "optimizer" in parts:
        return ConfigError(f"{key}: no such {'key' if group else 'group'}; {_OPTIMIZER}")
    beside = [option for option in options if option.rpartition(".")[0] == group]
    meant = ".".join(parts)
    same_leaf = [option for option in options if option.rpartition(".")[2] == parts[-1]]
    if meant in options:
        near = meant
    elif len(same_leaf) == 1:
        near = same_leaf[0]
    else:  # a hint stays within its group
        near = nearest(meant, beside if group and beside else options)
    if near:
        return ConfigError(f"{key}: no such key; did you mean {near}?")
    beside = beside or [option for option in options if "." not in option]
    return ConfigError(f"{key}: no such key; there are {', '.join(beside)}")


def unknown_option(group: str, name: object, options: Iterable[str]) -> ConfigError:
    """The error for a choice that its group does not have, with the nearest that it has, or all."""
    options = sorted(options)
    near = nearest(str(name), options)
    hint = f"did you mean {group}={near}?" if near else f"there are {', '.join(options)}"
    return ConfigError(f"{group}: {name!r} is not one of its options; {hint}")
