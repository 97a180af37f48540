"""Each optimization of a GPU's steps is turned off by its name, and on again by the next run of the process."""

from types import SimpleNamespace
from typing import get_args

import pytest
import torch

pytest.importorskip("triton")

from onlinenorm import OnlineNorm2d, models
from onlinenorm.ops.fused import inductor_pass, memset_nodes, nvrtc, single_read
from onlinenorm.training import trainer
from onlinenorm.training.cuda_graph import CastWeights
from onlinenorm.training.epoch_log import EpochLog
from onlinenorm.training.interruption import StopSignals
from onlinenorm.training.optimizations import Optimization, disable

ALL = set(get_args(Optimization))


@pytest.fixture(autouse=True)
def all_on_again():
    yield
    disable(())


@pytest.fixture
def in_use(monkeypatch):
    """Those that what is compiled, captured and launched now has."""
    found = set()
    launch = {"cuModuleLoadData": lambda *_: 0, "cuModuleGetFunction": lambda *_: 0, "cuGraphAddDependencies_v2": None}

    def launched(config, *_):
        found.update({"programmatic_launch"} if config._obj.attributes[0].value else ())
        return 0

    driver = SimpleNamespace(**launch, cuLaunchKernelEx=launched)
    monkeypatch.setattr(nvrtc, "_driver", lambda: driver)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: found.add("memset_kernels"))
    monkeypatch.setattr(inductor_pass, "_is_plain_add", lambda node: found.add("fold_gradients"))
    network = models.cifar_resnet8(OnlineNorm2d)

    def look():
        found.clear()
        nvrtc.Kernel(b"", "kernel").launch(1, 32, 0, 0, single_read.Params(), cooperative=False)
        memset_nodes.as_kernels(SimpleNamespace())
        graph = torch.fx.Graph()
        grad, operator = graph.placeholder("grad"), torch.ops.onlinenorm.fused_backward.default
        graph.call_function(torch.add, (operator,), {"grad": grad})
        inductor_pass.FoldGradients()(graph)
        with torch.autocast("cpu", torch.bfloat16):
            copies = CastWeights(network, dict(network.named_parameters()), "cpu").copies
        return found | ({"cast_weights"} if copies else set())

    return look


def test_a_run_goes_without_what_it_names_and_the_next_has_it_again(in_use, monkeypatch, tmp_path):
    monkeypatch.setattr(trainer.pl, "Trainer", lambda **_: SimpleNamespace(_signal_connector=SimpleNamespace()))
    parts = 1, tmp_path, EpochLog(tmp_path / "metrics.csv"), StopSignals(), []
    assert in_use() == ALL
    for names in (*((name,) for name in sorted(ALL)), tuple(ALL), ()):
        trainer.build_trainer(*parts, accelerator="gpu", disabled_optimizations=names)
        assert in_use() == ALL - set(names)


def test_what_was_compiled_with_the_pass_is_not_taken_from_the_cache_without_it():
    with_it = inductor_pass.FoldGradients().uuid()
    disable(["fold_gradients"])
    assert inductor_pass.FoldGradients().uuid() != with_it
