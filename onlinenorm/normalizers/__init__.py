"""Normalizers as modules: OnlineNorm, clamp removal, and the baselines it is compared with.

One of your own is a class of your own package, or a function that makes its layers, which takes ``num_features``, and a
file ``normalizer/NAME.yaml`` in configs/ or in the folder of ``--config-dir``: ``_target_: package.Class``,
``_partial_: true`` and its other arguments. ``normalizer=NAME`` then trains with it, in a row of that name in tables;
scripts/export.py and predict.py build it where ``--allow package.Class`` says so. A class may have the attributes

- ``parameter_roles``: {name of a parameter: "norm_weight" (multiplies) or "norm_bias" (is added)}, which decide about
  weight decay; ``weight`` and ``bias`` with a value a channel need none;
- ``statistics_depend_on``: a tuple of "processes" and "accumulation", the divisions of a batch that change its
  statistics; without it both do, and runs that divide batches otherwise are other runs (see ``dependence``);
- ``statistics = "global"``: its buffers are the same on all processes. Without it they are averaged before validation
  and in checkpoints, as are parameters that are not trained; of counts the largest is taken;
- ``averages_statistics = False``: they cannot be, and a run on several processes is refused;
- ``fuses_residual = True``: a call takes ``residual`` and ``relu`` and gives relu(norm(x) + residual).

A network of your own (``model/NAME.yaml``) takes ``normalizer``, a callable of the number of channels that makes a new
layer at each call, ``num_classes`` and ``in_channels``, and gives logits (N, num_classes). Images of your own
(``data/NAME.yaml``) are a subclass of ``onlinenorm.data.ImageDataModule``.
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
