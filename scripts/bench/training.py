"""Images per second and peak memory of a whole training step, normalizer against normalizer.

    python scripts/bench/training.py                     # all rows, one GPU
    python scripts/bench/training.py --batch 256 --mode compile+graph --dtype bf16 --seconds 300

A row is (normalizer, backend, stem, compiler, mode, dtype, batch, with or without optimizer); the compiler's settings
are torch.compile's own, with coordinate descent, or max-autotune, which take minutes and are kept in Inductor's cache
(TORCHINDUCTOR_CACHE_DIR): BatchNorm, the rival, gets all that are asked for, on everybody's stem, and on the others
with ``--every-stem``. Captured steps are those of train.py: small memsets are kernels, and weights are cast together,
but with the stem conv7x7, which stands for torchvision's network in a loop without this project.
All rows are measured in one process, in rounds that visit every row, so that drift of the GPU's clocks falls on all of
them; a row's time is the median over rounds of medians, its spread the range from the 20th to the 80th percentile of
the steps of all rounds over the median. Rounds after the first take the fastest rows first. Rows of PyTorch's own
backend, minutes to compile, come after all others, in rounds of their own.
The step is forward + backward of the classification loss under autocast, and SGD where the row says so. Rows of one
model share it, and its convolutions' tuning with those of other normalizers. The correctness gate runs first. Networks
that ``--seconds`` leaves no time to build are listed as not run; rounds begun go to their end.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts._venv import run_main

import torch
import torch.nn.functional as F
from torch.func import functional_call

from onlinenorm import OnlineNorm2d, models
from onlinenorm.report.settings import load_spec
from onlinenorm.training.cuda_graph import CastWeights, like
from scripts.bench import common
from scripts.bench.training_table import fastest, over, smallest, workload

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MODES = ("eager", "graph", "compile", "compile+graph")
NORMALIZERS: dict[str, Callable[..., torch.nn.Module]] = {
    "batch": torch.nn.BatchNorm2d,
    "online_clamp": OnlineNorm2d,
    "online_layer_scaling": partial(OnlineNorm2d, error_compensation="layer_scaling"),
    "online_none": partial(OnlineNorm2d, error_compensation="none"),
}
COMPILERS: dict[str, dict[str, Any]] = {
    "default": {},
    "coordinate_descent": {"options": {"coordinate_descent_tuning": True}},
    "max_autotune": {"mode": "max-autotune-no-cudagraphs"},  # coordinate descent is part of it
}
STEMS = ("space_to_depth_2x4", "space_to_depth", "conv7x7")  # the first is what "auto" takes
IMAGENET = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")  # the models that have such a stem


FP16_LOSS_SCALE = 2.0**10  # gradients that vanish would be zeros, and arithmetic on zeros takes less power and time


class Network:
    """One model and its input; lives through all rounds, graphs and activations only while a row is timed."""

    def __init__(self, normalizer: str, backend: str, stem: str, compiler: str | None, dtype: str, batch: int, args):
        self.device, self.dtype = torch.device(args.device), DTYPES[dtype]
        make = NORMALIZERS[normalizer]
        torch.manual_seed(0)
        norm = make if normalizer == "batch" else partial(make, backend=backend)
        model = getattr(models, args.model)(norm, **({"stem": stem} if args.model in IMAGENET else {}))
        self.model = model.to(self.device, memory_format=torch.channels_last).train()
        if compiler:
            self.model.compile(dynamic=False, **COMPILERS[compiler])
        shape = (batch, 3, args.size, args.size)
        self.x = torch.randn(shape, device=self.device).to(memory_format=torch.channels_last)
        self.target = torch.arange(batch, device=self.device) % 1000
        self.parameters = dict(self.model.named_parameters())
        self.sgd = torch.optim.SGD(self.parameters.values(), 1e-4, 0.9, fused=True)  # as train.py on a GPU
        with self._autocast():
            self.cast = CastWeights(self.model, self.parameters, self.device.type)
        self.casts_at_once = stem != "conv7x7"  # which stands for everybody's network and step

    def _autocast(self) -> torch.autocast:
        # Casts of weights are part of the step; a cache of them would outlive a captured graph.
        enabled = self.dtype is not torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=enabled, cache_enabled=False)

    def step(self, optimizer: bool = False, captured: bool = False) -> None:
        """A step; one that is captured casts all weights together, as training/cuda_graph.py does."""
        self.sgd.zero_grad(set_to_none=True)
        together = captured and self.casts_at_once
        if together:
            self.cast.refresh()
            given = self.parameters | self.cast.copies
        with self._autocast():
            logits = functional_call(self.model, given, (self.x,)) if together else self.model(self.x)
            loss = F.cross_entropy(logits, self.target)
        loss = loss * FP16_LOSS_SCALE if self.dtype is torch.float16 else loss
        if together:
            own, gradients = list(self.parameters.values()), torch.autograd.grad(loss, list(given.values()))
            for parameter, gradient in zip(own, like(own, gradients), strict=True):
                parameter.grad = gradient
        else:
            loss.backward()
        if optimizer:
            self.sgd.step()

    def held(self, captured: bool) -> int:
        """Bytes of weights, of a captured step's copies, and of the optimizer's state, where it has any by now."""
        copies = self.cast.copies.values() if captured and self.casts_at_once else ()
        tensors = [*self.parameters.values(), *copies]
        tensors += [value for state in self.sgd.state.values() for value in state.values() if torch.is_tensor(value)]
        return sum(tensor.nbytes for tensor in tensors)


class Row:
    """One configuration of one network."""

    def __init__(self, network: Network, key: dict):
        self.network, self.key = network, key
        self.rounds: list[list[float]] = []  # milliseconds of each step
        self.peak = 0.0

    def measure(self, repeats: int) -> None:
        network = self.network
        cuda = network.device.type == "cuda"
        captured = self.key["mode"].endswith("graph")
        step = partial(network.step, self.key["optimizer"], captured)
        if cuda:
            torch.cuda.empty_cache()
        step()
        step()
        network.sgd.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if cuda else 0
        run = common.captured(step) if captured else step
        self.rounds.append(common.timed(run, network.device, repeats + 2)[2:])
        if cuda:
            self.peak = max(self.peak, (torch.cuda.max_memory_allocated() - before + network.held(captured)) / 2**30)
        del run
        network.sgd.zero_grad(set_to_none=True)
        network.sgd.state.clear()

    @property
    def milliseconds(self) -> float:
        return statistics.median(map(statistics.median, self.rounds))

    def record(self) -> dict:
        return {
            **self.key,
            "milliseconds": round(self.milliseconds, 3),
            "images_per_second": round(1e3 * self.key["batch"] / self.milliseconds, 1),
            "peak_memory_gib": round(self.peak, 3),
            "repeat_spread": round(common.spread([*itertools.chain(*self.rounds)]), 4),
            "rounds": len(self.rounds),
        }


def networks_of(args) -> list[tuple]:
    """(normalizer, backend, stem, compiler, dtype, batch) and the modes to time each in; the deciding ones first."""
    wanted = []
    for compiler, stem, dtype, name, batch in itertools.product(
        (*args.compiler, None), args.stem, args.dtype, args.normalizer, sorted(args.batch, reverse=True)
    ):
        modes = [mode for mode in args.mode if mode.startswith("compile") == (compiler is not None)]
        first = stem == args.stem[0] and dtype == args.dtype[0]
        for backend in ["torch"] if name == "batch" else args.backend:
            # PyTorch's own backend keeps a dozen float32 copies of each tensor: small batches only.
            serves = backend == "fused" or name == "batch" or (batch <= 64 and first)
            # The rival has every compiler, in the first dtype, and every stem; the others what they are fastest with.
            if compiler in (None, "default"):
                serves = serves and (stem == args.stem[0] or (name == "batch" and dtype == args.dtype[0]))
            else:
                serves = name == "batch" and dtype == args.dtype[0]
            if modes and serves:
                wanted.append(((name, backend, stem, compiler, dtype, batch), modes))

    def rank(entry: tuple) -> tuple:
        (_, _, stem, compiler, dtype, _), _ = entry
        return _slow(entry), dtype != args.dtype[0], compiler is None, stem != args.stem[0]

    return sorted(wanted, key=rank)


def _slow(wanted: tuple) -> bool:
    """Whether a network of OnlineNorm has PyTorch's own backend."""
    (name, backend, *_), _ = wanted
    return name != "batch" and backend == "torch"


def summary(rows: list[dict]) -> list[str]:
    """Best row of each OnlineNorm kind over the best BatchNorm row, by batch size and use of the optimizer.

    Its peak memory is compared with the least that BatchNorm takes in the same mode and dtype.
    """
    lines = []
    for batch, optimizer in sorted({(row["batch"], row["optimizer"]) for row in rows}):
        of_size = [row for row in rows if (row["batch"], row["optimizer"]) == (batch, optimizer)]
        rival = fastest(of_size, normalizer="batch")
        step = "with optimizer" if optimizer else "forward and backward"
        for name in sorted({row["normalizer"] for row in of_size} - {"batch"}) if rival else ():
            best = fastest(of_size, normalizer=name)
            assert best is not None  # the name is of one of these rows
            like = smallest(of_size, normalizer="batch", mode=best["mode"], dtype=best["dtype"])
            speed, memory = over(best, rival, "images_per_second"), over(best, like, "peak_memory_gib")
            lines.append(f"N = {batch}, {step}: {name} / batch = {speed} in speed, {memory} in peak memory")
    return lines


def plot(results: dict, path: str) -> None:
    """Images per second, with the optimizer where that was measured, a panel a batch size: each normalizer in its
    fastest mode and dtype, and BatchNorm once more for every compiler and stem."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    spec = load_spec()
    stepped = [row for row in results["rows"] if row.get("optimizer")]
    rows = stepped or results["rows"]
    batches = sorted({row["batch"] for row in rows})
    shown = {}
    for batch in batches:
        kinds = itertools.groupby(sorted((row for row in rows if row["batch"] == batch), key=_kind), key=_kind)
        best = [max(group, key=_rate) for _, group in kinds]
        shown[batch] = sorted(best, key=_rate)
    heights = [1 + 0.42 * len(shown[batch]) for batch in batches]
    figure, axes = plt.subplots(
        len(batches), figsize=(9, 0.6 + sum(heights)), height_ratios=heights, sharex=True, squeeze=False
    )
    for ax, batch in zip(axes[:, 0], batches, strict=True):
        for y, row in enumerate(shown[batch]):
            rate, colour = row["images_per_second"], spec.row(row["normalizer"]).colour
            ax.barh(y, rate, 0.8, color=colour)
            ax.annotate(f"{rate:,.0f}", (rate, y), (-6, 0), textcoords="offset points", va="center", ha="right",
                        color="white", fontsize=9)  # fmt: skip
        names = [f"{spec.row(row['normalizer']).label}\n{_settings(row)}" for row in shown[batch]]
        ax.set_yticks(range(len(names)), names, fontsize=9)
        ax.set(title=f"batch {batch}")
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel(f"images/s, forward + backward{' + SGD' * bool(stepped)}")
    figure.suptitle(f"A training step of {workload(results)}, {results['device']}")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _rate(row: dict) -> float:
    return row["images_per_second"]


def _kind(row: dict) -> tuple[str, ...]:
    rival = row["normalizer"] == "batch" and row.get("compiler")
    return (row["normalizer"], row["stem"], row["compiler"]) if rival else (row["normalizer"],)


def _settings(row: dict) -> str:
    name = row.get("compiler") or "default"
    compiler = "" if name == "default" else f" ({name.replace('_', ' ')})"
    stem = {"conv7x7": "7x7 stem", "space_to_depth": "2x2 blocks", "space_to_depth_2x4": "2x4 blocks"}.get(
        row.get("stem", ""), ""
    )
    return ", ".join(part for part in (row["mode"] + compiler, row["dtype"], stem) if part)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--size", type=int, default=224, help="pixels a side")
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--mode", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--dtype", nargs="+", default=["bf16", "fp16"], choices=list(DTYPES))
    parser.add_argument("--normalizer", nargs="+", default=list(NORMALIZERS), choices=list(NORMALIZERS))
    parser.add_argument("--backend", nargs="+", default=["fused"], help="of the OnlineNorm rows; torch at N <= 64 only")
    parser.add_argument("--stem", nargs="+", default=list(STEMS), choices=STEMS, help="the first is everybody's")
    parser.add_argument("--compiler", nargs="+", default=list(COMPILERS), choices=list(COMPILERS), help="of BatchNorm")
    parser.add_argument("--every-stem", action="store_true", help="the slow compilers on every stem, minutes a network")
    parser.add_argument("--optimizer", choices=("without", "with", "both"), default="both", help="SGD in the step")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="build no further network after so long")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=20, help="steps a round")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", default="results/bench_training.json", help="the picture lands beside it")
    args = parser.parse_args(argv)
    common.check_device(parser, args)
    began, device = time.perf_counter(), torch.device(args.device)
    # All networks share the code of one forward: past dynamo's limit of 8 versions they would run eagerly, unnoticed.
    torch._dynamo.config.recompile_limit = 100
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        for backend in args.backend:
            common.gate(device, backend)
    results = {**common.head(device), "model": args.model, "size": args.size, "not_run": [], "rows": []}
    optimizers = {"without": [False], "with": [True], "both": [False, True]}[args.optimizer]
    rows: list[Row] = []

    def measure(row: Row) -> None:
        start = time.perf_counter()
        try:
            row.measure(args.repeats)
        except torch.OutOfMemoryError as error:
            print(f"{row.key}: {error}", flush=True)
            results["not_run"].append({**row.key, "why": "out of memory"})
            rows.remove(row)
            return
        print(row.record(), f"{time.perf_counter() - start:.0f} s", flush=True)
        results["rows"] = [measured.record() for measured in rows if measured.rounds]
        common.write(args.output, results)

    for _, group in itertools.groupby(networks_of(args), key=_slow):
        before = len(rows)
        for (name, backend, stem, compiler, dtype, batch), modes in group:
            network_key = {"normalizer": name, "backend": backend, "stem": stem, "compiler": compiler}
            keys = [
                {**network_key, "mode": mode, "dtype": dtype, "batch": batch, "optimizer": sgd}
                for mode, sgd in itertools.product(modes, optimizers)
            ]
            other_stem = compiler not in (None, "default") and stem != args.stem[0] and not args.every_stem
            if other_stem or time.perf_counter() - began > args.seconds:
                why = "only with --every-stem" if other_stem else "out of time"
                results["not_run"] += [{**key, "why": why} for key in keys]
                continue
            network = Network(name, backend, stem, compiler, dtype, batch, args)
            for key in keys:
                rows.append(Row(network, key))
                measure(rows[-1])
        for _ in range(args.rounds - 1):
            for row in sorted(rows[before:], key=lambda row: row.milliseconds / row.key["batch"]):
                measure(row)
    common.write(args.output, results)
    plot(results, str(args.output).removesuffix(".json") + ".png")
    print(*summary(results["rows"]), sep="\n")


if __name__ == "__main__":
    run_main(main)
