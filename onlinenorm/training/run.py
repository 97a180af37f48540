"""A run from its configuration to its results."""

import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from onlinenorm import data as image_sets
from onlinenorm.arguments import flatten
from onlinenorm.data.nvjpeg_loader import more_work_queues
from onlinenorm.data.sampler import check_division
from onlinenorm.data.workers import explain_worker_deaths
from onlinenorm.errors import ConfigError, DataError
from onlinenorm.records import CONFIG, read_record, run_path
from onlinenorm.text import first_line, plural
from onlinenorm.training import loggers
from onlinenorm.training.agreement import Agreement
from onlinenorm.training.attempts import former_attempts
from onlinenorm.training.checkpoint import resumable
from onlinenorm.training.children import watching
from onlinenorm.training.config_check import AUTO_KEYS, build, check_config, full_keys
from onlinenorm.training.epoch_log import EpochLog
from onlinenorm.training.fast_path import (
    ANEW,
    Choice,
    FastPathFailed,
    adopt,
    check_compiles_here,
    choose,
    forget_compiled,
    free_device,
    make_data,
    naming_fast_path,
    open_data,
    with_values,
)
from onlinenorm.training.final_validation import build_results, final_validation, summary, write_results
from onlinenorm.training.interruption import StopSignals
from onlinenorm.training.launch import is_rank_zero, process_count
from onlinenorm.training.opening import details, notes
from onlinenorm.training.probe import probe_batch, probe_network, probe_normalizer
from onlinenorm.training.probe_data import probe_data
from onlinenorm.training.recipe import Recipe
from onlinenorm.training.run_folder import RunFolder
from onlinenorm.training.trainer import quiet_lightning, resolve_in


def train(config: dict[str, Any]) -> dict[str, Any]:
    """Runs, continues or reprints the run of a configuration (plain values); returns its results."""
    check_config(config)
    if _may_decode_while_training(config["data"]):
        more_work_queues()
    path = run_path(config)
    folder = RunFolder(path, is_rank_zero())
    config = {**config, "trainer": resolve_in(folder, config["trainer"])}
    with StopSignals(path) as stop:
        return _train(config, folder, stop)


def _may_decode_while_training(settings: dict[str, Any]) -> bool:
    """Whether a GPU may decode batches, as far as can be told before CUDA starts; a class of one's own may."""
    kind = getattr(image_sets, settings["_target_"].rpartition(".")[2], image_sets.ImageNet)
    from_files = issubclass(kind, image_sets.ImageNet)
    return from_files and settings.get("decoder") in ("auto", "nvjpeg") and settings.get("on_device") is not True


def _train(config: dict[str, Any], folder: RunFolder, stop: StopSignals) -> dict[str, Any]:
    recipe = build(config, "recipe")
    normalizer = build(config, "normalizer")
    probe_normalizer(normalizer, config["normalizer"], config["trainer"])
    path, recorded = folder.path, folder.recorded_config()
    finished = adopt(config, recorded)
    if results := folder.results(finished):
        warnings_of_data = _whose(results, finished, recipe, path)
        if folder.rank_zero:
            print(summary(results, recipe, path), *warnings_of_data, *loggers.upload_hint(path), sep="\n")
        return results
    stop.watch_output()
    asked = config = adopt(config, recorded, ANEW)
    if recorded:
        check_compiles_here(config, path)
    with full_keys(config, "data", "recipe"):
        choice = choose(config, lambda config: open_data(config, recipe))
        probe_data(choice.data, choice.config)
    probe_batch(choice.config, normalizer, choice.data.in_channels, choice.data.image_size)
    with folder.lock(), quiet_lightning():
        while True:
            try:
                return _run(choice, recipe, normalizer, folder, stop)
            except FastPathFailed as failure:
                key, message = failure.key, str(failure)
            except Exception:
                if folder.rank_zero and (hint := loggers.upload_hint(path)):
                    print(*hint, sep="\n")
                raise
            # past the exception, whose traceback holds the tensors of what failed
            print(message, file=sys.stderr)
            free_device()
            asked = with_values(asked, {key: AUTO_KEYS[key]})
            choice = choose(asked, lambda config: open_data(config, recipe))


def _run(choice: Choice, recipe: Recipe, normalizer: Any, folder: RunFolder, stop: StopSignals) -> dict[str, Any]:
    config, data, path = choice.config, choice.data, folder.path
    names, seed = config["choices"], config["seed"]
    forget_compiled()
    checkpoint, position = resumable(folder.checkpoints, config, data)
    pl.seed_everything(seed, workers=False, verbose=False)  # before the network: all normalizers share its weights
    sizes = {"num_classes": data.num_classes, "in_channels": data.in_channels}
    with full_keys(config, "normalizer"):
        network = build(config, "model", normalizer=normalizer, **sizes)
    probe_network(network, config)
    module = build(config, "classifier", network=network, recipe=recipe)
    log = EpochLog(path / "metrics.csv")
    steps = position["global_step"] if position else None
    of_trainer = config["trainer"]
    processes = process_count(of_trainer)
    with full_keys(config, "data", "recipe"):  # before there are other processes, which would say it too
        check_division(data, recipe.batch_size, processes, of_trainer["accumulate_grad_batches"])
    shown = {"name": "/".join(path.parts[-3:]), "config": flatten(config), "resumed_step": steps}
    mirrors = build(config, "logger", folder=path, **shown)
    parts = {"folder": path, "epoch_log": log, "stop": stop, "loggers": mirrors}
    keys = full_keys(config, "data", "recipe", "normalizer")
    with loggers.closing(mirrors), keys, explain_worker_deaths():
        trainer = build(config, "trainer", max_epochs=recipe.epochs, **parts)
        trainer.callbacks.append(Agreement(config))
        data.trainer = trainer
        for loader in (data.train_dataloader, data.val_dataloader):  # what they refuse comes before what is told
            loader()
        resumed = folder.record_start(config, trainer.world_size, position)
        if folder.rank_zero:
            print(*details(config, data, recipe, choice.reasons), sep="\n")
            print(*(f"  {note}\n" for note in notes(network, config, data, recipe)), sep="", end="")
            print(*_continues(checkpoint, position, recipe.epochs), sep="", end="", flush=True)
        with watching(trainer):
            with naming_fast_path(choice, trainer):
                trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
            sections, arrays = final_validation(trainer, module, data, log)
    results = build_results(names, seed, module, data, log, resumed, sections, former_attempts(path))
    if trainer.is_global_zero:
        write_results(path, results, arrays)
        print(summary(results, recipe, path), *loggers.upload_hint(path), sep="\n")
    return results


def _continues(checkpoint: Path | None, position: dict[str, int] | None, epochs: int) -> list[str]:
    """The line on where a run goes on; none for one that begins."""
    if position is None:
        return []
    place = f"epoch {position['epoch'] + 1}, step {position['step']}"
    if position["epoch"] >= epochs:
        place = f"trained for {plural(epochs, 'epoch')}, and yet to be validated once more"
    return [f"  continues from {checkpoint}: {place}\n"]


def _whose(results: dict[str, Any], config: dict[str, Any], recipe: Recipe, folder: Path) -> list[str]:
    """What to say of the images of a finished run where those of a configuration are not there to be compared.

    Raises ConfigError where they are others.
    """
    recorded = results["dataset"]
    images = f"{recorded['train_images']:,} training and {recorded['val_images']:,} validation images"
    try:
        data = make_data(config, recipe)
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
