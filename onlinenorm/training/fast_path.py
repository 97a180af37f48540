"""What `auto` stands for where it chooses speed: model.compile, trainer.cuda_graph, data.decoder and data.on_device.

All are off on the CPU. On a GPU, by figures of ResNet-50 at 224 px in bfloat16 with SGD on an H100 (training steps of
commit baa1591, before the stem had kernels of its own; loaders of results/bench_data.json):

- model.compile: on where each process trains on at least two million images of 224 px, or as many pixels of others.
  Compiled and captured, an image takes 11 us less with OnlineNorm and 72 us less with BatchNorm than captured alone in
  batches of 256 (7,121 against 6,582 and 5,747 against 4,058 images/s), 14 and 76 us in batches of 32: two million save
  23 to 152 s. Compiling training and validation takes about a minute, which is judged and was not measured.
- trainer.cuda_graph: on from a hundred steps. A step of 32 images takes 7 ms in place of 28, one of 256 1.5 % less; the
  capture takes a few steps' time.
- data.on_device: on where the decoded set takes at most a quarter of the GPU's memory and half of what is free. Files
  are then decoded once, and by Pillow, whose pixels are the reference; so they are where there is no room just now.
- data.decoder: else nvjpeg, 7,045 images/s on 16 cores, where Pillow has 3,374 and torchvision 4,138; torchvision where
  the GPU does not decode.
- validation images are decoded by data.val_decoder whatever decodes the others, so that accuracies are of the same
  pixels; once a run, where a quarter of their device's free memory holds them (`data.kept_batches`): those of ImageNet
  take 7.5 GB.

Each is off where it is refused, or where nobody has seen it to be right: see the `_against_` functions. Of several
processes each chooses, and must choose as the others do: their layers exchange statistics in one order.
"""

import contextlib
import copy
import functools
import gc
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
import torch.distributed as dist

from onlinenorm.data import ImageDataModule
from onlinenorm.data.datasets import FolderDataset, InMemoryDataset
from onlinenorm.data.decoded import decoded_bytes, free_memory
from onlinenorm.data.nvjpeg_loader import gpu_decodes
from onlinenorm.errors import ConfigError, RunError
from onlinenorm.records import lookup
from onlinenorm.text import first_line
from onlinenorm.training.config_check import AUTO, AUTO_KEYS, build
from onlinenorm.training.launch import process_count
from onlinenorm.training.probe_data import BUILD
from onlinenorm.training.recipe import Recipe
from onlinenorm.training.targets import NAMED, own_errors

WORTH_COMPILING = 2_000_000  # images of 224 px
WORTH_CAPTURING = 100  # steps
SHARE_OF_MEMORY = 0.25
ANEW = ("data.on_device",)  # which leaves the pixels the same, and depends on the room that a machine has
OLDEST = (7, 0)  # compute capability that Inductor and Triton compile for
_COMPILERS = "torch._dynamo", "torch._inductor", "torch._functorch", "triton"


class Choice(NamedTuple):
    """What `choose` makes of a configuration.

    config: without "auto" among `AUTO_KEYS`. data: its data module, set up. reasons: key -> why it is off. fast: the
    keys that auto turned on.
    """

    config: dict[str, Any]
    data: ImageDataModule
    reasons: dict[str, str]
    fast: list[str]


def left_to_choose(config: dict[str, Any]) -> list[str]:
    """The keys that are "auto"."""
    return [key for key in AUTO_KEYS if lookup(config, key) == AUTO]


def with_values(config: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A copy of a configuration with other values at dotted keys of two parts."""
    config = copy.deepcopy(config)
    for key, value in values.items():
        group, _, leaf = key.partition(".")
        config[group][leaf] = value
    return config


def adopt(config: dict[str, Any], recorded: dict[str, Any] | None, anew: tuple[str, ...] = ()) -> dict[str, Any]:
    """The configuration with each "auto" as `recorded`, the one that a run was started with, has it; None: as it is.

    What is on there is left to each start where `anew` names it: another machine may have no room.
    """
    if recorded is None:
        return config
    values = {key: lookup(recorded, key, AUTO_KEYS[key]) for key in left_to_choose(config)}
    return with_values(config, {key: value for key, value in values.items() if not (value is True and key in anew)})


def check_compiles_here(config: dict[str, Any], folder: Path) -> None:
    """Raises ConfigError where the run in `folder` is compiled, and goes on compiled, and this machine cannot."""
    on_gpu = config["trainer"]["accelerator"] == "gpu"
    if on_gpu and lookup(config, "model.compile") is True and (problem := compiler_problem()):
        raise ConfigError(
            f"model.compile: the run in {folder} is compiled, and here {problem}; mend that, go on where it began, or "
            "start over in another run_dir="
        )


def make_data(config: dict[str, Any], recipe: Recipe) -> ImageDataModule:
    """The data module of a configuration without "auto", not set up."""
    transforms = {"augmentation": recipe.augmentation, "evaluation": recipe.evaluation}
    return build(config, "data", batch_size=recipe.batch_size, seed=config["seed"], **transforms)


def open_data(config: dict[str, Any], recipe: Recipe) -> ImageDataModule:
    """The same set up; raises DataError for images that are not there."""
    data = make_data(config, recipe)
    with own_errors("data", config["data"]["_target_"], "could not be opened", BUILD):
        data.prepare_data()
        data.setup("fit")
    return data


def choose(config: dict[str, Any], open_data: Callable[[dict[str, Any]], ImageDataModule]) -> Choice:
    """Chooses for each "auto"; explicit values stay.

    Args:
        config: its trainer resolved.
        open_data: configuration -> its data module, set up.
    """
    keys = left_to_choose(config)
    plain = with_values(config, {key: AUTO_KEYS[key] for key in keys})
    data = open_data(plain)
    if not keys or config["trainer"]["accelerator"] != "gpu":
        return Choice(plain, data, dict.fromkeys(keys, "on the CPU"), [])
    values: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    for key, against in (
        ("model.compile", _against_compiling),
        ("trainer.cuda_graph", _against_capturing),
        ("data.on_device", _against_keeping),
    ):
        if key in keys:
            reason = against(config, data)
            values[key] = not reason
            reasons |= {key: reason} if reason else {}
    if "data.decoder" in keys:
        values["data.decoder"] = _decoder(config, data)
    chosen = with_values(plain, values)
    fast = [key for key, value in values.items() if value is True]
    return Choice(chosen, data if chosen["data"] == plain["data"] else open_data(chosen), reasons, fast)


def culprit(error: BaseException, keys: list[str]) -> str | None:
    """The one of these keys, all on by choice, that an error before the first step is most likely due to, or None."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    if any(isinstance(each, torch.OutOfMemoryError) for each in chain):
        suspects = ["data.on_device", "trainer.cuda_graph"]
    elif any(type(each).__module__.startswith(_COMPILERS) for each in chain):
        suspects = ["model.compile"]
    elif any("captur" in str(each).lower() or "cuda graph" in str(each).lower() for each in chain):
        suspects = ["trainer.cuda_graph"]
    else:
        suspects = []
    return next((key for key in suspects if key in keys), None)


class FastPathFailed(Exception):
    """What was chosen for `key` failed before the first step; the run can start again without it."""

    def __init__(self, key: str, message: str):
        super().__init__(message)
        self.key = key


@contextlib.contextmanager
def naming_fast_path(choice: Choice, trainer: pl.Trainer) -> Iterator[None]:
    """Context of training: an error before a first step that is due to a choice becomes FastPathFailed.

    Of several processes each would go its own way, so that there it becomes a RunError that says what to choose.
    """
    try:
        yield
    except Exception as error:
        key = culprit(error, choice.fast) if trainer.global_step == 0 else None
        if key is None:
            raise
        value, instead = str(lookup(choice.config, key)).lower(), f"{key}={str(AUTO_KEYS[key]).lower()}"
        said = first_line(error)
        if said.endswith(":"):  # the compiler's errors name the cause in their second line
            said += f" {str(error).strip().splitlines()[1]}"
        failed = f"{key}: auto chose {value}, which failed before the first step ({said})"
        if trainer.world_size > 1:
            raise RunError(f"{failed}; start again with {instead}, for all processes alike") from error
        raise FastPathFailed(key, f"{failed}; the run goes on with {instead}") from error


def free_device() -> None:
    """Gives back what a run that failed held on its device, and forgets what was compiled for it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    forget_compiled()


def forget_compiled() -> None:
    """Drops what was compiled for a former run of this process, which counts against Dynamo's limit of versions."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def compiler_problem() -> str:
    """What keeps torch.compile from working on this machine's GPU, or ""."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.cuda.get_device_capability() < OLDEST:
        return f"{torch.cuda.get_device_name()} is older than Triton compiles for"
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("gcc", "clang", "cc"))), None)
    if compiler is None:
        return "there is no C compiler, which Triton needs (gcc, or CC)"
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        return "Python's headers are missing, which Triton needs (python3-dev)"
    return ""


def _against_both(config: dict[str, Any]) -> str:
    own = [group for group in ("normalizer", "model") if config[group]["_target_"] not in NAMED[group]]
    if own:  # it may do on the host what is then done once
        return f"its {' and '.join(own)} is code of your own"
    if torch.version.hip is not None:
        return "no NVIDIA GPU"
    if config["normalizer"].get("backend") == "reference":
        return "normalizer.backend=reference is a loop over samples"
    return ""


def _against_compiling(config: dict[str, Any], data: ImageDataModule) -> str:
    if reason := _against_both(config):
        return reason
    if config["trainer"].get("deterministic"):
        return "trainer.deterministic=true, and it picks kernels by their time"
    if config["normalizer"].get("backend") == "torch":
        return "normalizer.backend=torch takes minutes to compile"
    if reason := compiler_problem():
        return reason
    if (machines := config["trainer"]["num_nodes"]) > 1:
        return f"{machines} machines, of which one may lack a compiler"
    processes = config["trainer"]["devices"]
    images = config["recipe"]["epochs"] * data.train_images // processes
    if images * (data.image_size / 224) ** 2 < WORTH_COMPILING:
        each = " a process" if processes > 1 else ""
        return f"{images:,} images of {data.image_size} px{each} would not pay for it"
    return ""


def _against_capturing(config: dict[str, Any], data: ImageDataModule) -> str:
    if reason := _against_both(config):
        return reason
    if (machines := config["trainer"]["num_nodes"]) > 1:
        return f"{machines} machines, on which it has not been tried"
    backend = os.environ.get("PL_TORCH_DISTRIBUTED_BACKEND", "nccl")  # which Lightning asks for
    if config["trainer"]["devices"] > 1 and not (dist.is_nccl_available() and backend == "nccl"):
        return "several processes without NCCL, whose collectives alone can be captured"
    steps = config["recipe"]["epochs"] * (data.train_images // config["recipe"]["batch_size"])
    return f"{steps:,} steps would not pay for it" if steps < WORTH_CAPTURING else ""


def _against_keeping(config: dict[str, Any], data: ImageDataModule) -> str:
    if reason := _too_large(data):
        return reason
    alone = process_count(config["trainer"]) == 1  # several must choose alike
    needed, free = _decoded_bytes(data), (free_memory(_device()) or 0) if alone else None
    if free is not None and needed > free / 2:
        return f"{needed / 1e9:,.1f} GB decoded, and the GPU has {free / 1e9:,.1f} GB free"
    return ""


def _too_large(data: ImageDataModule) -> str:
    """Why a set is not one for a GPU's memory, whoever uses that now."""
    if not all(isinstance(dataset, InMemoryDataset | FolderDataset) for dataset in data._sets):
        return "a set of your own"
    room = SHARE_OF_MEMORY * torch.cuda.get_device_properties(_device()).total_memory
    folders = [dataset for dataset in data._sets if isinstance(dataset, FolderDataset)]
    files = sum(int(dataset.index.sizes.clip(0).sum()) for dataset in folders)
    if files > room or _decoded_bytes(data) > room:  # decoded they are larger
        return f"the set is larger than {SHARE_OF_MEMORY:.0%} of the GPU's {room / SHARE_OF_MEMORY / 1e9:,.0f} GB"
    return ""


@functools.lru_cache(maxsize=1)
def _decoded_bytes(data: ImageDataModule) -> float:
    return decoded_bytes(data._sets)  # which reads many files


def _decoder(config: dict[str, Any], data: ImageDataModule) -> str:
    files = all(isinstance(dataset, FolderDataset) for dataset in data._sets)
    if not files or config["data"]["_target_"] not in NAMED["data"]:
        return AUTO_KEYS["data.decoder"]
    kept = lookup(config, "data.on_device")
    if kept is True or (
        kept == AUTO and not _too_large(data)
    ):  # the same pixels in all runs, also with little room now
        return AUTO_KEYS["data.decoder"]
    return "nvjpeg" if gpu_decodes(_device()) else "torchvision"


def _device() -> torch.device:
    """The GPU that this process will train on."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0))
