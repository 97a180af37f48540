"""The table of the benchmark of several processes says what the figures do."""

import copy
import json

import pytest

from scripts.bench import distributed_table as table


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


def test_recorded_table_is_what_the_recorded_figures_give(root):
    recorded = root / "results" / "bench_distributed.json"
    if not recorded.exists():
        pytest.skip("not recorded yet: needs two GPUs")
    assert recorded.with_suffix(".md").read_text() == table.render(json.loads(recorded.read_text()))
