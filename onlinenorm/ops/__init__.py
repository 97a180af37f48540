"""OnlineNorm as functions: one interface, three backends.

``reference`` is a readable loop over samples, ``torch`` the same mathematics on per-sample moments with an associative
scan, ``fused`` the GPU kernels. Each module offers ``train_step`` and ``evaluate`` with the same signatures.
"""

from onlinenorm.ops.spec import ERROR_COMPENSATIONS, NormSpec

__all__ = ["BACKENDS", "ERROR_COMPENSATIONS", "NormSpec", "backend_module"]

BACKENDS = ("fused", "torch", "reference")


def backend_module(name: str):
    """Module of a backend, by its name; the fused kernels (and Triton with them) are imported at first use only."""
    if name == "reference":
        from onlinenorm.ops import reference

        return reference
    if name == "torch":
        from onlinenorm.ops import vectorized

        return vectorized
    assert name == "fused", name
    from onlinenorm.ops import fused

    return fused
