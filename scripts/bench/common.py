"""What the benchmarks share: the correctness gate, the timer, and the head of a results file."""

import contextlib
import itertools
import json
import platform
import shlex
import statistics
import sys
from pathlib import Path

import torch
import triton

from onlinenorm import OnlineNorm2d
from onlinenorm.files import write_atomically
from onlinenorm.ops.fused import memset_nodes
from onlinenorm.provenance import git_state

STATE = ("running_mean", "running_var", "control_u", "control_v")
# (N, C, H, W): small and ragged, and a tile of each kind the ImageNet networks hold.
GATE_SHAPES = ((3, 5, 7, 6), (6, 64, 56, 56), (5, 128, 28, 28), (9, 256, 14, 14), (13, 192, 7, 7))


def train_steps(layer, dtype: torch.dtype, shape, device, steps: int = 3) -> dict[str, torch.Tensor]:
    """Outputs, gradients and state of a few training steps on reproducible offset data, residual and ReLU included."""
    generator = torch.Generator(device).manual_seed(sum(shape))
    found: dict[str, torch.Tensor] = {}
    for step in range(steps):
        draw = torch.randn((3, *shape), generator=generator, device=device)
        x, residual, grad = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in draw)
        x = (0.5 * x - 2.3).to(layer.running_mean.dtype if dtype is torch.float64 else dtype)
        x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_()
        y = layer(x, residual=residual, relu=True)
        y.backward(grad)
        found |= {f"y{step}": y.detach(), f"grad_x{step}": x.grad, f"grad_residual{step}": residual.grad}
    found |= {name: getattr(layer, name).clone() for name in STATE}
    return found | {f"grad_{name}": p.grad for name, p in layer.named_parameters()}


def gate(device: torch.device, backend: str, guards=("clamp", "layer_scaling"), shapes=GATE_SHAPES) -> None:
    """Exit unless ``backend`` in bfloat16 is as near to the float64 sample loop as twice the PyTorch backend is."""
    for guard in guards:
        for shape in shapes:
            runs = []
            for name, dtype in ((backend, torch.bfloat16), ("torch", torch.bfloat16), ("reference", torch.float64)):
                layer = OnlineNorm2d(shape[1], error_compensation=guard, clamp_value=1.5, backend=name, device=device)
                if dtype is torch.float64:
                    layer = layer.double()
                # Inputs are rounded to bfloat16 for all three, so that only arithmetic differs.
                runs.append(train_steps(_Rounded(layer), dtype, shape, device))
            ours, eager, exact = runs
            for key, truth in exact.items():
                error, allowed = (_distance(found[key], truth) for found in (ours, eager))
                if not error <= 2 * allowed + 1e-5:
                    sys.exit(f"gate: {backend}, {guard}, {shape}: {key} is off by {error:.2e} (PyTorch {allowed:.2e})")


class _Rounded:
    """A layer whose inputs are rounded to bfloat16 first, in whatever precision it then computes."""

    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x, residual, relu):
        exact = self.layer.running_mean.dtype is torch.float64
        if exact:
            x, residual = (t.bfloat16().double() for t in (x, residual))
        return self.layer(x, residual=residual, relu=relu)

    def __getattr__(self, name):
        return getattr(self.layer, name)


def _distance(found: torch.Tensor, truth: torch.Tensor) -> float:
    return ((found.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-12)).item()


def timed(step, device: torch.device, repeats: int) -> list[float]:
    """Milliseconds of each of ``repeats`` calls, by device events on a GPU."""
    if device.type != "cuda":
        import time

        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - start))
        return times
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda.synchronize()
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]


@contextlib.contextmanager
def side_stream():
    """A current stream that is not the default one, behind what was queued before and ahead of what comes after.

    Its kernels come first where a graph has others beside them.
    """
    outer, side = torch.cuda.current_stream(), torch.cuda.Stream(priority=-1)
    side.wait_stream(outer)
    with torch.cuda.stream(side):
        yield side
    outer.wait_stream(side)


def captured(step):
    """``step`` as a CUDA graph, after a warm-up; call the result to replay it.

    Backward runs on the stream of its forward: to capture backward alone, run forward and this under ``side_stream``.
    """
    current = torch.cuda.current_stream()
    with side_stream() if current == torch.cuda.default_stream() else contextlib.nullcontext(current) as stream:
        for _ in range(2):
            step()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph, stream=stream):
        step()
    memset_nodes.as_kernels(graph)  # as training/cuda_graph.py does
    graph.instantiate()
    return graph.replay


def spread(times: list[float]) -> float:
    """Range from the 20th to the 80th percentile over the median."""
    if len(times) < 2:
        return 0.0
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return (fifths[3] - fifths[0]) / statistics.median(times)


def check_device(parser, args) -> None:
    """Ends with usage where what is recorded from a GPU would be written over, or no GPU is there to measure."""
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here: these figures are of an NVIDIA GPU; --device cpu --output FILE tries the script out")
    if args.device == "cpu" and args.output == parser.get_default("output"):
        parser.error(f"--device cpu would write over {args.output}; name another file with --output")


def head(device: torch.device) -> dict:
    """Where, with what and by which command a benchmark ran."""
    state = git_state()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": state["commit"][:7] + ("-dirty" if state["dirty"] else ""),
        # without the folders of this machine
        "command": "python " + shlex.join(Path(word).name if word.startswith("/") else word for word in sys.argv),
    }


def write(path: str, results: dict) -> None:
    """Results as JSON, so far: called after every round, so that an interrupted run leaves what it measured."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(path), json.dumps(results, indent=1) + "\n")  # others may read it meanwhile
