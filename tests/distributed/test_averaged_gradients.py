"""Captured steps of several processes average their gradients themselves, and DistributedDataParallel does not."""

import process_groups
import pytest
import torch
import torch.distributed as dist
from captured_runs import loss_of, stand_in, train
from pytorch_lightning import Callback
from pytorch_lightning.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from onlinenorm.training import cuda_graph
from onlinenorm.training.cuda_graph import GraphedStep


class Reductions(Callback):
    """Counts those of DistributedDataParallel."""

    def __init__(self):
        self.count = 0

    def on_train_start(self, trainer, module):
        def reduce(group, bucket):
            self.count += 1
            return default_hooks.allreduce_hook(group, bucket)

        trainer.model.register_comm_hook(None, reduce)


def train_on_processes(rank, options):
    """(state, reductions by DistributedDataParallel) of a run, without graphs and with them."""
    found = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        stand_in(monkeypatch)
        for graph in (False, True):
            strategy = DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
            reductions = Reductions()
            state = train(graph, callbacks=[reductions], strategy=strategy, devices=2, **options)
            found.append((state, reductions.count))
    return found


@pytest.mark.parametrize(
    "options, whole",
    [({}, True), ({"accumulate_grad_batches": 2}, False), ({"gradient_clip_val": 0.5}, False)],
    ids=str,
)
def test_gradients_of_several_processes_are_averaged_once(options, whole):
    """Within the graph; by DistributedDataParallel where they are wanted before the optimizer's step, as without."""
    for (plain, reductions), (graphed, reductions_graphed) in process_groups.run(2, train_on_processes, options):
        assert all(torch.equal(graphed[name], value) for name, value in plain.items())
        assert reductions > 0 and reductions_graphed == (0 if whole else reductions)


def batches_of_any_size(rank):
    """Weights after steps, some of them with a batch of another size on one process or both; and the true ones."""
    dist.init_process_group("gloo")
    found = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        stand_in(monkeypatch)
        for graphed in (False, True):
            torch.manual_seed(0)
            network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
            wrapped = DistributedDataParallel(network)
            optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9)
            step = GraphedStep(network, loss_of, (), optimizer, False, True)
            for sizes in ((8, 8), (8, 5), (5, 8), (3, 2), (8, 8)):
                images, labels = torch.randn(2, 8, 3, 2, 2)[rank, : sizes[rank]], torch.arange(sizes[rank]) % 5
                if graphed:
                    step.backward(step(images, labels))
                    step.step_optimizer()
                else:
                    loss_of(wrapped, images, labels).backward()
                    optimizer.step()
                optimizer.zero_grad()
            found.append(list(network.state_dict().values()))
    dist.destroy_process_group()
    return found


def test_processes_whose_batches_differ_in_size_meet_in_the_same_collectives():
    plain, graphed = process_groups.run(2, batches_of_any_size)[0]
    assert all(torch.equal(a, b) for a, b in zip(plain, graphed, strict=True))


def averages(rank):
    dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(0)
    makers = [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x[0, 0, 0].double(),
        lambda x: x[0].mT.contiguous().mT,
        lambda x: x[0, 0, 0, 0],
        lambda x: x.flatten()[:30].view(3, 10)[:, :3],  # not dense
        lambda x: x.double(),
    ]
    drawn = [[make(torch.randn(4, 3, 2, 5, generator=generator)) for make in makers] for _ in range(2)]
    collectives = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        reduce = dist.all_reduce
        monkeypatch.setattr(dist, "all_reduce", lambda *a: collectives.append(a[0].dtype) or reduce(*a))
        # of the last, its own dtype's parameter alone has a gradient of another, in another layout
        gradients = [*drawn[rank][:-1], drawn[rank][-1].bfloat16().contiguous(memory_format=torch.channels_last)]
        found = cuda_graph.averaged(drawn[rank], gradients)
    dist.destroy_process_group()
    drawn_otherwise = [[*tensors[:-1], tensors[-1].bfloat16().double()] for tensors in drawn]
    expected = [(a + b) / 2 for a, b in zip(*drawn_otherwise, strict=True)]
    exact = all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    return exact, [t.stride() for t in found] == [torch.empty_like(t).stride() for t in drawn[rank]], collectives


def test_averages_keep_layout_and_order_in_one_collective_of_a_dtype():
    for result in process_groups.run(2, averages):
        assert result == (True, True, [torch.float32, torch.float64])
