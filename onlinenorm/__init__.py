"""Online Normalization with activation clamping, and the harness that reproduces its ImageNet results."""

from onlinenorm.normalizers import OnlineNorm1d, OnlineNorm2d, convert, remove_clamping

__version__ = "0.1.0"
__all__ = ["OnlineNorm1d", "OnlineNorm2d", "convert", "remove_clamping"]
