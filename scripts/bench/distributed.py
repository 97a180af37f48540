"""Images per second on one and on several processes, each normalizer as it would be used: compiled, captured, or both.

    torchrun --standalone --nproc-per-node 2 scripts/bench/distributed.py                     two GPUs, some 10 minutes
    torchrun --standalone --nproc-per-node 4 scripts/bench/distributed.py --batch 128 32 \
        --output results/bench_distributed_4.json                                             four
    torchrun --standalone --nproc-per-node 2 scripts/bench/distributed.py --model cifar_resnet8 --size 16 --batch 4 \
        --repeats 2 --dtype fp32 --output /tmp/bench.json                                     the same on CPUs
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 scripts/bench/distributed.py \
        --batch 32 128 --normalizer online_peers online_global online_local \
        --output results/bench_machines.json                            two machines; the same on each
    torchrun --standalone --nproc-per-node 4 scripts/bench/distributed.py --machines 2 --batch 32 \
        --normalizer online_peers online_global online_local --output /tmp/bench.json         as if, on one
    python scripts/bench/distributed_table.py results/bench_distributed.json                  the table alone

A step is forward, backward with the gradients' all-reduce, and SGD, under autocast, on synthetic images, all of it
replayed as CUDA graphs (as trainer.cuda_graph does), of the network as it is or compiled; efficiency = rate of W
processes / (W x rate of one). With `--mode compile+graph compile+passes` also as accumulated gradients are: only the
passes captured, the all-reduce DistributedDataParallel's. One process is measured on rank 0 while the others wait.
Networks are compiled first, all at once, by processes of their own that fill Inductor's cache.

Rows that are held beside each other are built together and measured in rounds that visit each; a time is the median
over rounds. First comes what decides, with one `--batch` images a process and then the next: OnlineNorm with global
and with local statistics on all processes; its rivals and one process; the exactness check: the same global batches on
one process and on all, in float32 without TF32 and, for the kernels that take 16 bits alone, in bfloat16; losses,
parameters and statistics compared; all else. Rivals are torch's SyncBatchNorm, which torch compiles in pieces, without
being compiled, and a BatchNorm of traceable operators that it compiles whole (distributed_batch_norm.py). A row that
takes twice the time of its normalizer in another mode is measured once. What has been measured is written after each
row, as JSON and as a Markdown table beside it, and after `--seconds` nothing new begins.
"""

import argparse
import contextlib
import gc
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts._venv import run_main

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.func import functional_call

from onlinenorm.ops import distributed as ops
from onlinenorm.text import first_line
from onlinenorm.training.cuda_graph import CastWeights
from scripts.bench import common
from scripts.bench.distributed_exactness import (
    ALONE,
    CHECKED,
    CHECKED_16_BITS,
    DTYPES,
    NORMALIZERS,
    Alone,
    build,
    exactness,
)
from scripts.bench.distributed_rows import MEASURED, MODES, Row, Stage, data, stages
from scripts.bench.distributed_table import render

WAITING, COMPILING = 300, 240  # seconds: a process for the others, and these for all to be compiled first


def as_if_on(machines: int) -> None:
    """Moments are exchanged as on so many machines, each with a block of the processes, however few these are."""
    from onlinenorm.ops.fused import peers

    block = dist.get_rank() * machines // dist.get_world_size()
    ops.machine = peers.machine = lambda: f"machine {block}"  # of this process from here on
    ops.FEWEST = 1


def around_a_ring(size: int) -> int:
    """Bytes that each process sends for a sum of so many over all, which is scattered and gathered."""
    world = dist.get_world_size()
    return 2 * size * (world - 1) // world


def sent(name: str, args, device: torch.device) -> int:
    """Bytes of statistics that a process sends in a step of the first batch: an eager one is watched."""
    world, total = dist.get_world_size(), 0
    found = {key: getattr(dist, key, None) for key in ("all_gather_single", "all_gather_into_tensor", "all_reduce")}

    def watched(key, function):
        def call(*tensors, **options):
            nonlocal total
            tensor = tensors[1] if "gather" in key else tensors[0]
            # a ring: everybody's part goes once round
            others = dist.get_world_size(options.get("group")) - 1
            total += tensor.nbytes * others if "gather" in key else around_a_ring(tensor.nbytes)
            return function(*tensors, **options)

        return call

    model = build(name, args.model, device)
    images, labels = data(args.batch[0], args, device)
    with contextlib.ExitStack() as stack:
        for key, function in found.items():
            if function is not None:
                setattr(dist, key, watched(key, function))
                stack.callback(setattr, dist, key, function)
        if device.type == "cuda":
            from onlinenorm.ops.fused import peers

            mailbox = peers.mailbox

            def counted(spec, direction, samples, channels, device, layers=1):
                nonlocal total
                total += 8 * samples * channels * layers * (world - 1)
                return mailbox(spec, direction, samples, channels, device, layers)

            peers.mailbox = counted
            stack.callback(setattr, peers, "mailbox", mailbox)
        dtype = DTYPES[args.dtype]
        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
    return total


def compile_all(coming: list[Stage], world: int) -> None:
    """Fills Inductor's cache and that of the CUDA kernels: a process for each network, batch, processes and GPU."""
    script = [sys.executable, __file__, *sys.argv[1:], "--warm"]
    kinds = {
        (name, stage.processes, gpu, stage.batch)
        for stage in coming
        for name, mode in stage.rows
        for gpu in range(min(stage.processes, int(os.environ.get("LOCAL_WORLD_SIZE", stage.processes))))
        if "compile" in mode
    }
    environment = {key: value for key, value in os.environ.items() if "RANK" not in key and key != "WORLD_SIZE"}
    environment["TORCHINDUCTOR_COMPILE_THREADS"] = str(-(-(os.cpu_count() or 1) // max(1, len(kinds))))
    running = [subprocess.Popen([*script, *map(str, kind)], env=environment) for kind in sorted(kinds)]
    end = time.monotonic() + COMPILING
    for process in running:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()  # what one does not manage is compiled when it is measured


def warm(args, name: str, processes: int, gpu: int, batch: int) -> None:
    """Compiles a network for a GPU as one of ``processes``, of which it is the only one."""
    torch.cuda.set_device(gpu)
    device = torch.device("cuda", gpu)
    if processes > 1:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        from onlinenorm.ops.fused import nvrtc, peers

        dist.init_process_group("fake", store=FakeStore(), rank=gpu, world_size=processes)
        gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
        # that of SyncBatchNorm, whose shapes not every torch's pretended group knows
        setattr(dist, gather, lambda found, own, *_, **__: found.view(processes, -1).copy_(own.flatten()))
        # and kernels that would wait for others are compiled only
        peers.serve = lambda group, device: not args.machines
        peers.mailbox = lambda *_: peers.Mailbox((256,) * processes, gpu, 0)  # at no address that is followed
        peers.patience = lambda *_: 1.0
        if "peers" in name:
            nvrtc.Kernel.launch = lambda *_: None  # type: ignore[method-assign]  # of this process, which does nothing else
    network = build(name, args.model, device)
    network.compile(dynamic=False)
    images, labels = data(batch, args, device)
    with torch.autocast("cuda", DTYPES[args.dtype], enabled=args.dtype != "fp32", cache_enabled=False):
        weights: dict[str, torch.Tensor] = dict(network.named_parameters())
        if any("+" in mode for mode in args.mode or MODES):  # captured, with weights that are cast before
            weights |= CastWeights(network, weights, "cuda").copies
        F.cross_entropy(functional_call(network, weights, (images,)), labels).backward()
    torch.cuda.synchronize()


def agreed(flag: bool, device: torch.device) -> bool:
    """What rank 0 says; the others wait for it."""
    word = torch.tensor(flag, device=device, dtype=torch.int32)
    dist.broadcast(word, 0)
    return bool(word)


def built(name: str, mode: str, stage: Stage, args, device: torch.device, tell) -> Row | None:
    """A row, which is rank 0's where it is of one process, or None where one cannot build it, which `tell` is told."""
    row, error, alone = None, "", stage.processes == 1
    try:
        if not alone or dist.get_rank() == 0:
            with Alone() if alone else contextlib.nullcontext():
                row = Row(name, mode, stage, args, device)
    except Exception as caught:  # of compilers and captures, whatever they raise
        error = f"{type(caught).__name__}: {first_line(caught)}"
    failed = torch.tensor(int(bool(error)), device=device)
    dist.all_reduce(failed, dist.ReduceOp.MAX)
    if failed:
        kind = {"normalizer": name, "mode": mode, "batch_per_process": stage.batch}
        tell({**kind, "error": error or "on another process"})
        return None
    return row


def is_hopeless(record: dict, rows: list[dict]) -> bool:
    """Whether the normalizer of a row takes less than half its time in another mode."""
    same = "normalizer", "batch_per_process", "processes"
    others = [row for row in rows if row["mode"] != record["mode"] and all(row[key] == record[key] for key in same)]
    return any(2 * row["milliseconds"] < record["milliseconds"] for row in others)


def measure_stage(stage: Stage, args, device: torch.device, over, tell, hopeless) -> None:
    """Builds and measures the rows of a stage; `tell` gets each as it is after each round, or what kept it from it.

    `hopeless` says of such a row whether to measure it no more.
    """
    rows: list[Row] = []

    def measure(row: Row) -> None:
        with Alone() if stage.processes == 1 else contextlib.nullcontext():
            row.measure()
        tell(row.record())

    for name, mode in stage.rows:
        if over():
            break
        if (row := built(name, mode, stage, args, device, tell)) is not None:
            rows.append(row)
            measure(row)
            if args.profile and device.type == "cuda":
                tell({"normalizer": name, "mode": mode, "batch_per_process": stage.batch, "kernels": row.profile()})
        if agreed(row is not None and hopeless(row.record()), device) and row is not None:
            rows.remove(row)
    for _ in range(1, args.rounds):
        if over():
            break
        for row in rows:
            measure(row)
        dist.barrier()
    row = None
    del rows, measure
    gc.collect()  # graphs hold each other and the memory of a stage's rows
    if device.type == "cuda":
        torch.cuda.empty_cache()


def with_efficiency(rows: list[dict]) -> list[dict]:
    """Rows with what W processes reach of W times one, which has no others to synchronise with."""

    def kind(row: dict, name: str) -> tuple:
        return name, row["mode"], row["batch_per_process"]

    alone = {kind(row, row["normalizer"]): row["images_per_second"] for row in rows if row["processes"] == 1}
    for row in rows:
        base = alone.get(kind(row, ALONE[row["normalizer"]]))
        row["scaling_efficiency"] = round(row["images_per_second"] / row["processes"] / base, 4) if base else None
    return rows


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--size", type=int, default=224, help="pixels a side")
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 16], help="images a process")
    parser.add_argument("--dtype", default="bf16", choices=list(DTYPES))
    parser.add_argument("--normalizer", nargs="+", default=list(MEASURED), choices=list(NORMALIZERS))
    parser.add_argument("--mode", nargs="+", choices=MODES, help="default: on GPUs compile+graph and graph, else eager")
    parser.add_argument("--rounds", type=int, default=4, help="at most")
    parser.add_argument("--seconds", type=float, default=540, help="after which no further row or round begins")
    parser.add_argument("--repeats", type=int, default=15, help="steps a round")
    parser.add_argument("--check-model", default="cifar_resnet8", help="of the exactness check, at 32 px")
    parser.add_argument("--check-model-16-bits", default="resnet18", help="of that in bfloat16")
    parser.add_argument("--check-steps", type=int, default=30)
    parser.add_argument("--check-lr", type=float, default=0.002, help="low: rounding errors grow with it")
    parser.add_argument("--check-batch", type=int, default=32, help="images a process of the exactness check")
    parser.add_argument("--output", type=Path, default=Path("results/bench_distributed.json"))
    parser.add_argument("--profile", action="store_true", help="also print the kernels' times of each row")
    parser.add_argument("--machines", type=int, help="exchange moments as if processes were on so many")
    parser.add_argument("--no-check", action="store_true", help="leave the exactness checks out")
    parser.add_argument("--warm", nargs=4, help=argparse.SUPPRESS)  # normalizer, processes, GPU, batch: compile and end
    args = parser.parse_args(argv)
    torch._dynamo.config.recompile_limit = 64  # every row's network has the same code
    torch._dynamo.config.optimize_ddp = False  # captured, gradients come all at once: no part's are reduced earlier
    if args.warm:
        warm(args, args.warm[0], *map(int, args.warm[1:]))
        return 0
    cuda = torch.cuda.is_available()
    args.mode = args.mode or (["compile+graph", "graph"] if cuda else ["eager"])
    if not cuda:
        args.normalizer = [name for name in args.normalizer if "peers" not in name]
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        # longer than compiling takes, for which the others wait
        dist.init_process_group("nccl", device_id=device, timeout=timedelta(seconds=WAITING))
    else:
        dist.init_process_group("gloo")
    world, leader = dist.get_world_size(), dist.get_rank() == 0
    if args.machines:
        as_if_on(args.machines)
    names = [""] * world
    dist.all_gather_object(names, ops.machine())
    each = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    start = time.perf_counter()
    results = {**common.head(device), "backend": dist.get_backend(), "processes": world}
    where = "--standalone" if each == world else f"--nnodes {world // each}"
    results["command"] = results["command"].replace("python", f"torchrun {where} --nproc-per-node {each}", 1)
    if (machines := len(set(names))) > 1:
        results |= {"machines": machines, "machines_pretended": bool(args.machines)}
    results |= {"model": args.model, "size": args.size, "exactness_float32": [], "rows": []}
    if cuda:
        results |= {"exactness_bfloat16": [], "statistics_bytes_sent": {}}

    def tell(latest: dict) -> None:
        if "error" in latest:
            results.setdefault("not_built", []).append(latest)
        elif "milliseconds" in latest:
            kind = "normalizer", "mode", "batch_per_process", "processes"
            others = [row for row in results["rows"] if any(row[key] != latest[key] for key in kind)]
            results["rows"] = with_efficiency([*others, latest])
        if leader:
            print(f"{time.perf_counter() - start:5.0f} s  {latest}", flush=True)
            common.write(args.output, results)
            if results["rows"]:
                args.output.with_suffix(".md").write_text(render(results))

    def over() -> bool:
        """Whether rank 0 has used up the seconds."""
        return agreed(time.perf_counter() - start > args.seconds, device)

    def hopeless(record: dict) -> bool:
        return is_hopeless(record, results["rows"])

    def check() -> None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        for name in CHECKED:
            results["exactness_float32"].append(exactness(name, args, device, args.check_model))
            tell(results["exactness_float32"][-1])
        torch.backends.cudnn.allow_tf32 = True
        for name in CHECKED_16_BITS if cuda else ():
            checked = exactness(name, args, device, args.check_model_16_bits, torch.bfloat16)
            results["exactness_bfloat16"].append(checked)
            tell(checked)

    def measure(some: list[Stage]) -> None:
        if cuda and not over():
            if device.index == 0:  # of each machine
                compile_all(some, world)
            if leader:
                tell({"compiled": [stage.rows for stage in some]})
            dist.barrier()
        for stage in some:
            if not over():
                measure_stage(stage, args, device, over, tell, hopeless)

    deciding, others = stages(args, world)
    measure(deciding)
    if not args.no_check and not over():
        check()
    if cuda and not over():
        results["gradient_bytes_sent"] = around_a_ring(
            sum(p.nbytes for p in build("batch", args.model, device).parameters())
        )
        for name in args.normalizer:
            results["statistics_bytes_sent"][name] = sent(name, args, device)
    measure(others)
    dist.destroy_process_group()
    exact = all(r["ranks_identical"] and r["largest_loss_difference"] < 1e-4 for r in results["exactness_float32"])
    exact &= all(row["ranks_identical"] for row in results.get("exactness_bfloat16", ()))
    return 0 if exact else 1


if __name__ == "__main__":
    run_main(main)
