"""Statistics that every process keeps for itself, made one before they are used or saved."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from onlinenorm.normalizers.online_norm import OnlineNorm
from onlinenorm.ops.across_processes import average_over_processes


@torch.no_grad()
def average_statistics(model: nn.Module) -> int:
    """Replace per-process running statistics by their mean over all processes, in place; returns the layers changed.

    These are OnlineNorm layers with local statistics and BatchNorm layers that are not synchronised. Layers with global
    statistics are identical on all processes and left alone. One collective for the whole model; without a process
    group, or with one process, nothing happens. Every process must call it at the same point.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return 0
    layers = [
        layer
        for layer in model.modules()
        if (isinstance(layer, OnlineNorm) and layer.statistics == "local")
        or (isinstance(layer, _BatchNorm) and not isinstance(layer, nn.SyncBatchNorm) and layer.track_running_stats)
    ]
    if layers:
        average_over_processes([b for layer in layers for b in layer.buffers(False) if b.is_floating_point()])
    return len(layers)
