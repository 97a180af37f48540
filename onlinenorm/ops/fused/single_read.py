"""Launchers of the single-read CUDA kernels: which tensors they take, how they are cut into tiles, what is compiled."""

import ctypes
import functools
import itertools
import operator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from onlinenorm.ops.distributed import late_report
from onlinenorm.ops.fused import peers, workspace
from onlinenorm.ops.fused.cubin_cache import cubin
from onlinenorm.ops.fused.nvrtc import Kernel, architecture, tensor_map
from onlinenorm.ops.fused.params import NORM, SHORTCUT, Params
from onlinenorm.ops.fused.tiling import (
    POOLED_TUNINGS,
    WIDTH,
    Tuning,
    cut,
    even,
    possible_tunings,
    samples_held,
    shortcut_tuning_for,
    tuning_for,
)
from onlinenorm.ops.spec import NormSpec

MOST_SCALED = 32 * WIDTH  # channels of layer scaling: a warp adds up the sums of their slabs
LEFT_TO_OTHERS = 32  # multiprocessors, where CTAs that all run at once wait for another GPU: NCCL's kernels take them
DEPTH = 4  # samples that must wait on the chip at once for it; one would do, but slowly
FLAGS = "RELU", "RESIDUAL", "SKIP_GRAD", "POOL", "SHORTCUT"
SOURCES = Path(__file__).parent / "cuda"


@functools.cache
def source_of(direction: str) -> str:
    """The CUDA source of the forward or the backward kernel."""
    parts = ("backward_stage", "backward_reduce") if direction == "backward" else ()
    names = ("common", "sums", "max_pool", *parts, direction)
    return "\n".join((SOURCES / f"{name}.cu").read_text() for name in names)


@functools.cache
def _kernel(device: int, direction: str, defines: tuple[str, ...]) -> Kernel:
    target = architecture(*torch.cuda.get_device_capability(device))
    assert target is not None, "NVRTC knows no architecture for this device: `supports_device` is False for it"
    return Kernel(cubin(source_of(direction), target, ("--std=c++17", *defines)), f"online_norm_{direction}")


@dataclass(frozen=True)
class Launch:
    """All of a launch but for its tensors."""

    kernel: Kernel
    ctas: int
    threads: int
    shared_memory: int
    cooperative: bool  # all CTAs must run at once
    box_rows: int
    tile_sums: int  # where these begin, in bytes behind the sums of samples
    channel_sums: int
    messages: int  # bytes of all of these, of one layer
    workspace: int  # and of all layers with the tile scheduler's counters
    params: bytes


@functools.lru_cache(4096)
def _plan(
    device: int, direction: str, shape: tuple[int, ...], half: bool, flags: tuple[str, ...], spec: NormSpec,
    tuning: Tuning,
) -> Launch:  # fmt: skip
    """The kernel compiled, cut into tiles for a shape, and its parameters as far as they are known.

    ``flags`` are the names of common.cu that are 1.
    """
    samples, channels, height, width = shape
    pixels, slabs = height * width, channels // WIDTH
    scaled = spec.error_compensation == "layer_scaling"
    values: dict[str, int] = {"HALF": half, "CLAMP": spec.error_compensation == "clamp", "SCALED": scaled}
    values |= {name: name in flags for name in FLAGS}
    values |= {"PEERS": spec.processes, **tuning.defines}
    kernel = _kernel(device, direction, tuple(f"-D{name}={int(value)}" for name, value in values.items()))
    multiprocessors, most_shared_memory = _chip(device)
    if scaled and spec.processes > 1:
        multiprocessors -= LEFT_TO_OTHERS
    tiling, shared = cut(direction, height, width, values, tuning, most_shared_memory)
    kernel.allow_shared_memory(shared)
    norms = 1 + values["SHORTCUT"]
    threads = tuning.threads + (norms * WIDTH if scaled and direction == "forward" else 0)  # the scale warps
    resident = kernel.ctas_per_multiprocessor(threads, shared)
    ctas_per_slab = max(1, min(resident * multiprocessors // slabs, tiling.items(samples)))
    waits = not scaled or (resident > 0 and samples_held(tiling, tuning, ctas_per_slab) > 0)
    assert waits, f"{direction} of {shape}: more than `supports` allows"
    alone = spec.processes == 1  # else sums of samples and of their channels are in a mailbox of `peers`
    tile_sums = 8 * samples * channels * alone
    channel_sums = tile_sums + 8 * samples * channels * tiling.tiles * (tiling.tiles > 1)
    messages = channel_sums + 8 * samples * slabs * scaled * alone
    params = Params(
        samples=samples,
        channels=channels,
        pixels=pixels,
        tile_rows=tiling.tile_rows,
        tiles=tiling.tiles,
        segments=tiling.segments,
        box_rows=tiling.box_rows,
        boxes=tiling.boxes,
        width=width,
        alpha_fwd=spec.alpha_fwd,
        one_minus_alpha_fwd=1 - spec.alpha_fwd,
        alpha_bkw=spec.alpha_bkw,
        one_minus_alpha_bkw=1 - spec.alpha_bkw,
        eps=spec.eps,
        clamp=spec.clamp_value,
        zeta_eps=spec.layer_scaling_eps,
        scale=spec.gradient_scale,
    )
    return Launch(
        kernel, ctas_per_slab * slabs, threads, shared, scaled, tiling.box_rows, tile_sums, channel_sums, messages,
        norms * messages + 4 * slabs, bytes(params),
    )  # fmt: skip


def supports(x: Tensor, spec: NormSpec, shortcut: bool = False) -> bool:
    """Whether to use these kernels: Hopper or later, 16 bits, channels_last, whole slabs of 64 channels.

    With ``shortcut`` also those of two layers. Across processes they exchange moments by `peers`, where the layer and
    the machine are for it.
    """
    return (
        x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.shape[1] % WIDTH == 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.shape[0] * x.shape[2] * x.shape[3] < 2**31
        and supports_device(x.device.index)
        and (spec.error_compensation != "layer_scaling" or _fits_on_chip(x, spec, shortcut))
        and (spec.processes == 1 or _exchanges(x, spec))
    )


def _exchanges(x: Tensor, spec: NormSpec) -> bool:
    """Whether the processes' kernels exchange moments while they run, for which all need batches of one size."""
    return bool(spec.mailbox) and not spec.counts and peers.serve(spec.group, x.device.index)


def _fits_on_chip(x: Tensor, spec: NormSpec, shortcut: bool = False) -> bool:
    """Whether whole samples wait on the chip, ``DEPTH`` times over, for the sums that layer scaling takes of them."""
    channels, height, width = map(operator.index, x.shape[1:])  # of symbolic sizes the values: tilings differ
    if spec.layer_scaling_group_size not in (None, channels) or channels > MOST_SCALED:
        return False
    return _holds_samples(channels, height, width, x.device.index, shortcut)


@torch.compiler.assume_constant_result
def _holds_samples(channels: int, height: int, width: int, device: int, shortcut: bool) -> bool:
    return _launches_hold_samples(channels, height, width, *_chip(device), shortcut)


@functools.cache
def _launches_hold_samples(
    channels: int, height: int, width: int, multiprocessors: int, room: int, shortcut: bool
) -> bool:
    """Whether every launch that the tables may ask for, cut as `_plan` cuts it, holds ``DEPTH`` samples.

    Compiled for a CTA a multiprocessor at least (__launch_bounds__).
    """
    ctas = multiprocessors // (channels // WIDTH)
    some = [flags for count in range(4) for flags in itertools.combinations(FLAGS[:3], count)]
    if shortcut:
        some += [("RELU", "RESIDUAL", "SHORTCUT"), ("RELU", "RESIDUAL", "SKIP_GRAD", "SHORTCUT")]
    for direction, flags in itertools.product(("forward", "backward"), some):
        values = {name: int(name in flags) for name in FLAGS}
        for tuning in possible_tunings(direction, True, flags, height * width):
            tiling, _ = cut(direction, height, width, values, tuning, room)
            if samples_held(tiling, tuning, ctas) < DEPTH:
                return False
    return True


def ctas_per_slab(x: Tensor) -> int:
    """CTAs that serve each slab of 64 channels at the same time."""
    return _chip(x.device.index)[0] // (x.shape[1] // WIDTH)


@torch.compiler.assume_constant_result
def _chip(device: int) -> tuple[int, int]:
    """Multiprocessors of a device, and bytes of shared memory that a CTA of one may take."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # torch names no fields


@torch.compiler.assume_constant_result
def supports_device(device: int) -> bool:
    """Whether the kernels run on a device: Hopper or later, which have TMA, and known to the compiler."""
    return _supports_device(device)


@functools.cache
def _supports_device(device: int) -> bool:
    if torch.version.cuda is None:
        return False
    capability = torch.cuda.get_device_capability(device)
    return capability >= (9, 0) and architecture(*capability) is not None


def aligned(tensor: Tensor) -> Tensor:
    """``tensor`` where 16 bytes at a time may be read, a copy if need be."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _launch(direction: str, inputs: tuple[Tensor, ...], flags: tuple[str, ...], spec: NormSpec, **tensors) -> None:
    """Queue a kernel over ``inputs``: x first forward and second backward."""
    inputs = tuple([aligned(tensor) for tensor in inputs])
    x = inputs[direction == "backward"]
    shape, device = tuple(x.shape), x.device
    samples, channels, height, width = shape
    scaled = spec.error_compensation == "layer_scaling"
    tuning: Tuning | None
    if "POOL" in flags:
        tuning = POOLED_TUNINGS[direction, scaled]
    elif "SHORTCUT" in flags:
        tuning = shortcut_tuning_for(direction, scaled, samples, height * width)
        assert tuning, "`shortcut` asks first"
    else:
        residual = "RESIDUAL" in flags or "SKIP_GRAD" in flags
        tuning = tuning_for(direction, scaled, residual, samples, height * width)
    plan = _plan(device.index, direction, shape, x.dtype == torch.float16, flags, spec, tuning)
    stream = torch._C._cuda_getCurrentRawStream(device.index)
    params = Params.from_buffer_copy(plan.params)
    for name, tensor in tensors.items():
        if tensor is not None:
            setattr(params, name, tensor.data_ptr())
    maps = b""
    for tensor in inputs:  # a box of a pooled one is a row of it
        box_rows = plan.box_rows if tensor.shape == shape else width // 2
        maps += tensor_map(tensor.data_ptr(), tensor.numel() // channels, channels, box_rows, WIDTH)
    ctypes.memmove(ctypes.addressof(params) + Params.maps.offset, maps, len(maps))

    def queue(address: int, clear: int, clear_bytes: int) -> None:
        """Launch with mailboxes between CTAs and the tile scheduler's counters at ``address``, empty: all bits set."""
        _place_tables(params, "", address, plan, spec.processes)
        if "SHORTCUT" in flags:
            address += plan.messages
            rows = table_rows(samples * spec.processes, channels, spec.error_compensation)
            params.shortcut_tables = params.tables + 8 * channels * rows
            _place_tables(params, SHORTCUT, address, plan, spec.processes)
        params.tile_counter = address + plan.messages
        if spec.processes > 1:
            _place_mailbox(params, spec, direction, device, 1 + ("SHORTCUT" in flags))
        params.clear, params.clear_count = clear, clear_bytes // 16
        plan.kernel.launch(plan.ctas, plan.threads, plan.shared_memory, stream, params, plan.cooperative)

    workspace.with_messages(plan.workspace, device, stream, queue)


def _place_tables(params: Params, layer: str, address: int, plan: Launch, processes: int) -> None:
    """What lies behind a layer's states in its table, and its messages from ``address`` on."""
    size = 8 * params.samples * processes * params.channels
    moments = getattr(params, layer + "tables") + size
    places = moments, moments + size, address, address + plan.tile_sums, address + plan.channel_sums
    for name, place in zip(("moments", "rzeta", "sample_sums", "tile_sums", "channel_sums"), places, strict=True):
        setattr(params, layer + name, place)


def _place_mailbox(params: Params, spec: NormSpec, direction: str, device: torch.device, layers: int) -> None:
    """Sums of samples and of their channels in this process's mailbox, and the places of all processes' mailboxes."""
    box = peers.mailbox(spec, direction, params.samples, params.channels, device, layers)
    place, params.rank = box.addresses[box.rank], box.rank
    params.launches, params.late = place + box.launches, late_report()
    for prefix in ("", SHORTCUT)[:layers]:
        setattr(params, prefix + "sample_sums", place)
        setattr(params, prefix + "channel_sums", place + 8 * params.samples * spec.processes * params.channels)
        place += box.launches // layers
    params.patience = peers.patience(spec, device.index)
    params.peers[: len(box.addresses)] = box.addresses


def _parameter(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else aligned(tensor.float().contiguous())


def mask_size(x: Tensor) -> int:
    """Bytes of the ReLU's bits for x, samples padded to an even number of rows."""
    return x.shape[0] * x.shape[1] // 8 * even(x.shape[2] * x.shape[3])


def table_rows(samples: int, channels: int, error_compensation: str) -> int:
    """Rows of 2 C in the table of ``forward``, of so many samples of all processes."""
    return 2 * samples + (-(-samples // (2 * channels)) if error_compensation == "layer_scaling" else 0)


def _layer(prefix: str, weight, bias, state_a, state_b) -> dict[str, Tensor | None]:
    """Parameters and state of a layer by the kernels' names."""
    values = _parameter(weight), _parameter(bias), state_a, state_b
    return {prefix + name: value for name, value in zip(NORM, values, strict=False)}


def launch_forward(inputs, flags, spec: NormSpec, layer, y, mask, shortcut=None) -> Tensor:
    """Fill y, and mask where the flags ask for one; returns the table (layers, rows, 2 C) and moves the states.

    ``layer``, and ``shortcut`` that normalises the residual, are each weight, bias, mean and variance.
    """
    samples, channels = inputs[0].shape[:2]
    rows, layers = table_rows(samples * spec.processes, channels, spec.error_compensation), 1 + (shortcut is not None)
    tables = torch.empty((layers, rows, 2 * channels), dtype=torch.float32, device=y.device)
    other = {} if shortcut is None else _layer(SHORTCUT, *shortcut)
    _launch("forward", inputs, flags, spec, out=y, mask=mask, tables=tables, **_layer("", *layer), **other)
    return tables


def launch_backward(
    inputs, flags, spec: NormSpec, layer, tables, mask, grad_residual=None, shortcut=None
) -> tuple[Tensor, ...]:
    """Gradients of x, which is ``inputs[1]``, and of weight and bias of each layer; moves u and v.

    Fills ``grad_residual``. ``layer``, and ``shortcut``, whose x is ``inputs[2]``, are each weight, bias, u and v.
    """
    x = inputs[1]
    grad_x = torch.empty_like(x)
    arguments, gradients = _layer("", *layer), []
    if shortcut is not None:
        arguments |= _layer(SHORTCUT, *shortcut)
    for name in ("grad_weight", "grad_bias", SHORTCUT + "grad_weight", SHORTCUT + "grad_bias")[: 2 * len(tables)]:
        gradients.append(torch.empty(x.shape[1], dtype=torch.float32, device=x.device))
        arguments[name] = gradients[-1]
    _launch(
        "backward", inputs, flags, spec, out=grad_x, out_residual=grad_residual, mask=mask, tables=aligned(tables),
        **arguments,
    )  # fmt: skip
    return grad_x, *gradients


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    spec: NormSpec,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output, table (1, rows, 2 C), and the bits of a ReLU behind a residual; moves the state.

    M rows are the states before each of all processes' samples, M the moments of each; behind them is 1 / zeta of each
    where layers are scaled.
    """
    y, masked = torch.empty_like(x), relu and residual is not None
    mask = torch.empty(mask_size(x), dtype=torch.uint8, device=x.device) if masked else None
    inputs = (x,) if residual is None else (x, residual)
    flags = ("RESIDUAL",) * (residual is not None) + ("RELU",) * relu
    return y, launch_forward(inputs, flags, spec, (weight, bias, running_mean, running_var), y, mask), mask


def backward(
    grad: Tensor,
    skip_grad: Tensor | None,
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    tables: Tensor,
    control_u: Tensor,
    control_v: Tensor,
    spec: NormSpec,
    relu: bool,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of x, residual (where its ReLU left a mask), weight and bias; moves u and v.

    With ``overwrite`` the residual's gradient may take the memory of ``grad``: a CTA reads each element once, before
    it writes that of the residual.
    """
    grad_residual, grad = None, aligned(grad)
    if mask is not None:
        grad_residual, mask = grad if overwrite else torch.empty_like(x), aligned(mask)
    flags = ("RELU",) * relu + ("RESIDUAL",) * (mask is not None) + ("SKIP_GRAD",) * (skip_grad is not None)
    inputs = (grad, x) if skip_grad is None else (grad, x, skip_grad)
    grad_x, grad_weight, grad_bias = launch_backward(
        inputs, flags, spec, (weight, bias, control_u, control_v), tables, mask, grad_residual
    )
    return grad_x, grad_residual, grad_weight, grad_bias
