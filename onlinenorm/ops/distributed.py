"""Tables of per-sample moments across processes: what one process with the global batch would hold.

One collective over all brings them, or, over several machines, two: each process gathers with its counterparts on the
others, and what it then holds with those of its own machine. A message crosses from machine to machine once either way.
NCCL's all-gather is a ring over all W processes for memory that is not registered with it: W - 1 steps, one after the
other, where M machines in two steps take M + W / M - 2. But the ring keeps both kinds of links busy at once. By NCCL
2.30's own model (`src/graph/tuning.cc`; no such machines were at hand) the gathers of a step of resnet50 with 32 images
a GPU take 4.8, 9.1 and 17.4 ms on 2, 4 and 8 machines of 8 H100s in one step, and 4.3, 7.2 and 12.2 in two, with 128
images 7.0, 13.2 and 25.4, and 6.9, 12.6 and 23.0 as `LARGEST` divides them; on machines of four, two steps gain from
four machines on.

And what `fused.peers` leaves for those who do not load Triton: which layers' kernels exchange moments, and for whom one
has waited in vain.
"""

import socket
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

exchanging: set[int] = set()  # layers whose kernels have exchanged moments, by `NormSpec.mailbox`
refusals: dict[str, str] = {}  # name of a process group -> why its processes' kernels exchange none, "" where they do
FEWEST = 16  # processes whose moments are gathered in two steps,
LARGEST = 2**18  # and bytes that each has of them
_late: list[Tensor] = []
_two_steps: weakref.WeakKeyDictionary[dist.ProcessGroup, tuple[dist.ProcessGroup, ...]] = weakref.WeakKeyDictionary()


def constant_when_compiled(function: Callable) -> Callable:
    """``torch.compiler.assume_constant_result``, which would import the compiler here and now."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # read by dynamo
    return function


def process_group(name: str) -> dist.ProcessGroup | None:
    """The process group of that name; None, which stands for all processes, for ""."""
    return dist.distributed_c10d._resolve_process_group(name) if name else None  # type: ignore[arg-type]  # a name it is


@constant_when_compiled
def own_rank(group: str) -> int:
    """This process's place in the group of that name."""
    return dist.get_rank(process_group(group))


def machine() -> str:
    """What the processes of this machine have in common, and those of others do not."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else socket.gethostname()


def timeout_of(members: dist.ProcessGroup, device: torch.device) -> timedelta | None:
    """How long the processes of a group wait for each other in a collective, where it says so."""
    return getattr(getattr(members._get_backend(device), "options", None), "_timeout", None)


def _steps(table: Tensor, group: str, by_machine: bool) -> tuple[dist.ProcessGroup, ...]:
    """The groups that a table is gathered in, one after the other; all processes get as many."""
    world, members = dist.group.WORLD, process_group(group) or dist.group.WORLD
    assert world is not None and members is not None, "the caller has several processes"
    if not by_machine or members is not world or world.size() < FEWEST or table.nbytes > LARGEST:
        return (members,)
    if world not in _two_steps:
        _two_steps[world] = _between_and_within_machines(world, table.device)
    return _two_steps[world] or (members,)


def gathers_by_machine(group: str) -> bool:
    """Whether small tables of a group's processes have been gathered in two steps."""
    members = process_group(group) or dist.group.WORLD
    return members is not None and bool(_two_steps.get(members))


def _between_and_within_machines(world: dist.ProcessGroup, device: torch.device) -> tuple[dist.ProcessGroup, ...]:
    """This process's counterparts on other machines, and its own machine; () where ranks are not in equal blocks."""
    machines = [""] * world.size()
    dist.all_gather_object(machines, machine())
    each, ranks = machines.count(machines[0]), range(world.size())
    names = machines[::each]
    if 1 in (each, len(names)) or len(set(names)) < len(names) or machines != [n for n in names for _ in range(each)]:
        return ()
    blocks = [list(ranks[first : first + each]) for first in ranks[::each]]
    counterparts = [list(ranks[place::each]) for place in range(each)]
    timeout = timeout_of(world, device)
    return tuple(dist.new_subgroups_by_enumeration(parts, timeout)[0] for parts in (counterparts, blocks))  # type: ignore[misc]  # this process is in one of them


def gather_samples(
    tables_KNC: Tensor, processes: int, group: str = "", counts: Sequence[int] = (), by_machine: bool = False
) -> Tensor:
    """K tables of this process's N samples -> (K, M, C) of all in the order of the global batch.

    That batch was dealt out: the processes' first samples come first, in rank order, then their second ones; a process
    without more is passed over. Every process must call it, with the same K and C, and the same N where ``counts`` does
    not give that of each. One collective, or with ``by_machine`` one between and one within machines where that is
    faster: the same bits.
    """
    if processes == 1:
        return tables_KNC
    if counts:
        tables_KNC = F.pad(tables_KNC, (0, 0, 0, max(counts) - tables_KNC.shape[1]))
    # straight into place, where lists are copied once more; by its name from torch 2.14 on, or the one before
    gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gathered, steps = tables_KNC.contiguous(), _steps(tables_KNC, group, by_machine)
    for members in steps:
        own, gathered = gathered, gathered.new_empty(members.size() * len(gathered), *gathered.shape[1:])
        gather_into(gathered, own, group=members)
    last = len(steps)  # whose processes come first in `gathered`, and last in the order of ranks
    gathered = gathered.unflatten(0, (*(members.size() for members in reversed(steps)), -1))
    tables_KMC = gathered.permute(last, last + 1, *reversed(range(last)), last + 2).flatten(1, last + 1)
    if not counts:
        return tables_KMC
    held = [n < count for n in range(max(counts)) for count in counts]
    return tables_KMC[:, torch.tensor(held, device=tables_KMC.device)]


def total_samples(samples: int, processes: int, group: str = "", counts: Sequence[int] | None = None) -> int:
    """Samples of all processes, where this one has ``samples``."""
    return sum(counts) if counts else samples * processes


def own_samples(table_MC: Tensor, processes: int, group: str, counts: Sequence[int]) -> Tensor:
    """This process's rows of a table over all samples: a view of every W-th, or a copy where ``counts`` differ."""
    if processes == 1:
        return table_MC
    if not counts:
        return table_MC[own_rank(group) :: processes]
    return table_MC[own_mask(table_MC, processes, group, counts)]


def own_mask(table_MC: Tensor, processes: int, group: str, counts: Sequence[int]) -> Tensor | None:
    """Which rows of a table over all samples are this process's, where ``counts`` differ; else None."""
    if processes == 1 or not counts:
        return None
    rank = own_rank(group)
    mine = [r == rank for n in range(max(counts)) for r, count in enumerate(counts) if n < count]
    return torch.tensor(mine, device=table_MC.device)


def late_report() -> int:
    """Address of the number in which a kernel leaves 1 + the rank that it has waited for in vain."""
    if not _late:
        _late.append(torch.zeros(1, dtype=torch.int32).pin_memory())
    return _late[0].data_ptr()


def late() -> int | None:
    """The rank that a kernel of this process has waited for in vain, which ends it a second later."""
    rank = int(_late[0]) - 1 if _late else -1
    return None if rank < 0 else rank
