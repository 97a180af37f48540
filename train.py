"""Trains a network with a normalizer, as the configuration says: python train.py experiment=table1 normalizer=batch seed=1"""

import contextlib
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

from onlinenorm.training import finish, loggers
from onlinenorm.training.checkpoint import read, resumable
from onlinenorm.training.config_check import build, check_config, flatten, nearest, prefixed, unknown_key
from onlinenorm.training.epoch_log import EpochLog
from onlinenorm.training.errors import ConfigError, RunError
from onlinenorm.training.interruption import StopSignals
from onlinenorm.training.launch import is_leader
from onlinenorm.training.run_folder import RunFolder
from onlinenorm.training.trainer import quiet_lightning, resolve

CONFIGS = Path(__file__).resolve().parent / "configs"
GROUPS = ("normalizer", "model", "data", "recipe", "trainer", "logger", "experiment")


def train(config: dict[str, Any]) -> dict[str, Any]:
    """Runs, continues or reprints the run of a configuration (plain values, from `load_config`); returns its results."""
    check_config(config, known=(*GROUPS, "choices", "seed", "run_dir", "classifier"))
    config = {**config, "trainer": resolve(config["trainer"])}
    recipe = build(config, "recipe")
    normalizer = build(config, "normalizer")
    with prefixed("normalizer", config["normalizer"]):
        normalizer(num_features=64)  # a probe: a wrong value is found before data are looked for
    choices, seed = config["choices"], config["seed"]
    path = Path(config["run_dir"] or Path("runs", choices["experiment"], choices["normalizer"], f"seed{seed}"))
    with StopSignals() as stop, RunFolder(path, is_leader()) as folder, quiet_lightning():
        folder.check_config(config)
        if results := folder.results():
            print(finish.summary(results, path))
            return results
        data = build(config, "data", batch_size=recipe.batch_size, seed=seed, augmentation=recipe.augmentation,
                     evaluation=recipe.evaluation)  # fmt: skip
        data.prepare_data()
        data.setup("fit")
        checkpoint, damaged = resumable(folder.checkpoints)
        for line in damaged:
            print(f"{line}: continuing from {checkpoint}", file=sys.stderr)

        pl.seed_everything(seed, workers=False, verbose=False)  # before the network: all normalizers share its weights
        with prefixed("normalizer", config["normalizer"]):
            network = build(config, "model", normalizer=normalizer, num_classes=data.num_classes,
                            in_channels=data.in_channels)  # fmt: skip
        module = build(config, "classifier", network=network, recipe=recipe)
        log = EpochLog(path / "metrics.csv")
        mirrors = build(config, "logger", folder=path, name="/".join(path.parts[-3:]), config=flatten(config))
        trainer = build(config, "trainer", max_epochs=recipe.epochs, folder=path, epoch_log=log, stop=stop,
                        loggers=mirrors)  # fmt: skip
        position = read(checkpoint)["position"] if checkpoint else None
        resumed = folder.record_start(config, trainer.world_size, position)
        try:
            with prefixed("recipe", config["recipe"]):
                trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
            clamping, arrays = finish.final_validation(trainer, module, data)
        finally:
            loggers.finish(mirrors)
        results = finish.build_results(choices, seed, module, data, log, resumed, clamping)
        if trainer.is_global_zero:
            finish.write_results(path, results, arrays)
            print(finish.summary(results, path))
        return results


def load_config(overrides: list[str]) -> dict[str, Any]:
    """The composed configuration as plain values, with the chosen file of each group under `choices`."""
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise ConfigError(
            f"{' '.join(overrides)}: not an override; write key=value ({str(error).splitlines()[0]})"
        ) from None
    groups = [override for override in parsed if override.key_or_group in GROUPS]
    for override in groups:
        name, options = override.value(), sorted(file.stem for file in (CONFIGS / override.key_or_group).glob("*.yaml"))
        if not isinstance(name, str | None) or (name is not None and name not in options):
            near = nearest(str(name), options)
            hint = f"did you mean {override.key_or_group}={near}?" if near else f"there are {', '.join(options)}"
            raise ConfigError(f"{override.key_or_group}: {name!r} is not one of its options; {hint}")
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        try:
            plain = _compose([override.input_line for override in groups])
            keys = set(flatten(plain)) | set(plain) | set(GROUPS)
            for override in parsed:
                key = override.key_or_group
                parents = {known.rpartition(".")[0] for known in keys}
                if not override.is_delete() and key not in keys and key not in parents and not key.startswith("hydra"):
                    raise unknown_key(key, keys)
            return _compose(overrides)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(str(error).splitlines()[0]) from None


def _compose(overrides: list[str]) -> dict[str, Any]:
    config = hydra.compose("train", overrides, return_hydra_config=True)
    return _plain(config, config.hydra.runtime.choices)


def _plain(config: DictConfig, choices: DictConfig) -> dict[str, Any]:
    keys = [key for key in config if key not in ("hydra", *(g for g in GROUPS if config.get(g) is None))]
    plain = OmegaConf.to_container(OmegaConf.masked_copy(config, keys), resolve=True, throw_on_missing=True)
    chosen = {group: choices.get(group) for group in GROUPS} | {"experiment": choices.get("experiment") or "default"}
    return {**plain, "choices": chosen}


@contextlib.contextmanager
def told():
    """Context whose deliberate errors end the program with their message alone."""
    try:
        yield
    except (ConfigError, RunError) as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


@hydra.main(config_path="configs", config_name="train", version_base="1.3")
def hydra_main(config: DictConfig) -> None:
    """What Hydra calls for --multirun; --help, --cfg and the like never get here."""
    with told():
        job = _plain(config, HydraConfig.get().runtime.choices)
        if HydraConfig.get().mode is hydra.types.RunMode.MULTIRUN and job["trainer"].get("devices") != 1:
            overrides = " ".join(HydraConfig.get().overrides.task)
            raise ConfigError(f"trainer.devices: --multirun is for one process a run; use: python train.py {overrides}")
        train(job)


if __name__ == "__main__":
    if any(argument.startswith("-") for argument in sys.argv[1:]):
        hydra_main()
    else:
        with told():
            train(load_config(sys.argv[1:]))
