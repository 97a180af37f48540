"""What a run says of itself before it trains: at once what its configuration says, then what else had to be found out.

Nothing that takes long to load is imported here: the first lines come before torch is.
"""

import inspect
from typing import Any

from onlinenorm.records import lookup, run_path
from onlinenorm.text import plural
from onlinenorm.training.launch import is_rank_zero, process_count

# argument of an OnlineNorm layer -> the error_compensation without which it has no effect
OF_GUARD = {"clamp_value": "clamp", "layer_scaling_eps": "layer_scaling", "layer_scaling_group_size": "layer_scaling"}
# key -> the names in trainer.disabled_optimizations that have no effect without it
OF_FAST_PATH = {"trainer.cuda_graph": {"cast_weights", "memset_kernels"}, "model.compile": {"fold_gradients"}}


def announce(config: dict[str, Any]) -> None:
    """Prints what is known from the configuration and the folder's files alone; nothing for a finished run."""
    path = run_path(config)
    if not is_rank_zero() or (path / "results.json").exists():
        return
    begun = any((path / "checkpoints").glob("*.ckpt"))
    chosen = [f"{group}={name}" for group, name in config["choices"].items() if name and group != "logger"]
    print(f"{path}: {'continues' if begun else 'new run'}: {' '.join(chosen)} seed={config['seed']}", flush=True)
    every = lookup(config, "trainer.checkpoint_every_n_steps")
    epochs = lookup(config, "recipe.epochs")
    print(
        f"  {epochs} epoch{'s' * (epochs != 1)} in batches of {lookup(config, 'recipe.batch_size')}; saves at the "
        f"end of each epoch, {f'every {every:,} steps ' if isinstance(every, int) else ''}and when asked to stop "
        "(Ctrl-C, SIGTERM, SIGUSR1)",
        flush=True,
    )


def details(config: dict[str, Any], data: Any, recipe: Any, reasons: dict[str, str]) -> list[str]:
    """Lines on a run that is about to start.

    Args:
        config: of the run, without "auto".
        data: its data module, set up.
        recipe: its `Recipe`.
        reasons: key -> why what could be faster is off, of `fast_path.Choice`.
    """
    from onlinenorm.data.datasets import FolderDataset
    from onlinenorm.provenance import device_name

    trainer = config["trainer"]
    processes = process_count(trainer)
    on_gpu = trainer["accelerator"] == "gpu"
    where = f"{f'{processes} x ' * (processes > 1)}{device_name(on_gpu)}"
    held = "on the device" if data.on_device and on_gpu else "from memory"
    images = held
    if isinstance(data._sets[0], FolderDataset):
        images = f"decoded by {data.decoder}" + (f" once, then {held}" if data.on_device else "")
        if on_gpu and "data.on_device" in reasons:
            images += f", not kept on the device ({reasons['data.on_device']})"
    return [
        f"  on {where}, {trainer['precision']}{how(config, reasons)}",
        f"  {data.name}: {data.train_images:,} training and {data.val_images:,} validation images of "
        f"{data.num_classes:,} classes at {data.image_size} px, {images}",
        f"  learning rate {recipe.scaled_lr:g}{_schedule(recipe)}, momentum {recipe.scaled_momentum:g}; "
        + (f"label smoothing {recipe.label_smoothing:g} in the train loss alone; " if recipe.label_smoothing else "")
        + f"{plural(data.train_images // recipe.batch_size, 'step')} an epoch",
    ]


def _schedule(recipe: Any) -> str:
    """What becomes of the learning rate, as " after 5 epochs of warm-up from 0.1, times 0.1 after epochs 30, 60"."""
    warmup = recipe.warmup_epochs
    rise = f" after {warmup} epoch{'s' * (warmup > 1)} of warm-up from {recipe.first_lr:g}" if warmup else ""
    if recipe.schedule == "cosine":
        return f"{rise}, falling to 0 as a cosine"
    if recipe.schedule == "plateau":
        return f"{rise}, times {recipe.lr_factor:g} when validation stops improving"
    drops = ", ".join(map(str, recipe.milestones))
    return rise + (
        f", times {recipe.lr_factor:g} after epoch{'s' * (len(recipe.milestones) > 1)} {drops}" if drops else ""
    )


def notes(network: Any, config: dict[str, Any], data: Any, recipe: Any) -> list[str]:
    """Sentences on what a run's settings ask for and will not get; arguments as of `details`."""
    return [
        *_without_effect(network, config, data, recipe),
        *_warmup_notes(network, config, data, recipe),
        *_worker_notes(config, data),
    ]


def _without_effect(network: Any, config: dict[str, Any], data: Any, recipe: Any) -> list[str]:
    """A sentence for each reason why keys that are set change nothing."""
    from onlinenorm.data.datasets import InMemoryDataset
    from onlinenorm.data.decoders import DEVICE_DECODERS
    from onlinenorm.normalizers import OnlineNorm
    from onlinenorm.training.clamping import clamped_layers
    from onlinenorm.training.final_validation import NONE_TO_ESTIMATE, can_reestimate

    of_clamps = "clamp_raise_epochs", "clamp_off_epochs", "removal_every_epoch"
    said = []
    for keys, effective, why in (
        (of_clamps, bool(clamped_layers(network)), "no layer of the network clamps"),
        (("reestimate_images",), can_reestimate(network), NONE_TO_ESTIMATE),
        (("warmup_lr",), recipe.warmup_epochs > 0, "recipe.warmup_epochs is 0"),
    ):
        idle = [f"recipe.{key}" for key in keys if getattr(recipe, key)]
        if idle and not effective:
            said.append(f"{', '.join(idle)}: without effect, as {why}")
    if recipe.warmup_epochs and recipe.warmup_lr > recipe.scaled_lr:
        said.append(
            f"recipe.warmup_epochs, recipe.warmup_lr: without effect, as the warm-up would start at "
            f"{recipe.warmup_lr:g}, above the full learning rate {recipe.scaled_lr:g}"
        )
    guards = {layer.error_compensation for layer in network.modules() if isinstance(layer, OnlineNorm)}
    parameters = inspect.signature(OnlineNorm).parameters
    for key, value in config.get("normalizer", {}).items():
        guard = OF_GUARD.get(key)
        if guards and guard and guard not in guards and value != parameters[key].default:
            said.append(f"normalizer.{key}: without effect, as error_compensation={', '.join(sorted(guards))}")
    if data.on_unreadable == "skip" and isinstance(data._sets[0], InMemoryDataset):
        said.append("data.on_unreadable: without effect, as these images are all in memory from the start")
    if data.device_fraction < 1 and data.decoder not in DEVICE_DECODERS:
        said.append(f"data.device_fraction: without effect, as data.decoder is {data.decoder}")
    if data.keep_decoded and not data.on_device:
        said.append("data.keep_decoded: without effect, as data.on_device is false")
    disabled = config["trainer"].get("disabled_optimizations", ())
    if disabled and config["trainer"]["accelerator"] != "gpu":
        return [*said, "trainer.disabled_optimizations: without effect, as this run is on the CPU"]
    for key, of_it in OF_FAST_PATH.items():
        if (idle := sorted(of_it & set(disabled))) and not lookup(config, key):
            said.append(f"trainer.disabled_optimizations: {', '.join(idle)} without effect, as {key} is false")
    return said


def _warmup_notes(network: Any, config: dict[str, Any], data: Any, recipe: Any) -> list[str]:
    """A sentence where layers' own warm-up (``warmup_steps``, in batches) lasts as long as the run, else none.

    Such a run trains what the layer is during its warm-up: with BatchRenorm, BatchNorm.
    """
    steps = {layer: getattr(layer, "warmup_steps", None) for layer in network.modules()}
    warmup = {type(layer).__name__: value for layer, value in steps.items() if isinstance(value, int)}
    batches = recipe.epochs * (data.train_images // recipe.batch_size) * config["trainer"]["accumulate_grad_batches"]
    return [
        f"{name}'s warm-up of {value:,} batches is not over when this run of {batches:,} ends, so that it never does "
        "what it is there for; give normalizer.warmup_steps a smaller number, or train for longer"
        for name, value in warmup.items()
        if value >= batches
    ]


def _worker_notes(config: dict[str, Any], data: Any) -> list[str]:
    """A sentence where a machine's loader workers, as many as were asked for, are more than its cores, else none."""
    from onlinenorm.data.workers import cores

    processes = config["trainer"].get("devices", 1)
    workers, here = (data.num_workers or 0) * processes, cores()
    if workers <= here or data.on_device:
        return []
    each = f", {data.num_workers} of each of {processes} processes," if processes > 1 else ""
    return [
        f"data.num_workers: {workers} loader workers{each} share {plural(here, 'core')}, which seldom makes them "
        "faster; null takes as many as there are cores"
    ]


def how(config: dict[str, Any], reasons: dict[str, str]) -> str:
    """ ", compiled, not as CUDA graphs (why)" of a run on a GPU, "" on the CPU; arguments as of `details`."""
    text = ""
    for word, key in (("compiled", "model.compile"), ("as CUDA graphs", "trainer.cuda_graph")):
        on = lookup(config, key)
        if on or config["trainer"]["accelerator"] == "gpu":
            why = f" ({reasons[key]})" if key in reasons and not on else ""
            text += f", {'' if on else 'not '}{word}{why}"
    return text
