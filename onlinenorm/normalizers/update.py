"""Statistics of weights that were not trained as they are: averaged ones, or those of another network."""

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from onlinenorm.normalizers.online_norm import OnlineNorm


def update_statistics(model: nn.Module, batches: Iterable, device: torch.device | str | None = None) -> int:
    """Move the statistics of OnlineNorm layers along a stream of batches, without training; returns the layers.

    What ``torch.optim.swa_utils.update_bn`` does for BatchNorm, and does not for OnlineNorm, as it looks for BatchNorm
    alone: after averaging weights, give it some 3 / (1 - alpha_fwd) samples. Statistics move on from where they are,
    since they are a running average with a fixed decay; controls stay. The model runs in training mode, so statistics
    of other norms move by their own rule, and gets its modes back.

    Args:
        model: the network, on its device.
        batches: input tensors, or sequences whose first element is one, as loaders give them.
        device: where inputs are moved to; None leaves them where they are.

    Raises:
        ValueError: a batch that is neither; nothing moves by it.

    Warns when the model has no OnlineNorm layer.
    """
    layers = [m for m in model.modules() if isinstance(m, OnlineNorm)]
    if not layers:
        warnings.warn("update_statistics changed nothing: the model has no OnlineNorm layer", stacklevel=2)
        return 0
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        for batch in batches:
            x = batch[0] if isinstance(batch, (list, tuple)) and batch else batch
            if not isinstance(x, Tensor):
                raise ValueError(
                    f"batches: a batch is a {type(x).__name__}, where update_statistics takes an input tensor, or a "
                    "sequence that begins with one; give it a generator, as (batch['image'] for batch in loader)"
                )
            with torch.inference_mode(False), torch.enable_grad():  # without, nothing moves
                x = x.clone() if x.is_inference() else x  # autograd does not take it
                model(x if device is None else x.to(device))
    finally:
        for module, mode in modes:
            module.training = mode
    return len(layers)
