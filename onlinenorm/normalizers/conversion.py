"""Surgery between BatchNorm and OnlineNorm: in eval mode, and without a clamp, both compute the same."""

import gc
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from onlinenorm.arguments import check_choice
from onlinenorm.errors import ArgumentError
from onlinenorm.normalizers.online_norm import OnlineNorm, OnlineNorm1d, OnlineNorm2d
from onlinenorm.normalizers.sync_batch_norm import SyncBatchNorm2d

_FROM_THE_LAYER = ("num_features", "eps", "affine", "device", "dtype")
_BUFFERS = {_BatchNorm: {"running_mean", "running_var", "num_batches_tracked"},
            OnlineNorm: {"running_mean", "running_var", "control_u", "control_v"}}  # fmt: skip
_OWN_TENSORS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training")
_HOOKS = tuple(key for key in vars(nn.Module()) if key not in _OWN_TENSORS)
# What a subclass may define and still be its base.
_COSMETIC = {"__init__", "extra_repr", "__repr__", "__module__", "__qualname__", "__doc__", "__annotations__",
             "__annotate_func__", "__annotations_cache__", "__constants__", "__static_attributes__",
             "__firstlineno__", "__parameters__", "__orig_bases__"}  # fmt: skip


class OnlineNormAct2d(OnlineNorm2d):
    """act(drop(OnlineNorm2d(x))): stands in for layers of timm that hold a BatchNorm2d and an activation in one.

    Args, state and errors are OnlineNorm2d's; ``act`` and ``drop`` are modules set after construction.
    """

    fuses_residual = False
    act: nn.Module
    drop: nn.Module

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # as timm's
        if isinstance(self.act, nn.ReLU) and isinstance(self.drop, nn.Identity):
            return super().forward(x, relu=True)
        return self.act(self.drop(super().forward(x)))


class OnlineNormNd(OnlineNorm2d):
    """OnlineNorm2d that takes (N, C, ...) of 2 to 5 dimensions, as SyncBatchNorm does."""

    _dimensions = (2, 3, 4, 5)
    _layout = "(N, C, ...) of 2 to 5 dimensions"


_COUNTERPARTS = {
    nn.BatchNorm1d: OnlineNorm1d,
    nn.BatchNorm2d: OnlineNorm2d,
    SyncBatchNorm2d: OnlineNorm2d,
    nn.SyncBatchNorm: OnlineNormNd,
}


def convert(model: nn.Module, to: str = "online", **arguments) -> nn.Module:
    """Turn BatchNorm layers of ``model`` into OnlineNorm, or OnlineNorm into BatchNorm, in place; returns the model.

    Both normalise with running statistics in eval mode, y = weight (x - mean) / sqrt(var + eps) + bias, so these five
    are carried over, and OnlineNorm's control state starts at 0. Layers stay the same objects and change their class,
    so that whatever refers to them goes on: parents and lists, optimizers that hold their parameters, hooks of all
    kinds. Device, dtype, requires_grad, training flags and attributes set on a layer (a qconfig) stay with it.

    Eval: to OnlineNorm, outputs change only where the guard acts (``error_compensation="none"`` has none); to
    BatchNorm, the clamp is dropped as by ``remove_clamping``. There and back gives the original network, momentum
    included. Training: statistics move by the new layer's own rule.

    A BatchNorm layer in half precision becomes OnlineNorm with float32 parameters, which it keeps them in, and gets its
    dtype back with BatchNorm; what optimizers keep of these parameters follows. SyncBatchNorm becomes OnlineNorm with
    global statistics over its process group, and comes back as BatchNorm2d. timm's BatchNormAct2d keeps its activation
    and dropout.

    OnlineNorm layers also load what BatchNorm saved, with controls as before the first sample. BatchNorm refuses the
    controls in what OnlineNorm saved: convert the network and save that, or load with ``strict=False``.

    Args:
        model: any network, or one layer.
        to: "online" or "batch".
        arguments: to "online", OnlineNorm's (alpha_fwd, alpha_bkw, error_compensation, clamp_value, process_group, ...)
            but those that the layer sets (eps, affine, ...); to "batch", ``momentum``: by default that of the BatchNorm
            that was there before, else 0.1.

    Raises:
        ValueError: a layer that cannot be converted (its place is named, nothing is changed): BatchNorm without running
            statistics, or that does not update them; BatchNorm3d, an uninitialised lazy layer, a subclass that
            overrides anything; parameters, buffers or modules beside its own, as pruning, parametrisation and
            quantisation leave; a layer compiled by its own ``compile()`` or by torch.jit; half precision tied to a
            layer that stays; layer scaling; an argument out of its range.

    Warns when there is nothing to convert.
    """
    check_choice("to", to, ("online", "batch"))
    allowed = "momentum" if to == "batch" else "OnlineNorm's own except " + ", ".join(_FROM_THE_LAYER)
    for key in arguments:
        if key in _FROM_THE_LAYER or (to == "batch") != (key == "momentum"):
            raise ArgumentError(key, f"is no argument of a conversion to {to!r}; they are {allowed}")
    kind: type[nn.Module] = _BatchNorm if to == "online" else OnlineNorm
    counterpart: Callable[[Any, dict], nn.Module] = _to_online if to == "online" else _to_batch
    converted: dict[nn.Module, nn.Module] = {}
    for path, layer in model.named_modules():  # all counterparts are built before the first layer is changed
        if isinstance(layer, torch.jit.ScriptModule) and kind.__name__.strip("_") in layer.original_name:
            raise ValueError(
                f"{path or 'the layer'}: is a {layer.original_name} compiled by torch.jit, which cannot change any "
                "more; convert the network before torch.jit.script or torch.jit.trace"
            )
        if isinstance(layer, kind):
            try:
                _check_tensors(layer, kind)
                converted[layer] = counterpart(layer, arguments)
                _check_attributes(layer, converted[layer])
            except TypeError as error:
                raise ValueError(f"{error}; the arguments of a conversion are {allowed}") from None
            except ValueError as error:
                raise ValueError(f"{path or 'the layer'}: {error}") from None
    if not converted:
        warnings.warn(f"convert changed nothing: the model has no {kind.__name__.strip('_')} layer", stacklevel=2)
    _check_ties(model, converted)
    buffers: dict[int, Tensor] = {}
    before = {parameter: parameter.dtype for layer in converted for parameter in layer.parameters(recurse=False)}
    for layer, new in converted.items():
        _become(layer, new, buffers)
    _convert_optimizers({parameter: dtype for parameter, dtype in before.items() if parameter.dtype != dtype})
    return model


def _to_online(batch: _BatchNorm, arguments: dict) -> OnlineNorm:
    if batch.running_mean is not None and is_lazy(batch.running_mean):
        raise ValueError("is a lazy layer that has seen no data; run one batch through the network first")
    base = _plain_base(type(batch), (*_COUNTERPARTS, *_timm_classes(type(batch))))
    if batch.running_mean is None or not batch.track_running_stats:
        raise ValueError(
            "BatchNorm with track_running_stats=False has no statistics to carry over, or keeps those it has; "
            "build it with track_running_stats=True and let it see data first"
        )
    if isinstance(batch, (nn.SyncBatchNorm, SyncBatchNorm2d)):
        arguments = {"statistics": "global", "process_group": getattr(batch, "process_group", None), **arguments}
    mean = batch.running_mean
    dtype = torch.float64 if mean.dtype == torch.float64 else torch.float32
    cls = _COUNTERPARTS.get(base, OnlineNormAct2d)
    online = cls(batch.num_features, eps=batch.eps, affine=batch.affine, device=mean.device, dtype=dtype, **arguments)
    online._batch_norm = {
        "cls": None if isinstance(batch, nn.SyncBatchNorm) else type(batch),
        "momentum": batch.momentum,
        "batches": batch.num_batches_tracked,
        "dtype": mean.dtype,
    }
    return online


def _to_batch(online: OnlineNorm, arguments: dict) -> _BatchNorm:
    _plain_base(type(online), (OnlineNorm1d, OnlineNorm2d, OnlineNormAct2d, OnlineNormNd))
    if online.error_compensation == "layer_scaling":
        raise ValueError(
            "layer scaling divides by the root mean square over all channels of a sample, which BatchNorm, being per "
            "channel, cannot express; train with error_compensation='clamp' for a network that becomes a BatchNorm one"
        )
    before = getattr(online, "_batch_norm", {})
    momentum = arguments.get("momentum", before.get("momentum", 0.1))
    plain = nn.BatchNorm1d if isinstance(online, OnlineNorm1d) else nn.BatchNorm2d
    # float64 only if the network has been made so since
    dtype = online.running_mean.dtype
    dtype = before.get("dtype", dtype) if dtype == torch.float32 else dtype
    batch = plain(online.num_features, eps=online.eps, momentum=momentum, affine=online.affine,
                  device=online.running_mean.device, dtype=dtype)  # fmt: skip
    if before.get("batches") is not None:
        batch.num_batches_tracked = before["batches"].to(online.running_mean.device)
    if before.get("cls") is not None:
        batch.__class__ = before["cls"]  # its constructor may take anything; what it set is still on the layer
    return batch


def _timm_classes(cls: type) -> list[type]:
    return [c for c in cls.__mro__ if c.__name__ == "BatchNormAct2d" and c.__module__.startswith("timm.")]


def _plain_base(cls: type, bases: tuple[type, ...]) -> type:
    """The one of ``bases`` that layers of class ``cls`` are in all but name."""
    base = next((c for c in cls.__mro__ if c in bases), None)
    if base is None:
        raise ValueError(
            f"{cls.__name__} has no counterpart: BatchNorm1d, BatchNorm2d, SyncBatchNorm and timm's BatchNormAct2d do"
        )
    own = {name for c in cls.__mro__ if c not in base.__mro__ for name in vars(c)} - _COSMETIC
    if own:
        told = {"forward"} & own or {name for name in own if not name.startswith("_")} or own  # what tells it best
        raise ValueError(
            f"{cls.__name__} has no counterpart: it is a {base.__name__} with its own {', '.join(sorted(told))}, which "
            f"a conversion would lose; put a plain {base.__name__} in its place first"
        )
    return base


def _check_tensors(layer: nn.Module, kind: type) -> None:
    """Raises ValueError for tensors that the layer's class does not have."""
    foreign = (layer._parameters.keys() - {"weight", "bias"}) | (layer._buffers.keys() - _BUFFERS[kind])
    foreign |= layer._modules.keys() & {"parametrizations"}
    if foreign:
        raise ValueError(
            f"holds {', '.join(sorted(foreign))} beside the state of its class; where weight or bias are made from "
            "these (pruning, parametrisation, spectral norm), make them parameters again first, as "
            "torch.nn.utils.prune.remove does"
        )


def _check_attributes(layer: nn.Module, new: nn.Module) -> None:
    """Raises ValueError for modules of the layer that its class does not have, and for attributes set on it that mean
    something else on its counterpart."""
    fused = {"act", "drop"} if isinstance(layer, OnlineNormAct2d) or isinstance(new, OnlineNormAct2d) else set()
    if modules := layer._modules.keys() - fused:
        raise ValueError(
            f"holds {', '.join(sorted(modules))} beside the state of its class; convert first, then attach these, as "
            "quantisation attaches its observers"
        )
    if layer._compiled_call_impl is not None:
        raise ValueError("is compiled by its own compile(), as the layer that it was; convert first, then compile")
    clashes = [name for name in _attributes(layer) if name in vars(new) or hasattr(type(new), name)]
    if clashes:
        raise ValueError(
            f"has an own {', '.join(clashes)} set on it, which a {type(new).__name__} cannot take over; delete it first"
        )


def _attributes(layer: nn.Module) -> dict:
    """What has been set on a layer beyond what its class sets."""
    plain = nn.SyncBatchNorm if isinstance(layer, nn.SyncBatchNorm) else nn.BatchNorm2d
    known = vars((OnlineNorm2d if isinstance(layer, OnlineNorm) else plain)(1, device="meta"))
    return {name: value for name, value in vars(layer).items() if name not in known and name != "_batch_norm"}


def _check_ties(model: nn.Module, converted: dict[nn.Module, nn.Module]) -> None:
    """Raises ValueError where a parameter that changes its dtype also belongs to a layer that stays."""
    changing = {
        id(parameter): layer
        for layer, new in converted.items()
        for parameter in layer._parameters.values()
        if parameter is not None and parameter.dtype != new.running_mean.dtype
    }
    places = {layer: path for path, layer in model.named_modules()}
    for path, layer in model.named_modules():
        for name, parameter in layer._parameters.items():
            if layer not in converted and id(parameter) in changing:
                raise ValueError(
                    f"{places[changing[id(parameter)]]}: shares a parameter in {parameter.dtype} with {path}.{name}, "
                    "and OnlineNorm keeps its own in float32; call float() on the model first"
                )


def _convert_optimizers(before: dict[nn.Parameter, torch.dtype]) -> None:
    """Give what optimizers keep of parameters their new dtype, as Optimizer.load_state_dict does."""
    for holder in gc.get_referrers(*before) if before else ():
        if type(holder) is defaultdict:  # the state of an optimizer, to which nothing else leads
            for parameter, dtype in before.items():
                state = holder.get(parameter, {})
                state |= {
                    key: value.to(parameter.dtype)
                    for key, value in state.items()
                    if isinstance(value, Tensor) and value.dtype == dtype
                }


def _become(layer: nn.Module, new: nn.Module, buffers: dict[int, Tensor]) -> None:
    """Make ``layer`` what ``new`` is, with its own tensors, modules, hooks, attributes and training flag."""
    dtype = new.get_buffer("running_mean").dtype
    for name, parameter in layer._parameters.items():
        if parameter is not None and parameter.dtype != dtype:
            grad, parameter.grad = parameter.grad, None
            parameter.data = parameter.data.to(dtype)  # the same object, as in Module.to
            parameter.grad = None if grad is None else grad.to(dtype)
        new._parameters[name] = parameter
    for name in ("running_mean", "running_var"):
        buffer = getattr(layer, name)
        new._buffers[name] = buffers.setdefault(id(buffer), buffer.to(dtype))
    new._modules, new.training = layer._modules, layer.training
    state = vars(new) | {name: vars(layer)[name] for name in _HOOKS if name in vars(layer)} | _attributes(layer)
    layer.__class__ = type(new)
    vars(layer).clear()
    vars(layer).update(state)
