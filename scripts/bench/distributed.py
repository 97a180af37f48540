"""Images per second on one and on several processes, normalizer against normalizer, after a check that all is exact.

    torchrun --standalone --nproc-per-node 2 scripts/bench/distributed.py                     two GPUs, about 3 minutes
    torchrun --standalone --nproc-per-node 2 scripts/bench/distributed.py --model cifar_resnet8 --size 16 --batch 4 \
        --repeats 2 --dtype fp32 --output /tmp/bench.json                                     the same on CPUs
    python scripts/bench/distributed_table.py results/bench_distributed.json                  the table alone

A step is forward, backward with the gradients' all-reduce, and SGD, under autocast, on synthetic images, eager or
(as trainer.cuda_graph does) with forward and backward replayed as CUDA graphs, collectives included; `--batch` images a
process, so that efficiency = rate of W processes / (W x rate of one). One process is measured on rank 0 while
the others wait. Rates are medians over rounds that visit every row. First the exactness check: float32 without TF32,
the same global batches on one process and on all; losses, parameters and statistics compared. What has been measured is
written after each row, as JSON and as a Markdown table beside it.
"""

import argparse
import copy
import itertools
import os
import statistics
import sys
import time
import warnings
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts._venv import run_main

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from onlinenorm import OnlineNorm2d, models
from onlinenorm.normalizers import synchronise_batch_norm
from onlinenorm.training.cuda_graph import GraphedStep
from scripts.bench import common
from scripts.bench.distributed_table import render

NORMALIZERS = {
    "batch": nn.BatchNorm2d,
    "sync_batch": nn.BatchNorm2d,
    "online_local": partial(OnlineNorm2d, statistics="local"),
    "online_local_layer_scaling": partial(OnlineNorm2d, statistics="local", error_compensation="layer_scaling"),
    "online_global": partial(OnlineNorm2d, statistics="global"),
    "online_global_layer_scaling": partial(OnlineNorm2d, statistics="global", error_compensation="layer_scaling"),
}
MEASURED = ("batch", "sync_batch", "online_local", "online_local_layer_scaling", "online_global")
CHECKED = ("sync_batch", "online_global", "online_global_layer_scaling")
MODES = ("eager", "graph", "compile")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build(name: str, model: str, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    network = getattr(models, model)(NORMALIZERS[name]).to(device, memory_format=torch.channels_last)
    if name == "sync_batch" and device.type == "cuda":
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    elif name == "sync_batch":
        network = synchronise_batch_norm(network)
    return network.train()


def parallel(model: nn.Module, device: torch.device) -> nn.Module:
    ids = [device] if device.type == "cuda" else None
    # newer torch deprecates the key before its successor leaves each process its own statistics
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    return DistributedDataParallel(model, ids, broadcast_buffers=False, gradient_as_bucket_view=True)


def trained(model: nn.Module, batches, steps: int, lr: float) -> list[float]:
    """SGD over batches of (images, labels); the losses."""
    sgd = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    losses = []
    for images, labels in batches[:steps]:
        sgd.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        sgd.step()
        losses.append(loss.item())
    return losses


class Alone:
    """Context in which layers of this process see no process group: what one process computes."""

    def __enter__(self):
        self.found = dist.is_initialized, dist.get_world_size
        dist.is_initialized, dist.get_world_size = (lambda: False), (lambda *_: 1)

    def __exit__(self, *_):
        dist.is_initialized, dist.get_world_size = self.found


def exactness(name: str, args, device: torch.device) -> dict:
    """How far losses, parameters and statistics of all processes are from those of one, in float32."""
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(1)
    batch = args.check_batch * world
    images = torch.randn(args.check_steps, batch, 3, 32, 32, generator=generator) + 1
    labels = torch.randint(10, (args.check_steps, batch), generator=generator)
    images, labels = images.to(device), labels.to(device)
    whole = [(x.to(memory_format=torch.channels_last), t) for x, t in zip(images, labels, strict=True)]
    own = [(x[rank::world].contiguous(memory_format=torch.channels_last), t[rank::world]) for x, t in whole]
    model = build(name, args.check_model, device)
    one = copy.deepcopy(model)
    several = torch.tensor(trained(parallel(model, device), own, args.check_steps, args.check_lr), device=device)
    dist.all_reduce(several)
    several /= world
    with Alone():
        single = torch.tensor(trained(one, whole, args.check_steps, args.check_lr), device=device)
    found = {key: value for key, value in model.state_dict().items() if value.is_floating_point()}
    parameters = {key for key, _ in one.named_parameters()}

    def far(keys) -> float:
        pairs = [(found[key].flatten().double(), one.state_dict()[key].flatten().double()) for key in keys]
        ours, truth = (torch.cat(side) for side in zip(*pairs, strict=True))
        return float((ours - truth).norm() / truth.norm())

    same = torch.cat([value.flatten().double() for value in found.values()])
    others = [torch.empty_like(same) for _ in range(world)]
    dist.all_gather(others, same)
    return {
        "normalizer": name,
        "steps": args.check_steps,
        "largest_loss_difference": float((several - single).abs().max()),
        "parameter_difference": far(parameters),
        "statistic_difference": far(found.keys() - parameters),
        "ranks_identical": all(torch.equal(other, same) for other in others),
    }


class Loss(nn.Module):
    """(images, labels) -> cross entropy of a network; in the mode "graph" as CUDA graphs."""

    def __init__(self, network: nn.Module, mode: str):
        super().__init__()
        self.network = torch.compile(network, dynamic=False) if mode == "compile" else network
        self.graphed = GraphedStep(network, self.step) if mode == "graph" else None

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (self.graphed or partial(self.step, self.network))(images, labels)

    @staticmethod
    def step(forward, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(forward(images), labels)


class Row:
    """One normalizer in one mode on one process or on all; its network lives through all rounds."""

    def __init__(self, name: str, mode: str, processes: int, args, device: torch.device):
        self.name, self.mode, self.processes, self.args, self.device = name, mode, processes, args, device
        self.rounds: list[float] = []
        self.model = build(name, args.model, device)
        self.run: nn.Module = Loss(self.model, mode)
        if processes > 1:
            self.run = parallel(self.run, device)
        shape = (args.batch, 3, args.size, args.size)
        self.x = torch.randn(shape, device=device).to(memory_format=torch.channels_last)
        self.target = torch.arange(args.batch, device=device) % 10
        self.sgd = torch.optim.SGD(self.model.parameters(), 1e-4, 0.9)

    def step(self) -> None:
        self.sgd.zero_grad(set_to_none=True)
        dtype = DTYPES[self.args.dtype]
        with torch.autocast(self.device.type, dtype, enabled=dtype is not torch.float32):
            loss = self.run(self.x, self.target)
        loss.backward()
        self.sgd.step()

    def measure(self) -> None:
        warm_up = 3 if self.rounds else 8
        times = common.timed(self.step, self.device, self.args.repeats + warm_up)[warm_up:]
        self.rounds.append(statistics.median(times))

    def record(self) -> dict:
        milliseconds = statistics.median(self.rounds)
        return {
            "normalizer": self.name,
            "processes": self.processes,
            "dtype": self.args.dtype,
            "mode": self.mode,
            "batch_per_process": self.args.batch,
            "milliseconds": round(milliseconds, 3),
            "images_per_second": round(1e3 * self.args.batch * self.processes / milliseconds, 1),
            "rounds": len(self.rounds),
            "repeat_spread": round((max(self.rounds) - min(self.rounds)) / milliseconds, 4),
        }


def measured(args, device: torch.device, write) -> None:
    """Measures all normalizers on one process and on all, in rounds; `write` gets the rows there are after each."""
    world = dist.get_world_size()
    first = dist.get_rank() == 0
    start = time.perf_counter()
    rows: list[Row] = []
    for mode, name in itertools.product(args.mode, args.normalizer):
        if name != "sync_batch" and first:
            with Alone():
                rows.append(Row(name, mode, 1, args, device))
        dist.barrier()
        rows.append(Row(name, mode, world, args, device))
    for _ in range(args.rounds):
        for row in rows:
            if row.processes == 1:
                with Alone():
                    row.measure()
            else:
                dist.barrier()  # the other processes wait here while rank 0 measures alone
                row.measure()
            write([row.record() for row in rows if row.rounds], row)
        over = torch.tensor(time.perf_counter() - start > args.seconds, device=device, dtype=torch.int32)
        dist.broadcast(over, 0)
        if over:
            break


def with_efficiency(rows: list[dict]) -> list[dict]:
    """Rows with what W processes reach of W times one; SyncBatchNorm is held against BatchNorm on one."""
    alone = {(row["normalizer"], row["mode"]): row["images_per_second"] for row in rows if row["processes"] == 1}
    for row in rows:
        base = alone.get(("batch" if row["normalizer"] == "sync_batch" else row["normalizer"], row["mode"]))
        row["scaling_efficiency"] = round(row["images_per_second"] / row["processes"] / base, 4) if base else None
    return rows


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--size", type=int, default=224, help="pixels a side")
    parser.add_argument("--batch", type=int, default=128, help="images a process; all rows' graphs hold theirs at once")
    parser.add_argument("--dtype", default="bf16", choices=list(DTYPES))
    parser.add_argument("--normalizer", nargs="+", default=list(MEASURED), choices=list(NORMALIZERS))
    parser.add_argument("--mode", nargs="+", choices=MODES, help="default: eager and, on GPUs, graph")
    parser.add_argument("--rounds", type=int, default=5, help="at most")
    parser.add_argument("--seconds", type=float, default=100, help="after which no further round begins")
    parser.add_argument("--repeats", type=int, default=15, help="steps a round")
    parser.add_argument("--check-model", default="cifar_resnet8", help="of the exactness check, at 32 px")
    parser.add_argument("--check-steps", type=int, default=30)
    parser.add_argument("--check-lr", type=float, default=0.002, help="low: rounding errors grow with it")
    parser.add_argument("--check-batch", type=int, default=32, help="images a process of the exactness check")
    parser.add_argument("--output", type=Path, default=Path("results/bench_distributed.json"))
    args = parser.parse_args(argv)
    cuda = torch.cuda.is_available()
    args.mode = args.mode or (["eager", "graph"] if cuda else ["eager"])
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    world, leader = dist.get_world_size(), dist.get_rank() == 0
    start = time.perf_counter()
    results = {**common.head(device), "backend": dist.get_backend(), "processes": world}
    results["command"] = results["command"].replace("python", f"torchrun --standalone --nproc-per-node {world}", 1)
    results |= {"model": args.model, "size": args.size, "exactness_float32": [], "rows": []}

    def tell(line: dict) -> None:
        if leader:
            print(f"{time.perf_counter() - start:5.0f} s  {line}", flush=True)
            common.write(args.output, results)
            if results["rows"]:
                args.output.with_suffix(".md").write_text(render(results))

    def write(rows: list[dict], latest: Row) -> None:
        results["rows"] = with_efficiency(rows)
        tell(latest.record())

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for name in CHECKED:
        results["exactness_float32"].append(exactness(name, args, device))
        tell(results["exactness_float32"][-1])
    torch.backends.cudnn.allow_tf32 = True
    measured(args, device, write)
    dist.destroy_process_group()
    exact = all(r["ranks_identical"] and r["largest_loss_difference"] < 1e-4 for r in results["exactness_float32"])
    return 0 if exact else 1


if __name__ == "__main__":
    run_main(main)
