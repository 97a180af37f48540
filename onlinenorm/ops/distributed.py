"""Tables of per-sample moments across processes: what one process with the global batch would hold.

And what `fused.peers` leaves for those who do not load Triton: which layers' kernels exchange moments, and for whom one
has waited in vain.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

exchanging: set[int] = set()  # layers whose kernels have exchanged moments, by `NormSpec.mailbox`
refusals: dict[str, str] = {}  # name of a process group -> why its processes' kernels exchange none, "" where they do
_late: list[Tensor] = []


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


def gather_samples(tables_KNC: Tensor, processes: int, group: str = "", counts: Sequence[int] = ()) -> Tensor:
    """K tables of this process's N samples -> (K, M, C) of all in the order of the global batch, by one collective.

    That batch was dealt out: the processes' first samples come first, in rank order, then their second ones; a process
    without more is passed over. Every process must call it, with the same K and C, and the same N where ``counts`` does
    not give that of each.
    """
    if processes == 1:
        return tables_KNC
    if counts:
        tables_KNC = F.pad(tables_KNC, (0, 0, 0, max(counts) - tables_KNC.shape[1]))
    gathered = tables_KNC.new_empty(processes * tables_KNC.shape[0], *tables_KNC.shape[1:])
    # straight into place, where lists are copied once more; by its name from torch 2.14 on, or the one before
    gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather_into(gathered, tables_KNC.contiguous(), group=process_group(group))
    tables_KMC = gathered.unflatten(0, (processes, -1)).permute(1, 2, 0, 3).flatten(1, 2)
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
