"""How much the activation clamp does in a trained network."""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from onlinenorm.normalizers import OnlineNorm


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
