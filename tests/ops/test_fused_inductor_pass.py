"""The compile pass over gradients: those of two branches are not added first, nor is one value spread over pixels."""

import copy
import importlib
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

if not torch.cuda.is_available():
    if "triton" not in sys.modules:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton was imported without TRITON_INTERPRET=1", allow_module_level=True)

from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._inductor import config

from onlinenorm import OnlineNorm2d
from onlinenorm.ops.fused import inductor_pass
from onlinenorm.ops.fused.inductor_pass import FoldGradients
from onlinenorm.ops.fused.operators import spread


class TwoBlocks(nn.Module):
    """Two residual additions and a mean over pixels, or their sum, whose gradient is the same for all of them."""

    def __init__(self, pool):
        super().__init__()
        self.pool = pool
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList(OnlineNorm2d(4, backend="fused") for _ in range(2))

    def forward(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x), residual=x, relu=True)
        return self.pool(x, (2, 3))


@pytest.mark.parametrize("pool", [torch.mean, torch.sum])
def test_gradients_reach_the_operator_unadded_and_unspread(pool):
    plain = TwoBlocks(pool).to(memory_format=torch.channels_last)
    model, found = copy.deepcopy(plain), []

    def compile_backward(module, _):
        FoldGradients()(module.graph)
        module.recompile()
        operator = torch.ops.onlinenorm.fused_backward.default
        found.extend(node for node in module.graph.nodes if node.args[:1] == (operator,))
        return make_boxed_func(module.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=lambda module, _: make_boxed_func(module.forward), bw_compiler=compile_backward)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last)
    for run in (plain, compiled):
        run(x).square().sum().backward()

    last, first = found
    assert last.kwargs["skip_grad"] is None and first.kwargs["skip_grad"] is not None
    assert last.kwargs["grad"].meta["val"].shape == (2, 4, 1, 1)
    assert first.kwargs["grad"].meta["val"].is_contiguous(memory_format=torch.channels_last)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("channels, size", [(16, (3, 5)), (8, (1, 1)), (12, (2, 2)), (3, (4, 1)), (16, (0, 2))])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_one_value_is_spread_in_the_order_of_the_input(dtype, channels, size, layout):
    x = torch.empty(2, channels, *size, dtype=dtype).to(memory_format=layout)
    x = x.as_strided(x.shape, [3 if n == 1 else stride for n, stride in zip(x.shape, x.stride(), strict=True)])
    row = torch.randn(channels * 2 + 1, dtype=dtype)
    columns = torch.randn(channels, 2, dtype=dtype).T[..., None, None]
    for value in (row[:-1].view(2, channels, 1, 1), row[1:].view(2, channels, 1, 1), columns):
        found = spread(value, x)
        assert found.numel() == 0 or found.is_contiguous(memory_format=layout)
        assert torch.equal(found, value.expand_as(x))


def test_operators_of_deep_networks_are_known_to_inductor_before_it_meets_them():
    """Met in a deep graph, torch 2.11 would write down all that their arguments are computed from."""
    from torch._inductor.lowering import lowerings

    FoldGradients()(torch.fx.Graph())
    operators = torch.ops.onlinenorm
    pooled = operators.fused_max_pool_forward, operators.fused_max_pool_backward
    shortcut = operators.fused_shortcut_forward, operators.fused_shortcut_backward
    assert all(operator.default in lowerings for operator in (*pooled, *shortcut))


@pytest.fixture
def free_place():
    """Inductor without a custom pass, as in a program that has compiled nothing."""
    torch._dynamo.reset()
    inductor_pass._warn_of_another.cache_clear()
    with config.patch(post_grad_custom_pre_pass=None):
        yield
    inductor_pass._inductor_has_a_place.cache_clear()


def trained(module):
    module(torch.randn(2, 4, 5, 5)).square().sum().backward()


def compiled(module):
    return torch.compile(copy.deepcopy(module), backend="aot_eager", fullgraph=True)


def test_what_compiles_a_layer_on_the_kernels_installs_the_pass_and_says_so_once(free_place, caplog):
    caplog.set_level("INFO", logger="onlinenorm")
    model = TwoBlocks(torch.mean)
    trained(model)
    compiled(model.eval())(torch.randn(2, 4, 5, 5))
    trained(compiled(OnlineNorm2d(4, backend="torch")))
    assert config.post_grad_custom_pre_pass is None and "FoldGradients" not in caplog.text
    for _ in range(2):
        torch._dynamo.reset()
        trained(compiled(model.train()))
    assert isinstance(config.post_grad_custom_pre_pass, FoldGradients)
    assert caplog.text.count("FoldGradients") == 1


def test_a_pass_of_the_programs_own_stays(free_place, caplog):
    class Own(FoldGradients.__base__):
        def __call__(self, graph):
            pass

        def uuid(self):
            return None

    class Both(FoldGradients):
        pass

    for own, warnings in ((Own(), 1), (Both(), 0)):
        caplog.clear()
        torch._dynamo.reset()
        config.post_grad_custom_pre_pass = own
        trained(compiled(TwoBlocks(torch.mean)))
        assert config.post_grad_custom_pre_pass is own
        assert caplog.text.count("is Own already") == warnings
    assert inductor_pass.install()


@pytest.mark.parametrize(
    "module, name", [(module, name) for module, names in inductor_pass.PRIVATE.items() for name in names]
)
def test_what_torch_no_longer_has_is_named_once_and_layers_go_without_the_pass(
    module, name, free_place, monkeypatch, caplog
):
    plain = TwoBlocks(torch.mean)
    x = torch.randn(2, 4, 5, 5)
    monkeypatch.delattr(importlib.import_module(module), name)
    inductor_pass._inductor_has_a_place.cache_clear()
    for _ in range(2):
        torch._dynamo.reset()
        model = torch.compile(copy.deepcopy(plain), backend="eager", fullgraph=True)  # Inductor too uses these names
        torch.testing.assert_close(model(x), copy.deepcopy(plain)(x))
        trained(model)
    assert caplog.text.count(f"has no {module}.{name}, so OnlineNorm's layers are compiled without") == 1
    assert not inductor_pass.install()
    FoldGradients()(torch.fx.Graph())  # as part of a pass of the program's own


def test_layers_are_imported_and_compiled_where_inductor_has_no_such_passes(root):
    program = (
        "import torch; from torch._inductor import compile_fx, custom_graph_pass as own;"
        "del own.CustomGraphPass, own.get_hash_for_files;"
        "from onlinenorm import OnlineNorm2d; layer = OnlineNorm2d(4, backend='fused');"
        "x = torch.randn(2, 4, 3, 3, requires_grad=True);"
        "torch.compile(layer, backend='aot_eager')(x).sum().backward(); assert x.grad is not None"
    )
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count("has no torch._inductor.custom_graph_pass.C") == 1, done.stderr


def test_an_import_leaves_inductor_alone(root):
    program = (
        "import onlinenorm, onlinenorm.ops.fused; onlinenorm.OnlineNorm2d(4, backend='fused');"
        "from torch._inductor import config; assert config.post_grad_custom_pre_pass is None"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ | {"PYTHONPATH": str(root)})
