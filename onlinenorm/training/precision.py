"""Half precision with a loss scale, which OnlineNorm's controls follow."""

import torch
from pytorch_lightning.plugins.precision import MixedPrecision

from onlinenorm.normalizers import rescale_controls


class ScaledHalf(MixedPrecision):
    """float16 with float32 weights on a GPU or the CPU; the scaler's state is part of checkpoints.

    A step that overflows is left out, as GradScaler does: it counts as a step, and its images as seen.
    """

    def __init__(self, device: str):
        super().__init__("16-mixed", device)

    def optimizer_step(self, optimizer, model, closure, **kwargs):
        one = torch.ones((), device=model.device)
        before = self.scaler.scale(one)  # get_scale() waits for the device
        result = super().optimizer_step(optimizer, model, closure, **kwargs)
        rescale_controls(model, (self.scaler.scale(one) / before).masked_fill(before <= 0, 1.0))
        return result
