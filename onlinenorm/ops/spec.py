"""The constants of one OnlineNorm layer, as every backend receives them."""

from dataclasses import dataclass

ERROR_COMPENSATIONS = ("clamp", "layer_scaling", "none")


@dataclass(frozen=True)
class NormSpec:
    """Hyperparameters of one layer; immutable, so that compiled graphs can treat them as constants.

    ``alpha_fwd`` and ``alpha_bkw`` are the decay factors of the statistics and of the control process, ``eps`` is added
    to variances. ``error_compensation`` is one of ``ERROR_COMPENSATIONS``; ``clamp_value`` belongs to "clamp",
    ``layer_scaling_eps`` and ``layer_scaling_group_size`` (channels a group; None: all) to "layer_scaling".
    ``gradient_scale`` gives the unit of the control state: u and v are kept as gradient x gradient_scale. ``processes``
    is the number of processes that a global batch was dealt out to, sample by sample, and whose batches form one
    stream in that order; ``group`` names their process group ("": all processes), and ``counts`` the samples of each
    where these differ (empty: all have as many). ``mailbox`` is the number of a layer whose kernels tell other
    processes their moments while they run, where they can (0: the moments are gathered), ``shortcut_mailbox`` that of
    the layer on a residual that one kernel serves too.
    """

    alpha_fwd: float = 0.999
    alpha_bkw: float = 0.99
    eps: float = 1e-5
    error_compensation: str = "clamp"
    clamp_value: float = 5.0
    layer_scaling_eps: float = 1e-5
    layer_scaling_group_size: int | None = None
    gradient_scale: float = 1.0
    processes: int = 1
    group: str = ""
    counts: tuple[int, ...] = ()
    mailbox: int = 0
    shortcut_mailbox: int = 0

    @property
    def peers(self) -> tuple[int, str, tuple[int, ...]]:
        """Whose batches form the stream, as `distributed` and the custom operators take it."""
        return self.processes, self.group, self.counts

    def as_arguments(self) -> tuple:
        """The fields in order: custom operators take numbers and strings, not objects."""
        return (
            self.alpha_fwd,
            self.alpha_bkw,
            self.eps,
            self.error_compensation,
            self.clamp_value,
            self.layer_scaling_eps,
            self.layer_scaling_group_size,
            self.gradient_scale,
        )
