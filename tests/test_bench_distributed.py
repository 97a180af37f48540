"""The table of the benchmark of several processes says what the figures do."""

import argparse
import copy
import json
import sys

import process_groups
import pytest
import torch
import torch.distributed as dist
from captured_runs import stand_in

from onlinenorm.normalizers import SyncBatchNorm2d
from scripts.bench import distributed
from scripts.bench import distributed_table as table
from scripts.bench.distributed_batch_norm import TracedSyncBatchNorm2d
from scripts.bench.distributed_rows import Row, Stage


def row(normalizer, processes, milliseconds, efficiency=1.0):
    return {
        "normalizer": normalizer, "processes": processes, "dtype": "bf16", "mode": "eager", "batch_per_process": 256,
        "milliseconds": milliseconds, "images_per_second": 256e3 * processes / milliseconds, "rounds": 3,
        "repeat_spread": 0.02, "scaling_efficiency": efficiency,
    }  # fmt: skip


RESULTS = {
    "device": "NVIDIA", "torch": "2", "triton": "3", "commit": "abc", "command": "torchrun x", "backend": "nccl",
    "processes": 2, "model": "resnet50", "size": 224,
    "exactness_float32": [
        {"normalizer": "online_global", "steps": 30, "largest_loss_difference": 2e-7, "parameter_difference": 1e-8,
         "statistic_difference": 3e-8, "ranks_identical": True},
    ],
    "rows": [row("batch", 1, 50.0), row("batch", 2, 52.0, 0.9615), row("sync_batch", 2, 60.0, 0.8333),
             row("online_local", 2, 45.0, None), row("online_global", 2, 48.0, 0.9)],
}  # fmt: skip


def test_rates_costs_and_exactness():
    text = table.render(RESULTS)
    for part in (
        "# resnet50, 224 px, nccl: one process against 2",
        "| batch | eager | 1 | 256 | 50.00 ± 1.0% | 5,120 |  |",
        "| batch | eager | 2 | 256 | 52.00 ± 1.0% | 9,846 | 96.2% |",
        "| online_local | eager | 2 | 256 | 45.00 ± 1.0% | 11,378 | not measured |",
        "- eager: sync_batch takes +8.00 ms a step over batch (+15.4%).",
        "- eager: online_global takes +3.00 ms a step over online_local (+6.7%).",
        "- eager: a step with global statistics is faster than SyncBatchNorm's: 1.250 times its rate.",
        "| online_global | 30 | 2.0e-07 | 1.0e-08 | 3.0e-08 | yes |",
        "2 x NVIDIA; torch 2, triton 3, commit abc; `torchrun x`",
    ):
        assert part in text, part


def test_what_is_worse_or_was_not_measured_is_said():
    worse = copy.deepcopy(RESULTS)
    worse["rows"][4]["milliseconds"] = 61.0
    worse["exactness_float32"][0]["ranks_identical"] = False
    text = table.render(worse)
    assert "a step with global statistics is not faster than SyncBatchNorm's: 0.984 times" in text and "| NO |" in text
    partial = table.render({**RESULTS, "rows": RESULTS["rows"][:2], "exactness_float32": []})
    assert "takes" not in partial and "SyncBatchNorm" not in partial


def test_peers_messages_what_is_sent_and_what_could_not_be_built():
    rows = [*RESULTS["rows"], row("online_peers", 2, 45.9)]
    found = {"rows": rows, "exactness_bfloat16": RESULTS["exactness_float32"], "statistics_bytes_sent": {"batch": 0}}
    found["statistics_bytes_sent"]["online_peers"], found["gradient_bytes_sent"] = 27_200_000, 102_228_128
    found["not_built"] = [{"normalizer": "sync_batch", "mode": "compile", "error": "RuntimeError: no"}]
    text = table.render({**RESULTS, **found})
    for part in (
        "- eager: online_peers takes +0.90 ms a step over online_local (+2.0%).",
        "with global statistics by peers' messages is faster than SyncBatchNorm's: 1.307 times its rate.",
        "Statistics that a process sends in a step: online_peers 27.2 MB. Gradients: 102.2 MB.",
        "Global statistics: of online_peers with exchange=auto",
        "- Not built: sync_batch, compile: RuntimeError: no",
        "The same in bfloat16",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    "pretended, where", [(False, "2 x NVIDIA on 2 machines;"), (True, "2 x NVIDIA of one machine, taken for 2;")]
)
def test_what_several_machines_exchange_is_said(pretended, where):
    rows = [*RESULTS["rows"], row("online_peers", 2, 45.9)]
    text = table.render({**RESULTS, "rows": rows, "machines": 2, "machines_pretended": pretended})
    assert where in text and "with exchange=auto, where small messages are gathered between the machines" in text
    assert "a step with global statistics with exchange=auto is faster" in text and "peers'" not in text


def on_two_machines(rank):
    dist.init_process_group("gloo")
    distributed.as_if_on(2)
    steps = distributed.ops._steps(torch.ones(4), "", by_machine=True)
    found = [dist.get_process_group_ranks(group) for group in steps]
    dist.destroy_process_group()
    return found


def test_one_machine_can_stand_for_several():
    pytest.importorskip("triton")
    assert process_groups.run(4, on_two_machines) == [
        [[r % 2, r % 2 + 2], [r // 2 * 2, r // 2 * 2 + 1]] for r in range(4)
    ]


def test_costs_are_told_of_each_batch():
    small = [
        {**row(name, 2, time), "batch_per_process": 16} for name, time in (("online_local", 4), ("online_peers", 5))
    ]
    text = table.render({**RESULTS, "rows": RESULTS["rows"] + small})
    assert "- eager, 16 images: online_peers takes +1.00 ms a step over online_local (+25.0%)." in text
    assert "- eager, 256 images: online_global takes +3.00 ms a step over online_local (+6.7%)." in text


def test_what_decides_is_measured_first():
    args = argparse.Namespace(normalizer=list(distributed.MEASURED), batch=[128, 16], mode=["compile+graph", "graph"])
    deciding, others = distributed.stages(args, 2)
    both = "compile+graph"
    ours = ("online_peers", both), ("online_local", both)
    rivals = ("sync_batch_traced", both), ("sync_batch", "graph"), ("batch", both)
    alone = ("online_local", both), ("batch", both)
    assert [(stage.rows, stage.processes, stage.batch) for stage in deciding] == [
        (ours, 2, 128), (ours, 2, 16), (rivals, 2, 128), (alone, 1, 128), (rivals, 2, 16), (alone, 1, 16),
    ]  # fmt: skip
    rows = [(*row, stage.processes) for stage in deciding + others if stage.batch == 16 for row in stage.rows]
    everything = {(name, mode, 2) for name in args.normalizer for mode in args.mode}
    everything |= {(name, mode, 1) for name in ("batch", "online_local") for mode in args.mode}
    assert set(rows) == everything and len(rows) == len(everything)


def test_what_is_compiled_stands_beside_the_fastest_rival():
    rows = [{**row(name, 2, time), "mode": mode} for name, mode, time in (
        ("online_peers", "compile+graph", 10.0), ("sync_batch", "compile+graph", 30.0), ("sync_batch", "graph", 15.0),
    )]  # fmt: skip
    text = table.render({**RESULTS, "rows": rows})
    assert "by peers' messages is faster than SyncBatchNorm's (sync_batch, graph): 1.500 times its rate." in text
    rows.append({**row("sync_batch_traced", 2, 12.0), "mode": "compile+graph"})
    text = table.render({**RESULTS, "rows": rows})
    assert "faster than SyncBatchNorm's (sync_batch_traced, compile+graph): 1.200 times its rate." in text


def test_what_compiles_for_too_long_is_not_waited_for(monkeypatch):
    started, popen = [], distributed.subprocess.Popen

    def start(command, env):
        assert command[-5:] == ["--warm", "batch", "2", str(len(started)), "8"] and "RANK" not in env
        started.append(popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        return started[-1]

    monkeypatch.setattr(distributed.subprocess, "Popen", start)
    monkeypatch.setattr(distributed, "COMPILING", 0.1)
    monkeypatch.setenv("RANK", "0")
    distributed.compile_all([Stage((("batch", "compile+graph"), ("batch", "graph")), 2, 8)], 2)
    assert len(started) == 2 and all(process.wait(10) < 0 for process in started)


def test_what_takes_twice_the_time_of_another_mode_is_measured_once():
    slow, fast = {**row("sync_batch", 2, 41.0), "mode": "compile+graph"}, row("sync_batch", 2, 20.0)
    assert distributed.is_hopeless(slow, [slow, fast])
    assert not distributed.is_hopeless(fast, [slow, fast])
    assert not distributed.is_hopeless({**slow, "milliseconds": 39.0}, [slow, fast])
    assert not distributed.is_hopeless(slow, [slow, {**fast, "processes": 1}, {**fast, "normalizer": "batch"}])


def step_of(layer, rank):
    generator = torch.Generator().manual_seed(3)
    x, w = (t[rank::2].clone() for t in torch.randn((2, 8, 4, 5, 5), generator=generator))
    y = layer(x.requires_grad_())
    (y * w).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()]


def synchronised_steps(rank):
    dist.init_process_group("gloo")
    traced = torch.compile(TracedSyncBatchNorm2d(4), fullgraph=True, backend="aot_eager")
    found, expected = step_of(traced, rank), step_of(SyncBatchNorm2d(4), rank)
    dist.destroy_process_group()
    return found, expected


def test_the_rival_that_is_compiled_whole_is_batch_norm_over_all_processes():
    for found, expected in process_groups.run(2, synchronised_steps):
        for ours, truth in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)


def rows_of_all_kinds(rank):
    """Weights after the same steps in each mode."""
    dist.init_process_group("gloo")
    args = argparse.Namespace(model="cifar_resnet8", size=16, dtype="fp32")
    found = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        stand_in(monkeypatch)
        for mode in ("eager", "passes", "graph"):
            torch.manual_seed(rank)  # images of its own
            row = Row("online_local", mode, Stage((("online_local", mode),), 2, 4), args, torch.device("cpu"))
            row.step()
            found[mode] = torch.cat([parameter.flatten() for parameter in row.model.parameters()])
    dist.destroy_process_group()
    return found


def test_captured_in_part_or_whole_a_step_is_the_same():
    first, second = process_groups.run(2, rows_of_all_kinds)
    for mode in ("passes", "graph"):
        assert torch.equal(first[mode], first["eager"]) and torch.equal(second[mode], first["eager"])


def test_efficiency_is_that_of_one_process_with_the_same_batch():
    rows = [row("batch", 1, 50.0), {**row("batch", 1, 5.0), "batch_per_process": 16}, row("sync_batch", 2, 60.0)]
    assert [line["scaling_efficiency"] for line in distributed.with_efficiency(rows)] == [1.0, 1.0, round(50 / 60, 4)]


def test_recorded_tables_are_what_the_recorded_figures_give(root):
    for recorded in (root / "results").glob("bench_distributed*.json"):
        assert recorded.with_suffix(".md").read_text() == table.render(json.loads(recorded.read_text()))
