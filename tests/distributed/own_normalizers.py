"""Normalizers of somebody's own, with statistics that each process moves by its own images."""

from typing import ClassVar

import torch
from torch import nn


class DriftingNorm(nn.Module):
    """Subtracts a running level, in a buffer of a shape of its own, and counts what it has seen."""

    parameter_roles: ClassVar = {"gamma": "norm_weight"}

    def __init__(self, num_features: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, num_features, 1, 1))
        self.register_buffer("level", torch.zeros(1, num_features, 1, 1))
        self.register_buffer("images", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        if self.training:
            self.level.lerp_(x.detach().mean((0, 2, 3), keepdim=True), 0.3)
            self.images += len(x)
        return torch.tanh((x - self.level) * self.gamma)
