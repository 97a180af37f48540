"""Training as captured graphs: refused without a GPU, and the same run with one."""

import copy
import subprocess
import sys
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from captured_runs import loss_of, stand_in, train
from tests_training import outcome

from onlinenorm import models
from onlinenorm.data.network_input import NetworkInput
from onlinenorm.errors import ConfigError
from onlinenorm.normalizers import BatchRenorm2d, OnlineNorm2d
from onlinenorm.training.cuda_graph import GraphedStep
from onlinenorm.training.module import ImageClassifier
from onlinenorm.training.precision import ScaledHalf
from onlinenorm.training.recipe import Recipe


def test_without_a_gpu_it_is_refused(run, tmp_path):
    with pytest.raises(ConfigError, match=r"trainer\.cuda_graph: CUDA graphs need an NVIDIA GPU"):
        run(tmp_path, "trainer.cuda_graph=true")


@pytest.fixture
def on_the_cpu(monkeypatch):
    return stand_in(monkeypatch)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's advice on loggers and numbers of workers
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "options, whole",
    [
        ({}, True),
        ({"precision": "bf16-mixed"}, True),
        ({"accumulate_grad_batches": 2}, False),
        ({"gradient_clip_val": 0.5}, False),
        ({"precision": "16-mixed"}, False),
    ],
    ids=str,
)
def test_what_is_captured_makes_the_bits_of_a_run_without(on_the_cpu, options, whole):
    half = options.get("precision") == "16-mixed"

    def run(graph):
        plugins = {"plugins": ScaledHalf("cpu")} if half else options
        return train(graph, **plugins)

    plain, graphed = run(False), run(True)
    assert all(torch.equal(graphed[name], value) for name, value in plain.items())
    # the optimizer's step again where the learning rate has changed, after the second epoch
    assert on_the_cpu == ["forward", "backward", *(["step", "evaluate", "step"] if whole else ["evaluate"])]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "recipe, steps",
    [
        ({"warmup_epochs": 1, "milestones": (2,)}, ["evaluate", "step", "step"]),
        ({"schedule": "cosine"}, ["evaluate"]),
        ({"clamp_raise_epochs": 1}, ["step", "evaluate", "forward", "backward", "step", "evaluate"]),
    ],
    ids=str,
)
def test_what_changes_between_steps_is_followed(on_the_cpu, recipe, steps):
    """A learning rate of every step's own is not captured; one that rests is, and clamps of another value are."""
    plain, graphed = (train(graph, recipe=recipe) for graph in (False, True))
    assert all(torch.equal(graphed[name], value) for name, value in plain.items())
    assert on_the_cpu == ["forward", "backward", *steps]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("augmentation", ["pad_crop", "random_resized_crop", "scale_jitter"])
def test_bytes_go_to_the_graph(on_the_cpu, monkeypatch, augmentation):
    """What is captured makes the network's input itself."""
    dtypes, original = set(), GraphedStep.__call__

    def call(self, images, labels):
        dtypes.add(images.dtype)
        return original(self, images, labels)

    monkeypatch.setattr(GraphedStep, "__call__", call)
    plain, graphed = (train(graph, augmentation) for graph in (False, True))
    assert dtypes == {torch.float32 if augmentation == "scale_jitter" else torch.uint8}
    assert all(torch.equal(graphed[name], value) for name, value in plain.items())


def test_a_batch_of_another_shape_runs_as_it_is(on_the_cpu):
    found = []
    for graphed in (False, True):
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
        optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9)
        step = GraphedStep(network, loss_of, (), optimizer) if graphed else partial(loss_of, network)
        for images in (8, 8, 8, 5, 8):
            loss = step(torch.randn(images, 3, 2, 2), torch.arange(images) % 5)
            if graphed:
                step.backward(loss)
                assert all((p.grad is None) == (images == 8) for p in network.parameters())
                step.step_optimizer()
            else:
                loss.backward()
                optimizer.step()
            optimizer.zero_grad()
        found.append([loss, *network.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_images_stay_uint8_in_a_captured_run_alone(on_the_cpu):
    """Data may be fitted again without a graph, by a network that would take their pixels of 0 to 255."""
    seen = []

    class Looking(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.append((trainer.datamodule, trainer.datamodule.raw_training))

    train(True, callbacks=[Looking()])
    data, raw = seen[-1]
    assert raw and not data.raw_training


def test_a_compiled_network_and_what_makes_its_input_are_one_graph(monkeypatch):
    """Whose first kernel then reads uint8; as where the network is not compiled, with and without autocast."""
    torch.manual_seed(0)
    network = models.resnet18(OnlineNorm2d, num_classes=5).train()
    module, plain = (ImageClassifier(copy.deepcopy(network), Recipe(epochs=1, batch_size=4)) for _ in range(2))
    network_input = NetworkInput((0.5, 0.4, 0.3), (0.2, 0.2, 0.25), 32, 3)
    graphs, compile_network = [], torch.compile

    def backend(graph, inputs):
        graphs.append([each.dtype for each in inputs if each.dim() == 4])
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, **_: compile_network(function, backend=backend))
    module.network.compile(backend=backend)
    for each in (module, plain):
        each._of_raw = each._raw_network(network_input)
    for bits in (32, 32, 16, 16):
        images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
        with torch.autocast("cpu", torch.bfloat16, enabled=bits == 16):
            assert torch.equal(module(images), plain(images))
    assert [dtypes.count(torch.uint8) for dtypes in graphs] == [1, 1] and graphs[0][0] is torch.uint8


ENDING = """
import atexit, contextlib
import torch
from onlinenorm.training import cuda_graph

class Graph:
    def __init__(self, keep_graph):
        self.instantiated = False

    def instantiate(self):
        self.instantiated = True

    def reset(self):
        print("graph" if self.instantiated else "never made")

cuda_graph.find_spec = lambda package: None  # nothing here to look for memsets in
torch.cuda.CUDAGraph, torch.cuda.graph = Graph, lambda graph, **_: contextlib.nullcontext()
kept = [cuda_graph.capture(int, None)]
atexit.register(print, "process group")
kept += [cuda_graph.capture(int, None)]
gone = cuda_graph.capture(int, None)
del gone
raise SystemExit(3)
"""


def test_at_exit_graphs_end_before_process_groups(root):
    """Which would wait for the collectives in them."""
    ended = subprocess.run([sys.executable, "-c", ENDING], cwd=root, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout.split("\n")) == (3, ["graph", "graph", "process group", ""])


@pytest.mark.gpu
@pytest.mark.parametrize("whole", [True, False], ids=["with_the_optimizer", "passes_only"])
@pytest.mark.parametrize("normalizer", ["online_clamp", "online_layer_scaling", "batch", "batch_renorm"])
def test_same_gradients_and_buffers_as_without(normalizer, whole):
    makers = {
        "online_clamp": OnlineNorm2d,
        "online_layer_scaling": lambda c: OnlineNorm2d(c, error_compensation="layer_scaling"),
        "batch": torch.nn.BatchNorm2d,
        "batch_renorm": partial(BatchRenorm2d, warmup_steps=1, r_max_steps=4, d_max_steps=3),
    }
    torch.backends.cudnn.benchmark, before = False, torch.backends.cudnn.benchmark
    found = []
    for graphed in (False, True):
        torch.manual_seed(0)
        network = models.cifar_resnet8(makers[normalizer], in_channels=1).cuda().train()
        optimizer = torch.optim.SGD(network.parameters(), 0.01, 0.9, fused=True)
        run = GraphedStep(network, loss_of, (), optimizer if whole else None) if graphed else partial(loss_of, network)
        for _ in range(5):
            x = torch.randn(16, 1, 28, 28, device="cuda")
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", torch.bfloat16):
                loss = run(x, torch.arange(16, device="cuda") % 10)
            if graphed and whole:
                run.backward(loss)
                run.step_optimizer()
            else:
                loss.backward()
                optimizer.step()
        found.append({**network.state_dict(), "loss": loss.detach()})
    torch.backends.cudnn.benchmark = before
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["trainer.accumulate_grad_batches=2"],
        ["model.compile=true"],
        ["trainer.precision=16-mixed"],
        ["recipe.evaluation=ten_crop"],
        ["recipe.schedule=cosine", "recipe.milestones=[]"],
    ],
)
def test_same_run_as_without(run, tmp_path, overrides):
    shared = ["trainer=gpu", "trainer.precision=32-true", "trainer.deterministic=true", *overrides]
    plain = run(tmp_path / "plain", *shared)
    graphed = run(tmp_path / "graphed", *shared, "trainer.cuda_graph=true")
    assert graphed["last"]["val_loss"] == pytest.approx(plain["last"]["val_loss"], rel=1e-4)
    rows = [outcome(tmp_path / name)[1] for name in ("plain", "graphed")]
    for a, b in zip(*rows, strict=True):
        for key in ("train_loss", "val_loss"):
            assert float(b[key]) == pytest.approx(float(a[key]), rel=1e-4), key


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("normalizer", ["online_clamp", "batch"])
def test_same_bits_as_without(run, tmp_path, normalizer, precision):
    """Of a deterministic run, over a drop of the learning rate."""
    shared = ["trainer=gpu", f"trainer.precision={precision}", "trainer.deterministic=true", f"normalizer={normalizer}"]
    plain, graphed = (
        run(tmp_path / str(graph), *shared, f"trainer.cuda_graph={graph}")["parameters_sha256"]
        for graph in ("false", "true")
    )
    assert graphed == plain


@pytest.mark.gpu
@pytest.mark.parametrize(
    "overrides",
    [
        ["trainer.cuda_graph=false"],
        ["trainer.cuda_graph=true"],
        ["trainer.cuda_graph=true", "trainer.accumulate_grad_batches=2"],
        ["trainer.cuda_graph=true", "trainer.precision=16-mixed"],
        ["trainer.cuda_graph=true", "data.on_device=true"],
    ],
    ids=str,
)
def test_no_step_waits_for_the_device(run, tmp_path, monkeypatch, overrides):
    """Between two batches too, with a look at the loss after each; but for captures, and what ends an epoch."""
    watched = []

    original = ImageClassifier.on_train_batch_start

    def begin(self, batch, batch_idx):
        original(self, batch, batch_idx)
        if self.current_epoch == 1 and batch_idx + 1 < self.trainer.num_training_batches:
            torch.cuda.set_sync_debug_mode("error")

    def end(self, outputs, batch, batch_idx):
        watched.append(torch.cuda.get_sync_debug_mode())
        if batch_idx + 2 >= self.trainer.num_training_batches:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(ImageClassifier, "on_train_batch_start", begin)
    monkeypatch.setattr(ImageClassifier, "on_train_batch_end", end)
    try:
        run(tmp_path, "trainer=gpu", "trainer.log_every_n_steps=1", "recipe.batch_size=8", *overrides)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watched.count(2) >= 7
