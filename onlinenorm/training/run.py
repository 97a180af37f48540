"""A run from its configuration to its results."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from onlinenorm.arguments import flatten
from onlinenorm.data import ImageDataModule
from onlinenorm.data.workers import explain_worker_deaths
from onlinenorm.errors import ConfigError, DataError
from onlinenorm.records import CONFIG, read_record, run_path
from onlinenorm.text import first_line
from onlinenorm.training import loggers
from onlinenorm.training.attempts import former_attempts
from onlinenorm.training.checkpoint import resumable
from onlinenorm.training.config_check import build, check_config, full_keys
from onlinenorm.training.epoch_log import EpochLog
from onlinenorm.training.final_validation import build_results, final_validation, summary, write_results
from onlinenorm.training.interruption import StopSignals
from onlinenorm.training.launch import is_rank_zero
from onlinenorm.training.probe import probe_batch, probe_data, probe_network, probe_normalizer
from onlinenorm.training.recipe import Recipe
from onlinenorm.training.run_folder import RunFolder
from onlinenorm.training.trainer import quiet_lightning, resolve


def train(config: dict[str, Any]) -> dict[str, Any]:
    """Runs, continues or reprints the run of a configuration (plain values); returns its results."""
    check_config(config)
    config = {**config, "trainer": resolve(config["trainer"])}
    path = run_path(config)
    folder = RunFolder(path, is_rank_zero())
    with StopSignals(path) as stop:
        return _train(config, folder, stop)


def _train(config: dict[str, Any], folder: RunFolder, stop: StopSignals) -> dict[str, Any]:
    recipe = build(config, "recipe")
    normalizer = build(config, "normalizer")
    where = config["trainer"]
    processes = where["devices"] * where["num_nodes"]
    probe_normalizer(normalizer, config["normalizer"], where)
    names, seed, path = config["choices"], config["seed"], folder.path
    if results := folder.results(config):
        warnings_of_data = _whose(results, config, recipe, path)
        if folder.rank_zero:
            print(summary(results, path), *warnings_of_data, sep="\n")
        return results
    if folder.rank_zero:  # at once, for what follows may take long
        chosen = " ".join(f"{group}={name}" for group, name in names.items() if name and group != "logger")
        print(
            f"{path}: {chosen} seed={seed}; on {f'{processes} x ' * (processes > 1)}{where['accelerator']}, "
            f"{where['precision']}",
            flush=True,
        )
    with full_keys(config, "data", "recipe"):
        data = _data(config, recipe)
        data.prepare_data()
        data.setup("fit")
        probe_data(data, config)
    probe_batch(config, normalizer, data.in_channels, data.image_size)
    with folder.lock(), quiet_lightning():
        checkpoint, position = resumable(folder.checkpoints, config, data)
        pl.seed_everything(seed, workers=False, verbose=False)  # before the network: all normalizers share its weights
        sizes = {"num_classes": data.num_classes, "in_channels": data.in_channels}
        with full_keys(config, "normalizer"):
            network = build(config, "model", normalizer=normalizer, **sizes)
        probe_network(network, config)
        module = build(config, "classifier", network=network, recipe=recipe)
        log = EpochLog(path / "metrics.csv")
        steps = position["global_step"] if position else None
        shown = {"name": "/".join(path.parts[-3:]), "config": flatten(config), "resumed_step": steps}
        mirrors = build(config, "logger", folder=path, **shown)
        parts = {"folder": path, "epoch_log": log, "stop": stop, "loggers": mirrors}
        trainer = build(config, "trainer", max_epochs=recipe.epochs, **parts)
        resumed = folder.record_start(config, trainer.world_size, position)
        with loggers.closing(mirrors), explain_worker_deaths():
            with full_keys(config, "data", "recipe", "normalizer"):
                trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
            clamping, arrays = final_validation(trainer, module, data, log)
        results = build_results(names, seed, module, data, log, resumed, clamping, former_attempts(path))
        if trainer.is_global_zero:
            write_results(path, results, arrays)
            print(summary(results, path))
            if hint := loggers.upload_hint(path):
                print(hint)
        return results


def _data(config: dict[str, Any], recipe: Recipe) -> ImageDataModule:
    transforms = {"augmentation": recipe.augmentation, "evaluation": recipe.evaluation}
    return build(config, "data", batch_size=recipe.batch_size, seed=config["seed"], **transforms)


def _whose(results: dict[str, Any], config: dict[str, Any], recipe: Recipe, folder: Path) -> list[str]:
    """What to say of the images of a finished run where those of a configuration are not there to be compared.

    Raises ConfigError where they are others.
    """
    recorded = results["dataset"]
    images = f"{recorded['train_images']:,} training and {recorded['val_images']:,} validation images"
    try:
        data = _data(config, recipe)
        data.setup()
        same = recorded.get("fingerprint", data.fingerprint) == data.fingerprint
    except (DataError, ConfigError, OSError) as error:
        root = read_record(folder / CONFIG)["data"].get("root")
        place = f"those at data.root={root} as it was then" if root else "no others than these"
        return [f"  of {recorded['name']}, {images}, {place}; not compared: {first_line(error)}"]
    if not same:
        key = "data.root" if "root" in config["data"] else "data"
        raise ConfigError(
            f"{key}: holds other images than those that {folder / 'results.json'} tells of ({recorded['name']}, "
            f"{images}); give back the former ones, or choose another run_dir= to start over"
        )
    return []
