"""Where the processes of a run meet before training: missing ones are printed, and a signal ends the wait of all."""

import contextlib
import os
import platform
import socket
import sys
import time
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from onlinenorm.errors import ConfigError, RunError
from onlinenorm.text import first_line
from onlinenorm.training.children import WatchingLauncher
from onlinenorm.training.interruption import StopSignals
from onlinenorm.training.launch import launched
from onlinenorm.training.look_ahead import LookAhead

POLL_SECONDS = 0.1
PATIENCE_SECONDS = 30.0  # of processes of one machine; others are announced at once
REMIND_SECONDS = 60.0
LIMIT_SECONDS = 1800.0


class FixedBuckets(DistributedDataParallel):
    """DistributedDataParallel that reduces gradients in the same buckets in every step.

    Its own first step has others than those that follow, so that gradients of three processes or more are added in
    another order, and a run that was killed and continued differs by a rounding.
    """

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.reducer._push_all_rebuilt_params()
        self.reducer._rebuild_buckets()  # which happens once

    def _build_params_for_reducer(self) -> tuple[list, list]:
        parameters, sparse = super()._build_params_for_reducer()
        return parameters[::-1], sparse[::-1]  # as gradients come: a bucket is sent when those before it have been


class MeetingDDPStrategy(DDPStrategy):
    """DDPStrategy whose processes meet before torch's own rendezvous, which prints nothing and ignores signals."""

    def __init__(self, stop: StopSignals, **options):
        super().__init__(**options)
        self.stop = stop
        self._store: dist.Store | None = None

    def setup_distributed(self) -> None:
        if not dist.is_initialized():
            self.set_world_ranks()
            assert self.cluster_environment is not None
            host, port = self.cluster_environment.main_address, self.cluster_environment.main_port
            # kept: torch's rendezvous goes on with the store that rank 0 serves
            place = self.global_rank, self.world_size, self.num_processes
            self._store = meet(host, port, *place, self.stop, self.root_device.type)
        super().setup_distributed()

    def process_dataloader(self, dataloader: Any) -> Any:
        module: Any = self.lightning_module
        trainer = module.trainer
        check = trainer.datamodule.on_before_batch_transfer
        return LookAhead(dataloader, check, trainer.accumulate_grad_batches, self.stop)

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = WatchingLauncher(self.cluster_environment, self.num_processes, self.num_nodes)

    def _setup_model(self, model: torch.nn.Module) -> DistributedDataParallel:
        # DDP is made on a stream of its own, and a 3x3 kernel of one input channel has two names for one layout: both
        # are without effect, and would be printed by every process.
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        # A compiled network stays in one piece. Cut at DDP's buckets, a part's gradients could be reduced while others
        # are computed; but captured, as by default, they come all at once.
        if (dynamo := sys.modules.get("torch._dynamo")) is not None:
            dynamo.config.optimize_ddp = False
        device_ids = self.determine_ddp_device_ids()
        with torch.cuda.stream(torch.cuda.Stream()) if device_ids is not None else contextlib.nullcontext():
            return FixedBuckets(model, device_ids, **self._ddp_kwargs)


def meet(
    host: str, port: int, rank: int, world_size: int, devices: int, stop: StopSignals, kind: str = "cpu"
) -> dist.Store:
    """The store at host:port, once all processes are there; `stop` is deferred from then on.

    All go on or none does: the first that sees them complete, or gets a signal, decides for all by setting one key.
    Raises Interrupted where that was a signal, ConfigError where processes are not all on the same `kind` of device,
    which wait for each other in vain, RunError where the meeting fails.
    """
    wait = _Wait(0.0 if world_size > devices else PATIENCE_SECONDS)
    store = _open_store(host, port, rank, world_size, wait)
    prefix = f"meeting/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    decision = f"{prefix}/decision"
    stop.defer()
    try:
        store.set(f"{prefix}/{rank}", kind)
        while not store.check([decision]):
            if stop.signum:
                store.compare_set(decision, "", str(int(stop.signum)))
            elif rank == 0:
                missing = [r for r in range(world_size) if not store.check([f"{prefix}/{r}"])]
                if not missing:
                    kinds = [store.get(f"{prefix}/{r}").decode() for r in range(world_size)]
                    store.compare_set(decision, "", _of_two_kinds(kinds) or "0")
                elif wait.due():
                    print(_missing(missing, host, port, world_size, devices), flush=True)
            time.sleep(POLL_SECONDS)
        decided = store.get(decision).decode()
    except RuntimeError as error:  # of the store: its server has gone
        if stop.signum:
            stop.raise_interrupted_early()
        raise RunError(
            f"{host}:{port}: the first process left before all had come ({first_line(error)}); its own output says why"
        ) from None
    if decided == "0":
        return store
    if rank == 0:
        time.sleep(5 * POLL_SECONDS)  # for the others to read it
    if decided.isdecimal():
        stop.signum = stop.signum or int(decided)
        stop.raise_interrupted_early()
    raise ConfigError(decided)


def _of_two_kinds(kinds: list[str]) -> str:
    """What to say of processes on other devices than the first, or ""."""
    other = next((rank for rank, kind in enumerate(kinds) if kind != kinds[0]), None)
    if other is None:
        return ""
    return (
        f"trainer.accelerator: process 0 is on {kinds[0]}, process {other} on {kinds[other]}; see that torch finds "
        "GPUs on every machine (nvidia-smi, CUDA_VISIBLE_DEVICES, a CUDA build), or name trainer.accelerator for all"
    )


class _Wait:
    """When to say that one waits, and when to give up."""

    def __init__(self, patience: float):
        self._began = time.monotonic()
        self._next = self._began + patience

    def due(self) -> bool:
        now = time.monotonic()
        if now - self._began > LIMIT_SECONDS:
            raise RunError(
                f"{LIMIT_SECONDS / 60:.0f} minutes have passed and not all processes have come; giving up: see that "
                "each was started and reaches the first one at MASTER_ADDR, MASTER_PORT"
            )
        if now < self._next:
            return False
        self._next = now + REMIND_SECONDS
        return True


def _open_store(host: str, port: int, rank: int, world_size: int, wait: _Wait) -> dist.Store:
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if hosts:
        try:
            socket.getaddrinfo(host, port)
        except OSError as error:
            raise RunError(
                f"MASTER_ADDR: {host} is not found ({error.strerror}); set it to this machine, the first, or "
                "where there is one alone, unset it"
            ) from None
    while not hosts:
        try:  # quietly: the store's own attempts fill the log
            socket.create_connection((host, port), timeout=1.0).close()
            break
        except OSError:
            if wait.due():
                print(f"waiting for the first process of {world_size}, at {host}:{port}", flush=True)
            time.sleep(POLL_SECONDS)
    try:
        return dist.TCPStore(
            host, port, world_size, hosts, timedelta(seconds=30), wait_for_workers=False, multi_tenant=hosts
        )
    except RuntimeError as error:
        raise RunError(
            f"MASTER_PORT: {host}:{port} cannot be used for the processes to meet ({first_line(error)}); "
            "set another MASTER_PORT for all of them, and MASTER_ADDR to the name of this machine, the first one"
        ) from None


def _missing(missing: list[int], host: str, port: int, world_size: int, devices: int) -> str:
    machines = sorted({rank // devices for rank in missing})
    ranks = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
    text = f"waiting at {host}:{port} for {len(missing)} of {world_size} processes: rank {ranks}"
    if machines == [0]:
        return text
    text += f", of machine {', '.join(map(str, machines))}"
    if launched() is not None:
        return text
    address = os.environ.get("MASTER_ADDR", host)
    address = platform.node() if address in ("127.0.0.1", "localhost") else address
    command = " ".join([os.path.basename(sys.executable), *sys.argv])
    return (
        f"{text}; to be started there with: NODE_RANK={machines[0] or machines[1]} MASTER_ADDR={address} "
        f"MASTER_PORT={port} {command}"
    )
