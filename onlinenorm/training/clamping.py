"""The activation clamp over a run: what it does, what its removal would do, and how a recipe takes it away."""

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onlinenorm.normalizers import OnlineNorm
from onlinenorm.training.accuracy import full_precision, predicted
from onlinenorm.training.recipe import Recipe, clamp_factor


def clamped_layers(network: nn.Module) -> list[OnlineNorm]:
    """The OnlineNorm layers of `network` that clamp."""
    return [m for m in network.modules() if isinstance(m, OnlineNorm) and m.error_compensation == "clamp"]


class ClampMeter:
    """Context that measures, in eval mode, what reaches the clamps of a network.

    Each call of a layer's `OnlineNorm.forward`, which a subclass makes within its own, is evaluated once more without
    clamp, residual and ReLU: w = weight y + bias, which the clamp limits to [-c, c]. `totals` then holds (activations
    with |w| > c, activations, max |w|).
    """

    def __init__(self, network: nn.Module):
        self.layers = clamped_layers(network)
        self.clamped = self.count = self.largest = torch.zeros((), dtype=torch.float64)

    def __enter__(self) -> "ClampMeter":
        self._forward = forward = OnlineNorm.forward

        @functools.wraps(forward)
        def measured(layer: OnlineNorm, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
            if layer in self.layers:
                self._measure(layer, x)
            return forward(layer, x, *arguments, **options)

        OnlineNorm.forward = measured  # type: ignore[method-assign,assignment]  # until closed
        return self

    def __exit__(self, *_: object) -> None:
        OnlineNorm.forward = self._forward  # type: ignore[method-assign]  # as it was

    @torch.no_grad()
    def _measure(self, layer: OnlineNorm, x: Tensor) -> None:
        assert not layer.training, "measured where statistics stand still"
        layer.error_compensation = "none"
        try:
            magnitude = self._forward(layer, x).abs()
        finally:
            layer.error_compensation = "clamp"
        device = magnitude.device
        self.clamped = self.clamped.to(device) + (magnitude > layer.clamp_value).sum()
        self.count = self.count.to(device) + magnitude.numel()
        self.largest = torch.maximum(self.largest.to(device), magnitude.max().double())

    def totals(self, strategy) -> tuple[float, float, float]:
        """(clamped, activations, max |w|) over all processes of a Lightning strategy."""
        clamped, count = (strategy.reduce(value.clone(), reduce_op="sum") for value in (self.clamped, self.count))
        return float(clamped), float(count), float(strategy.reduce(self.largest.clone(), reduce_op="max"))


class ClampSchedule(pl.Callback):
    """Gives the clamps of a network the value that a recipe has for an epoch; see `recipe.clamp_factor`.

    With `removal_every_epoch` each validation of an epoch that clamps runs a second time without: the epoch's row gets
    `without_val_loss` (unless it is not finite), `without_val_top1` and `changed_predictions`, of the whole set.
    """

    def __init__(self, network: nn.Module, recipe: Recipe):
        self.recipe, self.layers = recipe, clamped_layers(network)
        self._values = [layer.clamp_value for layer in self.layers]
        self._factor: float | None = 1.0

    @property
    def clamp_value(self) -> float | None:
        """The value in force, of the first layer; None where nothing clamps."""
        return None if self._factor is None or not self.layers else self.layers[0].clamp_value

    def set(self, factor: float | None) -> bool:
        """Multiplies the values that the network was built with, or removes the clamps; returns whether that is new."""
        if factor == self._factor:
            return False
        self._factor = factor
        for layer, value in zip(self.layers, self._values, strict=True):
            layer.error_compensation = "none" if factor is None else "clamp"
            if factor is not None:
                layer.clamp_value = value * factor
        return bool(self.layers)

    def put_back(self) -> None:
        """The clamps as in the run's last epoch that had them."""
        self.set(clamp_factor(self.recipe, self.recipe.epochs - self.recipe.clamp_off_epochs))

    @contextlib.contextmanager
    def removed(self) -> Iterator[None]:
        """Context without the clamps."""
        factor = self._factor
        self.set(None)
        try:
            yield
        finally:
            self.set(factor)

    def on_train_start(self, trainer, module) -> None:
        self._follow(trainer, module)

    def on_train_epoch_start(self, trainer, module) -> None:
        self._follow(trainer, module)

    def _follow(self, trainer, module) -> None:
        if self.set(clamp_factor(self.recipe, trainer.current_epoch + 1)) and module.graph is not None:
            module.graph_steps()  # anew: the value is part of what was captured

    def _measures(self, trainer) -> bool:
        return trainer.state.fn == "fit" and self.recipe.removal_every_epoch and self.clamp_value is not None

    def on_validation_epoch_start(self, trainer, module) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64, device=module.device)

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if not self._measures(trainer):
            return
        images, labels, _ = batch
        context = trainer.precision_plugin.val_step_context
        with torch.compiler.set_stance("force_eager"), self.removed(), context():
            logits = module(images)
        known = labels >= 0
        prediction = predicted(logits)
        loss = F.cross_entropy(full_precision(logits)[known], labels[known], reduction="none").double().sum()
        counts = ((prediction == labels) & known, prediction != predicted(outputs), known)
        self._sums += torch.stack([loss, *(count.double().sum() for count in counts)])

    def figures(self, module) -> dict[str, float]:
        """Of the last validation, over all processes, what its row gets; every process calls this."""
        if not self._measures(module.trainer):
            return {}
        loss, top1, changed, images = module.reduced(self._sums)
        images = max(images, 1.0)
        figures = {"without_val_top1": top1 / images, "changed_predictions": int(changed)}
        return figures | ({"without_val_loss": loss / images} if math.isfinite(loss) else {})
