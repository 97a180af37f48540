"""OnlineNorm as modules: parameters, state and input checks around one op."""

import itertools
import logging
import math
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from onlinenorm.errors import ArgumentError
from onlinenorm.hooks import are_untouched
from onlinenorm.normalizers import data_parallel
from onlinenorm.normalizers.batch_sizes import Sizes, check_even_batches, exchanged_sizes
from onlinenorm.normalizers.dependence import PROCESSES
from onlinenorm.normalizers.precision import FullPrecision
from onlinenorm.normalizers.recompute import Start, starting_point
from onlinenorm.normalizers.settings import CheckedSettings
from onlinenorm.normalizers.transforms import LeafOfGraphs, check_training_is_differentiated_once
from onlinenorm.ops import NormSpec, backend_module
from onlinenorm.ops.repetition import with_known_start

logger = logging.getLogger(__name__)

_mailboxes = itertools.count(1)


class OnlineNorm(LeafOfGraphs, CheckedSettings, FullPrecision):
    """What OnlineNorm1d and OnlineNorm2d share; use those."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor
    running_var: Tensor
    control_u: Tensor
    control_v: Tensor
    exchange = "gather"  # of layers pickled by versions without it
    _mailbox = 0
    fuses_residual = True
    fuses_max_pool = True
    fuses_shortcut = True
    _dimensions: tuple[int, ...] = ()
    _layout = ""
    _announced: set[str] = set()  # noqa: RUF012  (shared on purpose: one log line a process and backend)

    def __init__(
        self,
        num_features: int,
        alpha_fwd: float = 0.999,
        alpha_bkw: float = 0.99,
        eps: float = 1e-5,
        affine: bool = True,
        error_compensation: str = "clamp",
        clamp_value: float = 5.0,
        layer_scaling_eps: float = 1e-5,
        layer_scaling_group_size: int | None = None,
        backend: str = "auto",
        statistics: str = "global",
        exchange: str = "gather",
        process_group: dist.ProcessGroup | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if isinstance(num_features, bool) or not isinstance(num_features, int) or num_features < 1:
            raise ArgumentError("num_features", f"{num_features!r} must be a whole number of channels, at least 1")
        self.num_features = num_features
        self.alpha_fwd, self.alpha_bkw = alpha_fwd, alpha_bkw
        self.eps = eps
        self.affine = bool(affine)
        self.error_compensation = error_compensation
        self.clamp_value = clamp_value
        self.layer_scaling_eps = layer_scaling_eps
        self.layer_scaling_group_size = layer_scaling_group_size
        self.backend = backend
        self.statistics = statistics
        self.exchange = exchange
        self.process_group = process_group
        self._mailbox = next(_mailboxes)
        self.gradient_scale = 1.0

        state = {"device": device, "dtype": torch.float64 if dtype == torch.float64 else torch.float32}
        if affine:
            self.weight = nn.Parameter(torch.empty(num_features, **state))
            self.bias = nn.Parameter(torch.empty(num_features, **state))
        else:
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)
        for name in ("running_mean", "running_var", "control_u", "control_v"):
            self.register_buffer(name, torch.empty(num_features, **state))
        self.reset_parameters()

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._mailbox = next(_mailboxes)  # that of the layer it is a copy of is not its own

    def reset_running_stats(self) -> None:
        """Mean 0, variance 1, controls 0: the state before the first sample."""
        with torch.no_grad():
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.control_u.zero_()
            self.control_v.zero_()

    def reset_parameters(self) -> None:
        """State as before the first sample, weight 1 and bias 0."""
        self.reset_running_stats()
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    @property
    def spec(self) -> NormSpec:
        """The layer's constants in the form the ops take.

        Each of W processes sees the gradient of its own mean loss, W times its share of the global mean: dividing by W
        keeps the control state in units that do not depend on the number of processes.
        """
        return self._spec()

    def _spec(self, shortcut: "OnlineNorm | None" = None) -> NormSpec:
        world_size = data_parallel.group_size(*self._group) if self.training else 1
        processes = world_size if self.statistics == "global" else 1
        exchanges = processes > 1 and self.exchange == "auto"
        return NormSpec(
            self.alpha_fwd,
            self.alpha_bkw,
            self.eps,
            self.error_compensation,
            self.clamp_value,
            self.layer_scaling_eps,
            self.layer_scaling_group_size,
            self.gradient_scale / world_size,
            processes,
            self._group[0],
            mailbox=self._mailbox if exchanges else 0,
            shortcut_mailbox=shortcut._mailbox if exchanges and shortcut is not None else 0,
        )

    @property
    def statistics_depend_on(self) -> tuple[str, ...]:
        """Which divisions of a batch change the statistics (see `dependence`): none, but for streams of processes."""
        return (PROCESSES,) if self.has_own_stream else ()

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """Whose batches form one stream; None for all processes. Kept by name, so that layers can be copied."""
        return None if not self._group[0] else data_parallel.resolved_group(*self._group)

    @process_group.setter
    def process_group(self, group: dist.ProcessGroup | None) -> None:
        self._group = data_parallel.group_key(group)

    @property
    def has_own_stream(self) -> bool:
        """Whether other processes of the program may hold other statistics."""
        return self.statistics == "local" or bool(self._group[0])

    def resolve_backend(self, device: torch.device) -> str:
        """The backend that serves tensors on ``device``: the one asked for, or what "auto" stands for there."""
        if self.backend != "auto":
            return self.backend
        return "fused" if device.type == "cuda" else "torch"

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        relu: bool = False,
        max_pool: bool = False,
        shortcut: "OnlineNorm | None" = None,
    ) -> Tensor:
        self._check_input(x, residual)
        if shortcut is not None:
            if residual is None:
                raise ArgumentError("shortcut", "is the layer that a residual passes first, and there is no residual")
            if not relu or max_pool or not self._takes(shortcut, x):
                residual, shortcut = shortcut(residual), None
        if max_pool and x.dim() != 4:
            raise ArgumentError("max_pool", f"pools images (N, C, H, W), got an input of shape {tuple(x.shape)}")
        backend = self.resolve_backend(x.device)
        if not torch.compiler.is_compiling():
            self._announce(backend)
        ops = backend_module(backend)
        x_NCHW = self._as_images(x)
        residual_NCHW = None if residual is None else self._as_images(residual)
        if self.training:
            check_training_is_differentiated_once(self, x)
            spec = self._spec(shortcut)
            start = self._start(x_NCHW, spec)
            if start.sizes.counts:
                spec = replace(spec, counts=start.sizes.counts)
            if not start.sizes.same_pixels:
                ops = backend_module("torch")  # the kernels take one number of pixels for all processes
                if shortcut is not None and residual is not None:
                    residual_NCHW, shortcut = self._as_images(shortcut(residual)), None
            layer = (self.weight, self.bias, start.mean, start.var, self.control_u, self.control_v)
            arguments: tuple = (x_NCHW, residual_NCHW, *layer, spec, relu)
            step = ops.train_step
            if shortcut is not None and residual_NCHW is not None:
                other = shortcut._layer(residual_NCHW)
                step, arguments = ops.train_step_shortcut, (x_NCHW, residual_NCHW, layer, other, spec)
            elif max_pool and relu and residual is None and hasattr(ops, "train_step_max_pool"):
                step, max_pool = ops.train_step_max_pool, False
            repeats = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
            out = with_known_start(step, *arguments) if repeats else step(*arguments)
        else:
            statistics = (self.running_mean, self.running_var)
            out = ops.evaluate(x_NCHW, residual_NCHW, self.weight, self.bias, *statistics, self.spec, relu)
        if max_pool:
            return F.max_pool2d(out, 3, 2, 1)
        return out.reshape(x.shape) if out.dim() != x.dim() else out

    def _takes(self, shortcut: "OnlineNorm", x: Tensor) -> bool:
        """Whether one operator may serve this layer and that of a residual: in training, alike, without hooks."""
        backend = self.resolve_backend(x.device)
        return (
            type(shortcut) is type(self)
            and type(shortcut).forward is OnlineNorm.forward
            and are_untouched(shortcut)
            and self.training
            and shortcut.training
            and backend == shortcut.resolve_backend(x.device)
            and hasattr(backend_module(backend), "train_step_shortcut")
            and (self.spec.processes == 1 or self.exchange == "auto")
            and self.exchange == shortcut.exchange
            and (*self.spec.as_arguments(), *self.spec.peers) == (*shortcut.spec.as_arguments(), *shortcut.spec.peers)
        )

    def _layer(self, x_NCHW: Tensor) -> tuple:
        """Parameters and state from which a pass over x starts."""
        self._check_input(x_NCHW, None)
        start = self._start(x_NCHW, self.spec)
        return self.weight, self.bias, start.mean, start.var, self.control_u, self.control_v

    def _start(self, x_NCHW: Tensor, spec: NormSpec) -> Start:
        """Statistics for this pass to start from and move: the buffers, or copies where nothing may move.

        Under no_grad the batch is normalised as in training but not learned from. When activation checkpointing runs a
        layer again inside backward, it repeats the pass from the same statistics, without counting the batch twice.
        """
        if self.has_own_stream and data_parallel.initialised():
            data_parallel.keep_streams_apart()

        def first() -> Start:
            sizes = exchanged_sizes(self, x_NCHW, spec.group) if spec.processes > 1 else Sizes()
            return Start(self.running_mean, self.running_var, sizes)

        if torch.compiler.is_compiling():
            if spec.processes > 1 and not x_NCHW.is_cuda:
                check_even_batches(self.running_mean, len(x_NCHW), spec.group)
            start = Start(self.running_mean, self.running_var, Sizes())
            return start if torch.is_grad_enabled() else start.copy()
        return starting_point(self, first)

    def _as_images(self, x: Tensor) -> Tensor:
        """(N, C), (N, C, L) or (N, C, H, W) as (N, C, H, W)."""
        return x if x.dim() == 4 else x.reshape(*x.shape[:2], math.prod(x.shape[2:]), 1)

    def _check_input(self, x: Tensor, residual: Tensor | None) -> None:
        name = type(self).__name__
        if isinstance(x, torch.fx.Proxy):  # of a call of the layer there would be none here
            raise ValueError(f"{name}: torch.fx traces networks that call the layer; put it into one, as nn.Sequential")
        if torch.jit.is_tracing():  # which records sizes, and warns of comparing them
            return
        if x.dim() not in self._dimensions:
            raise ValueError(f"{name} takes {self._layout}, got an input of shape {tuple(x.shape)}")
        if x.shape[1] != self.num_features:
            raise ValueError(
                f"{name} was built for {self.num_features} channels, got {x.shape[1]} in an input of shape "
                f"{tuple(x.shape)}; channels are dimension 1"
            )
        if not x.is_floating_point():
            raise ValueError(f"{name} takes floating point, got {x.dtype}; convert images with x.float()")
        if x.device != self.running_mean.device:
            raise ValueError(f"{name} is on {self.running_mean.device}, its input on {x.device}; move one with .to()")
        self._check_state()
        if self.training and x.numel() == 0 and not (len(x) == 0 and self.spec.processes > 1):  # then all are told
            raise ValueError(f"{name} cannot take statistics from an empty input of shape {tuple(x.shape)}")
        if residual is not None and (residual.shape != x.shape or residual.device != x.device):
            raise ValueError(
                f"{name}: residual {tuple(residual.shape)} on {residual.device}, but it must be as the input is: "
                f"{tuple(x.shape)} on {x.device}"
            )

    def _announce(self, backend: str) -> None:
        if backend not in OnlineNorm._announced:
            OnlineNorm._announced.add(backend)
            logger.info("OnlineNorm runs on the %s backend (asked for: %s)", backend, self.backend)

    def _load_from_state_dict(self, state_dict, prefix, *arguments):
        """Also what BatchNorm saved, with controls as before the first sample."""
        controls = [prefix + name for name in ("control_u", "control_v")]
        if prefix + "running_mean" in state_dict and not any(key in state_dict for key in controls):
            state_dict.pop(prefix + "num_batches_tracked", None)
            state_dict |= {key: torch.zeros_like(state_dict[prefix + "running_mean"]) for key in controls}
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def __prepare_scriptable__(self):
        raise RuntimeError(
            f"{type(self).__name__}: torch.jit.script cannot compile the layer; use torch.compile, torch.export in "
            "eval mode, or convert(model, to='batch')"
        )

    def extra_repr(self) -> str:
        guard = {
            "clamp": f", clamp_value={self.clamp_value:g}",
            "layer_scaling": f", layer_scaling_group_size={self.layer_scaling_group_size}",
            "none": "",
        }[self.error_compensation]
        group = f", process_group={list(self._group[1])}" if self._group[0] else ""
        return (
            f"{self.num_features}, alpha_fwd={self.alpha_fwd:g}, alpha_bkw={self.alpha_bkw:g}, eps={self.eps:g}, "
            f"affine={self.affine}, error_compensation={self.error_compensation}{guard}, backend={self.backend}"
            f"{group}"
        )


_DOCUMENTATION = r"""Normalise each channel of {layout} with statistics of the samples that came before.

    y_n = (x_n - m_n) / sqrt(var_n + eps),   out = relu(guard(weight * y_n + bias) + residual)

    with m and var exponential averages over the stream of samples (per channel, decay ``alpha_fwd``), so that no output
    depends on later samples and batches of one work like any other; residual and ReLU where asked for, and behind them
    a 3x3 max-pool of stride 2 and padding 1 (``max_pool``, of images); ``shortcut`` is a layer that the residual passes
    first. The backward pass is a control process (decay ``alpha_bkw``) that keeps gradients nearly orthogonal to y and
    to 1, not the derivative of the forward pass.

    Training: statistics move in place in the forward pass, controls in the backward pass, samples in batch order;
    under ``torch.no_grad()`` nothing moves. Activation checkpointing, nested or not, reentrant or not, counts a batch
    once; under torch.compile it is an error, as in an autograd.Function with ``setup_context``. What differentiates the
    training pass a second time (of a compiled one torch itself speaks), in forward mode, batched or by torch.func, or
    takes it without its backward pass (torch.export, torch.jit), is told to call eval() first.
    ``torch.optim.swa_utils.update_bn`` knows BatchNorm alone: see ``update_statistics``. ``load_state_dict`` also takes
    what BatchNorm saved, with controls as before the first sample.

    Controls are averages of gradients as backward meets them, times ``layer.gradient_scale`` (a float, at first 1):
    give it 1 / scale where a loss is multiplied by a constant. A sample whose gradient overflows moves no control, so
    that a step that GradScaler discards does no lasting harm; where its scale changes, call ``rescale_controls``, or
    set ``gradient_scale`` anew before each forward pass. Every backward pass through a retained graph moves controls.

    Eval: the statistics are constants, gradients ordinary, nothing moves, and the guard still applies
    (``remove_clamping`` takes the clamp away).

    Args:
        num_features: channels C, at least 1.
        alpha_fwd: decay of mean and variance, in (0, 1).
        alpha_bkw: decay of the gradient controls, in (0, 1).
        eps: added to the variance, > 0.
        affine: learn ``weight`` (initially 1) and ``bias`` (initially 0) per channel.
        error_compensation: "clamp" limits outputs to [-clamp_value, clamp_value]; "layer_scaling" divides each sample
            by its root mean square over channels and positions; "none" lets the error of the statistics through.
        clamp_value: limit of "clamp", > 0 and < 65504, in deviations (before residual and ReLU).
        layer_scaling_eps: added to the mean square of "layer_scaling", > 0.
        layer_scaling_group_size: channels that share a scale; divides C; None for all.
        backend: "auto" (fused kernels on CUDA, else torch), "fused", "torch" or "reference".
        statistics: across processes "global" (the stream that one process with the global batch would see, where that
            batch is dealt out image by image: rank r of W holds positions r, r + W, ...; one small collective forward
            and one backward) or "local" (each process its own stream; no
            communication, to be averaged before validation and checkpoints, see ``average_statistics``). Batches may be
            of different sizes, each process's mean loss counting as much, as in DistributedDataParallel; in compiled
            programs and captured CUDA graphs global statistics need batches of one size, and on GPUs a layer that once
            had as many samples as the layer before it must go on so. DistributedDataParallel starts local streams from
            that of rank 0, where it wraps the network and at its first forward pass, and then leaves them alone: load
            statistics of a process's own after that pass.
        exchange: how global statistics come to other processes: "gather" (collectives) or "auto" (in 16 bits on up to 8
            GPUs of one machine, Hopper or later, each with access to the others' memory, kernels store moments there
            while they run, so that images are read once; elsewhere, and for uneven batches, as "gather", but small
            messages of 16 processes or more on several machines between these first and then within each). Every
            process must see all GPUs of its machine: where CUDA_VISIBLE_DEVICES, or SLURM's --gpus-per-task, leaves
            each its own alone, torch shares no memory between them. Of a layer's captured forward and backward graphs
            one is replayed after the other in turn. A process that does not come is waited for as long as by the
            group's collectives; what waits then fails.
        process_group: whose batches form the global stream, and by whose number gradients are taken to be averaged; a
            ``torch.distributed`` group that this process belongs to, or None for all processes.
        device, dtype: of parameters and state; float32, or float64 when asked for, never half precision.

    Shapes:
        x, residual and output {layout}; the output has the dtype and memory format of x.

    Raises:
        ValueError: an argument outside its range; an input of another rank, channel count or integer dtype; on every
            process, an empty batch on one of them.

    Sources: Chiley et al. 2019, arXiv:1905.05894; the clamp: Chiley, Error Compensation Mechanism in Online
    Normalization, 2020.
    """


class OnlineNorm1d(OnlineNorm):
    __doc__ = _DOCUMENTATION.format(layout="(N, C) or (N, C, L)")
    _dimensions = (2, 3)
    _layout = "(N, C) or (N, C, L)"


class OnlineNorm2d(OnlineNorm):
    __doc__ = _DOCUMENTATION.format(layout="(N, C, H, W)")
    _dimensions: tuple[int, ...] = (4,)
    _layout = "(N, C, H, W)"
