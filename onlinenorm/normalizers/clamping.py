"""Taking the clamp out of a trained network."""

import warnings

from torch import nn

from onlinenorm.normalizers.online_norm import OnlineNorm


def remove_clamping(model: nn.Module) -> int:
    """Switch off the activation clamp of every OnlineNorm layer in ``model``, in place; returns the layers changed.

    An OnlineNorm layer without clamp is, in eval mode, w = weight (x - mean) / sqrt(var + eps) + bias: what BatchNorm
    computes. Statistics and parameters stay as they are. Layer scaling is left alone: it couples the channels of a
    sample and has no such limit. Warns when no layer was clamped.
    """
    clamped = [m for m in model.modules() if isinstance(m, OnlineNorm) and m.error_compensation == "clamp"]
    for layer in clamped:
        layer.error_compensation = "none"
    if not clamped:
        warnings.warn("remove_clamping changed nothing: the model has no clamped OnlineNorm layer", stacklevel=2)
    return len(clamped)
