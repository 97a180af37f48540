"""Global statistics where the sizes of batches depend on the data: as one process, or told to every process."""

import copy

import process_groups
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from onlinenorm import OnlineNorm2d
from onlinenorm.normalizers import batch_sizes

# samples of the two processes in each step, of the first network and of what comes after it
STEPS = (((4, 4), (4, 4)), ((4, 4), (4, 3)), ((3, 4), (2, 4)), ((4, 4), (4, 4)))


def norms():
    torch.manual_seed(3)
    return [nn.Sequential(nn.Conv2d(2, 2, 1), OnlineNorm2d(2, alpha_fwd=0.9)).double() for _ in range(2)]


def images(step, which):
    generator = torch.Generator().manual_seed(2 * step + which)
    return torch.randn(8, 2, 4, 4, generator=generator, dtype=torch.float64) + 1


def own(x, counts, rank):
    """The samples of a process, or (rank None) those of both."""
    return process_groups.dealt(x[: sum(counts)], counts)[rank] if rank is not None else x[: sum(counts)]


def follow(first, second, rank):
    """The second network sees a part of what the first gives."""
    for step, (before, after) in enumerate(STEPS):
        y = first(own(images(step, 0), before, rank))
        if rank is not None:
            part = y[: after[rank]]
        else:
            held = process_groups.dealt(torch.arange(sum(before)), before)
            part = y[torch.cat([own[:n] for own, n in zip(held, after, strict=True)]).sort().values]
        z = second(part)
        losses = [z] if rank is not None else process_groups.dealt(z, after)
        sum(loss.square().flatten(1).sum(1).mean() for loss in losses).div(len(losses)).backward()


def apart(first, second, rank):
    """Two networks with batches of their own in one step."""
    for step, counts in enumerate(STEPS):
        for which, network in enumerate((first, second)):
            y = network(own(images(step, which), counts[which], rank))
            losses = [y] if rank is not None else process_groups.dealt(y, counts[which])
            sum(loss.square().flatten(1).sum(1).mean() for loss in losses).div(len(losses)).backward()


WAYS = {"follow": follow, "apart": apart}


def statistics(networks):
    return [{name: value.clone() for name, value in network[1].named_buffers()} for network in networks]


def worker(rank, way):
    dist.init_process_group("gloo")
    networks = norms()
    WAYS[way](*networks, rank)
    with pytest.raises(ValueError, match=r"batch of process 1 is empty \(samples of each: 2, 0\)"):
        networks[1](networks[0](images(0, 0)[:2])[: 2 - 2 * rank])
    dist.destroy_process_group()
    return statistics(networks)


@pytest.mark.parametrize("way", WAYS)
def test_processes_with_batches_of_changing_sizes_equal_one_process(way):
    found = process_groups.run(2, worker, way)
    networks = norms()
    WAYS[way](*networks, None)
    networks[0](images(0, 0)[:2].repeat_interleave(2, 0))  # as before the empty batch, of which the second layer tells
    for actual in found:
        torch.testing.assert_close(actual, statistics(networks))


def on_a_gpu(rank):
    """As on GPUs, where the host does not wait for sizes at each layer."""
    batch_sizes._host_waits = lambda x: True
    exchanges, exchange = [], batch_sizes._exchange
    batch_sizes._exchange = lambda *arguments: exchanges.append(1) or exchange(*arguments)
    dist.init_process_group("gloo")
    networks = norms()
    apart(*(DistributedDataParallel(network) for network in networks), rank)
    assert len(exchanges) == 2 * len(STEPS)  # one a pass of each network
    found = statistics(networks)
    deep = nn.Sequential(*(OnlineNorm2d(2) for _ in range(5)))
    for step in range(3):
        exchanges.clear()
        deep(torch.randn(4 - rank, 2, 3, 3))
        assert len(exchanges) == (5 if step == 0 else 1)
    trunk, head = OnlineNorm2d(2), OnlineNorm2d(2)
    for _ in range(2):
        head(trunk(torch.randn(4, 2, 3, 3)))
    y = trunk(torch.randn(4, 2, 3, 3))
    if rank == 1:
        with pytest.raises(
            RuntimeError, match=r"^OnlineNorm2d: got 3 samples, and the layer before it in this pass 4;"
        ):
            head(y[:3])
    dist.destroy_process_group()
    return found


def test_where_the_host_does_not_wait_sizes_are_exchanged_once_a_pass():
    found = process_groups.run(2, on_a_gpu)
    networks = norms()
    apart(*networks, None)
    for actual in found:
        torch.testing.assert_close(actual, statistics(networks))


def compiled(rank):
    dist.init_process_group("gloo")
    layer = OnlineNorm2d(2)
    eager, run = copy.deepcopy(layer), torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 2, 3, 3) + rank
    torch.testing.assert_close(run(x), eager(x))
    torch.testing.assert_close(layer.state_dict(), eager.state_dict())
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=r"^samples of each process: 4, 3; in compiled programs"):
        run(x[: 4 - rank])
    torch.testing.assert_close(layer.state_dict(), before)
    torch.testing.assert_close(run(x), eager(x))
    dist.destroy_process_group()


def test_compiled_programs_refuse_uneven_batches_on_every_process():
    process_groups.run(2, compiled)
