"""Several gloo processes give what one process with the global batch gives."""

import copy
import os

import process_groups
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from onlinenorm import OnlineNorm2d
from onlinenorm.normalizers import average_statistics, gather_statistics

STEPS, BATCH = 5, 8


def network(guard, statistics="global"):
    torch.manual_seed(3)
    norm = {"error_compensation": guard, "clamp_value": 1.0, "statistics": statistics, "alpha_fwd": 0.9}
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), OnlineNorm2d(4, **norm), nn.ReLU(), nn.Conv2d(4, 3, 1), OnlineNorm2d(3, **norm)
    ).double()


def batches():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(STEPS, BATCH, 2, 6, 6, generator=generator, dtype=torch.float64) + 1


def train(model, parts, accumulate=1):
    """SGD on the mean of a quadratic loss; each step's batch comes in ``accumulate`` parts."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for batch in parts:
        optimizer.zero_grad()
        for micro_batch in batch.chunk(accumulate):
            output = model(micro_batch)
            ((output - 1).square().flatten(1).sum(1).mean() / accumulate).backward()
        optimizer.step()


def worker(rank, world_size, port, guard, accumulate, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    model = network(guard)
    wrapped = DistributedDataParallel(model)
    # Every micro-batch is dealt out, so that ranks taking turns give one process's order.
    own = [torch.cat([m[rank::world_size] for m in batch.chunk(accumulate)]) for batch in batches()]
    train(wrapped, own, accumulate)
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    local = network(guard, statistics="local")
    with torch.no_grad():
        local[1].running_mean.fill_(rank)
    assert average_statistics(local) == 2
    assert torch.allclose(local[1].running_mean, torch.full((4,), (world_size - 1) / 2, dtype=torch.float64))
    assert average_statistics(model) == 0
    dist.destroy_process_group()


class OwnStatistics(torch.nn.Module):
    """Keeps statistics of any shape and a count, as a normalizer of one's own may."""

    def __init__(self, statistics=None):
        super().__init__()
        self.register_buffer("level", torch.zeros(2, 3))
        self.register_buffer("scalar", torch.zeros(()))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))
        self.register_buffer("phase", torch.full((2,), 1 + 2j))
        self.register_buffer("seen", torch.zeros(2, dtype=torch.bool))
        self.register_buffer("halves", torch.zeros(3, dtype=torch.float16))
        if statistics:
            self.statistics = statistics


class OnlineNormAndMore(OnlineNorm2d):
    """Its statistics are global, and what it keeps beside them is not."""

    def __init__(self, num_features):
        super().__init__(num_features)
        self.register_buffer("more", torch.zeros(()))


def own_statistics(rank, world_size, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    model = nn.Sequential(
        OwnStatistics(), nn.InstanceNorm2d(2, track_running_stats=True), OwnStatistics("global"), OnlineNormAndMore(2)
    )
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.level[1] += rank
            layer.scalar += rank
            layer.batches += 2**53 + 1 + 2 * rank  # what float64 cannot hold
            layer.phase[1] *= 1 + rank
            layer.seen[rank] = True
            layer.halves += 1 + rank
        model[1].running_mean += rank
        model[3].more += rank
    tables = gather_statistics(model)
    assert average_statistics(model) == 3
    torch.save([tables, model.state_dict()], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_statistics_of_any_layer_are_averaged_and_counts_are_the_largest(tmp_path):
    process_groups.run(2, own_statistics, 2, process_groups.free_port(), str(tmp_path))
    for rank in range(2):
        tables, state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert state["0.level"].tolist() == [[0, 0, 0], [0.5, 0.5, 0.5]] and float(state["0.scalar"]) == 0.5
        assert int(state["0.batches"]) == 2**53 + 3 and state["1.running_mean"].tolist() == [0.5, 0.5]
        assert tables["0.level"].shape == (2, 2, 3) and tables["0.batches"].tolist() == [2**53 + 1, 2**53 + 3]
        assert state["0.phase"].tolist() == [1 + 2j, 1.5 + 3j] and state["0.seen"].tolist() == [True, True]
        assert state["0.halves"].tolist() == [1.5] * 3 and tables["0.halves"].dtype == torch.float16
        assert tables["0.phase"].tolist() == [[1 + 2j, 1 + 2j], [1 + 2j, 2 + 4j]]
        assert float(state["2.scalar"]) == rank, "said to be the same everywhere"
        assert float(state["3.more"]) == 0.5 and "3.running_mean" not in tables


@pytest.mark.parametrize(
    ("world_size", "accumulate", "guard"), [(2, 1, "clamp"), (4, 1, "layer_scaling"), (2, 2, "none")]
)
def test_processes_equal_one_process(world_size, accumulate, guard, tmp_path):
    one = network(guard)
    train(one, batches(), accumulate)
    process_groups.run(world_size, worker, world_size, process_groups.free_port(), guard, accumulate, str(tmp_path))
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world_size)]
    for name, expected in one.state_dict().items():
        for state in states:
            assert torch.equal(state[name], states[0][name]), f"{name} differs between ranks"
        scale = expected.abs().max()
        assert (states[0][name] - expected).abs().max() <= 1e-9 * scale, name


def test_compiles_with_a_process_group():
    """The collectives sit inside custom operators: no graph breaks."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{process_groups.free_port()}", rank=0, world_size=1)
    try:
        eager = network("clamp")
        compiled = copy.deepcopy(eager)
        x = batches()[0]
        torch._dynamo.reset()
        output = torch.compile(compiled, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(output, eager(x))
        output.sum().backward()
    finally:
        dist.destroy_process_group()


def test_one_process_has_nothing_to_average():
    assert average_statistics(network("clamp", "local")) == 0
