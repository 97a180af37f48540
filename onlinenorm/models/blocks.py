"""What both families of networks share: residual blocks around a pluggable normalizer, and its checks.

The blocks are torchvision's with another forward pass, so parameters, names and initialisation stay torchvision's.
Each norm site is one call that also carries the residual addition and the ReLU, for normalizers that do all three in
one pass over memory.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchvision.models import resnet as torchvision_resnet

from onlinenorm.errors import ArgumentError
from onlinenorm.hooks import are_untouched

Normalizer = Callable[[int], nn.Module]
# Norms whose backward needs their input alone, so that their output may be overwritten, which saves its memory. Not
# their subclasses: what those compute last (tanh, sigmoid, softmax) may need its output.
OVERWRITABLE = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm, nn.InstanceNorm2d, nn.Identity)


def norm_act(
    norm: nn.Module,
    x: Tensor,
    residual: Tensor | None = None,
    relu: bool = True,
    shortcut: nn.Module | None = None,
) -> Tensor:
    """relu(norm(x) + residual): one call where the normalizer has ``fuses_residual = True``, else torch's own ops.

    Args:
        norm: layer over the channels of x.
        x: (N, C, H, W), an intermediate result that nothing else reads.
        residual: same shape as x, or None for no addition.
        relu: apply the ReLU.
        shortcut: the norm that the residual passes first, of a normalizer with ``fuses_shortcut = True``.
    """
    if shortcut is not None:
        return norm(x, residual=residual, relu=relu, shortcut=shortcut)
    if fuses(norm, "fuses_residual"):
        return norm(x, residual=residual, relu=relu)
    out = norm(x)
    # a hook may put its own output, or a view, in place of the norm's
    inplace = type(norm) in OVERWRITABLE and are_untouched(norm)
    if residual is not None:
        out = out.add_(residual) if inplace else out + residual
    return F.relu(out, inplace=inplace or residual is not None) if relu else out


def norm_act_max_pool(norm: nn.Module, x: Tensor, pool: nn.MaxPool2d, fuse: bool = True) -> Tensor:
    """pool(relu(norm(x))), in one kernel each way where a compiled network's normalizer has ``fuses_max_pool = True``.

    Eager networks call the layers one by one, and so do compiled ones where either has a hook.
    """
    fuse = fuse and torch.compiler.is_compiling() and fuses(norm, "fuses_max_pool")
    if fuse and _is_resnets(pool) and are_untouched(norm, pool):
        return norm(x, relu=True, max_pool=True)
    return pool(norm_act(norm, x))


def shortcut_of(block: "BasicBlock | Bottleneck", x: Tensor) -> tuple[Tensor, nn.Module | None]:
    """The residual of a block, and the norm that it has yet to pass, in the kernel of the block's last norm, or None.

    Eager networks call the layers one by one, and so do compiled ones where a norm or the shortcut has a hook.
    """
    downsample, norm = block.downsample, block.last_norm
    if downsample is None:
        return x, None
    fuse = block.fuse_shortcut and torch.compiler.is_compiling() and fuses(norm, "fuses_shortcut")
    if fuse and _ends_in(downsample, type(norm)) and are_untouched(norm, downsample, downsample[1]):
        return downsample[0](x), downsample[1]
    return downsample(x), None


def fuses(norm: nn.Module, attribute: str) -> bool:
    """Whether this attribute of a norm is true, and said of the ``forward`` it has: a subclass may have another."""
    for holder in (norm, *type(norm).__mro__):
        if attribute in vars(holder):
            return bool(getattr(norm, attribute))
        if "forward" in vars(holder):
            return False
    return False


def _ends_in(downsample: nn.Module, norm: type) -> bool:
    """Whether a shortcut is a convolution and a norm of this class."""
    return type(downsample) is nn.Sequential and len(downsample) == 2 and type(downsample[1]) is norm


def _is_resnets(pool: nn.Module) -> bool:
    if type(pool) is not nn.MaxPool2d or pool.return_indices or pool.ceil_mode:
        return False
    return (pool.kernel_size, pool.stride, pool.padding, pool.dilation) == (3, 2, 1, 1)


class ResNet:
    """What the ResNets of both families know of themselves."""

    in_torchvision = False  # whether torchvision has the same network, by the same names
    # whether its own layers alone read their weights, once a pass, so that captured steps may cast all of them together
    # (training/cuda_graph.py); each class says so of itself
    layers_alone_read_weights = False

    @staticmethod
    def sizes(state: Mapping[str, Tensor]) -> tuple[int, int]:
        """(num_classes, in_channels) of the network whose state dict this is; KeyError where it is none of these."""
        return state["fc.weight"].shape[0], state["conv1.weight"].shape[1]


class BasicBlock(torchvision_resnet.BasicBlock):
    """Two 3x3 convolutions and a shortcut (He et al. 2015, figure 5 left)."""

    fuse_shortcut = False

    def forward(self, x: Tensor) -> Tensor:
        identity, shortcut = shortcut_of(self, x)
        out = norm_act(self.bn1, self.conv1(x))
        return norm_act(self.bn2, self.conv2(out), residual=identity, shortcut=shortcut)

    @property
    def last_norm(self) -> nn.Module:
        return self.bn2


class Bottleneck(torchvision_resnet.Bottleneck):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; the 3x3 carries the stride ("v1.5")."""

    fuse_shortcut = False

    def forward(self, x: Tensor) -> Tensor:
        identity, shortcut = shortcut_of(self, x)
        out = norm_act(self.bn1, self.conv1(x))
        out = norm_act(self.bn2, self.conv2(out))
        return norm_act(self.bn3, self.conv3(out), residual=identity, shortcut=shortcut)

    @property
    def last_norm(self) -> nn.Module:
        return self.bn3


class BottleneckStride1x1(Bottleneck):
    """Bottleneck whose first 1x1 convolution carries the stride ("v1", He et al. 2015)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.conv1.stride, self.conv2.stride = self.conv2.stride, self.conv1.stride


class NormSite(nn.Module):
    """Holds the place of a normalizer over ``num_features`` channels until ``plug_in`` fills it."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features


def plug_in(model: nn.Module, normalizer: Normalizer) -> None:
    """Replace every NormSite by ``normalizer(num_features)``, in order of registration.

    By then all other weights are drawn, so they are a function of the seed alone, whichever normalizer is plugged in.

    Raises:
        ValueError: the normalizer is not a callable that returns a new nn.Module at each call.
    """
    if isinstance(normalizer, nn.Module):
        raise ArgumentError(
            "normalizer",
            f"{type(normalizer).__name__} is one built layer, which cannot serve every site; pass a "
            "callable num_features -> nn.Module (a class or functools.partial; in a config, _partial_: true)",
        )
    if not callable(normalizer):
        raise ArgumentError("normalizer", f"must be a callable num_features -> nn.Module, got {normalizer!r}")
    built = set()
    for path, site in [(path, site) for path, site in model.named_modules() if isinstance(site, NormSite)]:
        layer = normalizer(site.num_features)
        if not isinstance(layer, nn.Module):
            raise ArgumentError(
                "normalizer",
                f"must return an nn.Module, but called with {site.num_features} channels it returned "
                f"{layer!r} ({type(layer).__name__})",
            )
        if layer in built:
            raise ArgumentError(
                "normalizer",
                f"returned the same {type(layer).__name__} twice; each site needs a layer of its own, "
                "so build it inside the callable",
            )
        built.add(layer)
        model.set_submodule(path, layer)


def init_convolutions(module: nn.Module) -> None:
    """Draw every convolution's weight kaiming_normal (fan_out, relu), as torchvision does."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


def zero_last_gammas(model: nn.Module) -> None:
    """Set the last gamma of each residual branch to 0, so that every block starts as its shortcut (Goyal et al. 2017).

    Raises:
        ValueError: the normalizer has no weight.
    """
    for block in model.modules():
        if isinstance(block, (BasicBlock, Bottleneck)):
            norm = block.last_norm
            roles = getattr(norm, "parameter_roles", {"weight": "norm_weight"})
            gammas = [name for name, role in roles.items() if role == "norm_weight"]
            if not gammas or not all(_set_to_zero(norm, name) for name in gammas):
                raise ArgumentError(
                    "zero_init_last_gamma",
                    f"{type(norm).__name__} has no weight that can be set to 0; use "
                    "zero_init_last_gamma=false or an affine normalizer",
                )


def _set_to_zero(norm: nn.Module, name: str) -> bool:
    """Sets a weight, dotted where it lies further down, to 0; whether that can be done.

    It cannot where there is none, or where its parametrisation makes no 0 of finite values, as an exponential.
    """
    path, _, leaf = name.rpartition(".")
    try:
        owner = norm.get_submodule(path)
        weight = getattr(owner, leaf)
        if not parametrize.is_parametrized(owner, leaf):
            nn.init.zeros_(weight)
            return True
        setattr(owner, leaf, torch.zeros_like(weight))
    except (AttributeError, RuntimeError, NotImplementedError):  # without an inverse
        return False
    return not getattr(owner, leaf).any() and all(torch.isfinite(p).all() for p in owner.parameters())


def check_sizes(num_classes: int, in_channels: int) -> None:
    """ValueError unless both are whole numbers of at least 1."""
    for key, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ArgumentError(key, f"must be a whole number of at least 1, got {value!r}")
