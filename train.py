"""Trains a network with a normalizer: python train.py experiment=table1 normalizer=batch seed=1"""

import os
import signal

if __name__ == "__main__":
    # until train() hears them: no traceback of imports, and the exit code that it would have
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda signum, _: os._exit(128 + signum))

import itertools
import sys
from pathlib import Path
from typing import Any

import hydra
import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from onlinenorm.data.workers import worker_deaths_told
from onlinenorm.training import finish, loggers
from onlinenorm.training.attempts import former_attempts
from onlinenorm.training.checkpoint import resumable
from onlinenorm.training.config_check import build, check_config, check_keys, check_option, flatten, prefixed
from onlinenorm.training.epoch_log import EpochLog
from onlinenorm.training.errors import ConfigError, told
from onlinenorm.training.interruption import StopSignals
from onlinenorm.training.launch import is_leader
from onlinenorm.training.run_folder import RunFolder
from onlinenorm.training.trainer import quiet_lightning, resolve

CONFIGS = Path(__file__).resolve().parent / "configs"
GROUPS = ("normalizer", "model", "data", "recipe", "trainer", "logger", "experiment")


def train(config: dict[str, Any]) -> dict[str, Any]:
    """Runs, continues or reprints the run of a configuration (plain values, of `load_config`); returns its results."""
    check_config(config)
    config = {**config, "trainer": resolve(config["trainer"])}
    path = Path("runs", config["choices"]["experiment"], config["choices"]["normalizer"], f"seed{config['seed']}")
    if config["run_dir"]:
        path = Path(str(config["run_dir"]))  # 2026 is a number to YAML
    folder = RunFolder(path, is_leader())
    with StopSignals(path) as stop:
        return _train(config, folder, stop)


def _train(config: dict[str, Any], folder: RunFolder, stop: StopSignals) -> dict[str, Any]:
    recipe = build(config, "recipe")
    normalizer = build(config, "normalizer")
    with prefixed("normalizer", config["normalizer"]):
        normalizer(num_features=64)  # a probe: a wrong value is found before data are looked for
    names, seed, path = config["choices"], config["seed"], folder.path
    if results := folder.results(config):
        if folder.leader:
            print(finish.summary(results, path))
        return results
    with prefixed("recipe", config["recipe"]), prefixed("data", config["data"]):
        views = {"augmentation": recipe.augmentation, "evaluation": recipe.evaluation}
        data = build(config, "data", batch_size=recipe.batch_size, seed=seed, **views)
        data.prepare_data()
        data.setup("fit")
    with folder.held(), quiet_lightning():
        checkpoint, position = resumable(folder.checkpoints, config, data.fingerprint)
        pl.seed_everything(seed, workers=False, verbose=False)  # before the network: all normalizers share its weights
        sizes = {"num_classes": data.num_classes, "in_channels": data.in_channels}
        with prefixed("normalizer", config["normalizer"]):
            network = build(config, "model", normalizer=normalizer, **sizes)
        module = build(config, "classifier", network=network, recipe=recipe)
        log = EpochLog(path / "metrics.csv")
        steps = position["global_step"] if position else None
        shown = {"name": "/".join(path.parts[-3:]), "config": flatten(config), "resumed_step": steps}
        mirrors = build(config, "logger", folder=path, **shown)
        parts = {"folder": path, "epoch_log": log, "stop": stop, "loggers": mirrors}
        trainer = build(config, "trainer", max_epochs=recipe.epochs, **parts)
        resumed = folder.record_start(config, trainer.world_size, position)
        with loggers.finishing(mirrors), worker_deaths_told():
            with (
                prefixed("normalizer", config["normalizer"]),
                prefixed("recipe", config["recipe"]),
                prefixed("data", config["data"]),
            ):
                trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
            clamping, arrays = finish.final_validation(trainer, module, data, log)
        results = finish.build_results(names, seed, module, data, log, resumed, clamping, former_attempts(path))
        if trainer.is_global_zero:
            finish.write_results(path, results, arrays)
            print(finish.summary(results, path))
        return results


def load_config(overrides: list[str]) -> dict[str, Any]:
    """The composed configuration as plain values, with the chosen file of each group under `choices`."""
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
        groups = [override for override in parsed if override.key_or_group in GROUPS and not override.is_delete()]
        for override in groups:
            group = override.key_or_group
            check_option(group, override.value(), [file.stem for file in (CONFIGS / group).glob("*.yaml")])
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            base = _compose([override.input_line for override in groups])
            keys = [override.key_or_group for override in parsed if not override.key_or_group.startswith("hydra")]
            check_keys(keys, base)
            return _compose(overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"{' '.join(overrides)}: {str(error).splitlines()[0]}; overrides are key=value") from None


def jobs(overrides: list[str]) -> list[list[str]]:
    """The overrides of each job that --multirun makes of `overrides`."""
    choices = []
    for override in OverridesParser.create().parse_overrides(overrides):
        values = override.sweep_string_iterator() if override.is_sweep_override() else None
        choices.append([f"{override.get_key_element()}={v}" for v in values] if values else [override.input_line])
    return [list(job) for job in itertools.product(*choices)]


def _compose(overrides: list[str]) -> dict[str, Any]:
    config = hydra.compose("train", overrides, return_hydra_config=True)
    return plain(config, config.hydra.runtime.choices)


def plain(config: DictConfig, choices: DictConfig) -> dict[str, Any]:
    """A composed configuration as plain values, with `choices`."""
    keys = [key for key in config if key != "hydra" and not (key in GROUPS and config[key] is None)]
    values = OmegaConf.to_container(OmegaConf.masked_copy(config, keys), resolve=True, throw_on_missing=True)
    names = {group: choices.get(group) for group in GROUPS} | {"experiment": choices.get("experiment") or "default"}
    return {**values, "choices": names}


@hydra.main(config_path="configs", config_name="train", version_base="1.3")
def hydra_main(config: DictConfig) -> None:
    """What Hydra calls for each job of --multirun; --help, --cfg and the like never get here."""
    with told():
        job = plain(config, HydraConfig.get().runtime.choices)
        if HydraConfig.get().mode is hydra.types.RunMode.MULTIRUN and job.get("trainer", {}).get("devices") != 1:
            command = " ".join(["python train.py", *HydraConfig.get().overrides.task])
            raise ConfigError(f"trainer.devices: --multirun is for one process a run; for several use: {command}")
        train(job)


if __name__ == "__main__":
    flags = {argument for argument in sys.argv[1:] if argument.startswith("-")}
    with told():
        if not flags:
            train(load_config(sys.argv[1:]))
        elif flags <= {"-m", "--multirun"}:
            for job in jobs([argument for argument in sys.argv[1:] if argument not in flags]):
                check_config(load_config(job))
    if flags:
        hydra_main()
