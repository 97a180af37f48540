"""Launchers of the two-pass kernels: which block shapes, how many slices, in which order.

Across processes the tables of moments are gathered between the reduction and the scan, one slice a sample, and every
process scans the samples of all; `geo` below describes this process's tensor, `everyone` the samples of all processes.
"""

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from onlinenorm.ops.distributed import gather_samples, own_mask, own_rank, own_samples, total_samples
from onlinenorm.ops.fused.kernels import backward as backward_kernels
from onlinenorm.ops.fused.kernels import forward as forward_kernels
from onlinenorm.ops.spec import NormSpec
from onlinenorm.ops.vectorized import MOST_GROWTH

PROGRAMS_WANTED = 1024  # reductions slice the rows of a sample until about this many programs share the work


@dataclass(frozen=True)
class Geometry:
    """How the kernels see a dense (N, C, H, W) tensor: sizes, strides in elements and block shapes."""

    samples: int
    channels: int
    pixels: int
    stride_n: int
    stride_p: int
    stride_c: int
    block_p: int
    block_c: int
    splits: int
    rows: int

    @classmethod
    def of(cls, x: Tensor, most: int) -> "Geometry":
        """That of x, with the slices of a tensor of ``most`` samples: all processes cut theirs alike."""
        samples, channels, height, width = x.shape
        pixels = height * width
        wide, tall = triton.next_power_of_2(channels), triton.next_power_of_2(pixels)
        if x.is_contiguous(memory_format=torch.channels_last):
            stride_p, stride_c = channels, 1
            block_c = min(wide, 64)
            block_p = min(tall, 2048 // block_c)
        else:
            stride_p, stride_c = 1, pixels
            block_p = min(tall, 512)
            block_c = min(wide, 2048 // block_p)
        programs = most * triton.cdiv(channels, block_c)
        splits = max(1, min(PROGRAMS_WANTED // programs, pixels // (4 * block_p)))
        rows = triton.cdiv(triton.cdiv(pixels, splits), block_p) * block_p
        splits = triton.cdiv(pixels, rows)
        return cls(samples, channels, pixels, channels * pixels, stride_p, stride_c, block_p, block_c, splits, rows)

    @property
    def strides(self) -> tuple[int, int, int]:
        return self.stride_n, self.stride_p, self.stride_c

    @property
    def reduce_grid(self) -> tuple[int, int]:
        return self.samples * self.splits, triton.cdiv(self.channels, self.block_c)

    @property
    def apply_grid(self) -> tuple[int, int]:
        return self.samples * triton.cdiv(self.pixels, self.block_p), triton.cdiv(self.channels, self.block_c)

    @property
    def blocks(self) -> dict[str, int]:
        return {"BLOCK_P": self.block_p, "BLOCK_C": self.block_c}

    @property
    def scan_blocks(self) -> dict[str, int]:
        return {
            "BLOCK_N": min(triton.next_power_of_2(self.samples), 64),
            "BLOCK_C": min(triton.next_power_of_2(self.channels), 16 if self.channels < 1024 else 32),
        }

    def groups(self, spec: NormSpec) -> tuple[int, int]:
        """Layer-scaling groups and channels a group."""
        size = spec.layer_scaling_group_size or self.channels
        return self.channels // size, size


def _geometries(x: Tensor, spec: NormSpec) -> tuple[Geometry, Geometry]:
    """This process's tensor, and the samples of all processes."""
    geo = Geometry.of(x, max(spec.counts, default=len(x)))
    if spec.processes == 1:
        return geo, geo
    return geo, replace(geo, samples=total_samples(len(x), *spec.peers), splits=1, rows=geo.pixels)


def _table(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def _from_all(partial: Tensor, spec: NormSpec, merge_kernel, *sizes: int) -> Tensor:
    """Partial moments (N, splits, C, 2) of this process's samples -> (M, 1, C, 2) of all processes', as dealt.

    ``merge_kernel``, which is called with ``sizes``, makes one slice of several: the bits that the scan would.
    """
    if spec.processes == 1:
        return partial
    samples, splits, channels, _ = partial.shape
    if splits > 1:
        slices, partial = partial, _table(partial, samples, 1, channels, 2)
        block_c = min(triton.next_power_of_2(channels), 128)
        merge_kernel[samples, triton.cdiv(channels, block_c)](
            slices, partial, channels, splits, *sizes, BLOCK_C=block_c
        )
    by_machine = bool(spec.mailbox)  # exchange="auto"
    return gather_samples(partial.flatten(1)[None], *spec.peers, by_machine)[0].unflatten(1, partial.shape[1:])


def _reduce(x: Tensor, geo: Geometry) -> Tensor:
    partial = _table(x, geo.samples, geo.splits, geo.channels, 2)
    forward_kernels.moments_kernel[geo.reduce_grid](
        x, partial, geo.pixels, geo.channels, geo.splits, geo.rows, *geo.strides, **geo.blocks, STAGES=3
    )
    return partial


def _own(table: Tensor | None, spec: NormSpec) -> Tensor | None:
    return None if table is None else own_samples(table, *spec.peers).contiguous()


def _layer_scale(moments, state, weight, bias, geo: Geometry, spec: NormSpec, state_stride: int) -> Tensor | None:
    if spec.error_compensation != "layer_scaling":
        return None
    groups, size = geo.groups(spec)
    rzeta = _table(moments, geo.samples, groups)
    forward_kernels.layer_scale_kernel[(geo.samples * groups,)](
        moments, state, weight, bias, rzeta, geo.channels, groups, size, state_stride, spec.eps,
        spec.layer_scaling_eps, BLOCK_C=min(triton.next_power_of_2(size), 1024),
    )  # fmt: skip
    return rzeta


def _apply(x, residual, weight, bias, state, rzeta, geo: Geometry, spec: NormSpec, relu, state_stride) -> Tensor:
    y = torch.empty_like(x)
    forward_kernels.apply_kernel[geo.apply_grid](
        x, residual, y, state, weight, bias, rzeta, geo.pixels, geo.channels, *geo.groups(spec), state_stride,
        *geo.strides, spec.eps, spec.clamp_value,
        RELU=relu, CLAMP=spec.error_compensation == "clamp", **geo.blocks,
    )  # fmt: skip
    return y


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
    """Output, tables (2, M, C, 2) of moments and state, 1 / zeta where layers are scaled; moves mean and variance.

    M samples of all processes.
    """
    geo, everyone = _geometries(x, spec)
    partial = _from_all(_reduce(x, geo), spec, forward_kernels.merge_moments_kernel, geo.rows, geo.pixels)
    tables = _table(x, 2, everyone.samples, geo.channels, 2)
    scan = everyone.scan_blocks
    forward_kernels.forward_scan_kernel[(triton.cdiv(geo.channels, scan["BLOCK_C"]),)](
        partial, tables[0], tables[1], running_mean, running_var, everyone.samples, geo.channels, everyone.splits,
        everyone.rows, geo.pixels, spec.alpha_fwd, 1 - spec.alpha_fwd, **scan,
    )  # fmt: skip
    rzeta = _layer_scale(tables[0], tables[1], weight, bias, everyone, spec, geo.channels)
    state, own_rzeta = (_own(table, spec) for table in (tables[1], rzeta))
    return _apply(x, residual, weight, bias, state, own_rzeta, geo, spec, relu, geo.channels), tables, rzeta


def evaluate(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    spec: NormSpec,
    relu: bool,
) -> Tensor:
    """Output with frozen statistics."""
    geo = Geometry.of(x, len(x))
    state, moments = torch.stack([running_mean, running_var], -1), None
    if spec.error_compensation == "layer_scaling":
        # A scan from any state fills the table of moments; the copies keep the layer's own state still.
        tables = _table(x, 2, geo.samples, geo.channels, 2)
        scan = geo.scan_blocks
        forward_kernels.forward_scan_kernel[(triton.cdiv(geo.channels, scan["BLOCK_C"]),)](
            _reduce(x, geo), tables[0], tables[1], running_mean.clone(), running_var.clone(), geo.samples,
            geo.channels, geo.splits, geo.rows, geo.pixels, spec.alpha_fwd, 1 - spec.alpha_fwd, **scan,
        )  # fmt: skip
        moments = tables[0]
    rzeta = _layer_scale(moments, state, weight, bias, geo, spec, 0)
    return _apply(x, residual, weight, bias, state, rzeta, geo, spec, relu, 0)


def backward(
    grad: Tensor,
    skip_grad: Tensor | None,
    x: Tensor,
    out: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    tables: Tensor,
    rzeta: Tensor | None,
    control_u: Tensor,
    control_v: Tensor,
    spec: NormSpec,
    relu: bool,
    residual_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of x, residual (where asked for), weight and bias; moves u and v."""
    geo, everyone = _geometries(x, spec)
    moments, state = tables
    own_state, own_moments = _own(state, spec), _own(moments, spec) if rzeta is not None else None
    flags = {"RELU": relu, "CLAMP": spec.error_compensation == "clamp", **geo.blocks}
    sizes = geo.pixels, geo.channels
    partial = _table(x, geo.samples, geo.splits, geo.channels, 2)
    backward_kernels.gradient_moments_kernel[geo.reduce_grid](
        grad, skip_grad, x, out, partial, own_moments, own_state, weight, bias, *sizes, geo.splits, geo.rows,
        *geo.strides, spec.eps, spec.clamp_value, **flags, STAGES=3,
    )  # fmt: skip
    partial = _from_all(partial, spec, backward_kernels.merge_gradients_kernel)
    groups = geo.groups(spec)
    kappa = None
    if rzeta is not None:
        kappa = torch.empty_like(rzeta)
        backward_kernels.project_kernel[(rzeta.numel(),)](
            partial, moments, state, weight, bias, rzeta, kappa, geo.channels, *groups, everyone.splits, geo.pixels,
            spec.eps, BLOCK_C=min(triton.next_power_of_2(groups[1]), 1024),
        )  # fmt: skip
    control = _table(x, everyone.samples, geo.channels, 2)
    rank = own_rank(spec.group) if spec.processes > 1 else 0
    grad_weight, grad_bias = _table(x, geo.channels), _table(x, geo.channels)
    scan = everyone.scan_blocks
    backward_kernels.backward_scan_kernel[(triton.cdiv(geo.channels, scan["BLOCK_C"]),)](
        partial, moments, state, rzeta, kappa, weight, bias, control_u, control_v, control, grad_weight, grad_bias,
        own_mask(control, *spec.peers), everyone.samples, rank, spec.processes, geo.channels, *groups, everyone.splits,
        geo.pixels, spec.eps, spec.alpha_bkw, 1 - spec.alpha_bkw, spec.gradient_scale, MOST_GROWTH,
        **scan,
    )  # fmt: skip
    own_control, own_rzeta, own_kappa = (_own(table, spec) for table in (control, rzeta, kappa))
    grad_x = torch.empty_like(x)
    grad_residual = torch.empty_like(x) if residual_gradient else None
    backward_kernels.gradient_apply_kernel[geo.apply_grid](
        grad, skip_grad, x, out, grad_x, grad_residual, own_state, own_control, weight, bias, own_rzeta, own_kappa,
        *sizes, *groups, *geo.strides, spec.eps, spec.clamp_value, **flags,
    )  # fmt: skip
    return grad_x, grad_residual, grad_weight, grad_bias
