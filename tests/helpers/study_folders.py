"""A whole folder of studies as sweeps would leave it, without training."""

from pathlib import Path

import numpy as np
from run_folders import write_run

NAN = "exit code 1\nthe loss became NaN or infinite at step 40 (epoch 1, learning rate 0.1). The last good checkpoint"
STEPS = {  # milliseconds and GiB at batch 256
    "batch": (44.0, 10.3), "online_clamp": (40.0, 10.6), "online_layer_scaling": (42.0, 10.9),
    "online_none": (39.0, 10.5),
}  # fmt: skip


def benchmark(*normalizers: str) -> dict:
    """A bench_training.json of these normalizers: batches 32 and 256, eager and a fifth faster in graphs."""
    rows = []
    for mode, factor in (("eager", 1.0), ("compile+graph", 0.8)):
        for batch, name in ((batch, name) for batch in (32, 256) for name in normalizers):
            milliseconds = STEPS[name][0] * factor * batch / 256
            rows.append({
                "normalizer": name, "backend": "torch" if name == "batch" else "fused", "mode": mode, "dtype": "bf16",
                "batch": batch, "milliseconds": milliseconds, "images_per_second": 1e3 * batch / milliseconds,
                "peak_memory_gib": STEPS[name][1] * batch / 256, "repeat_spread": 0.001,
            })  # fmt: skip
    head = {"device": "a GPU", "torch": "2", "triton": "3", "commit": "abc", "command": "bench", "optimizer": False}
    return {**head, "rows": rows}


def course(epochs: int, value: float, seed: int) -> list[tuple[float, float]]:
    """Clamped fractions that fall tenfold at each third of the run and end at 0, with the largest activations."""
    random = np.random.default_rng(seed)
    drops = [3 * epoch // epochs for epoch in range(epochs)]
    fractions = [float(10 ** (-1 - value / 2 - d - 0.2 * random.random())) for d in drops[:-1]] + [0.0]
    return [
        (part, float(value * (3 - d) * (1 + 0.1 * random.random()))) for part, d in zip(fractions, drops, strict=True)
    ]


def write_studies(root: Path, epochs: int = 6, seeds: int = 3) -> Path:
    """root with studies fashion_mnist, resnet50, clamp_value and batch_size; alpha_fwd and alpha_bkw were not run."""
    common = {"scale": "fashion_mnist", "epochs": epochs}
    random = np.random.default_rng(0)
    main = root / "fashion_mnist" / "runs"
    for name in ("online_clamp", "online_layer_scaling", "batch", "online_none", "group", "layer", "instance"):
        for seed in range(seeds if name in ("online_clamp", "online_layer_scaling", "batch") else 2):
            wrong = random.choice(100, 8, replace=False).tolist()
            clamped = course(epochs, 5, seed) if name == "online_clamp" else None
            write_run(main, name, seed, model="cifar_resnet20", clamped=clamped, wrong=wrong, **common)
    for name in ("online_clamp", "online_layer_scaling", "batch"):
        clamped = course(epochs, 5, 9) if name == "online_clamp" else None
        options = {"model": "resnet50", "data": {"image_size": 224}, "clamped": clamped, "wrong": [1, 2, 3], **common}
        write_run(root / "resnet50" / "runs", name, 0, **options)
    clamps = root / "clamp_value" / "runs"
    for value in (1.0, 5.0, 8.0):
        for seed in range(2):
            settings = {"clamp_value": value, "error_compensation": "clamp", "_target_": "x"}
            folder = clamps / f"normalizer.clamp_value={value:g}"
            write_run(
                folder, "online_clamp", seed, normalizer_config=settings, clamped=course(epochs, value, seed), **common
            )
    settings = {"clamp_value": 5.0, "error_compensation": "none", "_target_": "x"}
    write_run(clamps, "online_none", 0, normalizer_config=settings, **common)
    write_run(clamps, "online_none", 1, normalizer_config=settings, done=0, failure=NAN, **common)
    for size in (1, 32, 512):
        for name in ("online_clamp", "batch"):
            folder = root / "batch_size" / "runs" / f"recipe.batch_size={size}"
            stopped = {"done": 1, "failure": NAN} if (name, size) == ("batch", 1) else {}
            top1 = 0.7 + 0.03 * np.log10(size) if name == "batch" else 0.88
            write_run(folder, name, 0, recipe={"batch_size": size}, top1=top1, **stopped, **common)
    return root


def write_photographs(root: Path) -> Path:
    """root with every study of photographs that the findings tell of, as small as they can be."""
    set_of = {"_target_": "onlinenorm.data.Imagenette", "image_size": 128}
    image = {"scale": "imagenette", "model": "resnet50", "data": set_of}

    def clamped(folder: Path, seed: int, cost: float, recipe: dict | None = None, **options) -> None:
        top1 = 0.81 + 0.001 * seed
        clamping = {
            "layers": 53, "clamp_value": 5.0, "with": {"val_loss": 0.6, "val_top1": top1},
            "without": {"val_loss": 1.1, "val_top1": top1 - cost - 1e-4 * seed}, "changed_predictions": 400,
            "clamped_fraction": 1e-3, "max_abs_activation": 22.0,
        }  # fmt: skip
        again = {"images": 9440, "val_loss": 0.7, "val_top1": top1 - cost / 2, "changed_predictions": 200}
        removals = [(1.5, 0.5 - cost, 400 - 50 * epoch) for epoch in range(5)]
        told = {"clamping": clamping, "reestimated": again, "clamped": [(1e-3, 20.0)] * 5, "removals": removals}
        write_run(folder, "online_clamp", seed, recipe=recipe, **{**image, **told, **options})

    for seed in range(3):
        clamped(root / "imagenette" / "runs", seed, 0.05)
        for name in ("online_layer_scaling", "batch"):
            again = {"images": 9440, "val_loss": 0.5, "val_top1": 0.8 + 0.001 * seed, "changed_predictions": 100}
            write_run(root / "imagenette" / "runs", name, seed, reestimated=again, **image)
        for name in ("online_clamp", "online_layer_scaling", "batch"):
            for scale in ("cifar10", "cifar100"):
                write_run(root / scale / "runs", name, seed, scale=scale, model="cifar_resnet20")
    sweeps: tuple = (("clamp_off", "clamp_off_epochs", (1, 2)), ("clamp_raised", "clamp_raise_epochs", (1, 2)))
    for study, key, values in (*sweeps, ("lr", "lr", (0.05,))):
        clamped(root / f"imagenette_{study}" / "runs", 0, 0.05)
        for value in values:
            folder = root / f"imagenette_{study}" / "runs" / f"recipe.{key}={value}"
            clamped(folder, 0, 0.05 / (1 + value), recipe={key: value})
    for value in (3, 8):
        folder = root / "imagenette_clamp_value" / "runs" / f"normalizer.clamp_value={value}"
        settings = {"clamp_value": float(value), "error_compensation": "clamp", "_target_": "x"}
        clamped(folder, 0, 0.1 / value, normalizer_config=settings)
    for model in ("resnet18", "resnet101"):
        clamped(root / "imagenette_depth" / "runs" / f"model={model}", 0, 0.05, model=model)
    clamped(root / "imagenette_short" / "runs", 0, 0.1)
    tiny = {"scale": "tiny_imagenet", "data": {"image_size": 64}}
    clamped(root / "tiny_imagenet" / "runs", 0, 0.02, **tiny)
    for name in ("online_layer_scaling", "batch"):
        write_run(root / "tiny_imagenet" / "runs", name, 0, **{**image, **tiny})
    for warmup in (0, 5):
        folder = root / "imagenette_256" / "runs" / f"recipe.warmup_epochs={warmup}"
        recipe = {"batch_size": 256, "warmup_epochs": warmup}
        for name in ("online_clamp", "online_layer_scaling"):
            write_run(folder, name, 0, recipe=recipe, **image)
        for seed in range(3):
            top1 = 0.595 + 0.0013 * seed if warmup else 0.60 + 0.001 * seed
            write_run(folder, "batch", seed, top1=top1, recipe=recipe, **image)
    return root
