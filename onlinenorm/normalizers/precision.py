"""State that stays in full precision whatever a network is converted to."""

import torch
from torch import nn

HALF = (torch.float16, torch.bfloat16)


class FullPrecision(nn.Module):
    """A layer whose parameters and buffers are float32, or float64 after ``double()``, and never in half precision.

    Moving statistics need more digits than that: decay factors like 0.999 would round to 1. Of a conversion to half
    precision only the device is followed, and what was saved in it is loaded as float32.
    """

    def _apply(self, fn, recurse=True):
        def keep_precision(tensor):
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in HALF else moved

        return super()._apply(keep_precision, recurse)

    def _check_state(self) -> None:
        """Raises RuntimeError for statistics in half precision, which some wrappers put in by ``buffer.data = ...``."""
        for name, buffer in self._buffers.items():
            if buffer is not None and buffer.dtype in HALF:
                raise RuntimeError(
                    f"{type(self).__name__}: {name} is in {buffer.dtype}, in which a decay like 0.999 rounds to 1; "
                    "leave buffers in float32, in FullyShardedDataParallel by a MixedPrecision without buffer_dtype"
                )

    def _load_from_state_dict(self, state_dict, prefix, *arguments):
        for name in (*self._parameters, *self._buffers):
            tensor = state_dict.get(prefix + name)
            if tensor is not None and tensor.dtype in HALF:
                state_dict[prefix + name] = tensor.float()
        super()._load_from_state_dict(state_dict, prefix, *arguments)
