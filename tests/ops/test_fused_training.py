"""A network trained with fused kernels learns as with PyTorch's operators."""

from collections import Counter
from functools import partial
from statistics import fmean

import pytest
import torch
import torch.nn.functional as F
from led_training import Program, ratios, train
from torch import nn

from onlinenorm import OnlineNorm2d, models
from onlinenorm.models.blocks import Bottleneck, NormSite, init_convolutions, plug_in
from onlinenorm.models.imagenet import ImageNetResNet
from onlinenorm.models.stem import StemConv2d
from onlinenorm.training.cuda_graph import GraphedStep


def losses(backend, model, device, steps, batch, size, rate=1e-3, dtype=torch.float32, **arguments):
    """Loss of each step of SGD on fixed synthetic classes; further arguments are the network's."""
    torch.manual_seed(0)
    network = getattr(models, model)(partial(OnlineNorm2d, backend=backend), num_classes=10, **arguments)
    network = network.to(device, dtype, memory_format=torch.channels_last).train()
    sgd = torch.optim.SGD(network.parameters(), rate, 0.9)
    generator, found = torch.Generator().manual_seed(1), []
    patterns = torch.randn((10, 3, size, size), generator=generator)
    for _ in range(steps):
        target = torch.randint(10, (batch,), generator=generator)
        x = patterns[target] + torch.randn((batch, 3, size, size), generator=generator)
        loss = F.cross_entropy(network(x.to(device, dtype, memory_format=torch.channels_last)), target.to(device))
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        found.append(loss.item())
    return found


def distance(found, truth):
    return abs(found - truth) / max(abs(truth), 0.1)


def test_the_sample_loop_and_torch_draw_the_same_curve():
    ours, theirs = (losses(backend, "resnet18", torch.device("cpu"), 10, 4, 32) for backend in ("reference", "torch"))
    assert fmean(theirs[-5:]) < fmean(theirs[:5]), "nothing learned, so nothing compared"
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert distance(mine, other) <= 1e-3, f"step {step}: {mine} and {other}"


def exactly(monkeypatch):
    """Float32 without TF32, by the same algorithms on every run."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.gpu
def test_resnet50_draws_the_same_curve_for_200_steps(monkeypatch):
    """Within 1e-3 at every step, while the loss begins to fall.

    The last gammas of the blocks start at 0 and the rate is low: otherwise steps amplify rounding, see the next test.
    """
    pytest.importorskip("triton")
    exactly(monkeypatch)
    run = partial(losses, model="resnet50", device=torch.device("cuda"), steps=200, batch=16, size=64, rate=7e-5)
    ours, theirs = (run(backend, zero_init_last_gamma=True) for backend in ("fused", "torch"))
    assert fmean(theirs[-5:]) < 0.99 * fmean(theirs[:5]), "nothing learned, so nothing compared"
    print(f"fused and PyTorch's float32 apart by {max(map(distance, ours, theirs)):.1e}")
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert distance(mine, other) <= 1e-3, f"step {step}: {mine} and {other}"


@pytest.mark.gpu
def test_resnet50_learns_the_same_in_200_steps(monkeypatch):
    """Within 1e-3 for 20 steps, and never farther from float64 than thrice what PyTorch's own float32 has been, + 1e-3.

    Training from scratch amplifies rounding: PyTorch's backend in float32 leaves its own float64 curve by over 1e-3
    within 50 steps, at any learning rate that learns, so that no two programs can agree over 200.
    """
    pytest.importorskip("triton")
    exactly(monkeypatch)
    run = partial(losses, model="resnet50", device=torch.device("cuda"), steps=200, batch=16, size=64, rate=1e-5)
    ours, theirs, exact = run("fused"), run("torch"), run("torch", dtype=torch.float64)
    assert fmean(exact[-5:]) < fmean(exact[:5]), "nothing learned, so nothing compared"
    rounding = 0.0
    for step, (mine, other, truth) in enumerate(zip(ours, theirs, exact, strict=True)):
        rounding = max(rounding, distance(other, truth))
        allowed = 1e-3 + 3 * rounding * (step >= 20)
        assert distance(mine, truth) <= allowed, f"step {step}: {mine}, PyTorch {other}, float64 {truth}"
    print(f"fused and PyTorch's float32 apart by {max(map(distance, ours, theirs)):.1e}, rounding {rounding:.1e}")


def with_norms(model, **constants):
    """``model`` with OnlineNorm at its sites, gammas of both signs."""
    generator = torch.Generator().manual_seed(2)
    plug_in(model, partial(OnlineNorm2d, **constants))
    for norm in model.modules():
        if isinstance(norm, OnlineNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(norm.bias, std=0.2, generator=generator)
            norm.weight.detach()[::7] *= -1
    return model.train()


def classes(steps, batch, size, seed=3):
    """Batches of ten patterns under noise."""
    patterns = torch.randn((10, 3, size, size), generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        labels = torch.randint(10, (batch,), generator=generator)
        yield patterns[labels] + torch.randn((batch, 3, size, size), generator=generator), labels


def scaled_loss(network, images, labels, scale=1.0):
    return scale * F.cross_entropy(network(images), labels)


def program(network, scale=1.0, **options):
    return Program(network, partial(scaled_loss, network, scale=scale), **options)


class Rounded(torch.autograd.Function):
    """To float16 and back, each way."""

    @staticmethod
    def forward(ctx, x):
        return x.half().float()

    @staticmethod
    def backward(ctx, grad):
        return grad.half().float()


class Scaled(torch.autograd.Function):
    """x, and its gradient times a number."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.factor * grad, None


def small(rounds=True, gamma=1.0, factor=1.0):
    """Pool and bottlenecks, rounding to 16 bits; what a shortcut gives, or a block's gradient, times a number."""

    def bottleneck(channels, width, stride=1):
        shortcut = None
        if channels != 4 * width:
            shortcut = nn.Sequential(nn.Conv2d(channels, 4 * width, 1, stride, bias=False), NormSite(4 * width))
        return Bottleneck(channels, width, stride, shortcut, norm_layer=NormSite)

    torch.manual_seed(0)
    stem = nn.Conv2d(3, 16, 3, padding=1, bias=False), NormSite(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    model = nn.Sequential(*stem, bottleneck(16, 8), bottleneck(32, 8), bottleneck(32, 16, 2), *head)
    init_convolutions(model)
    with_norms(model, backend="torch")
    for module in model.modules() if rounds else ():
        if isinstance(module, (nn.Conv2d, OnlineNorm2d)):
            module.register_forward_hook(lambda module, inputs, out: Rounded.apply(out))
    model[6].downsample.register_forward_hook(lambda module, inputs, out: gamma * out)
    model[6].register_forward_pre_hook(lambda module, inputs: Scaled.apply(inputs[0], factor))
    return model


def test_a_percent_of_one_gradient_or_gamma_is_told_from_rounding():
    exact, up = program(small(rounds=False)), {"rounding": 2.0**-11}
    controls = [program(small()), *(program(small(), **up, seed=seed) for seed in (1, 2))]
    same, gamma, gradient = (program(small(**off), **up, seed=3) for off in ({}, {"gamma": 1.01}, {"factor": 0.99}))
    train([*controls, same, gamma, gradient], classes(150, 16, 16), 1e-2, exact)
    assert fmean(exact.losses[-20:]) < 0.9 * fmean(exact.losses[:20]), "nothing learned, so nothing compared"
    farthest = [max(ratios(each, controls, exact).values()) for each in (same, gamma, gradient)]
    print(f"rounding alone {farthest[0]:.2f}, a gamma off by 1 % {farthest[1]:.2f}, a gradient {farthest[2]:.2f}")
    assert farthest[0] <= 1 < min(farthest[1:])


def bottlenecks(stem, **constants):
    """ResNet-50's stem and blocks, six of its sixteen: shortcuts of both strides, and blocks without one."""
    torch.manual_seed(0)
    model = ImageNetResNet(Bottleneck, [2, 1, 1, 2], num_classes=10, norm_layer=NormSite)
    model.conv1 = StemConv2d(3, 64, stem)
    init_convolutions(model)
    for block in model.modules():
        if isinstance(block, Bottleneck):
            block.fuse_shortcut = True
    return with_norms(model, **constants)


def test_every_fusion_is_in_the_graphs_of_compiled_bottlenecks(monkeypatch):
    """Traced as for a Hopper GPU, not run."""
    fused = pytest.importorskip("onlinenorm.ops.fused")
    if not fused.INTERPRETED:
        pytest.skip("Triton was imported without TRITON_INTERPRET=1")
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    from onlinenorm.ops.fused import inductor_pass, single_read

    found = Counter()

    def traced(module, _):
        inductor_pass.FoldGradients()(module.graph)
        for node in module.graph.nodes:
            operator = str(node.args[0]) if node.op == "call_function" and node.args else ""
            if operator.startswith("onlinenorm."):
                skips = " of two gradients" * (node.kwargs.get("skip_grad") is not None)
                spreads = " of one for all pixels" * (
                    "grad" in node.kwargs and node.kwargs["grad"].meta["val"].shape[2] == 1
                )
                found[operator.split(".")[1] + skips + spreads] += 1
        (out,) = (node for node in module.graph.nodes if node.op == "output")
        values = [node.meta["val"] if isinstance(node, torch.fx.Node) else node for node in out.args[0]]

        def zeros(*_):
            return [
                torch.empty_strided(v.shape, v.stride(), dtype=v.dtype).zero_() if torch.is_tensor(v) else v
                for v in values
            ]

        return make_boxed_func(zeros)

    monkeypatch.setattr(single_read, "supports", lambda *arguments, **named: True)
    torch._dynamo.reset()
    network = bottlenecks("auto", backend="fused").to(memory_format=torch.channels_last)
    network.compile(dynamic=False, backend=aot_autograd(fw_compiler=traced, bw_compiler=traced))
    images, labels = next(classes(1, 32, 112))
    with torch.autocast("cpu", torch.bfloat16):
        scaled_loss(network, images.to(memory_format=torch.channels_last), labels).backward()
    assert found == {
        "fused_max_pool_forward": 1,
        "fused_forward": 14,
        "fused_shortcut_forward": 4,
        "fused_max_pool_backward of two gradients": 1,
        "fused_shortcut_backward of two gradients": 4,
        "fused_backward": 12,
        "fused_backward of two gradients": 1,
        "fused_backward of one for all pixels": 1,
    }


def recorded_launches(monkeypatch):
    """Counts of single-read kernels by direction and what else they do, and of gradients that one of them spreads."""
    from onlinenorm.ops.fused import operators, single_read

    launches = Counter()

    def launch(direction, inputs, flags, *rest, own=single_read._launch, **tensors):
        launches[direction] += 1
        launches.update({(direction, flag) for flag in flags} | {(direction, *sorted(flags))})
        own(direction, inputs, flags, *rest, **tensors)

    def spread(value, x, own=operators.spread):
        launches["spread"] += 1
        return own(value, x)

    monkeypatch.setattr(single_read, "_launch", launch)
    monkeypatch.setattr(operators, "spread", spread)
    return launches


def all_fusions(guard, dtype, scale, batch, launches):
    """The network as train.py runs it, compiled, its step captured, after a pass that shows that every fusion ran."""
    torch._dynamo.reset()
    network = bottlenecks("auto", backend="fused", error_compensation=guard)
    network.cuda().to(memory_format=torch.channels_last).compile(dynamic=False)
    step = GraphedStep(network, partial(scaled_loss, scale=scale))
    fused = Program(network, step, dtype)
    fused.pass_over(batch)
    passes = launches["forward", "POOL"]
    assert passes > 0 and launches["forward"] == 19 * passes, "a kernel that reads once at each site"
    assert launches["forward", "SHORTCUT"] == 4 * passes and launches["spread"] == passes
    assert launches["backward", "POOL", "RELU", "SKIP_GRAD"] == passes
    assert launches["backward", "RELU", "RESIDUAL", "SHORTCUT", "SKIP_GRAD"] >= passes
    assert launches["backward", "RELU", "RESIDUAL", "SKIP_GRAD"] >= passes
    layers = [module for module in network.modules() if type(module) in (nn.Conv2d, nn.Linear)]
    assert len(step._cast.copies) == len(layers) + 1, "weights, and the classifier's bias, are cast together"
    images = batch[0].to(memory_format=torch.channels_last)
    with torch.autocast("cuda", dtype):
        assert network.conv1._rearranges(images.cuda()) and network.conv1._pairs_columns(images.cuda())
    return fused


@pytest.mark.gpu
@pytest.mark.parametrize("guard, dtype", [("clamp", torch.bfloat16), ("layer_scaling", torch.float16)])
def test_every_fusion_at_once_learns_as_none_in_200_steps(guard, dtype, monkeypatch):
    """In 16 bits, compiled and captured: no farther from float32 than the same network without fusions is.

    First at the weights of the float32 run, where what is off in one gradient adds up and rounding does not, then each
    by itself. Where equal values of a pool's window take turns is below this: rounding makes and breaks ties.
    """
    pytest.importorskip("triton")
    exactly(monkeypatch)
    scale = 4096.0 if dtype is torch.float16 else 1.0
    batches, rate = partial(classes, 200, 32, 112), 1e-3 / scale
    launches = recorded_launches(monkeypatch)
    fused = all_fusions(guard, dtype, scale, next(batches()), launches)
    of_fused = launches.copy()
    up, last = {"rounding": torch.finfo(dtype).eps / 2}, torch.channels_last

    def unfused(backend, dtype, layout=torch.contiguous_format, **options):
        network = bottlenecks("conv7x7", backend=backend, error_compensation=guard).cuda().to(memory_format=layout)
        return program(network, scale, dtype=dtype, layout=layout, **options)

    # channels first, the norms' kernels read twice
    controls = [unfused("fused", dtype), unfused("fused", dtype, **up), unfused("torch", dtype, last, **up, seed=1)]
    off = unfused("fused", dtype, **up, seed=2)
    off.network.layer2.register_forward_pre_hook(lambda module, inputs: Scaled.apply(inputs[0], 0.99))
    exact = unfused("torch", None, last)
    train([*controls, fused, off], batches(), rate, exact)
    assert fmean(exact.losses[-20:]) < 0.9 * fmean(exact.losses[:20]), "nothing learned, so nothing compared"
    led = [ratios(each, controls, exact) for each in (fused, off)]
    train([*controls, fused], batches(), rate)
    alone = ratios(fused, controls, exact)
    farthest = [max(found.values()) for found in (led[0], alone, led[1])]
    print("off by {:.2f} of what rounding explains, alone {:.2f}; a gradient's 1 % {:.2f}".format(*farthest))
    assert launches == of_fused, "a control ran fused kernels"
    for found in (led[0], alone):
        assert {name: value for name, value in found.items() if not value <= 1} == {}
