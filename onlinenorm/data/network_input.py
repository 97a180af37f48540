"""From uint8 images to what a network takes."""

from collections.abc import Sequence

import torch
from torch import Tensor


class NetworkInput:
    """uint8 images as normalised float32 of a network's size and channels, on their device.

    x = (pixels / 255 + colour - mean) / std in one pass, then bilinear upscaling, then repeated gray. Once it has run
    on a device, or `prepare` has, it can be compiled and captured into a CUDA graph there.

    Args:
        mean, std: of the images' own channels, in units of [0, 1].
        size: width and height of the network's input, pixels.
        channels: of the network's input.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], size: int, channels: int):
        self.mean, self.std, self.size, self.channels = mean, std, size, channels
        self._statistics: dict[torch.device, list[Tensor]] = {}

    def __call__(self, images: Tensor, colour: Tensor | None = None) -> Tensor:
        """Of images N x C x H x W, or N x K x C x H x W of K crops; colour: shifts N x C of [0, 1], or None."""
        crops = images.shape[1] if images.dim() == 5 else None
        x_NCHW = images.flatten(0, 1) if crops else images
        mean_C11, std_C11, scale_C11, shift_C11 = self.prepare(images.device)
        if colour is not None:
            shift_C11 = (colour[:, :, None, None] - mean_C11) / std_C11  # now of each image
        x_NCHW = torch.addcmul(shift_C11, x_NCHW, scale_C11)
        if x_NCHW.shape[-1] != self.size:
            x_NCHW = torch.nn.functional.interpolate(
                x_NCHW, size=(self.size, self.size), mode="bilinear", align_corners=False
            )
        if x_NCHW.shape[1] != self.channels:
            x_NCHW = x_NCHW.repeat(1, self.channels, 1, 1)
        return x_NCHW.unflatten(0, (-1, crops)) if crops else x_NCHW

    def prepare(self, device: torch.device) -> list[Tensor]:
        """Mean and deviation, scale and shift on a device, which are kept there: a copy of them from the host at every
        batch would wait for the GPU."""
        if device not in self._statistics:
            mean_C11, std_C11 = (torch.tensor(values, device=device)[:, None, None] for values in (self.mean, self.std))
            self._statistics[device] = [mean_C11, std_C11, 1.0 / (255.0 * std_C11), -mean_C11 / std_C11]
        return self._statistics[device]
