"""Pages of recorded benchmarks: their figures come from the recorded data, or the page says that they do not."""

import json
import re

import pytest

from scripts.bench import kernels_table, levers_table, shortcut_table
from scripts.dev import rebuild


@pytest.fixture(scope="module")
def kernels(root):
    """scripts/bench/kernels_table.py, and what is recorded."""
    return kernels_table, json.loads((root / "results" / "bench_kernels.json").read_text())


def test_prose_beside_the_tables_of_kernels_has_no_figures_of_its_own(kernels):
    module, results = kernels
    computed, _, by_hand = module.render(results).partition("## What was tried, by hand")
    assert "not computed from the" in by_hand
    sources = results["device"], results["command"], results["torch"], results["triton"], results["commit"]
    for line in computed.splitlines():
        if line.startswith("|"):
            continue
        for source in sources:
            line = line.replace(source, "")
        line = line.replace(f"{results['copy_bytes_per_second'] / 1e12:.2f} TB/s", "").replace("batch 256", "")
        assert not re.search(r"\d", line.replace("bfloat16", "")), line


def test_shares_are_those_of_the_recorded_kernels(kernels):
    module, results = kernels
    lines = {(line[0], line[1]): line for line in module._shares(results)}
    assert len(module.GUARDS) > 1
    for guard, name in module.GUARDS.items():
        rows = [
            row for row in results["kernels"] if row["error_compensation"] == guard and row["bytes"] >= module.LARGE
        ]
        shares = [r["bytes"] / (1e-6 * module._time(r)) / results["copy_bytes_per_second"] for r in rows]
        _, _, count, reached, fastest, _ = lines[name, "from 160 MB"]
        assert (count, reached) == (str(len(rows)), f"{min(shares):.0%} to {max(shares):.0%}")
        best = sum(module._time(row) == min(row["microseconds"].values()) for row in rows)
        assert fastest == f"{best} of {len(rows)}"


def test_the_page_of_levers_tells_what_was_predicted_and_what_it_saved(tmp_path):
    row = {"batch": 256, "lever": "messages", "what": "fills", "without": 26.825, "with": 26.646, "predicted": 0.24}
    none = row | {"lever": "all", "what": "all", "with": 26.9, "predicted": None}
    head = {"model": "resnet50", "normalizer": "online_clamp", "device": "a GPU", "torch": "2", "triton": "3"}
    (tmp_path / "bench_levers.json").write_text(
        json.dumps(head | {"commit": "c", "command": "run", "rows": [row, none]})
    )
    levers_table.main([str(tmp_path / "bench_levers.json")])
    lines = (tmp_path / "bench_levers.md").read_text().splitlines()
    assert (
        "| 256 | fills | 26.82 | 26.65 | 0.18 | 0.24 |" in lines
        and "| 256 | all | 26.82 | 26.90 | -0.07 | none |" in lines
    )


def test_the_page_of_shortcuts_has_every_tuning_and_none_where_it_was_left_out(tmp_path):
    site = {"error_compensation": "clamp", "batch": 32, "channels": 256, "side": 56}
    rows = [
        site | {"direction": "forward", "microseconds": {"two kernels": 100.14, "128,2,4,400": 71.9}},
        site | {"direction": "backward", "microseconds": {"two kernels": 137.9}},
    ]
    head = {"device": "a GPU", "torch": "2", "triton": "3", "commit": "c", "command": "run", "rows": rows}
    (tmp_path / "bench_shortcut.json").write_text(json.dumps(head))
    shortcut_table.main([str(tmp_path / "bench_shortcut.json")])
    lines = (tmp_path / "bench_shortcut.md").read_text().splitlines()
    assert "| 32 | clamp | 256 | 56 | forward | 100.1 | 71.9 |" in lines
    assert "| 32 | clamp | 256 | 56 | backward | 137.9 | none |" in lines


def test_figures_of_more_gpus_have_pages_of_their_own(root, tmp_path, monkeypatch):
    results, folder = tmp_path / "results", tmp_path / "rebuilt"
    results.mkdir()
    folder.mkdir()
    for name in ("bench_distributed", "end_to_end"):
        found = json.loads((root / "results" / f"{name}.json").read_text())
        (results / f"{name}_4.json").write_text(json.dumps({**found, "processes": 4}))
    monkeypatch.setattr(rebuild, "RESULTS", results)
    assert rebuild.rebuild(folder) == 0
    made = {file.name for file in folder.iterdir()}
    assert made == {"bench_distributed_4.md", "end_to_end_4.md", "end_to_end_4.png"}
    assert "one process against 4" in (folder / "bench_distributed_4.md").read_text()
