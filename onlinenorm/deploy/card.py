"""The card that goes with an exported network: what it is, how good, how it was made, and under which terms."""

from typing import Any

from onlinenorm.data import ImageNet
from onlinenorm.deploy.forms import Form
from onlinenorm.deploy.predict import class_names
from onlinenorm.deploy.source import Trained
from onlinenorm.deploy.verification import Agreement
from onlinenorm.text import plural

FREE = 0.001
TORCHSCRIPT = "TorchScript is deprecated by PyTorch and not supported from Python 3.14 on; prefer exported-program"


def accuracy_lines(trained: Trained) -> list[str]:
    """The recorded accuracies of the weights, with and without clamp where there was one."""
    results = trained.results
    if results is None:
        recorded = f"{trained.top1:.2%} top-1" if trained.top1 is not None else "not recorded"
        return [f"| as trained ({trained.checkpoint.name}) | {recorded} | |"]
    clamping = results.get("clamping")
    if not clamping:
        return [f"| as trained | {results['last']['val_top1']:.2%} top-1 | {results['last']['val_loss']:.4f} |"]
    names = {
        "with": f"with clamp ({clamping['clamp_value']:g})",
        "without": f"without clamp ({clamping['clamp_value']:g})",
    }
    if off := trained.recipe.clamp_off_epochs:
        names = {
            "without": f"trained without the clamp in the last {plural(off, 'epoch')}",
            "with": f"with the clamp ({clamping['clamp_value']:g}) put back",
        }
    return [f"| {name} | {_figures(clamping[side])} |" for side, name in names.items()]


def _figures(recorded: dict[str, Any]) -> str:
    loss = recorded["val_loss"]  # None: not finite
    return f"{recorded['val_top1']:.2%} top-1 | {'not finite' if loss is None else format(loss, '.4f')}"


def removal_line(found: dict) -> str:
    """What removing the clamp did on the images of the verification, of `export.facts`, and what to do about it.

    It is taken as free where it costs at most `FREE` of top-1: on the whole set, where the run recorded it. So are
    statistics estimated anew, which are then what to do.
    """
    anew = found.get("images_anew")
    how = f" and estimating statistics anew on {anew} training images" if anew else ""
    line = (
        f"Removing the clamp{how} changed {found['changed_predictions']} of {found['images']} predictions "
        f"(logits by up to {found['max_logit_difference']:.2e})."
    )
    if found.get("top1_with_clamp") is None:  # no label is known, or recorded before it was measured
        return line
    before, after = found["top1_with_clamp"], found["top1"]
    line = f"{line} Top-1 went from {found['top1_with_clamp']:.2%} to {found['top1']:.2%} there"
    if recorded := found.get("recorded"):
        before, after = recorded["with"], recorded["without"]
        line += (
            f", and from {recorded['with']:.2%} to {recorded['without']:.2%} on all {recorded['images']:,} of the run"
        )
    if before - after <= FREE:
        return f"{line}: free, no remedy needed."
    again, keep = found.get("reestimated_top1"), "in a form that holds it (onnx, torchscript, exported-program)"
    if again is not None and before - again <= FREE:
        line += f". Better estimate statistics anew without it, with --reestimate {found['reestimated_images']}"
        return f"{line}: the run measured {again:.2%} so, which is free; or keep it, with --keep-clamp {keep}."
    line += f". Better keep it, with --keep-clamp {keep}"
    if again is not None:
        line += f"; on statistics estimated anew without it (--reestimate {found['reestimated_images']}) the run "
        line += f"measured {again:.2%}"
    if off := found.get("clamp_off_epochs"):
        return f"{line}; or take the run's last weights, trained without it in the last {plural(off, 'epoch')}."
    return f"{line}; or train without it at the end (recipe.clamp_off_epochs)."


def preparation(trained: Trained) -> str:
    """Python that turns an image file into the input of the network, as its validation images were turned."""
    data, channels = trained.data, len(trained.data.mean_std[0])
    mean, std = data.mean_std
    crop = data.native_size
    short = round(crop * 256 / 224) if isinstance(data, ImageNet) else crop
    mode, order = ("L", "gray") if channels == 1 else ("RGB", "red, green, blue")
    lines = [
        "import numpy as np",
        "import torch",
        "from PIL import Image",
        "",
        f'image = Image.open("photo.jpg").convert("{mode}")  # {order}; as stored, not turned as EXIF says',
        "short = min(image.size)",
        f"size = [{short} if side == short else int({short} * side / short) for side in image.size]",
        "image = image.resize(size, Image.Resampling.BILINEAR)",
        f"left, top = (round((side - {crop}) / 2) for side in size)  # the centre, {crop} x {crop}",
        f"image = image.crop((left, top, left + {crop}, top + {crop}))",
        f"images = torch.from_numpy(np.array(image)).reshape(1, {crop}, {crop}, {channels}).permute(0, 3, 1, 2) / 255",
        f"images = (images - torch.tensor({list(mean)})[:, None, None]) / torch.tensor({list(std)})[:, None, None]",
    ]
    if crop != data.image_size:
        side = f"({data.image_size}, {data.image_size})"
        lines.append(f'images = torch.nn.functional.interpolate(images, size={side}, mode="bilinear")')
    if channels != trained.in_channels:
        lines.append(f"images = images.repeat(1, {trained.in_channels}, 1, 1)")
    return "\n".join(lines)


def render_card(
    trained: Trained, form: Form, file: str, clamp_kept: bool, agreement: Agreement, removal: dict | None,
    command: str, made_with: dict[str, str],
) -> str:  # fmt: skip
    """The card as Markdown. `removal` is what `removal_line` takes, if it took place; `made_with` name -> value."""
    data, config, environment = trained.data, trained.config, trained.environment
    dataset = (trained.results or {}).get("dataset", {"name": data.name})
    mean, std = data.mean_std
    names, unnamed = class_names(trained)
    size, channels = data.image_size, trained.in_channels
    guard = {"clamp": "kept" if clamp_kept else "removed", "layer_scaling": "layer scaling kept"}.get(
        trained.guard, "none"
    )
    if not getattr(trained.network, "in_torchvision", False):
        arguments = "".join(f", {key}={value!r}" for key, value in trained.arguments.items())
        builder = f"onlinenorm.models.{trained.builder}(torch.nn.BatchNorm2d{arguments})"
    else:
        builder = f"torchvision.models.{trained.model_name}(num_classes={trained.num_classes})"
    reader = (
        f'safetensors.torch.load_file("{file}")'
        if file.endswith(".safetensors")
        else f'torch.load("{file}", weights_only=True)'
    )
    modules = sorted({f"{builder.split('.')[0]}.models", "torch", reader.partition(".load")[0]})
    imports = "\n".join(f"import {module}" for module in modules)
    usage = form.usage.format(file=file, builder=builder, reader=reader, imports=imports)
    git = environment.get("git", {})
    trained_with = ", ".join(f"{name} {version}" for name, version in environment.get("versions", {}).items())
    deprecated = f"\n{TORCHSCRIPT}.\n" if form.name == "torchscript" else ""
    choices, sha256 = config["choices"], (trained.results or {}).get("parameters_sha256", "not recorded")
    images = f"{dataset.get('train_images', '?')} training and {dataset.get('val_images', '?')} validation images"
    commit = git.get("commit", "not recorded") + (" (with local changes)" if git.get("dirty") else "")
    exported_with = ", ".join(f"{name} {value}" for name, value in made_with.items())
    reference = "trained network without its clamp" if removal else "trained network"
    accuracies = "\n".join(accuracy_lines(trained))
    return f"""# {trained.model_name}, {choices["normalizer"]}, as {form.name}

`{file}`: {trained.model_name} for {trained.num_classes} classes, trained on {dataset["name"]} with normalizer
{choices["normalizer"]} (experiment {choices["experiment"]}, seed {config["seed"]}). Activation clamp: {guard}.

## Accuracy on the validation set, recorded by the run

| weights | accuracy | loss (nats) |
|---|---|---|
{accuracies}

## Check of this file

Against the {reference}, on {agreement.images} validation images in float32: largest logit difference
{agreement.max_difference:.2e}, {agreement.changed_predictions} predictions changed.
{removal_line(removal) if removal else ""}

## Use

Input `images`: float32, N x {channels} x {size} x {size}, any N: pixels / 255, minus mean {list(mean)},
over deviation {list(std)}. Output: logits, N x {trained.num_classes}.

From a photograph to `images`, as the validation images were prepared:

```python
{preparation(trained)}
```

From `images` to `logits`:

```python
{usage}
```

Classes, in the order of the logits{f" ({unnamed})" if unnamed else ""}: {", ".join(names)}.
{deprecated}
## How it was made

| | |
|---|---|
| dataset | {dataset["name"]}, {images} |
| dataset fingerprint | {dataset.get("fingerprint", "not recorded")} |
| training command | `{environment.get("command", "not recorded")}` |
| training commit | {commit} |
| trained with | {trained_with or "not recorded"}; {environment.get("hardware", "hardware not recorded")} |
| parameters (sha256) | {sha256} |
| export command | `{command}` |
| exported with | {exported_with} |

## Licence

Code: Apache-2.0. Weights follow from their data: {dataset["name"]}, {dataset.get("licence", data.licence)}.
"""
