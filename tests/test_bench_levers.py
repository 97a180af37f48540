"""The benchmark of levers: what it times, what it compiles for that, and what it records where time runs out."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("triton")

from onlinenorm import models
from onlinenorm.models.blocks import BasicBlock, NormSite, plug_in
from onlinenorm.models.imagenet import ImageNetResNet
from onlinenorm.models.stem import StemConv2d
from onlinenorm.ops.fused import memset_nodes
from onlinenorm.ops.fused.nvrtc import Kernel
from scripts.bench import common, levers, levers_table, training


class Norm(nn.Module):
    """Takes what OnlineNorm takes, for nothing."""

    fuses_residual = fuses_max_pool = fuses_shortcut = True

    def __init__(self, channels, backend):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x, residual=None, relu=False, max_pool=False, shortcut=None):
        residual = residual if shortcut is None else shortcut(residual)
        out = self.weight * x if residual is None else self.weight * x + residual
        out = F.relu(out) if relu else out
        return F.max_pool2d(out, 3, 2, 1) if max_pool else out


def four_blocks(normalizer, stem):
    model = ImageNetResNet(BasicBlock, [1, 1, 1, 1], norm_layer=NormSite)
    model.conv1 = StemConv2d(3, 64, stem)
    plug_in(model, normalizer)
    return model


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the benchmark on the CPU; gives the record, and of each step measured whether it was compiled anew."""
    torch._dynamo.reset()
    compiled, measured = [], []

    def backend(module, _):
        compiled.append(sum("conv2d" in str(node.target) for node in module.graph.nodes))
        return module.forward

    def measure(row, repeats, own=training.Row.measure):
        before = len(compiled)
        own(row, repeats)
        measured.append((row.key["batch"], len(compiled) - before, row.network.casts_at_once, Kernel.starts_early))

    monkeypatch.setitem(training.NORMALIZERS, "online_clamp", Norm)
    monkeypatch.setitem(training.COMPILERS, "default", {"backend": backend})
    monkeypatch.setattr(models, "four_blocks", four_blocks, raising=False)
    monkeypatch.setattr(training, "IMAGENET", ("four_blocks",))
    monkeypatch.setattr(training.Row, "measure", measure)
    monkeypatch.setattr(common, "captured", lambda step: step)
    monkeypatch.setattr(Kernel, "starts_early", Kernel.starts_early)
    monkeypatch.setattr(memset_nodes, "MOST_BYTES", memset_nodes.MOST_BYTES)

    def run(options):
        path = tmp_path / "levers.json"
        small = "--model four_blocks --size 32 --repeats 1 --device cpu --output"
        levers.main([*options.split(), *small.split(), str(path)])
        return json.loads(path.read_text()), measured, path.with_suffix(".md").read_text()

    return run


def test_all_but_one_are_timed_and_only_what_is_compiled_otherwise_is_compiled(run):
    results, measured, page = run("--leave-one-out --batch 2 1 --rounds 2")
    names = ["early", "memsets", "casts", "stem", "blocks", "shortcut", "max_pool", "all"]
    assert [(row["lever"], row["batch"]) for row in results["rows"]] == [(n, b) for n in names for b in (2, 1)]
    assert results["not_run"] == [] and "Not run" not in page and page.count("| 2 |") == len(names)
    everything = {row["with"] for row in results["rows"] if row["batch"] == 2}
    assert len(everything) == 1, "every lever is held against the same step"
    # all, without early, without memsets, without casts, ..., none; twice
    anew = [count for batch, count, *_ in measured if batch == 2]
    assert anew == [1, 0, 0, 1, 1, 1, 1, 1, 1] + [0] * 9
    assert [early for batch, *_, early in measured if batch == 2] == [True, False, *[True] * 6, False] * 2
    assert [casts for batch, _, casts, _ in measured if batch == 2] == [*[True] * 3, False, *[True] * 4, False] * 2


def test_a_lever_is_timed_on_top_of_a_base(run):
    results, measured, page = run("--batch 1 --rounds 1 --lever stem casts --base blocks max_pool")
    assert [row["lever"] for row in results["rows"]] == ["casts", "stem", "all"]
    assert len({row["without"] for row in results["rows"]}) == 1
    assert [count for _, count, *_ in measured] == [1, 1, 1, 1]  # the base, with casts, with the stem, with both
    assert results["rows"][-1]["predicted"] is None and "off alone" not in page


def test_what_time_does_not_suffice_for_is_not_run_and_rows_begun_go_on(run, monkeypatch):
    clock = itertools.chain([0.0] * 10, itertools.repeat(100.0))  # one of the whole, three a row
    monkeypatch.setattr(levers, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    results, measured, page = run("--leave-one-out --batch 1 --rounds 3 --seconds 60")
    done = [row["lever"] for row in results["rows"]]
    assert done == ["early", "memsets"]
    assert [row["lever"] for row in results["not_run"]] == ["casts", "stem", "blocks", "shortcut", "max_pool", "all"]
    assert len(measured) == 3 * 3 and "Not run, for want of time: casts at batch 1, " in page


@pytest.mark.parametrize("options", ["--lever stem --base max_pool", "--lever stem --base stem blocks"])
def test_levers_that_change_nothing_are_refused(run, options, capsys):
    with pytest.raises(SystemExit):
        run(options)
    assert "--base" in capsys.readouterr().err.splitlines()[-1]


def test_each_lever_has_words_and_a_prediction():
    assert levers.SWITCHES.keys() == levers.PREDICTED.keys() == levers.WHAT.keys() - {"all"}
    taken = {entry[0] for entry in levers_table.TAKEN}
    assert {levers.WHAT["max_pool"], levers.WHAT["shortcut"], levers.WHAT["early"]} <= taken
