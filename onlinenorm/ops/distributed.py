"""Tables of per-sample moments across processes: what one process with the global batch would hold."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


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
    """K tables of this process's N samples -> (K, M, C) of all, in rank order, by one collective.

    Every process must call it, with the same K and C, and the same N where ``counts`` does not give that of each.
    """
    if processes == 1:
        return tables_KNC
    if counts:
        tables_KNC = F.pad(tables_KNC, (0, 0, 0, max(counts) - tables_KNC.shape[1]))
    gathered = tables_KNC.new_empty(processes * tables_KNC.shape[0], *tables_KNC.shape[1:])
    # straight into place, where lists are copied once more; by its name from torch 2.14 on, or the one before
    gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather_into(gathered, tables_KNC.contiguous(), group=process_group(group))
    tables_PKNC = gathered.unflatten(0, (processes, -1))
    if counts:
        return torch.cat([table_KNC[:, :n] for table_KNC, n in zip(tables_PKNC, counts, strict=True)], 1)
    return tables_PKNC.transpose(0, 1).flatten(1, 2)


def total_samples(samples: int, processes: int, group: str = "", counts: Sequence[int] | None = None) -> int:
    """Samples of all processes, where this one has ``samples``."""
    return sum(counts) if counts else samples * processes


def own_samples(table_MC: Tensor, processes: int, group: str, counts: Sequence[int]) -> Tensor:
    """This process's rows of a table over all samples."""
    if processes == 1:
        return table_MC
    rank = own_rank(group)
    samples = counts[rank] if counts else len(table_MC) // processes
    return table_MC[first_own_sample(samples, processes, group, counts) :][:samples]


def first_own_sample(samples: int, processes: int, group: str, counts: Sequence[int]) -> int:
    """Where this process's ``samples`` begin among those of all."""
    if processes == 1:
        return 0
    rank = own_rank(group)
    return sum(counts[:rank]) if counts else rank * samples
