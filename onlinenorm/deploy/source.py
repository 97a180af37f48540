"""A trained network from its run folder, of which nothing is trusted: what is named is checked before it is built."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onlinenorm import data
from onlinenorm.errors import ConfigError, DeployError, RunError
from onlinenorm.normalizers import OnlineNorm
from onlinenorm.records import read_record
from onlinenorm.text import first_line
from onlinenorm.training import targets
from onlinenorm.training.checkpoint import LAST, PREVIOUS, read
from onlinenorm.training.clamping import ClampSchedule
from onlinenorm.training.config_check import build, check_config, made_by
from onlinenorm.training.final_validation import parameters_sha256
from onlinenorm.training.recipe import Recipe, clamp_factor
from onlinenorm.training.targets import NAMED, OWN


@dataclass
class Trained:
    """A network in eval mode on the CPU, its clamps as in the epoch of its weights, and what is known about it.

    `results` is None where the run has not finished or `checkpoint` holds other weights than it ended with; `top1` is
    the accuracy that the checkpoint itself records, if any; `clamp_off` "recipe.clamp_off_epochs=N" where that took
    away its clamps, else "".
    """

    folder: Path
    checkpoint: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    results: dict[str, Any] | None
    network: nn.Module
    recipe: Recipe
    data: data.ImageDataModule
    num_classes: int
    in_channels: int
    top1: float | None = None
    clamp_off: str = ""

    @property
    def model_name(self) -> str:
        return f"{self.builder}{self.config['model'].get('depth', '')}"

    @property
    def guard(self) -> str:
        """What its OnlineNorm layers do against large activations: "clamp", "layer_scaling", "none"; "" without any."""
        kinds = {m.error_compensation for m in self.network.modules() if isinstance(m, OnlineNorm)}
        return min(kinds, key=("layer_scaling", "clamp", "none").index) if kinds else ""

    @property
    def builder(self) -> str:
        """Name of the function or class that builds the network."""
        return self.config["model"]["_target_"].rpartition(".")[2]

    def own(self, group: str) -> str:
        """What a node, "model" or "normalizer", names in full where it is not in our list, else ""."""
        target = self.config[group]["_target_"]
        return "" if target in NAMED[group] else target

    @property
    def arguments(self) -> dict[str, Any]:
        """What `builder` takes besides the normalizer; plain values."""
        skipped = ("_target_", "_partial_", "compile", "zero_init_last_gamma")
        node = {key: value for key, value in self.config["model"].items() if key not in skipped}
        return node | {"num_classes": self.num_classes, "in_channels": self.in_channels}

    def build_network(self, normalizer) -> nn.Module:
        """A network like this one, untrained, with another normalizer (a callable num_features -> nn.Module)."""
        node = {"_target_": self.config["model"]["_target_"], **self.arguments}
        return build({"model": node}, "model", normalizer=normalizer)


def load_trained(
    path: str | Path,
    data_root: str | None = None,
    evaluation: str | None = None,
    allowed: Collection[str] = (),
) -> Trained:
    """The network of a run folder (its last weights) or of a checkpoint file inside one.

    Weights are read as tensors and plain values only (weights_only), the configuration as plain YAML; nothing outside
    the run folder is read, and only networks, normalizers, data and recipes of this package (and torch.nn's norms) are
    built, and of other packages what `allowed` names. The dataset is not opened.

    Args:
        path: run folder, or a .ckpt file in it or in its checkpoints/.
        data_root: where the dataset lies on this machine; None as in the run's configuration.
        evaluation: view of validation images, "center_crop" or "ten_crop"; None as in the run's recipe.
        allowed: names in full of normalizers, networks and data sets of the user's own package, as the run's
            configuration has them. Building them runs code of that package.

    Raises DeployError for anything missing, damaged, foreign or outside, DataError for the dataset where it is asked.
    """
    folder, checkpoint = locate(Path(path))
    config = _read_config(folder, allowed)
    try:
        check_config(config)
        recipe = build(config, "recipe")
    except (ConfigError, RunError, ValueError) as error:
        raise DeployError(f"{folder / 'config.yaml'}: {error}") from error
    state, content = _read_state(checkpoint)
    node = {**config["data"], "num_workers": None if config["data"].get("num_workers") else 0}
    if "on_device" in node:
        node["on_device"] = False  # images come one batch at a time, to where the network is then
    if data_root is not None:
        node["root"] = data_root
    try:
        images = build({"data": node}, "data", batch_size=recipe.batch_size, seed=config["seed"], augmentation="none",
                     evaluation=evaluation or recipe.evaluation)  # fmt: skip
        classes, channels = _sizes(config, state, images, checkpoint)
        normalizer = build(config, "normalizer")
        trained = Trained(folder, checkpoint, config, _read_json(folder, "environment.json"), None, nn.Identity(),
                          recipe, images, classes, channels)  # fmt: skip
        trained.network = trained.build_network(normalizer)
    except data.DataError:  # at their place, not in the file
        raise
    except (ConfigError, RunError, ValueError) as error:
        raise DeployError(f"{folder / 'config.yaml'}: {error}") from error
    _load(trained.network, state, checkpoint)
    clamps = ClampSchedule(trained.network, recipe)
    if clamps.set(clamp_factor(recipe, _epoch(content, recipe.epochs))) and clamps.clamp_value is None:
        trained.clamp_off = f"recipe.clamp_off_epochs={recipe.clamp_off_epochs}"
    results = _read_json(folder, "results.json")
    if results.get("parameters_sha256") == parameters_sha256(trained.network):
        trained.results = results
    top1 = content.get("val_top1")
    trained.top1 = float(top1) if isinstance(top1, float) else None
    for layer in trained.network.modules():
        if isinstance(layer, OnlineNorm):
            layer.backend = "auto"  # the run's may need a GPU that is not here
    trained.network.eval().requires_grad_(False)
    return trained


def _sizes(
    config: dict[str, Any], state: dict[str, Tensor], images: data.ImageDataModule, checkpoint: Path
) -> tuple[int, int]:
    """(classes, input channels): by the weights where the network's class reads them (``sizes``), else by the data."""
    target = config["model"]["_target_"]
    if (sizes := getattr(made_by(targets.locate("model", target)), "sizes", None)) is None:
        try:
            return images.num_classes, images.in_channels
        except data.DataError as error:
            raise elsewhere(error) from error
    try:
        classes, channels = sizes(state)
    except (KeyError, IndexError) as error:
        raise DeployError(f"{checkpoint}: holds no network of {target} ({type(error).__name__}: {error})") from error
    return classes, channels


def elsewhere(error: data.DataError) -> data.DataError:
    """An error of the run's data, with what tells a script where else they are."""
    return data.DataError(f"{first_line(error)} (--data-root names another place)")


def locate(path: Path) -> tuple[Path, Path]:
    """(run folder, checkpoint file) of either; both resolved, and the one inside the other."""
    if not path.exists():
        raise DeployError(f"{path}: does not exist; name a run folder such as runs/quickstart/online_clamp/seed0")
    if path.is_dir():
        folder, checkpoint = path, path / "checkpoints" / LAST
        if not (folder / "config.yaml").is_file():
            raise DeployError(
                f"{path}: is not a run folder (no config.yaml in it); name one like runs/NAME/NORMALIZER/seed0"
            )
        if not checkpoint.exists():
            raise DeployError(f"{checkpoint}: does not exist; the run has saved no weights yet")
    else:
        checkpoint = path
        above = [folder for folder in path.absolute().parents[:2] if (folder / "config.yaml").is_file()]
        if not above:
            raise DeployError(f"{path}: lies in no run folder (no config.yaml beside it or one folder up)")
        folder = above[0]
    inside(folder, checkpoint)
    return folder.resolve(), checkpoint.resolve()


def inside(folder: Path, file: Path) -> Path:
    """`file` resolved; DeployError if that is outside `folder`, as through a symbolic link."""
    resolved = file.resolve()
    if not resolved.is_relative_to(folder.resolve()):
        raise DeployError(f"{file}: leads outside the run folder, to {resolved}; refused")
    return resolved


def _read_config(folder: Path, allowed: Collection[str]) -> dict[str, Any]:
    path = inside(folder, folder / "config.yaml")
    config = read_record(path, DeployError)
    for key, target in targets.targets(config):
        # before anything is imported
        group = key.partition(".")[0]
        if target in NAMED.get(group, ()) or (group in OWN and target in allowed):
            continue
        way = f"; --allow {target} builds it, which runs code of its package" if group in OWN else ""
        raise DeployError(
            f"{path}: {key}: {target!r} is foreign and is refused; there are {', '.join(NAMED.get(group, ()))}{way}"
        )
    return config


def _read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(the network's state, the whole content) of last.ckpt, previous.ckpt or best.ckpt."""
    try:
        content = read(path)
    except RunError as error:
        previous = path.with_name(PREVIOUS)
        hint = f"; {previous} may be whole" if path.name == LAST and previous.exists() else ""
        raise DeployError(f"{error}{hint}") from error
    state = content
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        state = {key.removeprefix("network."): value for key, value in content["state_dict"].items()}
    elif isinstance(content, dict) and isinstance(content.get("network"), dict):
        state = content["network"]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise DeployError(f"{path}: holds no network (neither a training state nor a best.ckpt)")
    return state, content


def _epoch(content: dict[str, Any], epochs: int) -> int:
    """The epoch, from 1, whose weights a checkpoint holds; where it does not tell, the last."""
    if position := content.get("position"):  # of last.ckpt: epochs done, and steps of the next
        epoch = position["epoch"] + (position["step"] > 0)
    else:
        epoch = content.get("epoch", epochs)
    return min(max(epoch, 1), epochs)


def _load(network: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    try:
        network.load_state_dict(state, strict=True)
    except RuntimeError as error:
        detail = " ".join(str(error).split())
        raise DeployError(f"{path}: does not fit the network of config.yaml ({detail[:300]})") from error
    bad = [key for key, value in state.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if bad:
        raise DeployError(f"{path}: {bad[0]} (one of {len(bad)}) is not finite; the training diverged")


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = inside(folder, folder / name)
    return read_record(path, DeployError) if path.exists() else {}
