"""The forms a network can be exported to: what each can hold, how its file is made and how it is loaded again."""

import copy
import io
import itertools
import json
import logging
import warnings
from collections.abc import Callable
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from onlinenorm import models
from onlinenorm.deploy.source import Trained
from onlinenorm.deploy.weights import WEIGHTS, read_weights, write_weights
from onlinenorm.errors import DeployError
from onlinenorm.normalizers import OnlineNorm, OnlineNorm1d, OnlineNorm2d, convert, identity, remove_clamping

Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Form:
    """A kind of file.

    Args:
        name: as in --to.
        suffix: of the file.
        holds_guards: whether a clamp or layer scaling can be part of it.
        write: (source network, `Trained`, path) -> None.
        load: (path, `Trained`) -> the network in the file as a function of images; used to verify the file.
        usage: Python that loads the file, with {file}, {builder}, {reader} and {imports} to be filled in.
    """

    name: str
    suffix: str
    holds_guards: bool
    write: Callable[[nn.Module, Trained, Path], None]
    load: Callable[[Path, Trained], Logits]
    usage: str


def prepare(trained: Trained, form: Form, keep_clamp: bool = False) -> nn.Module:
    """A copy of the network as `form` will hold it, with BatchNorm for OnlineNorm but for layer scaling.

    The clamp is removed unless `keep_clamp`. Raises DeployError, with the reason, where the form cannot hold it.
    """
    guard = trained.guard
    if not form.holds_guards:
        if own := trained.own("model") or trained.own("normalizer"):
            raise DeployError(
                f"--to {form.name}: holds weights of networks that its reader can build, and {own} is your own; use "
                f"{_others()}"
            )
        if trained.builder not in models.__all__:
            raise DeployError(
                f"--to {form.name}: holds weights of networks of onlinenorm.models, and {trained.builder} is not in "
                f"its __all__; use {_others()}"
            )
        if guard == "layer_scaling":
            raise DeployError(
                f"--to {form.name}: layer scaling divides by the root mean square over all channels of a sample, which "
                f"per-channel normalisation cannot express; {_others()} can hold it (or train with clamping: "
                "normalizer=online_clamp)"
            )
        if keep_clamp and guard == "clamp":
            raise DeployError(f"--to {form.name}: holds no clamp; leave --keep-clamp out, or use {_others()}")
    network = copy.deepcopy(trained.network)
    if guard == "clamp" and not keep_clamp:
        remove_clamping(network)
    if guard == "clamp" and keep_clamp:
        with_hardtanh(network)
    elif guard in ("none", "clamp"):
        try:
            convert(network, to="batch")
        except ValueError as error:  # of a class of the user's own, which those forms hold as it is
            if not form.holds_guards:
                raise DeployError(f"--to {form.name}: {error}") from error
    if not form.holds_guards and not any(isinstance(m, _BatchNorm) for m in network.modules()):
        normalizer = trained.config["normalizer"]["_target_"].rpartition(".")[2]
        raise DeployError(
            f"--to {form.name}: normalizer {normalizer} has no running statistics to put there; use {_others()}"
        )
    return network.eval().requires_grad_(False)


def with_hardtanh(network: nn.Module) -> None:
    """BatchNorm and then Hardtanh in place of OnlineNorm layers that clamp, which compute the same in eval mode.

    Files hold them as operators of their own, which runtimes fuse. A network with layers of other classes stays as it
    is, and so do its files.
    """
    layers = {path: m for path, m in network.named_modules(remove_duplicate=False) if isinstance(m, OnlineNorm)}
    if not all(type(layer) in (OnlineNorm1d, OnlineNorm2d) for layer in layers.values()):
        return
    values = {path: m.clamp_value for path, m in layers.items() if m.error_compensation == "clamp"}
    convert(network, to="batch")
    clamped: dict[nn.Module, nn.Module] = {}
    for path, value in values.items():
        layer = layers[path]
        clamped.setdefault(layer, nn.Sequential(layer, nn.Hardtanh(-value, value)))
        network.set_submodule(path, clamped[layer])


def without_clamp(trained: Trained) -> nn.Module:
    """A copy of the trained network with its clamps, if any, removed: what exports without clamp are held against."""
    network = copy.deepcopy(trained.network)
    if trained.guard == "clamp":
        remove_clamping(network)
    return network


def _others() -> str:
    return ", ".join(form.name for form in FORMS.values() if form.holds_guards)


def stock_network(trained: Trained) -> nn.Module:
    """An untrained network of torchvision's class, or for a CIFAR-style one of ours with torch's BatchNorm2d."""
    if not getattr(trained.network, "in_torchvision", False):
        return trained.build_network(nn.BatchNorm2d)
    if trained.in_channels != 3:
        raise DeployError(f"--to torchvision: torchvision's networks take 3 channels, this one {trained.in_channels}")
    if trained.config["model"].get("bottleneck_stride", "3x3") != "3x3":
        raise DeployError("--to torchvision: torchvision has no ResNet with bottleneck_stride 1x1; use --to folded")
    return torchvision.models.get_model(trained.model_name, weights=None, num_classes=trained.num_classes)


def stock_state(network: nn.Module, stock: nn.Module) -> dict[str, Tensor]:
    """State of `stock` that makes it compute what `network` (with BatchNorm) does.

    Weights that `network` lacks are 1 and biases 0; where eps differs, the variance takes up the difference.
    """
    state = {key: value.contiguous().clone() for key, value in network.state_dict().items()}
    for path, layer in network.named_modules():
        if isinstance(layer, _BatchNorm):
            twin: Any = stock.get_submodule(path)
            assert layer.running_mean is not None and layer.running_var is not None
            if layer.weight is None:
                state[f"{path}.weight"] = torch.ones_like(layer.running_mean)
                state[f"{path}.bias"] = torch.zeros_like(layer.running_mean)
            if layer.eps != twin.eps:
                state[f"{path}.running_var"] = layer.running_var + (layer.eps - twin.eps)
    return state


def fold(network: nn.Module) -> int:
    """Merge each BatchNorm into the convolution before it, in place, and leave Identity; returns the layers merged.

    w' = w gamma / sqrt(var + eps),  b' = beta - mean gamma / sqrt(var + eps). A convolution's norm is the one named
    alike (conv1, bn1) or next to it in a Sequential. Raises DeployError where a BatchNorm is left.
    """
    merged = 0
    for parent in list(network.modules()):
        children = dict(parent.named_children())
        pairs = [(f"conv{n}", f"bn{n}") for n in range(1, 4)]
        if isinstance(parent, nn.Sequential):
            pairs += itertools.pairwise(children)
        for conv, norm in pairs:
            before, after = children.get(conv), children.get(norm)
            if isinstance(before, nn.Conv2d) and isinstance(after, _BatchNorm):
                setattr(parent, conv, fuse_conv_bn_eval(before, after))
                setattr(parent, norm, nn.Identity())
                merged += 1
    left = [path for path, layer in network.named_modules() if isinstance(layer, _BatchNorm)]
    if left:
        raise DeployError(f"--to folded: {left[0]} follows no convolution that it could be folded into")
    return merged


def load_folded(path: str | Path) -> nn.Module:
    """The network of a file made with --to folded, in eval mode: convolutions with biases, no normalizers."""
    state, about = read_weights(Path(path))
    if about.get("model") not in models.__all__:
        raise DeployError(f"{path}: is no file made with --to folded")
    network = getattr(models, about["model"])(normalizer=identity, **json.loads(about["arguments"]))
    for key in state:
        if key.endswith(".bias") and network.get_submodule(key.removesuffix(".bias"))._parameters.get("bias") is None:
            network.get_submodule(key.removesuffix(".bias")).bias = nn.Parameter(torch.empty_like(state[key]))
    network.load_state_dict(state, strict=True)
    return network.eval().requires_grad_(False)


def _write_stock(network: nn.Module, trained: Trained, path: Path) -> None:
    write_weights(stock_state(network, stock_network(trained)), {}, path)


def _load_stock(path: Path, trained: Trained) -> Logits:
    stock = stock_network(trained)
    stock.load_state_dict(read_weights(path)[0], strict=True)
    return stock.eval().requires_grad_(False)


def _write_folded(network: nn.Module, trained: Trained, path: Path) -> None:
    fold(network)
    state = {key: value.contiguous() for key, value in network.state_dict().items()}
    write_weights(state, {"model": trained.builder, "arguments": json.dumps(trained.arguments)}, path)


def _example(trained: Trained) -> Tensor:
    # two images: a batch of one would be taken for a constant
    return torch.zeros(2, trained.in_channels, trained.data.image_size, trained.data.image_size)


def _write_onnx(network: nn.Module, trained: Trained, path: Path) -> None:
    _need("onnx", "onnxscript", "onnxruntime", extra="onnx")
    with _quiet(), redirect_stdout(io.StringIO()):
        torch.onnx.export(
            network, (_example(trained),), path, dynamo=True, external_data=False, verbose=False,
            input_names=["images"], output_names=["logits"], dynamic_shapes=({0: torch.export.Dim("batch")},),
        )  # fmt: skip


def _load_onnx(path: Path, trained: Trained) -> Logits:
    import onnx
    import onnxruntime

    onnx.checker.check_model(str(path))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.contiguous().numpy()})[0])


def _write_torchscript(network: nn.Module, trained: Trained, path: Path) -> None:
    with _quiet(), torch.no_grad():
        torch.jit.save(torch.jit.trace(network, _example(trained)), path)


def _load_torchscript(path: Path, trained: Trained) -> Logits:
    with _quiet():
        return torch.jit.load(path)


def _write_exported(network: nn.Module, trained: Trained, path: Path) -> None:
    with _quiet():
        program = torch.export.export(
            network, (_example(trained),), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
        )
        torch.export.save(program, path)


def _load_exported(path: Path, trained: Trained) -> Logits:
    with _quiet():
        return torch.export.load(path).module()


@contextmanager
def _quiet():
    """Without the exporters' notes on themselves: the deprecation of TorchScript stands in the table and the card."""
    levels = {name: logging.getLogger(name).level for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def _need(*packages: str, extra: str) -> None:
    from importlib.util import find_spec

    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise DeployError(f"--to onnx: needs {', '.join(missing)}; pip install -c constraints.txt -e '.[{extra}]'")


_FORMS = (
    Form("torchvision", WEIGHTS, False, _write_stock, _load_stock,
         "{imports}\n\nnetwork = {builder}\nnetwork.load_state_dict({reader}, strict=True)\n"
         "logits = network.eval()(images)"),
    Form("folded", WEIGHTS, False, _write_folded, lambda path, trained: load_folded(path),
         'from onlinenorm.deploy import load_folded\n\nlogits = load_folded("{file}")(images)'),
    Form("onnx", ".onnx", True, _write_onnx, _load_onnx,
         'import onnxruntime\n\nsession = onnxruntime.InferenceSession("{file}")\n'
         'logits = session.run(["logits"], {{"images": images.numpy()}})[0]'),
    Form("torchscript", ".torchscript", True, _write_torchscript, _load_torchscript,
         'import torch\n\nlogits = torch.jit.load("{file}")(images)'),
    Form("exported-program", ".pt2", True, _write_exported, _load_exported,
         'import torch\n\nlogits = torch.export.load("{file}").module()(images)'),
)  # fmt: skip
FORMS = {form.name: form for form in _FORMS}
