"""What each parameter of a network is for, which decides whether weight decay acts on it."""

import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from onlinenorm.errors import ConfigError
from onlinenorm.normalizers import OnlineNorm

ROLES = ("weight", "bias", "norm_weight", "norm_bias")
NORM_TYPES = (
    OnlineNorm,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
_CONTAINERS = (nn.Module, nn.ParameterList, nn.ParameterDict)


def make_normalizer(target: Callable[..., Any], num_features: int, **arguments: Any) -> Any:
    """The layer of a normalizer's class or function, known as a normalizer from then on."""
    layer = target(num_features=num_features, **arguments)
    for inner in layer.modules() if isinstance(layer, nn.Module) else ():
        inner.is_normalizer = True  # type: ignore[assignment]  # torch declares tensors and modules alone
    return layer


def is_normalizer(module: nn.Module) -> bool:
    """Whether `make_normalizer` made a module, or what holds it."""
    return getattr(module, "is_normalizer", False) is True


def parameter_roles(model: nn.Module) -> dict[str, str]:
    """Name -> role of every trained parameter, once each: "weight", "bias", "norm_weight" or "norm_bias".

    What a module says of its parameters, or of those further down, in an attribute ``parameter_roles`` ({name: role})
    comes first. Else the module that owns a parameter decides, so that ``downsample.1`` is a norm whatever it is
    called: ``weight`` and ``bias`` of torch's norms and of a normalizer's layers, where they have a value a channel,
    are those of a norm; parameters of torch's other layers are ordinary. Raises ConfigError for any other.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ConfigError(
                f"{_class(model.get_submodule(name.rpartition('.')[0]))}: has no shape before its first batch; use the "
                "layer that is built with its number of channels"
            )
    roles: dict[str, str] = {}
    seen = set()
    for path, module, above in _walk(model, "", ()):
        _check_declared(module)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                full, (own, owner) = f"{path}{name}", (name, module)
                if isinstance(module, ParametrizationList):  # OWNER.parametrizations.NAME.original
                    own, owner = path.split(".")[-2], above[-3][1]
                own = _before_hooks(own, owner)
                roles[full] = (
                    _declared(full, above) or _implied(own, parameter, owner, above) or _unknown(full, parameter, above)
                )
    return roles


def _before_hooks(name: str, module: nn.Module) -> str:
    """weight_orig, weight_g, weight_v as "weight" where a hook of torch's (spectral_norm, prune) makes that of them."""
    bare = re.sub(r"_(orig|g|v)$", "", name)
    made = (getattr(hook, "name", getattr(hook, "_tensor_name", "")) for hook in module._forward_pre_hooks.values())
    return bare if bare in made else name


def _walk(module: nn.Module, path: str, above: tuple) -> Iterator[tuple[str, nn.Module, tuple]]:
    """(prefix of its parameters, module, (prefix, module) of it and all around it) for each module, outermost first."""
    above = (*above, (path, module))
    yield path, module, above
    for name, child in module.named_children():
        yield from _walk(child, f"{path}{name}.", above)


def _check_declared(module: nn.Module) -> None:
    """Raises ConfigError for a ``parameter_roles`` that is no mapping, or names what the module does not have."""
    declared = getattr(module, "parameter_roles", {})
    if not isinstance(declared, Mapping):
        raise ConfigError(
            f"{_class(module)}: parameter_roles is {declared!r}; it maps names of parameters to what they are, as in "
            '{"gamma": "norm_weight"}'
        )
    for name in declared:
        try:
            operator.attrgetter(name)(module)
        except (AttributeError, TypeError):
            raise ConfigError(
                f"{_class(module)}: parameter_roles names {name!r}, which it does not have; correct the name (a "
                "parameter that is left out in some cases is set to None there)"
            ) from None


def _declared(full: str, above: tuple) -> str | None:
    for path, module in reversed(above):
        declared = getattr(module, "parameter_roles", {})
        if (role := declared.get(full.removeprefix(path))) is not None:
            if role not in ROLES:
                raise ConfigError(
                    f"{_class(module)}: parameter_roles says {role!r} of {full.removeprefix(path)}, which is not one "
                    f"of {', '.join(ROLES)}"
                )
            return role
    return None


def _implied(name: str, parameter: nn.Parameter, module: nn.Module, above: tuple) -> str | None:
    ordinary_name = name in ("weight", "bias")
    if isinstance(module, NORM_TYPES):
        return f"norm_{name}" if ordinary_name else None
    if any(is_normalizer(outer) for _, outer in above):
        one_a_channel = parameter.numel() == max(parameter.shape, default=1)
        return f"norm_{name}" if ordinary_name and one_a_channel else None
    if type(module) in _CONTAINERS:
        return None
    if type(module).__module__.startswith("torch.nn.modules."):
        return "bias" if "bias" in name else "weight"
    of_torch = any(
        base.__module__.startswith("torch.nn.modules.") for base in type(module).__mro__ if base != nn.Module
    )
    return name if of_torch and ordinary_name else None


def _unknown(full: str, parameter: nn.Parameter, above: tuple) -> str:
    path, module = next(((p, m) for p, m in above if is_normalizer(m)), above[-1])
    if type(module) in _CONTAINERS and len(above) > 1:
        path, module = above[-2]
    name = full.removeprefix(path)
    where = "say in the class"
    if _class(module).startswith("torch."):
        where = "derive a class of your own from it, or put it into one, and say there"
    one_a_channel = parameter.numel() == max(parameter.shape, default=1)
    raise ConfigError(
        f"{_class(module)}: whether weight decay acts on its parameter {name} is not known; {where} what it is: "
        f'parameter_roles = {{"{name}": "{"norm_weight" if one_a_channel else "weight"}"}}, with norm_weight '
        "(multiplies) or norm_bias (is added) for what a normalizer has once a channel, weight or bias otherwise"
    )


def _class(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
