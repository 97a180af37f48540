"""Which processes exchange moments between kernels, and the memory in which they do, without GPUs."""

from datetime import timedelta
from types import SimpleNamespace

import process_groups
import pytest
import torch
import torch.distributed as dist
from torch import nn

pytest.importorskip("triton")

from onlinenorm import OnlineNorm2d
from onlinenorm.errors import RunError
from onlinenorm.normalizers.exchange import Exchange, exchange_of
from onlinenorm.ops.distributed import process_group, refusals
from onlinenorm.ops.fused import peers, single_read
from onlinenorm.ops.spec import NormSpec


def pretend(rank, on_each, shared=False, alone=False, no_access=(), no_memory=()):
    """Makes this process one of several on machines of ``on_each`` GPUs, as far as `peers` looks at them."""
    dist.init_process_group("gloo")
    machine, device = divmod(rank, on_each)
    visible = [0 if shared else index for index in range(on_each)]
    if alone:
        visible, device = [device], 0
    peers.machine = lambda: f"machine-{machine}"
    peers._uuid = lambda index: f"GPU-{machine}-{visible[index]}"
    torch.cuda.device_count = lambda: len(visible)
    torch.cuda.can_device_access_peer = lambda own, other: rank not in no_access
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.get_device_properties = lambda index: SimpleNamespace(
        multi_processor_count=132, shared_memory_per_block_optin=232_448
    )
    single_read.supports_device = lambda index: True
    peers._patience = lambda members: 20.0
    peers.CHUNK = 1 << 17

    def allocate(state, size, device):
        state.meet()
        if rank in no_memory:
            raise RuntimeError("no handle can be exported")
        places = tuple(r << 40 for r in range(state.members.size()))
        state.rest = peers._Shared(torch.zeros(size, dtype=torch.uint8), places, lambda: events.append("barrier"))

    peers._allocate, events = allocate, []
    return device, events


def chosen(rank, on_each, groups=(), **faults):
    """Whether the kernels of a layer of all processes exchange, or why not, and so of each group of this process."""
    device, _ = pretend(rank, on_each, **faults)
    image = SimpleNamespace(
        is_cuda=True, dtype=torch.bfloat16, shape=(4, 64, 8, 8), device=SimpleNamespace(index=device),
        element_size=lambda: 2, is_contiguous=lambda memory_format: True,
    )  # fmt: skip
    names = {"": dist.get_world_size()}
    for ranks in groups:
        if rank in ranks:
            names[dist.new_group(ranks, use_local_synchronization=True).group_name] = len(ranks)
    found = []
    for name, processes in names.items():
        specs = [NormSpec(processes=processes, group=name, mailbox=mailbox) for mailbox in (1, 2, 0)]
        *both, gathered = [single_read.supports(image, spec) for spec in specs]
        assert both[0] == both[1] and not gathered
        reason = refusals[(process_group(name) or dist.group.WORLD).group_name]
        assert both[0] == (not reason)
        found.append(reason or True)
    dist.barrier()  # rank 0 serves the store
    dist.destroy_process_group()
    return found


class Chosen:
    """`chosen` with arguments, which can be sent to a process."""

    def __init__(self, on_each, faults, groups=()):
        self.on_each, self.faults, self.groups = on_each, faults, groups

    def __call__(self, rank):
        return chosen(rank, self.on_each, self.groups, **self.faults)


@pytest.mark.parametrize(
    "on_each, faults, expected",
    [
        (2, {}, True),
        (1, {}, "2 machines"),
        (2, {"shared": True}, "processes share a GPU"),
        (
            2, {"alone": True},
            "process 0 does not see the GPU of process 1 (CUDA_VISIBLE_DEVICES, or --gpus-per-task, leaves it out)",
        ),
        (2, {"no_access": (1,)}, "process 1 has no peer access from cuda:1 to cuda:0"),
        (2, {"no_memory": (0,)}, "no memory can be shared (no handle can be exported)"),
    ],
)  # fmt: skip
def test_processes_on_one_machine_exchange_where_each_reaches_the_others(on_each, faults, expected):
    """And all of them say the same, whichever of them it is that does not reach another."""
    found = process_groups.run(2, Chosen(on_each, faults))
    assert found == [[expected]] * 2


def test_between_machines_moments_are_gathered_and_within_each_exchanged():
    """Two machines of two GPUs: a layer of all processes gathers, one whose group is a machine's does not."""
    assert process_groups.run(4, Chosen(2, {}, ((0, 1), (2, 3)))) == [["2 machines", True]] * 4


def layers_told(rank, faults):
    """What a network's layers are said to do, one of which has asked for a mailbox if it may."""
    device, _ = pretend(rank, 2, **faults)
    layers = [OnlineNorm2d(64, backend="fused", exchange=exchange) for exchange in ("auto", "auto", "gather")]
    if peers.serve("", device):
        peers.mailbox(layers[0].spec, "forward", 4, 64, torch.device("cuda", device))
    network = nn.Sequential(*layers, OnlineNorm2d(64, statistics="local"), nn.BatchNorm2d(64))
    found = exchange_of(network), exchange_of(nn.Sequential(*layers[:1])), exchange_of(network[3:])
    dist.barrier()  # rank 0 serves the store
    dist.destroy_process_group()
    return *found, exchange_of(network)


def test_what_a_networks_layers_did_is_told():
    found, other = process_groups.run(2, layers_told, {})
    assert found == other and found[2] is found[3] is None
    mixed, first = Exchange(*found[0]), Exchange(*found[1])
    assert (mixed.processes, mixed.by_kernels, mixed.gathered) == (2, 1, 2) and first == (2, 1, 0, "")
    assert "channels in whole 64s" in mixed.reason and mixed.reason.endswith("; exchange=gather")
    refused, _ = process_groups.run(2, layers_told, {"no_access": (1,)})
    reason = "process 1 has no peer access from cuda:1 to cuda:0"
    assert refused[0] == (2, 0, 3, f"{reason}; exchange=gather") and refused[1] == (2, 0, 1, reason)


def absence(rank, to_memory):
    """What the first process says where the other one meets it, but not to share memory, or never."""
    device, _ = pretend(rank, 2)
    peers._patience = lambda members: 1.0
    store = dist.distributed_c10d._get_default_store()

    def stay_away(*arguments):
        store.wait(["told"])
        store.set("gone", "")
        raise StopIteration

    if rank == 1:
        peers._allocate = stay_away
        with pytest.raises(StopIteration):
            peers.serve("", device) if to_memory else stay_away()
        return None
    with pytest.raises(RunError) as error:
        peers.serve("", device)
    store.set("told", "")
    store.wait(["gone"])  # this process serves the store
    return str(error.value)


@pytest.mark.parametrize("to_memory", [False, True])
def test_a_process_that_does_not_come_to_share_memory_is_named(to_memory):
    said, _ = process_groups.run(2, absence, to_memory)
    assert said.startswith("process 1 did not come to where processes share memory")


def patience(rank):
    dist.init_process_group("gloo", timeout=timedelta(seconds=50))
    return peers._patience(dist.group.WORLD)


def test_kernels_give_up_on_a_process_before_nccl_ends_their_own():
    assert process_groups.run(1, patience) == [45.0]


def launches(rank):
    """Mailboxes of a layer: the offsets they begin at, and what happens in between."""
    _, events = pretend(rank, 2)
    spec, gpu, found = NormSpec(processes=2, mailbox=1), torch.device("cuda", rank), []

    def launch(direction, samples, capturing=False):
        torch.cuda.is_current_stream_capturing = lambda: capturing
        events.clear()
        box = peers.mailbox(spec, direction, samples, 128, gpu)
        assert box.rank == rank and box.addresses[1] - box.addresses[0] == 1 << 40
        found.append((box.addresses[0], box.launches, list(events)))
        return box

    assert peers.serve("", rank)
    for samples in (4, 4):  # alike: one after the other, and nothing between them
        launch("forward", samples), launch("backward", samples)
    launch("forward", 4), launch("forward", 4)  # out of turn
    state = peers._groups[dist.group.WORLD]
    former, smaller = (((1,), "forward", samples, False, False) for samples in (4, 2))
    state.boxes[former][1].own.fill_(7)
    launch("forward", 2)  # another size: emptied
    assert not state.boxes[smaller][1].own.any() and former not in state.boxes
    launch("forward", 8)  # a larger one: elsewhere
    launch("forward", 8, capturing=True), launch("forward", 4), launch("forward", 8)  # what is captured remains
    launch("forward", 8, capturing=True)
    with pytest.raises(RuntimeError, match="run a step of that size before the capture"):
        launch("forward", 16, capturing=True)
    dist.barrier()  # rank 0 serves the store
    dist.destroy_process_group()
    return found


def test_a_layers_mailbox_follows_its_size_of_batch_and_leaves_graphs_theirs():
    found, other = process_groups.run(2, launches)
    assert found == other
    size = 8 * 4 * 2 * (128 + 2)  # of four samples of each of two processes, two slabs of 64 channels
    assert found[:4] == [(0, size, []), (8448, size, [])] * 2 and size + 8 <= 8448
    assert found[4:6] == [(0, size, []), (2 * 8448, size, [])]
    assert found[6] == (0, size // 2, ["barrier", "barrier"])
    large, captured, smaller, outside, again = found[7:]
    assert large == again == (3 * 8448, 2 * size, []) and captured == (*large[:2], ["barrier"])
    assert smaller[0] >= large[0] + 2 * size and outside[0] > smaller[0]


def passes_beside_graphs(rank):
    """The mailboxes of a step that is captured, and of passes of as many samples outside of its graphs."""
    _, events = pretend(rank, 2)
    spec, gpu = NormSpec(processes=2, mailbox=1), torch.device("cuda", rank)

    def launch(direction, capturing=False):
        torch.cuda.is_current_stream_capturing = lambda: capturing
        events.clear()
        return peers.mailbox(spec, direction, 4, 128, gpu).addresses[rank], list(events)

    assert peers.serve("", rank)
    steps = [[launch(direction, capturing) for direction in ("forward", "backward")] for capturing in (False, True)]
    passes = [launch("forward"), launch("backward"), launch("forward"), launch("forward"), launch("forward")]
    steps.append([launch(direction, capturing=True) for direction in ("forward", "backward")])
    passes += [launch("backward"), launch("backward")]
    dist.barrier()  # rank 0 serves the store
    dist.destroy_process_group()
    return steps, passes


def test_a_pass_without_a_backward_leaves_alone_what_the_next_replay_of_a_graph_uses():
    """No host call is made for a replay: nothing could put a barrier between it and the pass before it."""
    found, other = process_groups.run(2, passes_beside_graphs)
    (warm_up, captured, anew), passes = found
    assert captured == warm_up == anew and not any(events for _, events in captured)
    assert not {place for place, _ in passes} & {place for place, _ in captured}
    assert [place + (1 << 40) for place, _ in passes] == [place for place, _ in other[1]]
    forward, backward, again, second, third, *backwards = (place for place, _ in passes)
    assert forward == again == third != second, "no two passes in turn have one mailbox"
    assert backwards[0] == backward != backwards[1]
    assert not any(events for _, events in passes), "which makes barriers needless"
