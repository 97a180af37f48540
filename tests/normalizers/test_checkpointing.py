"""Activation checkpointing: statistics and gradients are those of the same network without it."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from onlinenorm import OnlineNorm2d
from onlinenorm.normalizers import recompute

BACKENDS = ("reference", "torch")


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_checkpointing_counts_a_batch_once(backend, reentrant):
    plain = nn.Sequential(nn.Conv2d(2, 3, 1), OnlineNorm2d(3, backend=backend), nn.ReLU(), OnlineNorm2d(3)).double()
    recomputed = copy.deepcopy(plain)
    for _ in range(3):
        x = torch.randn(4, 2, 3, 3, dtype=torch.float64)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        plain(a).square().sum().backward()
        checkpoint(recomputed, b, use_reentrant=reentrant).square().sum().backward()
        torch.testing.assert_close(a.grad, b.grad)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(recomputed.state_dict()[name], value, msg=name)
    torch.testing.assert_close(recomputed[0].weight.grad, plain[0].weight.grad)
    del a, b
    gc.collect()
    assert not len(recompute._regions), "statistics outlive the graphs they were kept for"


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointed_regions_repeat_their_own_passes(backend):
    """Two views before one backward, a layer twice in a region, and a graph kept for a second backward."""
    shared = OnlineNorm2d(3, backend=backend, alpha_fwd=0.9)
    plain = nn.Sequential(nn.Conv2d(3, 3, 1), shared, nn.Tanh(), nn.Conv2d(3, 3, 1), shared).double()
    recomputed = copy.deepcopy(plain)
    views = torch.randn(2, 4, 3, 3, 3, dtype=torch.float64).unbind()
    found = []
    for network, run in ((plain, plain), (recomputed, lambda x: checkpoint(recomputed, x, use_reentrant=False))):
        inputs = [view.clone().requires_grad_() for view in views]
        abandoned = run(views[0].clone().requires_grad_())
        del abandoned
        loss = sum((run(x) - 1).square().sum() for x in inputs)
        loss.backward(retain_graph=True)
        loss.backward()
        found.append([x.grad for x in inputs] + [p.grad for p in network.parameters()] + list(network.buffers()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def block(norm):
    return nn.Sequential(nn.Conv2d(3, 3, 1), norm, nn.Tanh()).double()


def nested(inner, reentrant):
    """A region in a region, with layers on both levels."""

    def run(network, x):
        return network[2](checkpoint(network[1], network[0](x), use_reentrant=inner))

    return lambda network, x: checkpoint(run, network, x, use_reentrant=reentrant)


def offloaded(network, x):
    with torch.autograd.graph.save_on_cpu():
        return network(x)


WAYS = {
    "nested": nested(False, False),
    "reentrant inside": nested(True, False),
    "reentrant around": nested(False, True),
    "both reentrant": nested(True, True),
    "three levels": lambda network, x: checkpoint(nested(False, False), network, x, use_reentrant=False)(network, x),
    "offloaded in a region": lambda network, x: checkpoint(offloaded, network, x, use_reentrant=False),
    "reentrant": lambda network, x: checkpoint(network, x, use_reentrant=True),
    "not reentrant": lambda network, x: checkpoint(network, x, use_reentrant=False),
}
WAYS["three levels"] = lambda network, x: checkpoint(WAYS["nested"], network, x, use_reentrant=False)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of a region first run inside another
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_checkpointing_equals_none(way):
    """Layers that occur twice in a region, and two passes before one backward."""
    shared, alone = (OnlineNorm2d(3, alpha_fwd=0.9, backend="torch") for _ in range(2))
    plain = nn.Sequential(block(shared), nn.Sequential(block(alone), block(shared)), block(alone))
    recomputed = copy.deepcopy(plain)
    found = []
    for network, run in ((plain, plain), (recomputed, lambda x: WAYS[way](recomputed, x))):
        generator = torch.Generator().manual_seed(2)
        gradients = []
        for _ in range(2):
            views = [torch.randn(4, 3, 3, 3, generator=generator).double().add(1).requires_grad_() for _ in range(2)]
            sum((run(x) - 1).square().sum() * scale for x, scale in zip(views, (1, 3), strict=True)).backward()
            gradients += [x.grad for x in views]
        found.append(gradients + [p.grad for p in network.parameters()] + list(network.buffers()))
    for actual, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_an_evaluation_through_a_region_learns_nothing():
    layer = OnlineNorm2d(3)
    for reentrant in (True, False):
        with torch.no_grad():
            checkpoint(layer, torch.randn(4, 3, 2, 2), use_reentrant=reentrant)
        checkpoint(lambda x: layer.eval()(x), torch.randn(4, 3, 2, 2), use_reentrant=reentrant)
        layer.train()
    assert not layer.running_mean.any()

    def looks_first(x):
        with torch.no_grad():
            layer(x)
        return layer(x)

    once = copy.deepcopy(layer)
    x = torch.randn(4, 3, 2, 2)
    once(x).sum().backward()
    checkpoint(looks_first, x.requires_grad_(), use_reentrant=False).sum().backward()
    assert torch.equal(layer.running_mean, once.running_mean) and torch.equal(layer.control_u, once.control_u)


class OfNamelessArguments(torch.autograd.Function):
    """A checkpoint of one's own, as decorators leave them: no argument is called ctx."""

    @staticmethod
    def forward(*arguments):
        ctx, x, run, *parameters = arguments
        ctx.run, ctx.parameters = run, parameters
        ctx.save_for_backward(x)
        return run(x)

    @staticmethod
    def backward(*arguments):
        ctx, gradient = arguments
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.run(x)
        first, *others = torch.autograd.grad(y, (x, *ctx.parameters), gradient)
        return first, None, *others


class WithSetupContext(torch.autograd.Function):
    @staticmethod
    def forward(x, run, *parameters):
        return run(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.run, *ctx.parameters = inputs
        ctx.save_for_backward(x)

    backward = OfNamelessArguments.backward


def two_passes(run, parameters):
    generator = torch.Generator().manual_seed(2)
    views = [torch.randn(4, 3, 3, 3, generator=generator).double().add(1).requires_grad_() for _ in range(2)]
    sum((run(x) - 1).square().sum() for x in views).backward()
    return [x.grad for x in views] + [p.grad for p in parameters]


def test_functions_of_ones_own_that_repeat_a_pass():
    plain = block(OnlineNorm2d(3, alpha_fwd=0.9, backend="torch"))
    recomputed, refused = copy.deepcopy(plain), copy.deepcopy(plain)
    expected = two_passes(plain, plain.parameters())
    run = lambda x: OfNamelessArguments.apply(x, recomputed, *recomputed.parameters())  # noqa: E731
    torch.testing.assert_close(two_passes(run, recomputed.parameters()), expected)
    torch.testing.assert_close(recomputed.state_dict(), plain.state_dict())
    before = copy.deepcopy(refused.state_dict())
    run = lambda x: WithSetupContext.apply(x, refused, *refused.parameters())  # noqa: E731
    with pytest.raises(RuntimeError, match=r"^OnlineNorm2d: the autograd.Function WithSetupContext .* define forward"):
        two_passes(run, refused.parameters())
    torch.testing.assert_close(refused.state_dict(), before)


def test_a_look_ahead_in_a_reentrant_region_is_told():
    """Its first run is all under no_grad, in which the look cannot be told from the pass that learns."""
    layer = OnlineNorm2d(3)

    def looks_first(x):
        with torch.no_grad():
            ahead = layer(x)
        return layer(x) + ahead

    y = checkpoint(looks_first, torch.randn(4, 3, 2, 2, requires_grad=True), use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"^OnlineNorm2d: .* under torch.no_grad\(\) .* use use_reentrant=False"):
        y.sum().backward()


def test_a_region_of_another_mode_is_told():
    layer = OnlineNorm2d(3).eval()
    y = checkpoint(layer, torch.randn(4, 3, 2, 2, requires_grad=True), use_reentrant=False)
    layer.train()
    with pytest.raises(RuntimeError, match=r"OnlineNorm2d: activation checkpointing repeats .* before train\(\)"):
        y.sum().backward()


HOOKS = torch.autograd.graph.save_on_cpu, lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


@pytest.mark.parametrize("hooks", HOOKS)
def test_hooks_around_a_training_loop_leave_nothing_behind(hooks):
    layer, x = OnlineNorm2d(3), torch.randn(4, 3, 2, 2)
    with hooks():
        for _ in range(3):
            layer(x).sum().backward()
            layer(checkpoint(layer, x.requires_grad_(), use_reentrant=False)).sum().backward()
    gc.collect()
    assert not len(recompute._regions)
    assert not [value for value in vars(layer).values() if isinstance(value, (list, tuple)) and len(value) > 2]


@pytest.mark.parametrize("compiled", ["region", "network"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_code_that_repeats_a_pass_is_refused(backend, compiled):
    """It runs none of the layer's Python, and would start from statistics that have moved."""
    torch._dynamo.reset()
    network = nn.Sequential(nn.Conv2d(3, 3, 1), OnlineNorm2d(3, backend=backend), nn.Tanh()).double()
    plain = copy.deepcopy(network)
    if compiled == "region":
        region = torch.compile(network, backend="aot_eager")
        # the compiler may be the first to look for a GPU, which the states of generators must not notice
        run = lambda x: checkpoint(region, x, use_reentrant=False, preserve_rng_state=False)  # noqa: E731
    else:
        run = torch.compile(lambda x: checkpoint(network, x, use_reentrant=False), backend="aot_eager")
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    y = run(x)
    try:
        y.sum().backward()
    except RuntimeError as error:
        assert "checkpointing under torch.compile repeats a training pass" in str(error)
    else:  # a compiler that keeps what it could repeat, as some versions of torch do
        plain(x).sum().backward()
        for actual, expected in zip(network.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(actual.grad, expected.grad)
        torch.testing.assert_close(network.state_dict(), plain.state_dict())
