"""What the training statistics of a normalizer depend on, besides the images and their order."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

# Ways to divide a step's batch: over processes, and into parts that one process takes one after another.
PROCESSES, ACCUMULATION = "processes", "accumulation"


def statistics_depend_on(normalizer: nn.Module, synchronised: bool = False) -> set[str]:
    """The divisions of a batch, of PROCESSES and ACCUMULATION, that change what a statistic of `normalizer` sees.

    A layer says so, for itself and the layers in it, by an attribute `statistics_depend_on`: a tuple of "processes" and
    "accumulation", () where it takes no statistics, or takes them over single samples, or over all processes and parts
    alike. torch's BatchNorm takes them over what one forward pass is given (with `synchronised`, or as SyncBatchNorm,
    of all processes), torch's other layers over single samples. A layer that says nothing is taken to depend on both:
    runs whose batches are divided otherwise are then other runs. Raises ValueError where something else is said.
    """
    if (said := getattr(normalizer, "statistics_depend_on", None)) is not None:
        if not isinstance(said, tuple | list | set) or not {PROCESSES, ACCUMULATION}.issuperset(said):
            raise ValueError(
                f"{type(normalizer).__name__}.statistics_depend_on: {said!r} is no tuple of {PROCESSES!r} and "
                f"{ACCUMULATION!r}"
            )
        return set(said)
    found: set[str] = set().union(*(statistics_depend_on(layer, synchronised) for layer in normalizer.children()))
    if isinstance(normalizer, _BatchNorm):
        everywhere = synchronised or isinstance(normalizer, nn.SyncBatchNorm)
        return found | ({ACCUMULATION} if everywhere else {PROCESSES, ACCUMULATION})
    if not type(normalizer).__module__.startswith("torch.nn.") or getattr(normalizer, "track_running_stats", False):
        return {PROCESSES, ACCUMULATION}
    return found
