"""How much the activation clamp does in a trained network."""

import torch
from torch import Tensor, nn

from onlinenorm.normalizers import OnlineNorm


def clamped_layers(network: nn.Module) -> list[OnlineNorm]:
    """The OnlineNorm layers of `network` that clamp."""
    return [m for m in network.modules() if isinstance(m, OnlineNorm) and m.error_compensation == "clamp"]


class ClampMeter:
    """Context that measures, in eval mode, what reaches the clamps of a network.

    A hook on each layer evaluates it again without clamp, residual and ReLU: w = weight y + bias, which the clamp
    limits to [-c, c]. `totals` then holds (activations with |w| > c, activations, max |w|).
    """

    def __init__(self, network: nn.Module):
        self.layers = clamped_layers(network)
        self.clamped = self.count = self.largest = torch.zeros((), dtype=torch.float64)

    def __enter__(self) -> "ClampMeter":
        self._hooks = [layer.register_forward_hook(self._measure) for layer in self.layers]
        return self

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _measure(self, layer: OnlineNorm, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert not layer.training, "measured where statistics stand still"
        layer.error_compensation = "none"
        try:
            magnitude = layer.forward(inputs[0]).abs()
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
