"""The Lightning trainer from a config node, and what "auto" stands for on this machine."""

import contextlib
import logging
import warnings
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.layer_sync import TorchSyncBatchNorm
from torch import nn

from onlinenorm.errors import ArgumentError, ConfigError
from onlinenorm.normalizers import check_synchronisable, synchronise_batch_norm
from onlinenorm.records import lookup
from onlinenorm.training.checkpoint import VerifiedIO
from onlinenorm.training.epoch_log import EpochLog
from onlinenorm.training.exchange import ExchangeNote
from onlinenorm.training.interruption import StopSignals
from onlinenorm.training.launch import check_alone, cluster_environment, launched, process_count
from onlinenorm.training.optimizations import Optimization, disable
from onlinenorm.training.precision import ScaledHalf
from onlinenorm.training.progress import RunProgress
from onlinenorm.training.rendezvous import MeetingDDPStrategy
from onlinenorm.training.run_folder import RunFolder
from onlinenorm.training.saving import Checkpoints

TORCHS_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
Precision = Literal["auto", "32-true", "64-true", "bf16-mixed", "16-mixed"]

_HARMLESS = (
    r".*does not have many workers",  # in-memory sets need none
    r".*The number of training batches .* is smaller than the logging interval",  # epochs have rows of their own
    r".*resuming from a checkpoint that ended before the epoch ended",  # the sampler starts at the right step
    r".*`srun` command is available",  # a run of one process on a login node
    r".*`broadcast_buffers` is deprecated",  # its successor is not in torch 2.11, and would sync rank-local buffers
    r".*GPU available but not used",  # trainer=cpu says so
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own call
    r"Detected call of `lr_scheduler.step\(\)` before",  # where a run continues with an epoch's validation
    r".*module\(s\) in eval mode at the start of training",  # where a validation was interrupted
)


def resolve(settings: dict[str, Any]) -> dict[str, Any]:
    """The trainer node with "auto" replaced by what this machine has, and names of a set in alphabetical order; of
    cuda_graph `fast_path` says what it is.

    Under torchrun and srun the numbers of processes and machines are those that have been started. Raises ConfigError
    where GPUs or CUDA graphs are asked for that cannot be had, or other processes than were started.
    """
    defaults = {"accelerator": "auto", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": "auto"}
    settings = {**defaults, **settings}
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if settings["accelerator"] == "auto":
        settings["accelerator"] = "gpu" if gpus else "cpu"
    on_gpu = settings["accelerator"] == "gpu"
    if on_gpu and not gpus:
        several = launched() is not None or settings["devices"] not in ("auto", 1)
        instead = "trainer=ddp trainer.accelerator=cpu trainer.precision=32-true" if several else "trainer=cpu"
        instead += " trainer.cuda_graph=false" if settings.get("cuda_graph") is True else ""
        raise ConfigError(
            "trainer.accelerator: a GPU is asked for and torch finds none (torch.cuda.is_available() is false); "
            f"use {instead}, or see that nvidia-smi works and torch is a CUDA build"
        )
    if (launch := launched()) is not None:
        if settings["devices"] not in ("auto", launch.devices) or settings["num_nodes"] not in (1, launch.num_nodes):
            raise ConfigError(
                f"trainer.devices: {settings['devices']} x {settings['num_nodes']} machine(s) asked for, {launch.name} "
                f"has started {launch.devices} x {launch.num_nodes}; use trainer=ddp without naming them"
            )
        settings |= {"devices": launch.devices, "num_nodes": launch.num_nodes}
    if settings.get("cuda_graph") is True and not on_gpu:
        raise ConfigError(
            "trainer.cuda_graph: CUDA graphs need an NVIDIA GPU, and this run is on the CPU; leave it at auto"
        )
    if settings["devices"] == "auto":
        settings["devices"] = gpus if on_gpu else 1
    if isinstance(settings["devices"], str) or settings["devices"] < 1:
        raise ConfigError(f"trainer.devices: {settings['devices']!r} is not a whole number of at least 1, or auto")
    if launch is None:
        check_alone(settings["devices"], settings["num_nodes"])
    if on_gpu and settings["devices"] > gpus:
        if launch is not None:
            raise ConfigError(
                f"trainer.devices: {launch.name} has started {launch.devices} processes on this machine, and this one "
                f"sees {gpus} GPU(s); let each see all of them (of SLURM: --gpus-per-node), or start {gpus}"
            )
        raise ConfigError(
            f"trainer.devices: {settings['devices']} asked for, this machine has {gpus} GPU(s); use auto for all"
        )
    if settings["precision"] == "auto":
        settings["precision"] = "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported() else "32-true"
    if settings["strategy"] == "auto" and process_count(settings) > 1:
        settings["strategy"] = "ddp"
    if "disabled_optimizations" in settings:  # a set of names
        settings["disabled_optimizations"] = sorted(set(settings["disabled_optimizations"]))
    return settings


def resolve_in(folder: RunFolder, settings: dict[str, Any]) -> dict[str, Any]:
    """`resolve` for a run in `folder`: of a finished one, which computes nothing, "auto" is what it had.

    Raises ConfigError also where the run was started on a GPU, is not finished, and there is none here.
    """
    here = resolve(settings)
    recorded = lookup(folder.recorded_config() or {}, "trainer", {})
    moved = here["accelerator"] == "cpu" and recorded.get("accelerator") == "gpu"
    if not moved or settings.get("accelerator", "auto") != "auto":
        return here
    if not (folder.path / "results.json").exists():
        raise ConfigError(
            f"run_dir: the run in {folder.path} was started on a GPU, and torch finds none here "
            "(torch.cuda.is_available() is false); continue it where there is one, or choose another run_dir="
        )
    auto = [key for key in ("accelerator", "devices", "strategy", "precision") if settings.get(key, "auto") == "auto"]
    return here | {key: recorded[key] for key in auto if key in recorded}


def build_trainer(
    max_epochs: int,
    folder: Path,
    epoch_log: EpochLog,
    stop: StopSignals,
    loggers: list[Logger],
    accelerator: Literal["auto", "cpu", "gpu"] = "auto",
    devices: int | Literal["auto"] = 1,
    num_nodes: int = 1,
    strategy: Literal["auto", "ddp"] = "auto",
    precision: Precision = "auto",
    accumulate_grad_batches: int = 1,
    sync_batchnorm: bool = False,
    deterministic: bool = False,
    cuda_graph: bool = False,
    disabled_optimizations: tuple[Optimization, ...] = (),
    log_every_n_steps: int = 50,
    checkpoint_every_n_steps: int | None = None,
) -> pl.Trainer:
    """The trainer of a run: its callbacks, verified checkpoints, and nothing of Lightning that would double ours.

    Args:
        max_epochs: epochs of the whole run.
        folder: the run folder; checkpoints go to `folder`/checkpoints.
        epoch_log, stop, loggers: what keeps the rows, handles signals, and mirrors the rows.
        accelerator, devices, num_nodes, strategy: processes and what they run on, after `resolve`.
        precision: of weights and arithmetic, in Lightning's words.
        accumulate_grad_batches: parts that a step's batch is cut into, at least 1.
        sync_batchnorm: BatchNorm takes its statistics over all processes.
        deterministic: only kernels that give the same bits each time.
        cuda_graph: replay the network's training passes as CUDA graphs.
        disabled_optimizations: what steps on a GPU go without.
        log_every_n_steps: optimizer steps between looks at the loss.
        checkpoint_every_n_steps: optimizer steps between checkpoints within an epoch, or None.
    """
    for key, value in (
        ("num_nodes", num_nodes),
        ("accumulate_grad_batches", accumulate_grad_batches),
        ("log_every_n_steps", log_every_n_steps),
    ):
        if value < 1:
            raise ArgumentError(key, f"{value!r} must be at least 1")
    if accelerator == "gpu":
        disable(disabled_optimizations)
    plugins: list[Any] = [VerifiedIO(), cluster_environment()]
    if scaled := precision == "16-mixed":
        plugins.append(ScaledHalf("cuda" if accelerator == "gpu" else "cpu"))
    if sync_batchnorm and strategy == "ddp":
        plugins.append(SyncedBatchNorm(on_gpu=accelerator == "gpu"))
    # Buffers are not broadcast: OnlineNorm's are identical on all ranks, and rank 0's would overwrite local streams,
    # which are averaged where they are used instead.
    ddp: Any = strategy
    if strategy == "ddp":
        ddp = MeetingDDPStrategy(stop, broadcast_buffers=False, gradient_as_bucket_view=True)
    trainer = pl.Trainer(
        max_epochs=max_epochs,
        callbacks=[
            epoch_log,
            RunProgress(epoch_log),
            ExchangeNote(),
            Checkpoints(folder / "checkpoints", checkpoint_every_n_steps, stop),
            *([TrainingGraph()] if cuda_graph else []),
        ],
        logger=loggers or False,
        default_root_dir=folder,
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        strategy=ddp,
        precision=None if scaled or precision == "auto" else precision,
        accumulate_grad_batches=accumulate_grad_batches,
        deterministic=deterministic,
        benchmark=accelerator == "gpu" and not deterministic,
        log_every_n_steps=log_every_n_steps,
        plugins=plugins,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # Lightning's handlers would come before ours, again at each validation, and talk to the other processes from within
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]  # StopSignals does it
    return trainer


class TrainingGraph(pl.Callback):
    """Has a module's training steps captured."""

    def on_train_start(self, trainer, module) -> None:
        module.graph_steps()


class SyncedBatchNorm(TorchSyncBatchNorm):
    """Replaces torch's BatchNorm layers: by its own SyncBatchNorm, or on the CPU, which that refuses, by ours."""

    def __init__(self, on_gpu: bool):
        self.on_gpu = on_gpu

    def apply(self, model):
        try:
            if not self.on_gpu:
                return synchronise_batch_norm(model)
            check_synchronisable(model, TORCHS_BATCH_NORMS)
        except ValueError as error:
            raise ConfigError(f"trainer.sync_batchnorm: {error}; leave it false, or use normalizer=batch") from error
        return super().apply(model)

    def revert(self, model):
        return super().revert(model) if self.on_gpu else model  # in eval mode ours are ordinary ones


@contextlib.contextmanager
def quiet_lightning():
    """Context without Lightning's messages on its own inner workings and its warnings about what is meant here."""
    names = ("pytorch_lightning", "lightning_fabric", "lightning.pytorch")
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        for message in _HARMLESS:
            warnings.filterwarnings("ignore", message)
        for name in names:
            logging.getLogger(name).setLevel(logging.WARNING)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
