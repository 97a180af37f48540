"""What the training statistics of a normalizer depend on, besides the images and their order."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

# Ways to divide a step's batch: over processes, and into parts that one process takes one after another.
PROCESSES, ACCUMULATION = "processes", "accumulation"


def statistics_depend_on(normalizer: nn.Module, synchronised: bool = False) -> set[str]:
    """The divisions of a batch, of PROCESSES and ACCUMULATION, that change what a statistic of `normalizer` sees.

    A layer says so by an attribute `statistics_depend_on`; torch's BatchNorm takes its statistics over what one forward
    pass is given (with `synchronised`, or as SyncBatchNorm, on all processes), torch's other layers over single
    samples. A layer that says nothing is taken to depend on both.
    """
    found: set[str] = set()
    for layer in normalizer.modules():
        if (said := getattr(layer, "statistics_depend_on", None)) is not None:
            found |= set(said)
        elif isinstance(layer, _BatchNorm):
            everywhere = synchronised or isinstance(layer, nn.SyncBatchNorm)
            found |= {ACCUMULATION} if everywhere else {PROCESSES, ACCUMULATION}
        elif not type(layer).__module__.startswith("torch.nn.") or getattr(layer, "track_running_stats", False):
            found |= {PROCESSES, ACCUMULATION}
    return found
