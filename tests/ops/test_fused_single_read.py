"""Single-read CUDA kernels: the cut into tiles, the run-time compiler, and races on the GPU."""

import copy
import ctypes
import itertools
import random
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

pytest.importorskip("triton")

from onlinenorm import OnlineNorm2d
from onlinenorm.ops.fused import driver, messages, single_read, two_pass
from onlinenorm.ops.spec import NormSpec

TUNINGS = [row[-1] for row in single_read.TUNINGS]


@pytest.mark.parametrize("group", sorted({tuning.group for tuning in TUNINGS}))
def test_tiles_cover_every_row_once_and_fit(group):
    for pixels in range(1, 600):
        for most_rows in (97, 128, 224, 448):
            tiling = single_read.Tiling.of(pixels, group, most_rows)
            assert tiling.tile_rows * tiling.segments <= most_rows
            assert tiling.tile_rows * tiling.segments <= tiling.boxes * tiling.box_rows <= most_rows + tiling.boxes
            assert tiling.box_rows <= single_read.BOX_ROWS
            assert (tiling.tiles - 1) * tiling.tile_rows < pixels <= tiling.tiles * tiling.tile_rows
            assert tiling.tiles == 1 or tiling.tile_rows % 2 == 0
            assert tiling.segments == 1 or tiling.tiles == 1
            assert tiling.items(7) * tiling.segments >= 7 * tiling.tiles


@pytest.mark.parametrize("tuning", TUNINGS, ids=str)
def test_tunings_are_such_as_the_kernels_can_be_cut(tuning):
    assert tuning.group % single_read.WIDTH == 0 and tuning.threads <= 1024
    assert tuning.chunk % (tuning.group // single_read.WIDTH) == 0 and tuning.stages >= 2


@pytest.mark.parametrize("guard", ["CLAMP", "SCALED"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_cuda_compiles_without_a_gpu(direction, guard):
    if torch.version.cuda is None:
        pytest.skip("torch without CUDA carries no NVRTC")
    source = (single_read.SOURCES / "common.cu").read_text() + (single_read.SOURCES / f"{direction}.cu").read_text()
    flags = {"HALF": 1, "RELU": 1, "RESIDUAL": 1, "EXTRA": 1, "CLAMP": 0, "SCALED": 0, **TUNINGS[-1].defines, guard: 1}
    code = driver.compile_source(source, "sm_90", tuple(f"-D{name}={value}" for name, value in flags.items()))
    assert code[:4] == b"\x7fELF" and b"online_norm" in code
    with pytest.raises(RuntimeError, match="NVRTC failed"):
        driver.compile_source("not CUDA", "sm_90", ())


def test_parameters_are_laid_out_as_the_kernels_read_them():
    source = (single_read.SOURCES / "common.cu").read_text()
    body = re.sub(r"//.*", "", source.partition("struct Params {")[2].partition("};")[0])
    declared = [name for line in body.split(";") for name in re.findall(r"(\w+)(?:\[\d+\])?\s*(?:,|$)", line.strip())]
    assert declared == [name for name, *_ in single_read.Params._fields_ if name != "padding"]
    assert ctypes.sizeof(single_read.Params) % 64 == 0


class FakeKernel:
    """Everything around a kernel as on an H100, but for the GPU: notes its launches."""

    launched: ClassVar[list] = []

    def __init__(self, *arguments):
        pass

    def allow_shared_memory(self, size):
        assert size <= H100.shared_memory_per_block_optin

    def blocks_per_multiprocessor(self, threads, shared_memory):
        return 1

    def launch(self, blocks, threads, shared_memory, stream, params, together):
        self.launched.append((blocks, stream, single_read.Params.from_buffer_copy(params), together))


H100 = SimpleNamespace(shared_memory_per_block_optin=232_448, multi_processor_count=132)


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: H100)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(single_read, "_kernel", FakeKernel)
    monkeypatch.setattr(single_read, "tensor_map", lambda address, *cut: address.to_bytes(8, "little") * 16)
    FakeKernel.launched.clear()
    single_read._plan.cache_clear()
    yield
    single_read._plan.cache_clear()
    messages._chunks.clear()


@pytest.mark.parametrize("guard", ["clamp", "layer_scaling"])
@pytest.mark.parametrize("residual", [False, True])
def test_a_launch_passes_every_tensor(residual, guard, without_gpu):
    x, other = (t.contiguous(memory_format=torch.channels_last) for t in torch.randn(2, 5, 64, 30, 30).bfloat16())
    mean, var, weight, bias = torch.rand(4 * 64 + 1)[1:].view(4, 64)
    spec, extra = NormSpec(alpha_fwd=0.75, error_compensation=guard), other if residual else None
    y, tables, mask = single_read.forward(x, extra, weight, bias, mean, var, spec, True)
    ((blocks, stream, params, together),) = FakeKernel.launched
    for name, tensor in {"out": y, "state": tables, "first": mean, "second": var}.items():
        assert getattr(params, name) == tensor.data_ptr(), name
    for name in ("weight", "bias"):  # read 16 bytes at a time, so copied from an odd address
        assert getattr(params, name) % 16 == 0, name
    assert params.mask == (mask.data_ptr() if residual else None) and params.out_residual is None
    assert bytes(params)[:8] == x.data_ptr().to_bytes(8, "little")
    assert bytes(params)[128:136] == (other.data_ptr() if residual else 0).to_bytes(8, "little")
    assert (params.samples, params.channels, params.pixels, stream) == (5, 64, 900, 7)
    assert (params.alpha_fwd, params.rest_fwd) == (0.75, 0.25)
    assert params.tiles > 1 and blocks == params.samples * params.tiles
    scaled = guard == "layer_scaling"
    assert together == scaled and tables.shape == (1, 6 + scaled, 128)
    if scaled:
        assert params.rzeta == tables[0, 6].data_ptr()
    assert params.slots - params.published == 8 * 5 * 64 and params.shares - params.slots == 8 * 5 * 64 * params.tiles
    assert params.tickets - params.shares == 8 * 5 * scaled


def images_on_a_gpu(shape):
    """As far as `suits` looks at them."""
    return SimpleNamespace(
        is_cuda=True, dtype=torch.bfloat16, shape=shape, device=SimpleNamespace(index=0),
        element_size=lambda: 2, is_contiguous=lambda memory_format: True,
    )  # fmt: skip


def test_layer_scaling_is_taken_where_the_chip_holds_whole_samples(without_gpu, monkeypatch):
    """Its tiles wait for one another: fewer stages than tiles would wait for ever."""
    monkeypatch.setattr(single_read, "serves", lambda device: True)
    spec, rng, taken = NormSpec(error_compensation="layer_scaling"), random.Random(0), 0
    for _ in range(2000):
        channels, height, width = 64 * rng.randint(1, 40), rng.randint(1, 120), rng.randint(1, 120)
        shape = (rng.randint(1, 3), channels, height, width)
        monkeypatch.setattr(H100, "multi_processor_count", rng.choice([16, 114, 132]))
        x = images_on_a_gpu(shape)
        if not single_read.suits(x, spec):
            continue
        taken += 1
        for direction, flags in (("forward", ("RELU", "RESIDUAL")), ("backward", ("RELU", "RESIDUAL", "EXTRA"))):
            for tuning in TUNINGS:
                # raises where the stages of the blocks that run at once do not hold a sample
                assert single_read._plan(0, direction, shape, False, flags, spec, tuning).together
    assert 200 < taken < 1800
    monkeypatch.setattr(H100, "multi_processor_count", 132)
    for other in (NormSpec(error_compensation="layer_scaling", layer_scaling_group_size=32), spec):
        x.shape = (2, 64, 8, 8) if other is not spec else (2, 64 * 33, 8, 8)
        assert not single_read.suits(x, other)


def test_a_device_that_is_not_served_is_not_asked_for_its_size(without_gpu, monkeypatch):
    """ROCm's device properties do not have it."""
    monkeypatch.setattr(single_read, "serves", lambda device: False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=304))
    x = images_on_a_gpu((2, 64, 8, 8))
    assert not single_read.suits(x, NormSpec(error_compensation="layer_scaling"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_what_the_chip_holds_is_known_while_tracing(dynamic, without_gpu):
    """Of symbolic sizes too, and without a break in the graph."""
    spec = NormSpec(error_compensation="layer_scaling")
    torch._dynamo.reset()

    def holds(x):
        return x + single_read._scales_at_once(x, spec)

    traced = torch.compile(holds, backend="eager", fullgraph=True, dynamic=dynamic)
    for shape, held in (((2, 64, 56, 56), 1), ((4, 2048, 7, 7), 1), ((2, 64, 300, 300), 0), ((2, 64 * 33, 4, 4), 0)):
        assert traced(torch.zeros(shape)).eq(held).all(), shape


@pytest.mark.parametrize(
    ("capability", "known", "target"),
    [
        ((9, 0), [80, 90, 100], "sm_90"),
        ((10, 3), [90, 100, 120], "sm_100"),  # code of an older minor version runs on a newer one
        ((10, 0), [90, 103], None),
        ((12, 1), [100, 120, 121], "sm_121"),
    ],
)
def test_the_target_is_the_newest_that_device_and_compiler_know(capability, known, target, monkeypatch):
    class Compiler:
        def nvrtcGetNumSupportedArchs(self, count):
            count._obj.value = len(known)

        def nvrtcGetSupportedArchs(self, archs):
            archs[:] = known

    monkeypatch.setattr(driver, "_nvrtc", Compiler)
    assert driver.architecture(*capability) == target


def test_the_compiler_that_comes_with_torch_knows_hopper(monkeypatch):
    if torch.version.cuda is None:
        pytest.skip("torch without CUDA carries no NVRTC")
    assert driver.architecture(9, 0) == "sm_90" and driver.architecture(19, 9) is None

    def missing():
        raise RuntimeError("libnvrtc not found")

    monkeypatch.setattr(driver, "_nvrtc", missing)
    assert driver.architecture(9, 0) is None


def test_no_chunk_of_messages_outlives_a_run_of_inductors_graphs(monkeypatch):
    """Their pool refuses it. Other streams, and large launches, are served as ever."""
    here = torch.device("cpu", 0)
    manager = SimpleNamespace(stream=SimpleNamespace(cuda_stream=7))
    trees = SimpleNamespace(get_manager=lambda index, create_if_none_exists: manager)
    monkeypatch.setitem(sys.modules, "torch._inductor.cudagraph_trees", trees)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(messages, "_chunks", {})
    address, memory = messages.empty(1000, here, 7)
    assert memory.nbytes == 1024 and address == memory.data_ptr() and (memory == -1).all() and not messages._chunks
    addresses = [messages.empty(1000, here, 8)[0] for _ in range(2)]
    assert addresses[1] - addresses[0] == 1024 and list(messages._chunks) == [(0, 8)]
    assert messages.empty(messages.LARGE + 1, here, 8)[1].nbytes > messages.LARGE and list(messages._chunks) == [(0, 8)]


class ThreadWithoutContext:
    """A driver that refuses to work until the calling thread has been given a context."""

    def __init__(self, device):
        self.device, self.current = device, None

    def cuDeviceGet(self, device, index):
        device._obj.value = 40 + index
        return 0

    def cuDevicePrimaryCtxRetain(self, context, device):
        context._obj.value = 1000 + device.value
        return 0

    def cuCtxSetCurrent(self, context):
        self.current = context.value
        return 0

    def cuModuleLoadData(self, module, code):
        return 0 if self.current == 1040 + self.device else 201

    def cuModuleGetFunction(self, function, module, name):
        return 0 if name == b"online_norm" else 500

    def cuGetErrorString(self, status, text):
        text._obj.value = b"named symbol not found"
        return 0


@pytest.mark.parametrize("device", [0, 3])
def test_a_thread_without_a_context_gets_that_of_torchs_device(device, monkeypatch):
    fake = ThreadWithoutContext(device)
    monkeypatch.setattr(driver, "_driver", lambda: fake)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: device)
    driver.Kernel(b"", "online_norm")
    with pytest.raises(RuntimeError, match="error 500 of cuModuleGetFunction: named symbol not found"):
        driver.Kernel(b"", "missing")


@pytest.mark.gpu
def test_a_new_thread_compiles_and_launches():
    """As the autograd engine's do, whose first call of CUDA may be one of these kernels."""
    x = torch.randn(4, 64, 5, 5, device="cuda").bfloat16().contiguous(memory_format=torch.channels_last)
    layer = OnlineNorm2d(64, backend="fused", device="cuda")
    twin = copy.deepcopy(layer)
    expected = twin(x)
    single_read._plan.cache_clear()
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(layer, x).result(), expected)


def one_step(path, tensors, weight, bias, state, residual, relu, extra, spec, **arguments):
    x, r, grad, other = tensors
    mean, var, u, v = (t.clone() for t in state)
    y, tables, kept = path.forward(x, r if residual else None, weight, bias, mean, var, spec, relu)
    both = grad, other if extra else None
    if path is single_read:
        found = path.backward(*both, x, kept, weight, bias, tables, u, v, spec, relu, **arguments)
    else:
        out = y if residual and relu else None
        found = path.backward(*both, x, out, weight, bias, tables, kept, u, v, spec, relu, residual and relu)
    names = "grad_x", "grad_residual", "grad_weight", "grad_bias"
    return {
        "y": y, "states": tables[-1][: len(x)].reshape(len(x), -1), "mean": mean, "var": var, "u": u, "v": v,
        **{name: t for name, t in zip(names, found, strict=True) if t is not None},
    }  # fmt: skip


@pytest.mark.gpu
def test_random_shapes_agree_with_two_passes_while_the_gpu_is_busy():
    """Races: random shapes and variants, each repeated bit for bit, with other work on another stream."""
    device, generator, rng = torch.device("cuda"), torch.Generator("cuda").manual_seed(0), random.Random(0)
    other_work, noise = torch.cuda.Stream(), torch.randn(2048, 2048, device=device)
    variants = list(itertools.product([False, True], [False, True], [False, True], ["clamp", "none", "layer_scaling"]))
    for trial in range(150):
        residual, relu, extra, guard = variants[trial % len(variants)]
        channels, side = 64 * rng.choice([1, 2, 4, 16]), rng.choice([1, 2, 3, 7, 8, 14, 15, 28, 31, 56])
        samples = rng.randint(1, max(1, min(300, 4_000_000 // (channels * side * side))))
        dtype = rng.choice([torch.bfloat16, torch.float16])
        shape = (4, samples, channels, side, side)
        drawn = torch.randn(shape, device=device, generator=generator).to(dtype)
        tensors = [t.contiguous(memory_format=torch.channels_last) for t in (1.5 * drawn[0] - 0.5, *drawn[1:])]
        weight, bias = torch.rand((2, channels), device=device, generator=generator)
        state = [t.contiguous() for t in torch.rand((4, channels), device=device, generator=generator) * 0.1 + 0.05]
        arguments = tensors, weight + 0.5, bias, state, residual, relu, extra, NormSpec(error_compensation=guard)
        with torch.cuda.stream(other_work):
            for _ in range(5):
                noise = torch.mm(noise, noise).tanh_()
        first = one_step(single_read, *arguments)
        for repeat in range(20):
            # In every other, the gradient of the residual takes the memory of that of the output.
            inputs = [tensors[0], tensors[1], tensors[2].clone(), tensors[3]] if repeat % 2 else tensors
            again = one_step(single_read, inputs, *arguments[1:], overwrite=repeat % 2 == 1)
            for name, value in first.items():
                assert torch.equal(again[name], value), (shape, arguments[4:7], name)
        if trial % 5 == 0:  # Triton specialises on sizes: compiling it for all would take minutes
            for name, value in one_step(two_pass, *arguments).items():
                distance = (first[name].double() - value.double()).norm() / value.double().norm().clamp(min=1e-9)
                # Rounding moves a few values across the edge of a mask.
                assert distance < 2e-2, (shape, arguments[4:7], name, distance.item())


def three_backends(channels, **arguments):
    """Equal layers: fused, PyTorch's in the same precision, PyTorch's in float64."""
    fused = OnlineNorm2d(channels, backend="fused", device="cuda", **arguments)
    for value in (fused.weight.data, fused.control_u, fused.control_v):
        value.add_(0.1 * torch.randn_like(value))
    eager, exact = copy.deepcopy(fused), copy.deepcopy(fused).double()
    eager.backend = exact.backend = "torch"
    return fused, eager, exact


def run(layer, x, residual, grad, relu, repeats=3):
    """Outputs, gradients and state of steps on the same input, by name; inputs in the layer's precision."""
    dtype = torch.float64 if layer.running_mean.dtype == torch.float64 else x.dtype
    x, grad = x.detach().to(dtype).requires_grad_(), grad.to(dtype)
    residual = None if residual is None else residual.detach().to(dtype).requires_grad_()
    found = {}
    for step in range(repeats):
        x.grad = None
        y = layer(x, residual=residual, relu=relu)
        y.backward(grad)
        found |= {f"y{step}": y.detach(), f"grad_x{step}": x.grad}
    if residual is not None:
        found["grad_residual"] = residual.grad
    found |= {name: p.grad for name, p in layer.named_parameters()}
    return found | {name: value.clone() for name, value in layer.named_buffers()}


def assert_as_near_as_eager(fused, eager, exact, *inputs):
    ours, theirs, truth = (run(layer, *inputs) for layer in (fused, eager, exact))
    for name, value in truth.items():
        size = value.norm().clamp(min=1e-6)
        mine, allowed = ((found[name].double() - value).norm() / size for found in (ours, theirs))
        # Rounding of inputs moves a few values across the edge of a mask.
        assert mine <= 2 * allowed + 2e-2, (tuple(inputs[0].shape), inputs[-1], name, mine.item(), allowed.item())


@pytest.mark.gpu
def test_thousands_of_random_shapes_against_float64():
    torch.manual_seed(0)
    rng = random.Random(1)
    for _ in range(2000):
        channels, height, width = 64 * rng.choice([1, 1, 2, 3, 4, 8]), rng.randint(1, 60), rng.randint(1, 60)
        samples = rng.randint(1, max(1, min(200, 2_000_000 // (channels * height * width))))
        shape, dtype = (samples, channels, height, width), rng.choice([torch.bfloat16, torch.float16])
        draw = (torch.randn(shape, device="cuda") for _ in range(3))
        x, residual, grad = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in draw)
        guard, alpha = rng.choice(["clamp", "none", "layer_scaling"]), rng.choice([0.9, 0.999, 0.9999])
        layers = three_backends(channels, error_compensation=guard, clamp_value=1.5, alpha_fwd=alpha)
        assert single_read.suits(x, layers[0].spec) or (guard == "layer_scaling" and x[0].nbytes > 2**21)
        assert_as_near_as_eager(*layers, x, residual if rng.random() < 0.5 else None, grad, rng.random() < 0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("guard", ["clamp", "none", "layer_scaling"])
def test_start_up_extremes_large_means_and_constant_channels(guard):
    """mean(y^2) of 10^4 to 10^5 on the first batch, channel means of 1000, new and known, no variance at all."""
    torch.manual_seed(0)
    x, residual, grad = torch.randn((3, 12, 64, 14, 14), device="cuda")
    x[:, 0] *= 300
    x[:, 1] += 1000
    x[:, 2] = 7
    x[:, 3] += 1000
    inputs = [t.bfloat16().contiguous(memory_format=torch.channels_last) for t in (x, residual, grad)]
    layers = three_backends(64, error_compensation=guard)
    for layer in layers:
        layer.running_mean[3] = 1000
    assert_as_near_as_eager(*layers, *inputs, True)


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", [3, 14, 56])
@pytest.mark.parametrize("guard", ["clamp", "layer_scaling"])
def test_bad_values_are_where_the_sample_loops_are(bad, side, guard):
    """What is not finite is so where the sample loop's is, and nowhere else; nothing waits for ever.

    With layer scaling that is a whole sample, and its channel from then on.
    """
    torch.manual_seed(0)
    x, residual, grad = torch.randn((3, 6, 64, side, side), device="cuda").bfloat16()
    x[2, 5, 0, 0] = bad
    inputs = [t.contiguous(memory_format=torch.channels_last) for t in (x, residual, grad)]
    fused, loop, _ = three_backends(64, error_compensation=guard)
    loop.backend = "reference"
    ours, theirs = (run(layer, *inputs, True) for layer in (fused, loop))
    for name, value in theirs.items():
        assert torch.equal(ours[name].isfinite(), value.isfinite()), name


@pytest.mark.gpu
@pytest.mark.parametrize("guard", ["clamp", "layer_scaling"])
def test_messages_survive_capture_beside_eager_launches_and_other_streams(guard):
    """Chunks of messages: a graph replayed between eager steps gives what eager steps alone give, bit for bit."""
    torch.manual_seed(0)
    x, _, grad = torch.randn((3, 40, 256, 14, 14), device="cuda").bfloat16()
    x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    mixed = OnlineNorm2d(256, backend="fused", device="cuda", error_compensation=guard)
    alone = copy.deepcopy(mixed)
    x.requires_grad_()

    def step(layer):
        layer(x, relu=True).backward(grad)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(mixed)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            step(mixed)
    for _ in range(4):
        graph.replay()
        step(mixed)
    for _ in range(1 + 4 * 4):
        step(alone)
    for name, value in alone.named_buffers():
        assert torch.equal(dict(mixed.named_buffers())[name], value), name


@pytest.mark.gpu
def test_launches_that_need_the_whole_gpu_take_turns():
    """Layer scaling on three streams at once, among clamps and other work: all end, and give what they give alone."""
    torch.manual_seed(0)
    noise, streams = torch.randn(2048, 2048, device="cuda"), [torch.cuda.Stream() for _ in range(4)]
    sites = [(32, 64, 56), (32, 256, 28), (32, 1024, 14), (32, 2048, 7)]
    inputs = [torch.randn(shape + shape[-1:], device="cuda").bfloat16() for shape in sites]
    inputs = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
    guards = ("layer_scaling", "layer_scaling", "layer_scaling", "clamp")

    def trained(layers, repeats=5):
        for _ in range(repeats):
            for layer, x in zip(layers, inputs, strict=True):
                layer(x, relu=True).backward(x)

    layers = [
        [OnlineNorm2d(c, backend="fused", device="cuda", error_compensation=g) for _, c, _ in sites] for g in guards
    ]
    alone = copy.deepcopy(layers)
    for column in alone:
        trained(column)
    torch.cuda.synchronize()
    for _ in range(5):
        for stream, column in zip(streams, layers, strict=True):
            with torch.cuda.stream(stream):
                trained(column, repeats=1)
        noise = torch.mm(noise, noise).tanh_()
    torch.cuda.synchronize()
    for column, twins in zip(layers, alone, strict=True):
        for layer, twin in zip(column, twins, strict=True):
            for name, value in twin.state_dict().items():
                assert torch.equal(layer.state_dict()[name], value), name
            assert torch.equal(layer.weight.grad, twin.weight.grad)
