"""Kernels of several GPUs that tell each other the moments of their samples while they run: the stream of one process.

python -m pytest tests/distributed/test_peers.py -m gpu [-k gpus4]       on a machine with two GPUs, Hopper or later
"""

import contextlib
import copy
import random
import time
from datetime import timedelta
from functools import partial

import process_groups
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from gpus import gpu_counts
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from onlinenorm import OnlineNorm2d, models
from onlinenorm.training.cuda_graph import GraphedStep

pytest.importorskip("triton")

from onlinenorm.ops.distributed import late as late_rank
from onlinenorm.ops.fused import two_pass
from scripts.bench.distributed_exactness import Alone

GUARDS = ("clamp", "layer_scaling")
# samples of each process, channels, height, width, and what else the layer does
LAYERS = (
    (4, 64, 56, 56, "residual"),
    (3, 128, 28, 28, "relu"),
    (32, 2048, 7, 7, "residual"),
    (5, 512, 14, 14, "plain"),
    (2, 64, 112, 112, "pool"),
    (128, 64, 14, 14, "residual"),
    (1, 64, 9, 7, "relu"),
)
SHORTCUTS = (
    (4, 256, 56, 56, "shortcut"),
    (5, 512, 14, 14, "shortcut"),  # a backward kernel of each layer
    (32, 2048, 7, 7, "shortcut"),
)
STEPS, CAPTURES = 3, 100


def begin(rank, seconds=60.0):
    """Joins the processes, if they have not met; a gather is an error from here on."""
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    if not dist.is_initialized():
        with told(rank, "meeting"):
            dist.init_process_group("nccl", device_id=device, timeout=timedelta(seconds=seconds))
            dist.barrier()

    def refuse(*arguments):
        raise AssertionError("the moments were gathered by a collective")

    two_pass.gather_samples = refuse
    return device


def end(rank):
    torch.cuda.synchronize()
    dist.barrier()
    dist.destroy_process_group()


@contextlib.contextmanager
def told(rank, what):
    """Says how long a part took."""
    start = time.monotonic()
    yield
    if rank == 0:
        print(f"{what}: {time.monotonic() - start:.1f} s", flush=True)


@pytest.fixture(scope="module", params=gpu_counts(hopper=True))
def pool(request):
    """Processes that meet once for all tests."""
    pool = process_groups.Pool(request.param)
    yield pool
    if pool.started:
        pool.run(end)
    pool.close()


def layer_steps(kind, guard, device, world, rank=None):
    """Outputs, gradients and state of a layer in a few steps, of one process's share or (rank None) of the whole."""
    samples, channels, height, width, form = kind
    generator = torch.Generator(device).manual_seed(7)  # which gives the same numbers on GPUs of one kind
    torch.manual_seed(1)
    arguments = {"error_compensation": guard, "clamp_value": 1.5, "alpha_fwd": 0.9, "exchange": "auto"}
    arguments["statistics"] = "local" if rank is None else "global"
    layer, other = layers = nn.ModuleList([OnlineNorm2d(channels, **arguments) for _ in range(2)])
    with torch.no_grad():
        for norm in layers:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.3)
    layers.to(device)
    found, scale = {}, 1 if rank is None else world  # the mean over own samples is so many shares of the mean over all
    for step in range(STEPS):
        draw = torch.randn((3, samples * world, channels, height, width), generator=generator, device=device).bfloat16()
        x, residual, w = (t if rank is None else t[rank::world] for t in draw)
        x, residual, w = (t.contiguous(memory_format=torch.channels_last) for t in (2 * x - 1, residual, w))
        x, residual = x.requires_grad_(), residual.requires_grad_()
        if form == "pool":
            y = layer(x, relu=True, max_pool=True)
            w = w[..., : height // 2, : width // 2]
        else:
            shortcut = other if form == "shortcut" else None
            y = layer(x, residual if form in ("residual", "shortcut") else None, form != "plain", shortcut=shortcut)
        y.backward(w * scale)
        found |= {f"y{step}": y.detach(), f"grad_x{step}": x.grad / scale}
        if form in ("residual", "shortcut"):
            found[f"grad_residual{step}"] = residual.grad / scale
    used = layers if form == "shortcut" else layers[:1]
    return found, dict(used.named_buffers()), {name: p.grad / scale for name, p in used.named_parameters()}


def distance(found, truth):
    return float((found.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-9))


def compare_layers(rank, layers):
    return compare(rank, begin(rank), layers)


def compare(rank, device, layers):
    lines, world = [], dist.get_world_size()
    for kind, guard in ((kind, guard) for kind in layers for guard in GUARDS):
        with told(rank, (kind, guard)):
            with Alone():
                whole, state, gradients = layer_steps(kind, guard, device, world)
            own, own_state, own_gradients = layer_steps(kind, guard, device, world, rank)
        worst = 0.0
        for name, tensor in own.items():
            worst = max(worst, distance(tensor, whole[name][rank::world]))
            assert worst <= 2e-3, (kind, guard, name, worst)
        for name, tensor in own_state.items():
            # a value next to 0 or to the clamp may fall to its other side, and a gradient is counted or not
            limit = 2e-5 if "running" in name else 1e-2
            assert distance(tensor, state[name]) <= limit, (kind, guard, name, distance(tensor, state[name]))
            others = [torch.empty_like(tensor) for _ in range(world)]
            dist.all_gather(others, tensor)
            assert same_bits(others, [tensor] * len(others)), (kind, guard, f"{name} differs between processes")
        for name, tensor in own_gradients.items():
            dist.all_reduce(tensor)
            assert distance(tensor, gradients[name]) <= 2e-3, (kind, guard, name, distance(tensor, gradients[name]))
        lines.append(f"{kind} {guard}: {worst:.1e}")
    return lines


@pytest.mark.parametrize("layers", [LAYERS, SHORTCUTS], ids=["alone", "with a shortcut's"])
def test_layers_equal_one_process(pool, layers):
    print(*pool.run(compare_layers, layers, seconds=300)[0], sep="\n")


def compare_without_gpus(rank):
    dist.init_process_group("gloo")
    some = [(2, 64, 8, 6, form) for form in ("residual", "plain", "pool", "shortcut")]
    return compare(rank, torch.device("cpu"), some)


def test_layers_that_gather_stand_the_comparison():
    """On the CPU: what GPUs alone can show is held against what is right."""
    assert len(process_groups.run(4, compare_without_gpus)[0]) == 8


class Network(nn.Module):
    """A few layers of every form, which end in logits."""

    def __init__(self, guard="clamp", exchange="auto", statistics="global"):
        super().__init__()
        norm = partial(OnlineNorm2d, error_compensation=guard, exchange=exchange, statistics=statistics)
        self.stem, self.n1 = nn.Conv2d(3, 64, 3, padding=1, bias=False), norm(64)
        self.c2, self.n2 = nn.Conv2d(64, 128, 3, stride=2, padding=1, bias=False), norm(128)
        self.c3, self.n3 = nn.Conv2d(128, 128, 1, bias=False), norm(128)
        self.head = nn.Linear(128, 10)

    def forward(self, x):
        x = self.n1(self.stem(x), relu=True, max_pool=True)
        x = self.n2(self.c2(x), relu=True)
        x = self.n3(self.c3(x), residual=x, relu=True)
        return self.head(x.mean((2, 3)))


def network(device, **arguments):
    torch.manual_seed(0)
    return Network(**arguments).to(device, memory_format=torch.channels_last)


def batches(rank, device, steps, samples=16, size=64):
    """A process's share of global batches."""
    generator, world = torch.Generator().manual_seed(5), dist.get_world_size()
    images = torch.randn((steps, world * samples, 3, size, size), generator=generator)
    labels = torch.randint(10, (steps, world * samples), generator=generator)
    for x, target in zip(images[:, rank::world].to(device), labels[:, rank::world].to(device), strict=True):
        yield x.contiguous(memory_format=torch.channels_last), target


def loss_of(forward, x, target):
    with torch.autocast("cuda", torch.bfloat16):
        loss = F.cross_entropy(forward(x), target)
    return loss


def gradients(model, step):
    """What a step, which returns a loss, leaves: its value, gradients and statistics."""
    model.zero_grad(set_to_none=True)
    loss = step()
    loss.backward()
    return [loss.detach().clone(), *(p.grad.clone() for p in model.parameters()), *(b.clone() for b in model.buffers())]


def same_bits(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def stress(rank):
    """Delays of processes at random and other work on their GPUs change no bit."""
    device = begin(rank)
    torch.backends.cudnn.deterministic = True
    rng, other = random.Random(rank), torch.cuda.Stream()
    matrix = torch.randn(2048, 2048, device=device)
    for guard in GUARDS:
        model = network(device, guard=guard)
        start = copy.deepcopy(model.state_dict())
        parts = list(batches(rank, device, 4))
        expected = [gradients(model, partial(loss_of, model, *part)) for part in parts]

        def delay(*arguments):
            if rng.random() < 0.4:
                torch.cuda._sleep(rng.randrange(3_000_000))
            if rng.random() < 0.3:
                with torch.cuda.stream(other):
                    matrix @ matrix

        for module in model.children():
            module.register_forward_pre_hook(delay)
            module.register_full_backward_pre_hook(delay)
        for repeat in range(25):
            model.load_state_dict(start)
            for part, truth in zip(parts, expected, strict=True):
                assert same_bits(gradients(model, partial(loss_of, model, *part)), truth), (guard, repeat)


def test_delays_change_no_bit(pool):
    pool.run(stress, seconds=300)


def graphs(rank):
    """Captured and replayed many times, and replayed after all kinds of eager passes."""
    device = begin(rank)
    torch.backends.cudnn.deterministic = True
    model = network(device)
    start = copy.deepcopy(model.state_dict())
    parts = list(batches(rank, device, 5))
    expected = [gradients(model, partial(loss_of, model, *part)) for part in parts]
    with told(rank, f"{CAPTURES} captures"):
        for capture in range(CAPTURES):
            model.load_state_dict(start)
            graphed = GraphedStep(model, loss_of)
            for part, truth in zip(parts, expected, strict=True):
                assert same_bits(gradients(model, partial(graphed, *part)), truth), capture
    with told(rank, "500 replays"):
        for repeat in range(100):
            model.load_state_dict(start)
            for part, truth in zip(parts, expected, strict=True):
                assert same_bits(gradients(model, partial(graphed, *part)), truth), repeat
            smaller = [part[: 1 + repeat % 3] for part in parts[0]]
            gradients(model, partial(loss_of, model, *smaller))
            for part in parts[: repeat % 3]:  # no backward, and a replay next
                loss_of(model, *part)


def test_captures_and_replays(pool):
    pool.run(graphs, seconds=300)


def out_of_turn(rank):
    """Passes without a backward, two forward passes before one, and a graph gone through twice."""
    device = begin(rank)
    torch.backends.cudnn.deterministic = True
    found = {}
    parts = list(batches(rank, device, 4))
    for exchange in ("auto", "gather"):
        if exchange == "gather":
            two_pass.gather_samples = gather
        model = network(device, exchange=exchange)
        with torch.no_grad():
            for part in parts[:3]:
                loss_of(model, *part)
        first, second = (loss_of(model, *part) for part in parts[:2])
        second.backward(retain_graph=True)
        second.backward()
        first.backward()
        loss_of(model, *parts[2])
        loss_of(model, *parts[3]).backward()
        found[exchange] = [*(p.grad for p in model.parameters()), *model.buffers()]
    for ours, theirs in zip(found["auto"], found["gather"], strict=True):
        assert distance(ours, theirs) <= 2e-2, distance(ours, theirs)


gather = two_pass.gather_samples


def test_passes_out_of_turn(pool):
    pool.run(out_of_turn, seconds=200)


def learn(rank, compiled):
    """Thirty steps of a network with data-parallel gradients, by either exchange and as of one process."""
    device = begin(rank)
    curves, ends = {}, {}
    torch._dynamo.config.optimize_ddp = False

    def steps(name, exchange, several):
        two_pass.gather_samples = refused if exchange == "auto" else gather
        torch.manual_seed(0)
        arguments = {"exchange": exchange, "statistics": "global" if several else "local"}
        if compiled:
            model = network(device, **arguments)  # of few layers, as every one of them takes its time
        else:
            model = models.resnet18(partial(OnlineNorm2d, **arguments), num_classes=10)
            model.to(device, memory_format=torch.channels_last)
        forward = torch.compile(model, dynamic=False) if compiled and exchange == "auto" else model
        wrapped = DistributedDataParallel(forward, [device], broadcast_buffers=False) if several else forward
        sgd = torch.optim.SGD(model.parameters(), 0.002, momentum=0.9)
        curve = []
        for step in range(30):
            generator = torch.Generator().manual_seed(step)
            x, target = torch.randn((32, 3, 64, 64), generator=generator), torch.arange(32) % 10
            if several:
                x, target = x[rank :: dist.get_world_size()], target[rank :: dist.get_world_size()]
            x = x.to(device).contiguous(memory_format=torch.channels_last)
            sgd.zero_grad()
            loss = loss_of(wrapped, x, target.to(device))
            loss.backward()
            sgd.step()
            curve.append(loss.detach())
        curves[name] = torch.stack(curve)
        ends[name] = torch.cat([b.flatten() for b in model.buffers() if b.numel() > 1])

    refused = two_pass.gather_samples
    for name, exchange, several in (("one", "gather", False), ("auto", "auto", True), ("gather", "gather", True)):
        with told(rank, f"thirty steps, {name}"), contextlib.nullcontext() if several else Alone():
            steps(name, exchange, several)
    for name in ("auto", "gather"):
        dist.all_reduce(curves[name])
        curves[name] /= dist.get_world_size()
    return {name: float((curve - curves["one"]).abs().max()) for name, curve in curves.items()} | {
        f"statistics {name}": distance(end, ends["one"]) for name, end in ends.items()
    }


@pytest.mark.parametrize("compiled", [False, True])
def test_thirty_steps_equal_one_process(pool, compiled):
    found = pool.run(learn, compiled, seconds=400)[0]
    print(found)
    assert found["auto"] <= max(2 * found["gather"], 0.02)
    assert found["statistics auto"] <= max(2 * found["statistics gather"], 0.02)


def late(rank):
    """The second process stops taking part; the others are told of it and do not wait for ever."""
    device = begin(rank, seconds=8)
    graphed = GraphedStep(network(device), loss_of)  # in which nothing but kernels waits
    parts = list(batches(rank, device, 2))
    graphed(*parts[0]).backward()
    torch.cuda.synchronize()
    if rank == 1:
        time.sleep(14)  # not by the store, which goes with the first that is told
        return None
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        graphed(*parts[1]).backward()
        torch.cuda.synchronize()
    return late_rank(), time.monotonic() - start


@pytest.mark.gpu
@pytest.mark.parametrize("processes", gpu_counts(hopper=True))
def test_a_process_that_stays_away_is_named_in_time(processes):
    pool = process_groups.Pool(processes)
    first, absent, *others = pool.run(late, seconds=100)
    pool.kill()  # at once: they can no longer part in order
    assert absent is None
    for waited_for, seconds in (first, *others):
        assert waited_for == 1 and seconds < 15
