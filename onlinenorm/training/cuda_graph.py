"""A network's training step on the GPU as CUDA graphs: two replays in place of hundreds of kernel launches."""

import torch
from torch import Tensor, nn


class _Call(nn.Module):
    """The network as a module of its own: what is captured is `network(x)`, compiled or not."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)


class GraphedNetwork:
    """Calls `network` in eval mode and without gradients as it is, in training as captured graphs.

    The first training batch is captured, after warm-up passes that leave no trace in the network's buffers; batches of
    its shape are replayed, others run as they are. Gradients reach autograd as usual, so that hooks, data-parallel
    wrappers and optimizers see no difference. The memory of activations stays reserved between steps.

    Args:
        network: (N, C, H, W) -> (N, classes), on a CUDA device, with buffers that are updated in place.
    """

    def __init__(self, network: nn.Module):
        self.network = network
        self._replay = None
        self._captured: tuple | None = None

    def __call__(self, images: Tensor) -> Tensor:
        if not (self.network.training and torch.is_grad_enabled()):
            return self.network(images)
        if self._replay is None:
            self._captured = _kind(images)
            self._replay = _capture(self.network, images)
        return self._replay(images) if _kind(images) == self._captured else self.network(images)


def _kind(images: Tensor) -> tuple:
    return images.shape, images.dtype, images.stride()


def _capture(network: nn.Module, images: Tensor):
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    # weights cast by autocast must be cast again in every replay, not once and kept
    dtype, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
    with torch.autocast("cuda", dtype, enabled, cache_enabled=False):
        replay = torch.cuda.make_graphed_callables(_Call(network), (images.clone(),))
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            buffer.copy_(before[name])
    return replay
