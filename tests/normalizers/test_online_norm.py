"""The modules: precision, layout, copies, modes, compilation and bad input."""

import copy
import logging
import pickle
import warnings

import pytest
import torch
from torch import nn

from onlinenorm import OnlineNorm1d, OnlineNorm2d
from onlinenorm.normalizers import BatchRenorm2d, OnlineNorm
from onlinenorm.normalizers.conversion import OnlineNormNd

BACKENDS = ("reference", "torch")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def state_of(layer):
    return {name: value.clone() for name, value in layer.state_dict().items()}


def assert_state_equal(actual, expected):
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def step(layer, seed=0, **arguments):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, layer.num_features, 4, 4, generator=generator).requires_grad_()
    y = layer(x, **arguments)
    y.backward(torch.randn(y.shape, generator=generator))
    return y.detach(), x.grad


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_has_dtype_and_layout_of_input(dtype, backend, training):
    layer = OnlineNorm2d(4, backend=backend).train(training)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(3, 4, 5, 6).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
        y = layer(x, residual=torch.randn_like(x), relu=True)
        y.sum().backward()
        assert y.dtype == dtype and x.grad.dtype == dtype
        assert y.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_output_is_the_rounded_float32_output(dtype):
    x = torch.randn(5, 4, 3, 3).to(dtype)
    half, full = OnlineNorm2d(4, backend="torch"), OnlineNorm2d(4, backend="torch")
    assert torch.equal(half(x), full(x.float()).to(dtype))
    assert_state_equal(half.state_dict(), full.state_dict())


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.float16)])
def test_parameters_and_state_never_lose_precision(convert):
    layer = OnlineNorm2d(4)
    step(layer)
    before = state_of(layer)
    convert(layer)
    assert_state_equal(layer.state_dict(), before)
    assert all(value.dtype == torch.float32 for value in layer.state_dict().values())
    assert all(value.dtype == torch.float64 for value in layer.double().state_dict().values())
    assert OnlineNorm2d(4, dtype=torch.bfloat16).weight.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), OnlineNorm2d(4, backend=backend))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = network(torch.randn(2, 3, 6, 6))
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert network[1].running_mean.dtype == torch.float32 and network[1].running_mean.abs().sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_eval_moves_nothing_and_has_ordinary_gradients(backend):
    layer = OnlineNorm2d(3, backend=backend, error_compensation="layer_scaling").double()
    layer(torch.randn(4, 3, 2, 2, dtype=torch.float64))
    before = state_of(layer.eval())
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))
    assert_state_equal(layer.state_dict(), before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_grad_in_train_mode_normalises_without_learning(backend):
    layer, twin = OnlineNorm2d(3, backend=backend), OnlineNorm2d(3, backend=backend)
    before = state_of(layer)
    x = torch.randn(4, 3, 2, 2)
    with torch.no_grad():
        y = layer(x)
    assert_state_equal(layer.state_dict(), before)
    assert torch.equal(y, twin(x))
    with torch.no_grad():
        torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    assert_state_equal(layer.state_dict(), before)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_are_independent_and_equal(backend, duplicate):
    layer = OnlineNorm2d(4, backend=backend)
    step(layer)
    twin, before = duplicate(layer), state_of(layer)
    expected = step(twin, seed=1)
    assert_state_equal(layer.state_dict(), before)
    actual = step(layer, seed=1)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
    assert_state_equal(layer.state_dict(), twin.state_dict())


def test_state_is_updated_in_place():
    layer = OnlineNorm2d(4)
    addresses = {name: value.data_ptr() for name, value in layer.state_dict().items()}
    step(layer)
    assert addresses == {name: value.data_ptr() for name, value in layer.state_dict().items()}


def test_state_dict_moves_between_backends():
    source = OnlineNorm2d(4, backend="reference")
    step(source)
    target = OnlineNorm2d(4, backend="torch")
    target.load_state_dict(source.state_dict(), strict=True)
    assert_state_equal(target.state_dict(), source.state_dict())
    assert list(source.state_dict()) == ["weight", "bias", "running_mean", "running_var", "control_u", "control_v"]


@pytest.mark.parametrize("guard", ["clamp", "layer_scaling", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_equals_eager_without_graph_breaks(backend, guard):
    torch._dynamo.reset()
    eager = OnlineNorm2d(4, backend=backend, error_compensation=guard, clamp_value=1.0)
    compiled = copy.deepcopy(eager)
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x, residual, g = torch.randn(3, 6, 4, 5, 5, generator=generator) * 2 + 1
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        expected, actual = eager(a, residual, relu=True), call(b, residual, relu=True)
        expected.backward(g)
        actual.backward(g)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(b.grad, a.grad)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_residual_and_relu(backend):
    fused, plain = OnlineNorm2d(4, backend=backend).double(), OnlineNorm2d(4, backend=backend).double()
    x, r = torch.randn(2, 5, 4, 3, 3, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (x, r, x, r)]
    a = fused(leaves[0], residual=leaves[1], relu=True)
    b = torch.relu(plain(leaves[2]) + leaves[3])
    a.square().sum().backward()
    b.square().sum().backward()
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(leaves[0].grad, leaves[2].grad)
    torch.testing.assert_close(leaves[1].grad, leaves[3].grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_dimensional_layouts_are_special_cases(backend):
    x = torch.randn(6, 3, 5)
    expected = OnlineNorm2d(3, backend=backend)(x[..., None])[..., 0]
    assert torch.equal(OnlineNorm1d(3, backend=backend)(x), expected)
    flat = OnlineNorm1d(3, backend=backend)(x[..., 0])
    assert flat.shape == (6, 3)
    assert torch.equal(flat, OnlineNorm1d(3, backend=backend)(x[..., :1])[..., 0])


def test_layer_scaling_groups_split_the_layer():
    grouped = OnlineNorm2d(6, error_compensation="layer_scaling", layer_scaling_group_size=2)
    x = torch.randn(4, 6, 3, 3)
    alone = [OnlineNorm2d(2, error_compensation="layer_scaling") for _ in range(3)]
    expected = torch.cat([layer(part) for layer, part in zip(alone, x.split(2, 1), strict=True)], 1)
    torch.testing.assert_close(grouped(x), expected)


def test_without_affine_there_are_no_parameters():
    layer = OnlineNorm2d(4, affine=False)
    assert not list(layer.parameters())
    torch.testing.assert_close(step(layer)[0], step(OnlineNorm2d(4))[0])


def test_clamp_limits_the_output():
    layer = OnlineNorm2d(2, clamp_value=0.5)
    assert layer(10 * torch.randn(4, 2, 3, 3)).abs().max() == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_features": 0}, "num_features"),
        ({"alpha_fwd": 1.5}, r"alpha_fwd: 1.5 .* 0 < alpha_fwd < 1"),
        ({"alpha_bkw": -0.1}, "alpha_bkw"),
        ({"eps": 0}, "eps"),
        ({"clamp_value": 0}, "clamp_value"),
        ({"clamp_value": "5"}, "clamp_value"),
        ({"layer_scaling_eps": -1.0}, "layer_scaling_eps"),
        ({"layer_scaling_group_size": 3}, "layer_scaling_group_size: 3 must be .* divides num_features=4"),
        ({"error_compensation": "clmap"}, "error_compensation: .* did you mean clamp"),
        ({"backend": "cuda"}, "backend"),
        ({"statistics": "globl"}, "statistics: .* did you mean global"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        OnlineNorm2d(**{"num_features": 4, **arguments})


@pytest.mark.parametrize(
    ("layer", "x", "message"),
    [
        (OnlineNorm2d(4), torch.zeros(2, 4), r"OnlineNorm2d takes \(N, C, H, W\), got an input of shape \(2, 4\)"),
        (OnlineNorm1d(4), torch.zeros(2, 4, 2, 2), r"OnlineNorm1d takes \(N, C\) or \(N, C, L\)"),
        (OnlineNorm2d(4), torch.zeros(2, 3, 2, 2), "built for 4 channels, got 3"),
        (OnlineNorm2d(4), torch.zeros(2, 4, 2, 2, dtype=torch.uint8), "uint8"),
        (OnlineNorm2d(4), torch.zeros(0, 4, 2, 2), "empty"),
    ],
)
def test_wrong_inputs_are_named(layer, x, message):
    with pytest.raises(ValueError, match=message):
        layer(x)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 9), (2, 4, 3, 3, 3)])
def test_only_images_are_pooled(shape, training):
    layer = OnlineNormNd(4) if len(shape) == 5 else OnlineNorm1d(4)
    with pytest.raises(ValueError, match=r"max_pool: pools images \(N, C, H, W\), got an input of shape \(2, 4"):
        layer.train(training)(torch.zeros(shape), relu=True, max_pool=True)
    assert not layer.running_mean.any()


def test_settings_are_checked_wherever_they_are_set():
    layer = OnlineNorm2d(4)
    for name, value, message in (
        ("error_compensation", "Clamp", "did you mean clamp"),
        ("statistics", "globl", "did you mean global"),
        ("backend", "tourch", "did you mean torch"),
        ("alpha_fwd", 1, "0 < alpha_fwd < 1"),
        ("clamp_value", -1.0, "0 < clamp_value < 65504"),
        ("clamp_value", 1e39, "0 < clamp_value < 65504"),
        ("gradient_scale", 0, "0 < gradient_scale < inf"),
        ("gradient_scale", float("nan"), "0 < gradient_scale < inf"),
        ("gradient_scale", float("inf"), "0 < gradient_scale < inf"),
        ("layer_scaling_group_size", 3, "divides num_features=4"),
        ("layer_scaling_group_size", True, "must be a whole number"),
    ):
        before = getattr(layer, name)
        with pytest.raises(ValueError, match=f"^{name}: .*{message}"):
            setattr(layer, name, value)
        assert getattr(layer, name) == before
    layer.gradient_scale = torch.tensor(0.5)
    assert layer.gradient_scale == 0.5 and isinstance(layer.gradient_scale, float)


@pytest.mark.parametrize("layer", [OnlineNorm2d(3), BatchRenorm2d(3)])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_statistics_put_in_half_precision_are_refused(layer, training):
    layer = copy.deepcopy(layer).train(training)
    for buffer in layer.buffers():  # as FullyShardedDataParallel does with MixedPrecision(buffer_dtype=...)
        buffer.data = buffer.to(torch.bfloat16) if buffer.is_floating_point() else buffer
    with pytest.raises(
        RuntimeError, match=r"Norm2d|Renorm2d: running_mean is in torch.bfloat16, .* without buffer_dty"
    ):
        layer(torch.randn(2, 3, 2, 2))


def test_wrong_residual_is_named():
    with pytest.raises(ValueError, match="residual"):
        OnlineNorm2d(2)(torch.zeros(2, 2, 3, 3), residual=torch.zeros(2, 2, 3, 1))


def test_tensors_on_another_device_are_told():
    layer, x = OnlineNorm2d(3), torch.randn(2, 3, 2, 2)
    with pytest.raises(ValueError, match=r"OnlineNorm2d is on cpu, its input on meta; move one"):
        layer(x.to("meta"))
    with pytest.raises(ValueError, match=r"residual \(2, 3, 2, 2\) on meta, but it must be as the input is"):
        layer(x, residual=x.to("meta"))


def test_backend_is_logged_once(caplog):
    OnlineNorm._announced.clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            step(OnlineNorm2d(2))
    assert [record.message for record in caplog.records] == ["OnlineNorm runs on the torch backend (asked for: auto)"]


def test_repr_names_what_matters():
    assert "error_compensation=clamp, clamp_value=3" in repr(OnlineNorm2d(4, clamp_value=3))
    assert "layer_scaling_group_size=2" in repr(
        OnlineNorm2d(4, error_compensation="layer_scaling", layer_scaling_group_size=2)
    )


def test_import_needs_torch_only():
    """The public names load neither Lightning nor Hydra nor Triton's compiler."""
    import subprocess
    import sys

    code = "import sys, onlinenorm; print([m for m in ('pytorch_lightning', 'hydra', 'triton') if m in sys.modules])"
    with warnings.catch_warnings():
        output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_copies_have_a_mailbox_of_their_own():
    """A number that two layers share would have one's kernels store into the other's memory."""
    layer = OnlineNorm2d(3)
    layers = [layer, copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer)), OnlineNorm2d(512)]
    assert len({each._mailbox for each in layers}) == len(layers) and 0 not in {each._mailbox for each in layers}
