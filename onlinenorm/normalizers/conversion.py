"""Surgery between BatchNorm and OnlineNorm: in eval mode, and without a clamp, both compute the same."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedTensorMixin

from onlinenorm.arguments import check_choice
from onlinenorm.normalizers.online_norm import OnlineNorm, OnlineNorm1d, OnlineNorm2d

_FROM_THE_LAYER = ("num_features", "eps", "affine", "device", "dtype")


class OnlineNormAct2d(OnlineNorm2d):
    """act(drop(OnlineNorm2d(x))): stands in for layers of timm that hold a BatchNorm2d and an activation in one.

    Args, state and errors are OnlineNorm2d's; ``act`` and ``drop`` are modules set after construction.
    """

    fuses_residual = False
    act: nn.Module
    drop: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.act, nn.ReLU) and isinstance(self.drop, nn.Identity):
            return super().forward(x, relu=True)
        return self.act(self.drop(super().forward(x)))


def convert(model: nn.Module, to: str = "online", **arguments) -> nn.Module:
    """Replace BatchNorm by OnlineNorm in ``model``, or OnlineNorm by BatchNorm, in place; returns the model.

    Both normalise with running statistics in eval mode, y = weight (x - mean) / sqrt(var + eps) + bias, so these five
    are carried over: parameters stay the same objects (an optimizer that holds them goes on), with their device, dtype
    and requires_grad, and each layer keeps its training flag and eps. OnlineNorm's control state starts at 0.

    Eval: to OnlineNorm, outputs change only where the guard acts (``error_compensation="none"`` has none); to
    BatchNorm, the clamp is dropped as by ``remove_clamping``. There and back gives the original network, momentum
    included. Training: statistics move by the new layer's own rule.

    A BatchNorm layer in half precision becomes OnlineNorm with float32 parameters, which it keeps them in, and gets its
    dtype back with BatchNorm. SyncBatchNorm becomes OnlineNorm2d with global statistics and comes back as BatchNorm2d.
    timm's BatchNormAct2d keeps its activation and dropout.

    Args:
        model: any network, or one layer (then the new layer is returned).
        to: "online" or "batch".
        arguments: to "online", OnlineNorm's (alpha_fwd, alpha_bkw, error_compensation, clamp_value, ...) but those
            that the replaced layer sets (eps, affine, ...); to "batch", ``momentum``: by default that of the BatchNorm
            that was there before, else 0.1.

    Raises:
        ValueError: a layer that cannot be replaced (its place is named, nothing is changed): BatchNorm without running
            statistics, BatchNorm3d, an uninitialised lazy layer, an unknown subclass with a forward of its own; layer
            scaling; an argument out of its range.

    Warns when there is nothing to replace.
    """
    check_choice("to", to, ("online", "batch"))
    allowed = "momentum" if to == "batch" else "OnlineNorm's own except " + ", ".join(_FROM_THE_LAYER)
    for key in arguments:
        if key in _FROM_THE_LAYER or (to == "batch") != (key == "momentum"):
            raise ValueError(f"{key}: is no argument of a conversion to {to!r}; they are {allowed}")
    kind = _BatchNorm if to == "online" else OnlineNorm
    replace: Callable = _to_online if to == "online" else _to_batch
    replacements: dict[nn.Module, nn.Module] = {}
    for path, layer in model.named_modules():  # all are built before the first is put in place
        if isinstance(layer, kind):
            try:
                replacements[layer] = replace(layer, arguments)
            except TypeError as error:
                raise ValueError(f"{error}; the arguments of a conversion are {allowed}") from None
            except ValueError as error:
                raise ValueError(f"{path or 'the layer'}: {error}") from None
    if not replacements:
        warnings.warn(f"convert changed nothing: the model has no {kind.__name__.strip('_')} layer", stacklevel=2)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replacements:
                parent._modules[name] = replacements[child]
    return replacements.get(model, model)


def _to_online(batch: _BatchNorm, arguments: dict) -> OnlineNorm:
    if isinstance(batch.running_mean, UninitializedTensorMixin):
        raise ValueError("is a lazy layer that has seen no data; run one batch through the network first")
    cls = _online_class(batch)
    if batch.running_mean is None:
        raise ValueError(
            "BatchNorm with track_running_stats=False has no statistics to carry over; "
            "build it with track_running_stats=True and let it see data first"
        )
    if isinstance(batch, nn.SyncBatchNorm):
        arguments = {"statistics": "global", **arguments}
    mean = batch.running_mean
    dtype = torch.float64 if mean.dtype == torch.float64 else torch.float32
    online = cls(batch.num_features, eps=batch.eps, affine=batch.affine, device=mean.device, dtype=dtype, **arguments)
    online._batch_norm = {
        "cls": type(batch) if cls is OnlineNormAct2d else None,
        "momentum": batch.momentum,
        "batches": batch.num_batches_tracked,
        "dtype": mean.dtype,
    }
    return _carry(batch, online, dtype)


def _to_batch(online: OnlineNorm, arguments: dict) -> _BatchNorm:
    if online.error_compensation == "layer_scaling":
        raise ValueError(
            "layer scaling divides by the root mean square over all channels of a sample, which BatchNorm, being per "
            "channel, cannot express; train with error_compensation='clamp' for a network that becomes a BatchNorm one"
        )
    before = getattr(online, "_batch_norm", {})
    momentum = arguments.get("momentum", before.get("momentum", 0.1))
    plain = nn.BatchNorm1d if isinstance(online, OnlineNorm1d) else nn.BatchNorm2d
    cls = before.get("cls") or plain
    batch = cls(online.num_features, eps=online.eps, momentum=momentum, affine=online.affine,
                device=online.running_mean.device)  # fmt: skip
    if before.get("batches") is not None:
        batch.num_batches_tracked = before["batches"].to(online.running_mean.device)
    # float64 only if the network has been made so since
    dtype = online.running_mean.dtype
    return _carry(online, batch, before.get("dtype", dtype) if dtype == torch.float32 else dtype)


def _carry(old: nn.Module, new: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``new`` with the statistics, affine parameters, activation and training flag of ``old``; the same objects."""
    for name in ("running_mean", "running_var"):
        setattr(new, name, getattr(old, name).to(dtype))
    for name in ("weight", "bias"):
        parameter = getattr(old, name)
        if parameter is not None and parameter.dtype != dtype:
            parameter = nn.Parameter(parameter.detach().to(dtype), requires_grad=parameter.requires_grad)
        setattr(new, name, parameter)
    if isinstance(new, OnlineNormAct2d) or isinstance(old, OnlineNormAct2d):
        new.act, new.drop = old.act, old.drop
    new.training = old.training
    return new


def _online_class(batch: _BatchNorm) -> type[OnlineNorm]:
    cls = type(batch)
    for base, online in ((nn.BatchNorm1d, OnlineNorm1d), (nn.BatchNorm2d, OnlineNorm2d)):
        if isinstance(batch, base) and cls.forward is base.forward:
            return online
    if isinstance(batch, nn.SyncBatchNorm) and cls.forward is nn.SyncBatchNorm.forward:
        return OnlineNorm2d
    if isinstance(batch, nn.BatchNorm2d) and all(
        isinstance(getattr(batch, n, None), nn.Module) for n in ("act", "drop")
    ):
        return OnlineNormAct2d
    raise ValueError(
        f"{cls.__name__} has no counterpart: BatchNorm1d, BatchNorm2d, SyncBatchNorm and timm's BatchNormAct2d do"
    )
