"""Mailboxes in which kernels of several processes, each with a GPU of one machine, find each other's sums of samples.

They lie in torch's symmetric memory: every process holds as many, at equal offsets, and maps those of the others, so
that a kernel stores a message into each by ordinary stores over NVLink or PCIe. The kernels say how a message is told
from the one before it in the same place (common.cu): between two launches with one mailbox every process's stream must
hold a launch of that layer with another, as training does by itself: each direction has its own. A pass that follows
one in its own direction takes a second one. Addresses stay, and what changes lies on the devices, so that launches can
be captured in CUDA graphs. As no host sees their replays, graphs have mailboxes that no other launch uses: between two
replays of a layer's forward graph there must be one of its backward graph, or the other way round, whatever passes run
between them; where one graph holds two launches in one direction, a barrier is put between them.

A mailbox is for one size of batch. Where that changes, a layer's is emptied for the next size; graphs keep theirs.

Between machines there are no such stores, and the moments are gathered: a sample needs those of all samples before it,
so where they come by a collective, images are read twice however it is divided. `ops.distributed` says how it is.
"""

import logging
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from onlinenorm.errors import RunError
from onlinenorm.ops.distributed import (
    constant_when_compiled,
    exchanging,
    machine,
    process_group,
    refusals,
    timeout_of,
)
from onlinenorm.ops.spec import NormSpec
from onlinenorm.text import first_line

logger = logging.getLogger(__name__)

MOST = 8  # processes, as in common.cu
CHUNK = 64 * 2**20  # bytes asked for at once: the processes meet for each
ALIGNMENT = 256
DEFAULT_PATIENCE = 600.0  # seconds, where the process group names none


@dataclass(frozen=True)
class Mailbox:
    """That of one layer, direction and size of batch: where it begins in each process's memory, seen from this one."""

    addresses: tuple[int, ...]
    rank: int
    launches: int  # bytes behind it: the number of launches so far


@dataclass
class _Shared:
    """A piece of the memory that the processes of a group share."""

    own: Tensor
    addresses: tuple[int, ...]  # where it begins in each process's memory
    barrier: Callable[[], None]


class _Place(NamedTuple):
    """Whose a mailbox is. Outside of graphs there is one size of batch at a time for what else it says."""

    numbers: tuple[int, ...]  # of the layers
    direction: str
    samples: int
    captured: bool
    second: bool = False  # for a pass right after one that used the first


@dataclass
class _Group:
    """What the processes of a group share: memory, of which `rest` is free, and the mailboxes in it."""

    members: dist.ProcessGroup
    store: dist.Store
    patience: float
    met: int = 0  # times
    handles: list = field(default_factory=list)
    rest: _Shared | None = None
    boxes: dict[_Place, tuple[Mailbox, _Shared]] = field(default_factory=dict)
    last: dict[int, _Place] = field(default_factory=dict)  # that a layer has used
    last_outside: dict[int, _Place] = field(default_factory=dict)  # and used outside of graphs

    def meet(self, word: str = "") -> list[str]:
        """What each process says, in rank order. Raises RunError where one does not come in time."""
        place, self.met = f"meeting/{self.met}", self.met + 1
        keys = [f"{place}/{rank}" for rank in range(self.members.size())]
        try:
            self.store.set(keys[self.members.rank()], word)
            self.store.wait(keys, timedelta(seconds=self.patience))
            return [self.store.get(key).decode() for key in keys]
        except dist.DistError as error:
            raise RunError(
                f"{self._missing(keys)} to where processes share memory for their kernels' messages "
                f"({first_line(error)}): it is stuck or dead, and its own output may say why"
            ) from error

    def _missing(self, keys: list[str]) -> str:
        try:
            missing = [str(rank) for rank, key in enumerate(keys) if not self.store.check([key])]
        except dist.DistError:  # the store's server is gone
            missing = []
        return f"process {', '.join(missing)} did not come" if missing else "not all processes came"


_groups: weakref.WeakKeyDictionary[dist.ProcessGroup, _Group | None] = weakref.WeakKeyDictionary()
_made: Counter[str] = Counter()  # groups, by name
_lock = threading.Lock()


@constant_when_compiled
def serve(group: str, device: int) -> bool:
    """Whether the processes of a group can reach each other's GPUs; all get the same answer, and must ask once."""
    return _state(group, device) is not None


def _state(group: str, device: int) -> _Group | None:
    members = process_group(group) or dist.group.WORLD
    assert members is not None, "the caller has several processes"
    if members not in _groups:
        name = members.group_name
        _made[name] += 1  # what an earlier group of that name said may still be in the store
        place = f"onlinenorm/peers/{name}/{_made[name]}"
        store = dist.PrefixStore(place, dist.distributed_c10d._get_default_store())
        state = _Group(members, store, _patience(members))
        refusals[name] = missing = _out_of_reach(state, device)
        if missing:
            logger.info("OnlineNorm: moments of samples are gathered by collectives: %s", missing)
        _groups[members] = None if missing else state
    return _groups[members]


def _out_of_reach(state: _Group, device: int) -> str:
    """Why kernels cannot exchange messages, the same on all processes; "" where each has mapped the others' memory."""
    processes = state.members.size()
    if processes > MOST:
        return f"{processes} processes, and messages between kernels are for {MOST} at most"
    places = [word.split(" ", 1) for word in state.meet(f"{machine()} {_uuid(device)}")]
    if (machines := len({name for name, _ in places})) > 1:
        return f"{machines} machines"
    visible = {_uuid(index): index for index in range(torch.cuda.device_count())}
    problem = ""
    if len({gpu for _, gpu in places}) < processes:
        problem = "processes share a GPU"
    else:
        found = (_unreachable(device, rank, visible.get(gpu)) for rank, (_, gpu) in enumerate(places))
        if unreachable := next(filter(None, found), ""):
            problem = f"process {state.members.rank()} {unreachable}"
    if problem := next(filter(None, state.meet(problem)), ""):
        return problem
    try:
        _allocate(state, CHUNK, torch.device("cuda", device))
    except RuntimeError as error:
        if torch.cuda.is_current_stream_capturing() or isinstance(error, RunError):
            raise
        problem = f"no memory can be shared ({first_line(error)})"
    return next(filter(None, state.meet(problem)), "")


def _unreachable(device: int, rank: int, gpu: int | None) -> str:
    """What keeps this process from the memory of process ``rank``'s GPU, which it sees as number ``gpu``, or ""."""
    if gpu is None:  # then torch refuses, too: each process has a GPU of the same number
        return f"does not see the GPU of process {rank} (CUDA_VISIBLE_DEVICES, or --gpus-per-task, leaves it out)"
    if gpu != device and not torch.cuda.can_device_access_peer(device, gpu):
        return f"has no peer access from cuda:{device} to cuda:{gpu}"
    return ""


def _uuid(device: int) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def _patience(members: dist.ProcessGroup) -> float:
    """Seconds, fewer than those after which NCCL ends a process of the group, whatever it is about to say."""
    timeout = timeout_of(members, torch.device("cuda"))
    return 0.9 * timeout.total_seconds() if timeout else DEFAULT_PATIENCE


def patience(spec: NormSpec, device: int) -> float:
    """Seconds that a kernel waits for a process."""
    state = _state(spec.group, device)
    assert state is not None, "`serve` was asked"
    return state.patience


def mailbox(
    spec: NormSpec, direction: str, samples: int, channels: int, device: torch.device, layers: int = 1
) -> Mailbox:
    """The mailbox for the next launch of a layer on the current stream; every process must ask, in the same order.

    Of two ``layers`` that one kernel serves, the second's half of it follows the first's. Raises RuntimeError for the
    first launch of its kind while a CUDA graph is captured.
    """
    with _lock:
        state = _state(spec.group, device.index)
        assert state is not None, "`serve` was asked"
        numbers = (spec.mailbox, spec.shortcut_mailbox)[:layers]
        captured = torch.cuda.is_current_stream_capturing()
        place = _Place(numbers, direction, samples, captured)
        if captured and place not in state.boxes:
            outside = place._replace(captured=False)
            if outside in state.boxes:  # it is the graphs' from here on, and later passes outside of them get another
                state.boxes[place] = state.boxes.pop(outside)
                state.last |= {number: place for number in numbers if state.last[number] == outside}
        last = state.last if captured else state.last_outside
        again = any(last.get(number) == place for number in numbers)
        if again and not captured:
            place = place._replace(second=True)
        if place not in state.boxes:
            _make_mailbox(state, place, 8 * samples * spec.processes, channels, device)
        elif again and captured:
            state.boxes[place][1].barrier()
        for record in (state.last,) if captured else (state.last, state.last_outside):
            record.update(dict.fromkeys(numbers, place))
        exchanging.update(numbers)
        return state.boxes[place][0]


def _make_mailbox(state: _Group, place: _Place, column: int, channels: int, device: torch.device) -> None:
    """That of another size of batch: the one of the size before, where it has room, emptied, or a new one.

    ``column`` is the size of a channel's messages in bytes.
    """
    _check_not_capturing()
    sums = len(place.numbers) * column * (channels + channels // 64)
    size = -(-(sums + channels // 64 * 4) // ALIGNMENT) * ALIGNMENT
    former = next((other for other in state.boxes if other == place._replace(samples=other.samples)), None)
    shared = None if former is None else state.boxes.pop(former)[1]
    if shared is not None and shared.own.nbytes >= size:
        shared.barrier()  # behind which nobody reads it or stores into it
        shared.own.zero_()
        shared.barrier()
    else:
        # what was too small remains unused; doubled each time, it is never more than what is used
        size = max(size, 0 if shared is None else 2 * shared.own.nbytes)
        if state.rest is None or state.rest.own.nbytes < size:
            _allocate(state, max(size, CHUNK), device)
        assert state.rest is not None
        rest = state.rest
        shared = _Shared(rest.own[:size], rest.addresses, rest.barrier)
        state.rest = _Shared(rest.own[size:], tuple(address + size for address in rest.addresses), rest.barrier)
    state.boxes[place] = Mailbox(shared.addresses, state.members.rank(), sums), shared


def _check_not_capturing() -> None:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "OnlineNorm: the processes share memory for their kernels' messages at a layer's first step with a size of "
            "batch, which cannot be captured in a CUDA graph; run a step of that size before the capture"
        )


def _allocate(state: _Group, size: int, device: torch.device) -> None:
    """More memory that all processes share, empty; each must call it."""
    _check_not_capturing()
    state.meet()  # torch's own meeting waits for a short time only
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # nothing here needs it
    from torch.distributed import _symmetric_memory as symmetric_memory

    memory = symmetric_memory.empty(size, dtype=torch.uint8, device=device)
    memory.zero_()
    torch.cuda.synchronize(device)  # before any other process, which meets this one below, stores into it
    handle = symmetric_memory.rendezvous(memory, state.members.group_name)
    state.handles.append(handle)
    barrier = partial(handle.barrier, channel=0, timeout_ms=int(1000 * state.patience))
    state.rest = _Shared(memory, tuple(handle.buffer_ptrs), barrier)
