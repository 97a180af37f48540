"""Launchers of the single-read CUDA kernels: which tensors they take, how they are cut into tiles, what is compiled."""

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from onlinenorm.ops.fused.driver import Kernel, compile_source
from onlinenorm.ops.spec import NormSpec

WIDTH, LANES, CHUNK = 64, 8, 16  # as in common.cu
SOURCES = Path(__file__).parent / "cuda"

POINTERS = (
    "x", "residual", "grad", "extra", "out", "out_residual", "mask", "weight", "bias", "first", "second", "moments",
    "state", "grad_weight", "grad_bias", "published", "slots", "tickets",
)  # fmt: skip
INTEGERS = ("samples", "channels", "pixels", "tile_rows", "tiles", "segments")
REALS = ("alpha", "rest", "eps", "clamp", "scale")


class Params(ctypes.Structure):
    """The kernels' argument; same order as in common.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int) for name in INTEGERS),
        *((name, ctypes.c_float) for name in REALS),
    )


@dataclass(frozen=True)
class Tuning:
    """How a kernel is compiled: threads a block, rows a thread holds of a tile, tiles between reducing and writing one,
    tiles copied ahead (0 or 1), blocks a multiprocessor."""

    threads: int
    rows: int
    lag: int
    ahead: int
    blocks: int

    @property
    def stages(self) -> int:
        return self.lag + 1 + self.ahead

    @property
    def defines(self) -> dict[str, int]:
        names = "THREADS", "ROWS", "LAG", "AHEAD", "BLOCKS"
        return dict(zip(names, (self.threads, self.rows, self.lag, self.ahead, self.blocks), strict=True))


# The fastest on an H100 at the norm sites of ResNet-50, batches 32 and 256 (results/kernels_tuning.json):
# (direction, residual behind a ReLU, rows N * H * W from, pixels H * W from, tuning); the first match counts.
TUNINGS = (
    ("forward", False, 0, 0, Tuning(512, rows=7, lag=1, ahead=1, blocks=1)),
    ("forward", True, 0, 0, Tuning(256, rows=7, lag=1, ahead=0, blocks=2)),
    ("backward", False, 200_000, 784, Tuning(512, rows=7, lag=1, ahead=0, blocks=1)),
    ("backward", False, 0, 0, Tuning(512, rows=4, lag=1, ahead=1, blocks=1)),
    ("backward", True, 0, 1568, Tuning(512, rows=4, lag=1, ahead=0, blocks=1)),
    ("backward", True, 0, 0, Tuning(256, rows=4, lag=1, ahead=0, blocks=2)),
)


def tuning_for(direction: str, residual: bool, samples: int, pixels: int) -> Tuning:
    """Row of TUNINGS for a tensor of ``samples`` images of ``pixels``."""
    for name, with_residual, rows, least, tuning in TUNINGS:
        if (name, with_residual) == (direction, residual) and samples * pixels >= rows and pixels >= least:
            return tuning
    raise AssertionError(f"TUNINGS has no row for {direction}, {residual}")


@dataclass(frozen=True)
class Tiling:
    """Cut of (N, pixels) rows into items: parts of a sample, or whole samples side by side (segments)."""

    tile_rows: int
    tiles: int
    segments: int

    @classmethod
    def of(cls, pixels: int, tuning: Tuning, most_rows: int) -> "Tiling":
        """Tiles of equal size, of at most ``most_rows`` and of what the threads can hold."""
        row_lanes = tuning.threads // LANES
        segments = tuning.threads // WIDTH
        while segments > 1 and (pixels > tuning.rows * (row_lanes // segments) or pixels * segments > most_rows):
            segments //= 2
        if segments > 1:
            return cls(pixels, 1, segments)
        tiles = -(-pixels // min(tuning.rows * row_lanes, most_rows))
        tile_rows = -(-pixels // tiles)
        return cls(tile_rows, -(-pixels // tile_rows), 1)

    def items(self, samples: int) -> int:
        return -(-samples // self.segments) if self.segments > 1 else samples * self.tiles

    @property
    def stage_rows(self) -> int:
        return self.tile_rows * self.segments


@functools.cache
def _kernel(device: int, direction: str, defines: tuple[str, ...]) -> Kernel:
    source = (SOURCES / "common.cu").read_text() + (SOURCES / f"{direction}.cu").read_text()
    major, minor = torch.cuda.get_device_capability(device)
    return Kernel(compile_source(source, f"sm_{major}{minor}", defines), "online_norm")


@functools.cache
def _prepared(
    device: int, direction: str, flags: tuple[tuple[str, int], ...], tuning: Tuning, pixels: int
) -> tuple[Kernel, Tiling, int, int]:
    """Compiled kernel, cut into tiles, shared memory in bytes, and the blocks that fill the device."""
    values = {**dict(flags), **tuning.defines}
    kernel = _kernel(device, direction, tuple(f"-D{name}={int(value)}" for name, value in values.items()))
    segments, warps = tuning.threads // WIDTH, tuning.threads // 32
    if direction == "forward":
        row = 2 * WIDTH * (1 + values["RESIDUAL"])
        tables = 8 * CHUNK + 2 * 4 * segments
    else:
        row = 2 * WIDTH * (2 + values["EXTRA"]) + 8 * (values["RELU"] and values["RESIDUAL"])
        tables = 6 * 4 * CHUNK + 4 * 4 * segments
    scratch = WIDTH * (8 * warps + tables) + 64
    properties = torch.cuda.get_device_properties(device)
    space = min(
        properties.shared_memory_per_block_optin, properties.shared_memory_per_multiprocessor // tuning.blocks - 1024
    )
    tiling = Tiling.of(pixels, tuning, (space - scratch) // tuning.stages // row - 1)
    shared = tuning.stages * (-(-tiling.stage_rows * row // 16) * 16) + scratch
    kernel.allow_shared_memory(shared)
    resident = kernel.blocks_per_multiprocessor(tuning.threads, shared)
    return kernel, tiling, shared, resident * properties.multi_processor_count


def suits(x: Tensor, spec: NormSpec) -> bool:
    """Whether to use these kernels: Hopper or later, 16 bits, channels_last, whole blocks of 64 channels."""
    return (
        x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.shape[1] % WIDTH == 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and spec.error_compensation != "layer_scaling"
        and x.shape[0] * x.shape[2] * x.shape[3] < 2**31
        and _is_hopper(x.device.index)
    )


@torch.compiler.assume_constant_result
def _is_hopper(device: int) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (9, 0)


def _launch(direction: str, shaped: Tensor, flags: dict[str, bool], spec: NormSpec, **tensors) -> None:
    samples, channels, height, width = shaped.shape
    pixels, columns = height * width, channels // WIDTH
    tuning = tuning_for(direction, flags["RESIDUAL"] or flags.get("EXTRA", False), samples, pixels)
    flags = {"HALF": shaped.dtype == torch.float16, "CLAMP": spec.error_compensation == "clamp", **flags}
    kernel, tiling, shared, capacity = _prepared(shaped.device.index, direction, tuple(flags.items()), tuning, pixels)
    # Messages between blocks and tickets, empty at first: all bits set.
    messages = samples * channels
    slots = messages * tiling.tiles if tiling.tiles > 1 else 0
    workspace = torch.empty(2 * (messages + slots) + columns, dtype=torch.int32, device=shaped.device).fill_(-1)
    address = workspace.data_ptr()
    params = Params(
        published=address,
        slots=address + 8 * messages,
        tickets=address + 8 * (messages + slots),
        samples=samples,
        channels=channels,
        pixels=pixels,
        tile_rows=tiling.tile_rows,
        tiles=tiling.tiles,
        segments=tiling.segments,
        eps=spec.eps,
        clamp=spec.clamp_value,
        scale=spec.gradient_scale,
        **tensors,
    )
    per_column = max(1, min(capacity // columns, tiling.items(samples)))
    kernel.launch(per_column * columns, tuning.threads, shared, params)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _parameter(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def mask_size(x: Tensor) -> int:
    """Bytes of the ReLU's bits for x."""
    return x.numel() // 8


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
    """Output, tables (2, N, C, 2) of moments and state, and the bits of a ReLU behind a residual; moves the state."""
    y = torch.empty_like(x)
    tables = torch.empty((2, *x.shape[:2], 2), dtype=torch.float32, device=x.device)
    masked = relu and residual is not None
    mask = torch.empty(mask_size(x), dtype=torch.uint8, device=x.device) if masked else None
    weight, bias = _parameter(weight), _parameter(bias)
    _launch(
        "forward", x, {"RELU": relu, "RESIDUAL": residual is not None}, spec,
        x=_address(x), residual=_address(residual), out=_address(y), mask=_address(mask), weight=_address(weight),
        bias=_address(bias), first=_address(running_mean), second=_address(running_var), moments=_address(tables[0]),
        state=_address(tables[1]), alpha=spec.alpha_fwd, rest=1 - spec.alpha_fwd,
    )  # fmt: skip
    return y, tables, mask


def backward(
    grad: Tensor,
    extra: Tensor | None,
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    tables: Tensor,
    control_u: Tensor,
    control_v: Tensor,
    spec: NormSpec,
    relu: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of x, residual (where its ReLU left a mask), weight and bias; moves u and v."""
    grad_x = torch.empty_like(x)
    grad_residual = None if mask is None else torch.empty_like(x)
    grad_weight, grad_bias = (torch.empty(x.shape[1], dtype=torch.float32, device=x.device) for _ in range(2))
    weight, bias = _parameter(weight), _parameter(bias)
    _launch(
        "backward", x, {"RELU": relu, "RESIDUAL": mask is not None, "EXTRA": extra is not None}, spec,
        x=_address(x), grad=_address(grad), extra=_address(extra), out=_address(grad_x),
        out_residual=_address(grad_residual), mask=_address(mask), weight=_address(weight), bias=_address(bias),
        first=_address(control_u), second=_address(control_v), moments=_address(tables[0]), state=_address(tables[1]),
        grad_weight=_address(grad_weight), grad_bias=_address(grad_bias), alpha=spec.alpha_bkw, rest=1 - spec.alpha_bkw,
    )  # fmt: skip
    return grad_x, grad_residual, grad_weight, grad_bias
