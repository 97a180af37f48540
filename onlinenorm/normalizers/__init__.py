"""Normalizers as modules: OnlineNorm, clamp removal, and the baselines it is compared with."""

from onlinenorm.normalizers.across_processes import average_statistics, gather_statistics, merged
from onlinenorm.normalizers.baselines import group_norm, identity, layer_norm
from onlinenorm.normalizers.clamping import remove_clamping
from onlinenorm.normalizers.conversion import convert
from onlinenorm.normalizers.loss_scale import rescale_controls
from onlinenorm.normalizers.online_norm import OnlineNorm, OnlineNorm1d, OnlineNorm2d
from onlinenorm.normalizers.sync_batch_norm import SyncBatchNorm2d, synchronise_batch_norm
from onlinenorm.normalizers.update import update_statistics

__all__ = [
    "OnlineNorm",
    "OnlineNorm1d",
    "OnlineNorm2d",
    "SyncBatchNorm2d",
    "average_statistics",
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
