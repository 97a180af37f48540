"""Normalizers as modules: OnlineNorm, clamp removal, and those it is compared with.

One of your own is a class and a file; CONTRIBUTING.md tells how, and which attributes the class may have.
"""

from onlinenorm.normalizers.baselines import group_norm, identity, layer_norm
from onlinenorm.normalizers.batch_renorm import BatchRenorm1d, BatchRenorm2d
from onlinenorm.normalizers.clamping import remove_clamping
from onlinenorm.normalizers.conversion import convert
from onlinenorm.normalizers.distributed import average_statistics, gather_statistics, merged
from onlinenorm.normalizers.loss_scale import rescale_controls
from onlinenorm.normalizers.online_norm import OnlineNorm, OnlineNorm1d, OnlineNorm2d
from onlinenorm.normalizers.sync_batch_norm import SyncBatchNorm2d, check_synchronisable, synchronise_batch_norm
from onlinenorm.normalizers.update import update_statistics

__all__ = [
    "BatchRenorm1d",
    "BatchRenorm2d",
    "OnlineNorm",
    "OnlineNorm1d",
    "OnlineNorm2d",
    "SyncBatchNorm2d",
    "average_statistics",
    "check_synchronisable",
    "convert",
    "gather_statistics",
    "group_norm",
    "identity",
    "layer_norm",
    "merged",
    "remove_clamping",
    "rescale_controls",
    "synchronise_batch_norm",
    "update_statistics",
]
