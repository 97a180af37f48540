"""Moments over several machines, which processes of this one stand for: gathered between them once, then within."""

import gc
import os
import time
import weakref
from datetime import timedelta
from types import SimpleNamespace

import process_groups
import pytest
import torch
import torch.distributed as dist
from torch import nn

from onlinenorm import OnlineNorm2d
from onlinenorm.errors import RunError
from onlinenorm.normalizers import average_statistics, gather_statistics, synchronise_batch_norm
from onlinenorm.normalizers.exchange import exchange_of
from onlinenorm.ops import distributed
from onlinenorm.ops.distributed import gather_samples
from onlinenorm.training.children import WatchingLauncher

EQUAL = "aabb"  # the machine of each process
COUNTS = 4, 3, 3, 2
BATCHES = (2, 2, 2, 2), (2, 2, 2, 2), (2, 2, 1, 1)  # samples of each process in each step
CHANNELS = 5


def pretend(rank, machines, timeout=None):
    """Makes this process one of a job on several machines; returns the processes of each gather that it is in."""
    dist.init_process_group("gloo", timeout=timeout)
    distributed.machine = lambda: machines[rank]
    distributed.FEWEST = 2
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    gather, groups = getattr(dist, name), []
    setattr(
        dist,
        name,
        lambda *tensors, group: groups.append(dist.get_process_group_ranks(group)) or gather(*tensors, group),
    )
    return groups


def gathered(rank, machines):
    """Tables gathered in one step and as chosen for these machines, and the processes of each gather of the latter."""
    groups = pretend(rank, machines)
    generator = torch.Generator().manual_seed(rank)
    found = []
    for counts in ((), COUNTS):
        tables = torch.randn(3, counts[rank] if counts else 2, CHANNELS, generator=generator, dtype=torch.float64)
        one = gather_samples(tables, 4, "", counts)
        groups.clear()
        found.append((one, gather_samples(tables, 4, "", counts, by_machine=True), list(groups)))
    dist.destroy_process_group()
    return found


def test_one_gather_between_machines_and_one_within_each_give_the_bits_of_one_over_all():
    for rank, found in enumerate(process_groups.run(4, gathered, EQUAL)):
        between, within = [rank % 2, rank % 2 + 2], [rank // 2 * 2, rank // 2 * 2 + 1]
        for one, two, groups in found:
            assert groups == [between, within] and torch.equal(one, two)
        assert found[0][1].shape == (3, 8, CHANNELS) and found[1][1].shape == (3, sum(COUNTS), CHANNELS)


@pytest.mark.parametrize("machines", ["aaab", "abab", "aaaa", "abcd", "aabc"])
def test_machines_without_equal_blocks_of_processes_gather_over_all(machines):
    for found in process_groups.run(4, gathered, machines):
        for one, other, groups in found:
            assert groups == [[0, 1, 2, 3]] and torch.equal(one, other)


def gathered_over_all(rank):
    """The processes of gathers that take one step, on machines where others take two."""
    groups = pretend(rank, EQUAL)
    tables = torch.ones(1, 2, CHANNELS)
    gather_samples(tables, 4)
    distributed.LARGEST = tables.nbytes - 1
    gather_samples(tables, 4, by_machine=True)
    distributed.LARGEST += 1
    distributed.FEWEST = 5
    gather_samples(tables, 4, by_machine=True)
    distributed.FEWEST = 4
    some = dist.new_group([0, 1, 2])
    if rank < 3:
        gather_samples(tables, 3, some.group_name, by_machine=True)
    assert not distributed._two_steps
    gather_samples(tables, 4, by_machine=True)
    dist.destroy_process_group()
    return groups


def test_what_is_large_or_of_few_processes_or_of_a_group_is_gathered_over_all():
    for rank, groups in enumerate(process_groups.run(4, gathered_over_all)):
        assert groups[:3] == [[0, 1, 2, 3]] * 3 and groups[3:-2] == [[0, 1, 2]] * (rank < 3)
        assert [len(ranks) for ranks in groups[-2:]] == [2, 2]


def groups_left(rank, machines):
    """Process groups that are still there after each of two is made, used for a gather and destroyed."""
    distributed.machine, distributed.FEWEST = lambda: machines[rank], 2
    store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), 4, rank == 0)
    made = []
    for start in "ab":
        dist.init_process_group("gloo", store=dist.PrefixStore(start, store), rank=rank, world_size=4)
        made.append(weakref.ref(dist.group.WORLD))
        gather_samples(torch.ones(1, 2, CHANNELS), 4, by_machine=True)
        dist.barrier()
        dist.destroy_process_group()
        gc.collect()
    return [group() is not None for group in made]


@pytest.mark.parametrize("machines", [EQUAL, "aaaa"])
def test_groups_that_a_program_has_destroyed_are_not_kept(machines):
    assert process_groups.run(4, groups_left, machines) == [[False, False]] * 4


def network(exchange):
    torch.manual_seed(3)
    norms = [
        OnlineNorm2d(4, backend="fused", exchange=exchange, error_compensation=guard, clamp_value=1.0, alpha_fwd=0.9)
        for guard in ("clamp", "layer_scaling")
    ]
    return nn.Sequential(nn.Conv2d(2, 4, 3), norms[0], nn.ReLU(), nn.Conv2d(4, 4, 1), norms[1])


def trained(rank, exchange, groups):
    """Everything that steps leave, a resumption after the first among them, and the gathers of the last."""
    model, found = network(exchange), []
    for step, counts in enumerate(BATCHES):
        x = torch.randn(sum(counts), 2, 6, 6, generator=torch.Generator().manual_seed(step)) + 1
        groups.clear()
        y = model(process_groups.dealt(x, counts)[rank])
        y.square().sum().backward()
        found += [y.detach(), *(p.grad.clone() for p in model.parameters())]
        state = {name: value.clone() for name, value in model.state_dict().items()}
        if step == 0:
            model = network(exchange)
            model.load_state_dict(state)
    last = [ranks for ranks in groups if len(ranks) < 4], [ranks for ranks in groups if len(ranks) == 4]
    assert not gather_statistics(model) and average_statistics(model) == 0
    return [*found, *state.values()], last, exchange_of(model).reason


def trained_both_ways(rank):
    groups = pretend(rank, EQUAL)
    one, (parts, whole), reason = trained(rank, "gather", groups)
    assert not parts and reason == "exchange=gather"
    two, (parts, rest), reason = trained(rank, "auto", groups)
    assert reason.endswith("; small messages between machines, then within each")
    assert len(parts) == 2 * (len(whole) - len(rest)) == 2 * 4  # two layers, forward and backward
    groups.clear()
    batch = nn.BatchNorm2d(4)
    batch(torch.randn(2, 4, 3, 3))
    synchronise_batch_norm(nn.Sequential(batch))(torch.randn(2, 4, 3, 3))
    assert all(len(ranks) == 4 for ranks in groups)
    dist.destroy_process_group()
    return one, two, parts


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 without a GPU")
def test_layers_train_to_the_same_bits_with_one_gather_between_machines_each_way():
    for rank, (one, two, parts) in enumerate(process_groups.run(4, trained_both_ways)):
        assert parts == [[rank % 2, rank % 2 + 2], [rank // 2 * 2, rank // 2 * 2 + 1]] * 4
        for ours, expected in zip(two, one, strict=True):
            assert torch.equal(ours, expected)


def wait_for_the_last(rank):
    """What processes say of one on another machine that does not come."""
    pretend(rank, EQUAL, timedelta(seconds=3))
    tables = torch.ones(1, 2, CHANNELS)
    gather_samples(tables, 4, by_machine=True)
    if rank == 3:
        time.sleep(15)
        return None
    began = time.monotonic()
    environment = SimpleNamespace(validate_settings=lambda **_: None, creates_processes_externally=True)
    launcher = WatchingLauncher(environment, 2, 1)
    with pytest.raises(RunError) as raised:
        launcher.launch(lambda: [gather_samples(tables, 4, by_machine=True) for _ in range(2)])
    seconds = time.monotonic() - began
    time.sleep(5)  # so that the others wait for a silent process, not for one that has closed its connections
    return str(raised.value), seconds


def test_processes_that_wait_for_a_stuck_one_of_another_machine_say_so_as_soon_as_ever():
    for said, seconds in process_groups.run(4, wait_for_the_last)[:3]:
        assert said.startswith("another process did not come to where this one has waited for it (") and seconds < 15
