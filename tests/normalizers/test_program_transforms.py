"""Programs that look into a layer: each works as with BatchNorm, or says in one sentence what to do."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor

from onlinenorm import OnlineNorm1d, OnlineNorm2d, convert
from onlinenorm.normalizers import BatchRenorm2d, SyncBatchNorm2d

BACKENDS = ("reference", "torch")


def network(**arguments):
    return nn.Sequential(nn.Conv2d(2, 3, 1), OnlineNorm2d(3, **arguments))


def images():
    return torch.randn(4, 2, 3, 3)


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # used by torch.fx.experimental itself
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_fx_takes_layers_as_leaves(training):
    """Node names, outputs, gradients and statistics as with BatchNorm."""
    batch = torchvision.models.resnet18(num_classes=3)
    online = convert(copy.deepcopy(batch)).train(training)
    twin, x = copy.deepcopy(online), torch.randn(2, 3, 32, 32)
    traced = torch.fx.symbolic_trace(online)
    assert [node.name for node in traced.graph.nodes] == [n.name for n in torch.fx.symbolic_trace(batch).graph.nodes]
    extractor = create_feature_extractor(online, {"layer4": "f", "layer1.0.bn1": "g"})
    features = extractor(x)
    assert features["f"].shape == (2, 512, 1, 1) and features["g"].shape == (2, 64, 8, 8)
    features["f"].sum().backward()
    if training:
        assert not torch.equal(extractor.bn1.running_mean, twin.bn1.running_mean)
        online.load_state_dict(twin.state_dict())
    assert torch.equal(traced(x), twin(x))
    if not training:
        from torch.fx.experimental.optimization import fuse

        assert torch.equal(fuse(online)(x), twin(x))


def test_fx_takes_other_layers_of_ours_as_leaves():
    model = convert(timm.create_model("mobilenetv3_small_050")).eval()
    x = torch.randn(2, 3, 32, 32)
    found = timm.models._features_fx.create_feature_extractor(model, ["blocks.2"])(x)
    assert next(iter(found.values())).shape[:2] == (2, 24)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))
    mixed = nn.Sequential(OnlineNorm1d(3), nn.ReLU(), nn.Unflatten(1, (3, 1, 1)), SyncBatchNorm2d(3)).eval()
    assert torch.equal(torch.fx.symbolic_trace(mixed)(torch.ones(2, 3)), mixed(torch.ones(2, 3)))
    with pytest.raises(ValueError, match="call the layer; put it into one"):
        torch.fx.symbolic_trace(OnlineNorm2d(3))


class Doubling(OnlineNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


def test_fx_runs_hooks_and_subclasses_once():
    """As of BatchNorm, whose hooks are no part of the graph either."""
    model, seen = nn.Sequential(nn.Conv2d(2, 3, 1), OnlineNorm2d(3), Doubling(3)).eval(), []
    model[1].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    model[1].register_forward_hook(lambda module, inputs, output: output * 3)
    model[2].register_forward_hook(lambda module, inputs, output: seen.append(float(output.detach().max())))
    for kind in (SyncBatchNorm2d, BatchRenorm2d):
        model.append(kind(3).eval())
        model[-1].register_forward_hook(lambda module, inputs, output: output + 1)
    x = images()
    traced = torch.fx.symbolic_trace(model)
    extractor = create_feature_extractor(model, {"2": "features"})
    assert [node.op for node in traced.graph.nodes] == ["placeholder", *["call_module"] * 5, "output"]
    expected = model(x)
    assert torch.equal(traced(x), expected)
    assert torch.equal(extractor(x)["features"], model[:3](x)) and len(seen) == 4


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = OnlineNorm2d(2)

    def forward(self, x):
        return self.norm(x, residual=x, relu=True)


def test_fx_keeps_residual_and_relu():
    block, x = Block(), images()
    found = torch.fx.symbolic_trace(copy.deepcopy(block))(x)
    assert torch.equal(found, block(x)) and found.min() == 0


def functional(run):
    def call(model, x):
        parameters = dict(model.named_parameters())
        loss = lambda values, x: torch.func.functional_call(model, values, (x,)).square().sum()  # noqa: E731
        return run(loss, parameters, x)

    return call


def dual(model, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


CALLS = {
    "grad": functional(lambda loss, parameters, x: torch.func.grad(loss)(parameters, x)),
    "per-sample gradients": functional(
        lambda loss, p, x: torch.func.vmap(torch.func.grad(loss), (None, 0))(p, x[:, None])
    ),
    "vmap": lambda model, x: torch.func.vmap(model)(x[:, None]),
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (x,)),
    "forward_ad": dual,
    "export": lambda model, x: torch.export.export(model, (x,)).module()(x),
    "trace": torch.jit.trace,
}


# torch's own forward mode compiles with what it deprecates
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms_work_in_eval_and_say_so_in_training(backend, call):
    model, x = network(backend=backend), images()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"^OnlineNorm2d: .*call eval\(\)"):
        CALLS[call](model, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert CALLS[call](model.eval(), x) is not None


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_script_says_what_to_use():
    for training in (True, False):
        with pytest.raises(RuntimeError, match=r"torch.jit.script cannot compile .* torch.export in eval mode"):
            torch.jit.script(network().train(training))


@pytest.mark.parametrize("last", [True, False], ids=["norm last", "norm inside"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_penalties_are_refused_in_training(backend, last):
    model = network(backend=backend)
    model = model if last else nn.Sequential(model, nn.Conv2d(3, 1, 1), nn.Tanh())
    x = images().requires_grad_()
    expected = torch.autograd.grad(copy.deepcopy(model)(x).sum(), x)[0]
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    assert torch.equal(gradient, expected)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated twice.*call eval\(\) on the norms"):
        gradient.square().sum().backward()
    (gradient,) = torch.autograd.grad(model.eval()(x).tanh().sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert model[0].weight.grad.any() if last else model[0][0].weight.grad.any()


def products(model, x):
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(model(x).square().sum(), parameters, create_graph=True)
    return torch.autograd.grad(sum(gradient.sum() for gradient in gradients), parameters, allow_unused=True)


def penalty_of_chosen_parameters(model, x, backward=False):
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    parameters = list(model.parameters())
    if backward:
        return gradient.square().sum().backward(inputs=parameters)
    return torch.autograd.grad(gradient.square().sum(), parameters, allow_unused=True)


SECOND = {
    "Hessian-vector products": products,
    "gradient penalty by grad": penalty_of_chosen_parameters,
    "gradient penalty by backward": lambda model, x: penalty_of_chosen_parameters(model, x, backward=True),
    "Hessian": lambda model, x: torch.autograd.functional.hessian(lambda x: model(x).square().sum(), x[:1]),
    "layer alone": lambda model, x: penalty_of_chosen_parameters(model[0][1], model[0][0](x).detach()),
}


@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_by_chosen_inputs_are_refused_in_training(backend, second):
    model, x = nn.Sequential(network(backend=backend), nn.Conv2d(3, 1, 1)), images()
    with pytest.raises(RuntimeError, match=r"cannot be differentiated twice.*call eval\(\) on the norms"):
        SECOND[second](model, x)
    SECOND[second](model.eval(), x)


def test_first_derivatives_with_a_graph_stay_as_they_are():
    """Also inside checkpointed regions, which give up what they have saved once."""
    model, x = network(backend="torch"), images()
    run = lambda model: checkpoint(model, x, use_reentrant=False)  # noqa: E731
    for call in (lambda model: model(x), run):
        found = []
        for create_graph in (False, True):
            twin = copy.deepcopy(model)
            found.append(torch.autograd.grad(call(twin).square().sum(), twin.parameters(), create_graph=create_graph))
        for once, with_graph in zip(*found, strict=True):
            assert torch.equal(once, with_graph) and with_graph.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_batched_gradients_are_refused_in_training(backend):
    model, x = network(backend=backend), images().requires_grad_()

    def batched():
        y = model(x)
        return torch.autograd.grad(y, x, torch.ones(2, *y.shape), is_grads_batched=True)

    for call in (batched, lambda: torch.autograd.functional.jacobian(model, x, vectorize=True)):
        model.train()
        with pytest.raises(RuntimeError, match=r"^OnlineNorm: in training mode .* vmap.* call eval\(\)"):
            call()
        model.eval()
        call()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_clamp_passes_no_gradient_at_a_tie(backend, training):
    layer = OnlineNorm2d(1, backend=backend, clamp_value=1.0).train(training).double()
    layer.running_var.fill_(1 - layer.eps)
    x = torch.tensor([[[[1.0, 0.5], [-1.0, -2.0]]]], dtype=torch.float64, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.flatten().tolist() == [1.0, 0.5, -1.0, -1.0]
    assert x.grad.flatten().tolist() == [0.0, 1.0, 0.0, 0.0]
