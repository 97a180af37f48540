"""What the clamps of a trained network do: validation at other clamp values, and what reaches each layer."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onlinenorm.deploy.images import validation_batches
from onlinenorm.deploy.source import Trained
from onlinenorm.errors import ArgumentError, DeployError
from onlinenorm.normalizers import OnlineNorm
from onlinenorm.normalizers.settings import check_clamp_value
from onlinenorm.training import ImageClassifier
from onlinenorm.training.accuracy import predicted
from onlinenorm.training.clamping import ClampMeter

STARTS = 0.1  # share of the changed predictions


@dataclass
class Setting:
    """Validation at one clamp value (None: removed); loss in nats, changes against the predictions as trained."""

    clamp_value: float | None
    trained: bool = False
    images: int = 0
    val_loss: float = 0.0
    val_top1: float = 0.0
    changed_predictions: int = 0
    clamped_fraction: float = 0.0


@dataclass
class Layer:
    """What reaches one clamp, as trained: |w| > clamp_value as a fraction of activations, and the largest |w|.

    And validation with the clamps up to this one removed, those behind it in place.
    """

    name: str
    channels: int
    clamp_value: float
    activations: int
    clamped_fraction: float
    max_abs_activation: float
    removed_val_loss: float
    removed_val_top1: float
    removed_changed_predictions: int


@dataclass
class Audit:
    """Settings, the trained one first and the removed one second, and layers in the network's order."""

    settings: list[Setting]
    layers: list[Layer]

    @property
    def start(self) -> Layer | None:
        """Where what removal does starts: the layer up to which it changes a tenth as many predictions as in all."""
        changed = self.settings[1].changed_predictions
        reached = (layer for layer in self.layers if layer.removed_changed_predictions >= STARTS * changed)
        return next(reached, None) if changed else None

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "start": self.start and self.start.name}


@torch.no_grad()
def audit(trained: Trained, values: Sequence[float], limit: int | None, device: torch.device) -> Audit:
    """Validates `trained` as it is, without clamp, at each of `values` and layer by layer, all in float32.

    Args:
        trained: a network with clamps.
        values: clamp values to try, > 0; sorted, and the trained one left out.
        limit: validation images, spread evenly; None for all.
        device: to run on.

    Raises DeployError where the network has no clamp, or is not finite without it, a value is no clamp value, or
    the dataset is missing.
    """
    layers = {n: m for n, m in trained.network.named_modules() if isinstance(m, OnlineNorm)}
    layers = {name: layer for name, layer in layers.items() if layer.error_compensation == "clamp"}
    if not layers:
        why = trained.guard.replace("_", " ") or "no OnlineNorm layers"
        if trained.clamp_off:
            why = (
                f"{trained.clamp_off} took them away; results.json says what putting them back does, and a run without "
                "that key has clamps to audit"
            )
        raise DeployError(f"{trained.checkpoint}: the network has no clamps to audit ({why})")
    try:
        values = [check_clamp_value(value) for value in values]
    except ArgumentError as error:
        raise DeployError(f"--values: {error}") from error
    clamp_values = {name: layer.clamp_value for name, layer in layers.items()}
    usual = next(iter(clamp_values.values()))
    settings = [Setting(usual, trained=True), Setting(None)]
    settings += [Setting(float(value)) for value in sorted(set(values) - {usual})]
    prefixes = [Setting(None) for _ in layers]
    meters = [{name: ClampMeter(layer) for name, layer in layers.items()} for _ in settings]
    channels_last = trained.config["classifier"].get("channels_last", True)
    module = ImageClassifier(trained.network, trained.recipe, channels_last).to(device).eval()
    for images, labels, _ in validation_batches(trained, limit, device):
        reference: Tensor | None = None
        for setting, meter in zip(settings, meters, strict=True):
            for name, layer in layers.items():
                layer.error_compensation = "none" if setting.clamp_value is None else "clamp"
                layer.clamp_value = (
                    clamp_values[name] if setting.trained or setting.clamp_value is None else setting.clamp_value
                )
            with ExitStack() as stack:
                if setting.clamp_value is not None:
                    for single in meter.values():
                        stack.enter_context(single)
                logits = module(images)
            reference = predicted(logits) if reference is None else reference
            _add(setting, logits, labels, reference)
        for name, layer in layers.items():
            layer.error_compensation, layer.clamp_value = "clamp", clamp_values[name]
        assert reference is not None  # of the first setting
        for layer, setting in zip(layers.values(), prefixes, strict=True):
            layer.error_compensation = "none"
            _add(setting, module(images), labels, reference)
    for name, layer in layers.items():
        layer.error_compensation, layer.clamp_value = "clamp", clamp_values[name]
    _check_finite(trained, settings, dict(zip(layers, prefixes, strict=True)))
    for setting in (*settings, *prefixes):
        setting.val_loss /= max(setting.images, 1)
        setting.val_top1 /= max(setting.images, 1)
    for setting, meter in zip(settings, meters, strict=True):
        count = sum(float(m.count) for m in meter.values())
        setting.clamped_fraction = sum(float(m.clamped) for m in meter.values()) / count if count else 0.0
    measured = zip(meters[0].items(), prefixes, strict=True)
    return Audit(settings, [_layer(name, layers[name], meter, prefix) for (name, meter), prefix in measured])


def _add(setting: Setting, logits: Tensor, labels: Tensor, reference: Tensor) -> None:
    known = labels >= 0
    setting.images += int(known.sum())
    setting.val_loss += float(F.cross_entropy(logits[known].double(), labels[known], reduction="sum"))
    prediction = predicted(logits)
    setting.val_top1 += int((prediction == labels)[known].sum())
    setting.changed_predictions += int((prediction != reference).sum())


def _check_finite(trained: Trained, settings: Sequence[Setting], prefixes: dict[str, Setting]) -> None:
    """Raises DeployError where logits were NaN or infinite, with the first layer whose removal makes them so."""
    own, _, *others = settings
    keep = "keep the clamps: scripts/export.py --keep-clamp, in a form that holds them"
    places = [("with its clamps, as trained", own, "its training has diverged")]
    places += [(f"once the clamps up to {name} are removed", prefix, keep) for name, prefix in prefixes.items()]
    places += [(f"at --values {other.clamp_value:g}", other, "leave that value out") for other in others]
    for where, setting, cure in places:
        if not math.isfinite(setting.val_loss):
            raise DeployError(f"{trained.checkpoint}: the network's logits are NaN or infinite {where}; {cure}")


def _layer(name: str, layer: OnlineNorm, meter: ClampMeter, prefix: Setting) -> Layer:
    count = float(meter.count)
    fraction = float(meter.clamped) / count
    return Layer(
        name, layer.num_features, layer.clamp_value, int(count), fraction, float(meter.largest),
        prefix.val_loss, prefix.val_top1, prefix.changed_predictions,
    )  # fmt: skip


def render_audit(result: Audit) -> str:
    """Both tables as Markdown, and where what removal costs, or gains, starts."""
    lines = ["| clamp | val loss | val top-1 | predictions changed | activations clamped |", "|---|---|---|---|---|"]
    for s in result.settings:
        name = "removed" if s.clamp_value is None else f"{s.clamp_value:g}" + (" (as trained)" if s.trained else "")
        clamped = "" if s.clamp_value is None else f"{s.clamped_fraction:.2e}"
        lines.append(
            f"| {name} | {s.val_loss:.4f} | {s.val_top1:.2%} | {s.changed_predictions} of {s.images} | {clamped} |"
        )
    lines += [
        "",
        "| layer | channels | clamp | activations clamped | largest activation before the clamp "
        "| removed up to here: val loss | val top-1 | predictions changed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {x.name} | {x.channels} | {x.clamp_value:g} | {x.clamped_fraction:.2e} | {x.max_abs_activation:.2f} "
        f"| {x.removed_val_loss:.4f} | {x.removed_val_top1:.2%} | {x.removed_changed_predictions} |"
        for x in result.layers
    ]
    if (start := result.start) is None:
        told = "Removing the clamps changes no prediction."
    else:
        own, removed = result.settings[:2]
        does = "costs" if removed.val_top1 < own.val_top1 else "gains" if removed.val_top1 > own.val_top1 else "changes"
        told = (
            f"What removal {does} starts at {start.name}: up to there {start.removed_changed_predictions} predictions "
            f"change, of {removed.changed_predictions} in all."
        )
    return "\n".join([*lines, "", told]) + "\n"


def draw_audit(result: Audit, path) -> None:
    """Accuracy against clamp value, and what reaches each layer's clamp, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    removed = next(s for s in result.settings if s.clamp_value is None)
    points = sorted((s.clamp_value, 100 * s.val_top1, s.trained) for s in result.settings if s.clamp_value is not None)
    left.axhline(100 * removed.val_top1, color="0.5", linestyle="--", label="removed")
    left.plot([p[0] for p in points], [p[1] for p in points], "o-", color="C0", label="clamp value without retraining")
    left.plot(*next((p[0], p[1]) for p in points if p[2]), "s", color="C1", markersize=9, label="as trained")
    left.set(xscale="log", xlabel="clamp value (deviations)", ylabel="validation top-1 (%)")
    left.set_xticks([p[0] for p in points], [f"{p[0]:g}" for p in points], minor=False)
    left.minorticks_off()
    left.legend()
    positions = range(len(result.layers))
    right.bar(
        positions, [x.max_abs_activation for x in result.layers], color="C0", label="largest |w| before the clamp"
    )
    right.axhline(result.layers[0].clamp_value, color="C1", label="clamp value")
    right.set(ylabel="deviations", xlabel="layer")
    step = max(len(result.layers) // 20, 1)
    right.set_xticks(positions[::step], [x.name for x in result.layers][::step], rotation=90, fontsize=7)
    fractions = right.twinx()
    fractions.plot(positions, [100 * x.clamped_fraction for x in result.layers], "k.", label="clamped (right axis)")
    fractions.set_ylabel("activations clamped (%)")
    fractions.set_ylim(bottom=0)
    handles = [*right.get_legend_handles_labels()[0], *fractions.get_legend_handles_labels()[0]]
    right.legend(handles, [handle.get_label() for handle in handles], fontsize=8)
    figure.savefig(path, dpi=120, format="png")
