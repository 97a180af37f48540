"""The rows of the benchmark of several processes: which there are, in which order, how one is built and measured."""

import statistics
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from torch import nn

from onlinenorm.training.cuda_graph import GraphedStep
from scripts.bench import common
from scripts.bench.distributed_exactness import ALONE, DTYPES, build, parallel
from scripts.bench.distributed_table import UNCOMPILED

MEASURED = ("online_peers", "online_local", "sync_batch_traced", "sync_batch", "online_global", "batch")
DECIDING = ("online_peers", "online_local"), ("sync_batch_traced", "sync_batch", "batch")  # one after the other
# graph: all of a step, as train.py has it; passes: forward and backward alone, DistributedDataParallel's reduction and
# SGD behind them
MODES = ("eager", "passes", "graph", "compile", "compile+passes", "compile+graph")


class Loss(nn.Module):
    """(images, labels) -> cross entropy of a network, compiled and as CUDA graphs where the mode says so.

    Where the optimizer's step is captured too, `graphed` has the backward pass and that step.
    """

    def __init__(self, network: nn.Module, mode: str, optimizer: torch.optim.Optimizer, processes: int):
        super().__init__()
        self.network: nn.Module = network
        if "compile" in mode:
            self.network = torch.compile(network, dynamic=False)  # type: ignore[assignment]  # a module it is
        self.graphed = None
        if "passes" in mode:
            self.graphed = GraphedStep(self.network, self.step)
        elif "graph" in mode:
            self.graphed = GraphedStep(self.network, self.step, optimizer=optimizer, averages=processes > 1)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (self.graphed or partial(self.step, self.network))(images, labels)

    @staticmethod
    def step(forward, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(forward(images), labels)


@dataclass(frozen=True)
class Stage:
    """Rows that are measured beside each other, each a normalizer in a mode."""

    rows: tuple[tuple[str, str], ...]
    processes: int
    batch: int  # images a process


def stages(args, world: int) -> tuple[list[Stage], list[Stage]]:
    """What decides, in the order of its weight, and all else that is to be measured."""
    first = args.mode[0]
    everything = [(name, mode) for mode in args.mode for name in args.normalizer]
    alone = list(dict.fromkeys((ALONE[name], mode) for name, mode in everything))
    ours, rivals = (
        [(name, UNCOMPILED.get((name, first), first)) for name in names if name in args.normalizer]
        for names in DECIDING
    )
    others = [row for row in everything if row not in ours + rivals]
    alone_first, alone_later = ([row for row in alone if (row[1] == first) == now] for now in (True, False))

    def planned(*kinds: tuple[list, int]) -> list[Stage]:
        return [Stage(tuple(rows), processes, batch) for batch in args.batch for rows, processes in kinds if rows]

    deciding = planned((ours, world)) + planned((rivals, world), (alone_first, 1))
    return deciding, planned((others, world), (alone_later, 1))


class Row:
    """A row of a stage; its network lives through all rounds."""

    def __init__(self, name: str, mode: str, stage: Stage, args, device: torch.device):
        self.name, self.mode, self.stage, self.args, self.device = name, mode, stage, args, device
        self.rounds: list[float] = []
        counters = torch._dynamo.utils.counters
        counters.clear()
        cuda = device.type == "cuda"
        if cuda:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        self.model = build(name, args.model, device)
        self.sgd = torch.optim.SGD(self.model.parameters(), 1e-4, 0.9, fused=cuda)
        loss = Loss(self.model, mode, self.sgd, stage.processes)
        self.whole = loss.graphed if loss.graphed is not None and loss.graphed.optimizer is not None else None
        self.run: nn.Module = loss if stage.processes == 1 else parallel(loss, device)
        self.x, self.target = data(stage.batch, args, device)
        for _ in range(2):
            self.step()
        self.memory = torch.cuda.max_memory_allocated() - before if cuda else 0
        self.compiled = {}
        if "compile" in mode:
            breaks = [f"{count} x {reason.splitlines()[0]}" for reason, count in counters["graph_break"].most_common(3)]
            self.compiled = {"graphs": counters["stats"]["unique_graphs"], "graph_breaks": breaks}

    def step(self) -> None:
        self.sgd.zero_grad(set_to_none=True)
        dtype = DTYPES[self.args.dtype]
        with torch.autocast(self.device.type, dtype, enabled=dtype is not torch.float32):
            loss = self.run(self.x, self.target)
        if self.whole is not None:
            self.whole.backward(loss)
            self.whole.step_optimizer()
        else:
            loss.backward()
            self.sgd.step()

    def measure(self) -> None:
        warm_up = 3 if self.rounds else 6
        times = common.timed(self.step, self.device, self.args.repeats + warm_up)[warm_up:]
        self.rounds.append(statistics.median(times))

    def record(self) -> dict:
        milliseconds = statistics.median(self.rounds)
        return {
            "normalizer": self.name,
            "processes": self.stage.processes,
            "dtype": self.args.dtype,
            "mode": self.mode,
            "batch_per_process": self.stage.batch,
            "milliseconds": round(milliseconds, 3),
            "images_per_second": round(1e3 * self.stage.batch * self.stage.processes / milliseconds, 1),
            "rounds": len(self.rounds),
            "repeat_spread": round((max(self.rounds) - min(self.rounds)) / milliseconds, 4),
            "peak_memory_gib": round(self.memory / 2**30, 2),
            **self.compiled,
        }

    def profile(self) -> dict:
        """Milliseconds of the kernels that a step spends most of its time in; microseconds of each norm's, in order."""
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            self.step()
            torch.cuda.synchronize()
        times = sorted(((event.device_time_total, event.key) for event in profile.key_averages()), reverse=True)
        slowest = {name[:100]: round(time / 1e3, 3) for time, name in times[:20]}
        norms: dict[str, list[float]] = {}
        for event in sorted(profile.events(), key=lambda event: event.time_range.start):
            if event.name.startswith("online_norm_"):
                norms.setdefault(event.name, []).append(round(event.time_range.elapsed_us(), 1))
        return {"slowest": slowest, "norms": norms}


def data(batch: int, args, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn((batch, 3, args.size, args.size), device=device).to(memory_format=torch.channels_last)
    return images, torch.arange(batch, device=device) % 10
