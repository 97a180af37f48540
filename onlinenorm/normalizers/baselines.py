"""The normalizers OnlineNorm is compared with, as callables of the channel count.

Each takes ``num_features`` and returns a fresh layer for (N, C, H, W), so that a network asks for any normalizer in
the same way. BatchNorm and InstanceNorm are torch's own classes and need no adapter.
"""

from torch import nn

from onlinenorm.errors import ArgumentError


def group_norm(num_features: int, num_groups: int = 32, eps: float = 1e-5) -> nn.GroupNorm:
    """GroupNorm over ``num_groups`` groups, or one channel a group where there are fewer channels than groups.

    Raises ValueError where the groups do not divide the channels. Source: Wu and He, arXiv:1803.08494.
    """
    groups = min(num_groups, num_features)
    if groups < 1 or num_features % groups:
        raise ArgumentError("num_groups", f"{num_groups!r} must divide the network's channels, here {num_features}")
    return nn.GroupNorm(groups, num_features, eps=eps)


def layer_norm(num_features: int, eps: float = 1e-5) -> nn.GroupNorm:
    """LayerNorm of a convolutional layer: one mean and variance a sample over (C, H, W), affine per channel.

    Source: Ba, Kiros and Hinton, arXiv:1607.06450.
    """
    return nn.GroupNorm(1, num_features, eps=eps)


def identity(num_features: int) -> nn.Identity:
    """No normalizer at all."""
    return nn.Identity()
