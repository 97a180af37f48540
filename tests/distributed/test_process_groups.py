"""OnlineNorm in other people's distributed programs: groups of processes, uneven batches, streams of their own."""

import copy
import logging
import os
import pickle

import process_groups
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from onlinenorm import OnlineNorm2d, convert
from onlinenorm.normalizers import average_statistics, gather_statistics
from onlinenorm.ops.distributed import process_group

COUNTS = ((4, 3), (2, 5), (3, 3))  # samples of the two processes in each step


def network(**arguments):
    torch.manual_seed(3)
    arguments = {"alpha_fwd": 0.9, "clamp_value": 1.0, **arguments}
    norms = [OnlineNorm2d(4, **arguments), OnlineNorm2d(3, **arguments)]
    return nn.Sequential(nn.Conv2d(2, 4, 3), norms[0], nn.Tanh(), nn.Conv2d(4, 3, 1), norms[1])


def images(step, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(sum(COUNTS[step]), 2, 6, 6, generator=generator, dtype=dtype) + 1


def steps(model, rank, compiled=None):
    """Gradients of three steps, on the images of one process or (rank None) of both; the mean of both losses' means."""
    found = []
    for step, counts in enumerate(COUNTS):
        model.zero_grad()
        parts = [process_groups.dealt(images(step), counts)[rank]] if rank is not None else [images(step)]
        out = (compiled or model)(parts[0])
        losses = [out] if rank is not None else process_groups.dealt(out, counts)
        sum((part - 1).square().flatten(1).sum(1).mean() for part in losses).div(len(losses)).backward()
        found.append([p.grad.clone() for p in model.parameters()])
    return found, {name: value.clone() for name, value in model.state_dict().items()}


def uneven(rank):
    dist.init_process_group("gloo")
    found = {}
    for guard in ("clamp", "layer_scaling"):
        wrapped = DistributedDataParallel(network(error_compensation=guard).double())
        found[guard] = steps(wrapped, rank)
    with pytest.raises(ValueError, match=r"batch of process 1 is empty \(samples of each: 2, 0\)"):
        OnlineNorm2d(2)(torch.randn(2 - 2 * rank, 2, 3, 3))
    layer = OnlineNorm2d(2)
    layer(torch.randn(2, 2, 3 + rank, 3)).sum().backward()  # images of other sizes
    found["sizes"] = layer.running_mean
    if os.environ.get("TRITON_INTERPRET") == "1":
        fused, plain = (network(error_compensation="layer_scaling", backend=b) for b in ("fused", "torch"))
        for step, counts in enumerate(COUNTS):
            x = process_groups.dealt(images(step, torch.float32), counts)[rank]
            results = []
            for model in (fused, plain):
                out = model(x)
                out.square().sum().backward()
                results.append([out, *model.parameters(), *[p.grad for p in model.parameters()], *model.buffers()])
            for actual, expected in zip(*results, strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    dist.destroy_process_group()
    return found


def test_uneven_batches_are_one_stream():
    """Processes with 4 and 3 images are one process with 7, whose loss is the mean of the two means."""
    ranks = process_groups.run(2, uneven)
    for guard in ("clamp", "layer_scaling"):
        gradients, state = steps(network(error_compensation=guard).double(), None)
        for found in ranks:
            actual, actual_state = found[guard]
            torch.testing.assert_close(actual, gradients)
            torch.testing.assert_close({k.removeprefix("module."): v for k, v in actual_state.items()}, state)
    assert torch.equal(ranks[0]["sizes"], ranks[1]["sizes"])


def groups(rank):
    dist.init_process_group("gloo")
    own, other = [dist.new_group([0]), dist.new_group([1])][:: 1 - 2 * rank]
    both = dist.new_group([0, 1])
    found = {}
    for name, arguments in {
        "alone": {"process_group": own},
        "both": {"process_group": both},
        "local": {"statistics": "local"},
        "compiled": {"statistics": "local"},
    }.items():
        model = DistributedDataParallel(network(**arguments).double())
        run = torch.compile(model, backend="aot_eager") if name == "compiled" else model
        x = images(2) + 5 * rank
        for _ in range(3):
            run(x).square().sum().backward()
        found[name] = {n: b.clone() for n, b in model.module.named_buffers()}
    layer = OnlineNorm2d(4, process_group=both)
    assert layer.process_group is both and "process_group=[0, 1]" in repr(layer)
    assert OnlineNorm2d(4, process_group=own).spec.gradient_scale == 1.0 and layer.spec.gradient_scale == 0.5
    x = torch.randn(2, 4, 3, 3) + rank
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    compiled = copy.deepcopy(layer)
    expected = layer(x)
    for twin in twins:
        assert torch.equal(twin(x), expected) and twin.process_group is both
    torch._dynamo.reset()
    assert torch.equal(torch.compile(compiled, backend="aot_eager", fullgraph=True)(x), expected)
    assert torch.equal(compiled.running_mean, layer.running_mean)
    found["mean of both"] = layer.running_mean.clone()
    with pytest.raises(ValueError, match=r"process_group: .* must be a group that this process belongs to"):
        OnlineNorm2d(4, process_group=other)
    found["pickled"] = pickle.dumps(layer)
    # a group of its own is averaged like a stream of its own
    single = OnlineNorm2d(4, process_group=own)
    with torch.no_grad():
        single.running_mean.fill_(rank)
    assert average_statistics(layer) == 0 and average_statistics(single, process_group=own) == 0
    assert gather_statistics(single)["running_mean"].shape == (2, 4)
    assert average_statistics(single) == 1 and single.running_mean.tolist() == [0.5] * 4
    converted = convert(nn.Sequential(nn.BatchNorm2d(2)), process_group=own)
    assert converted[0].process_group is own
    dist.destroy_process_group()
    return found


def test_groups_and_local_streams_are_kept_apart_by_data_parallel():
    ranks = process_groups.run(2, groups)
    for rank, found in enumerate(ranks):
        alone = network().double()
        x = images(2) + 5 * rank
        for _ in range(3):
            alone(x).square().sum().backward()
        own = dict(alone.named_buffers())
        for name, value in found["alone"].items():
            torch.testing.assert_close(value, own[name], msg=name)
        for way in ("local", "compiled"):
            for name, value in found[way].items():  # in units of the mean over both processes
                unit = 0.5 if "control" in name else 1
                torch.testing.assert_close(value, own[name] * unit, msg=f"{way} {name}")
    for name, value in ranks[0]["both"].items():
        assert torch.equal(value, ranks[1]["both"][name]), name
    assert not torch.allclose(ranks[0]["local"]["1.running_mean"], ranks[1]["local"]["1.running_mean"])
    layer = pickle.loads(ranks[0]["pickled"])  # here no such group exists
    layer.eval()(torch.randn(2, 4, 3, 3))
    with pytest.raises(ValueError, match=r"built with a group of the processes 0, 1, .* set layer.process_group"):
        layer.train()(torch.randn(2, 4, 3, 3))
    layer.process_group = None
    layer(torch.randn(2, 4, 3, 3))
    assert process_group("") is None


def streams(rank):
    dist.init_process_group("gloo")
    records: list[logging.LogRecord] = []
    logger = logging.getLogger("onlinenorm.normalizers.data_parallel")
    logger.addFilter(lambda record: records.append(record) or True)
    logger.setLevel(logging.INFO)
    model = DistributedDataParallel(network(statistics="local"))
    state = {name: value + rank for name, value in model.state_dict().items()}
    found = []
    for _ in range(2):
        model.load_state_dict(state)
        with torch.no_grad():
            model(images(2, torch.float32))
        found.append(model.module[1].running_mean.tolist())
    dist.destroy_process_group()
    return found, [record.getMessage() for record in records]


def test_streams_are_a_process_own_from_the_first_pass_on_which_is_said():
    for rank, (found, messages) in enumerate(process_groups.run(2, streams)):
        assert found == [[0.0] * 4, [float(rank)] * 4]
        (message,) = messages
        assert "own streams of 2 OnlineNorm layers from those of rank 0; from now on" in message
