"""What a changing loss scale asks of OnlineNorm."""

import torch
from torch import nn

from onlinenorm.normalizers.online_norm import OnlineNorm


@torch.no_grad()
def rescale_controls(network: nn.Module, factor: float) -> None:
    """Multiply the control state of every OnlineNorm in ``network``: to be called when the loss scale is multiplied.

    Controls are averages of gradients as backward sees them. After a change of the scale those of earlier samples would
    be too large or too small, and wear off by ``alpha_bkw`` a sample only::

        before = scaler.get_scale()
        ...
        scaler.update()
        rescale_controls(model, scaler.get_scale() / before)

    In place, so that compiled networks and captured CUDA graphs go on as they are; exact for powers of two.
    """
    for module in network.modules():
        if isinstance(module, OnlineNorm):
            module.control_u.mul_(factor)
            module.control_v.mul_(factor)
