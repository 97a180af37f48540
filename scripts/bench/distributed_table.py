#!/usr/bin/env python3
"""The recorded benchmark of several processes as Markdown: rates, what synchronisation costs, and the exactness check.

scripts/bench/distributed_table.py results/bench_distributed.json          # writes results/bench_distributed.md
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts._venv import run_main

from onlinenorm.report.words import markdown_table, origin

SYNCHRONISED = {  # and without
    "sync_batch": "batch", "sync_batch_traced": "batch", "online_global": "online_local",
    "online_peers": "online_local",
}  # fmt: skip
# torch compiles its SyncBatchNorm in pieces, between its collectives: beside what is compiled stands the fastest of it
# in both modes and of BatchNorm over all processes that is compiled whole.
RIVALS = "sync_batch", "sync_batch_traced"
UNCOMPILED = {("sync_batch", "compile+" + mode): mode for mode in ("graph", "passes")}
UNCOMPILED |= {("sync_batch", "compile"): "eager"}
RATES = ("normalizer", "mode", "processes", "images a process", "ms a step", "images/s", "scaling efficiency")
EXACTNESS = ("normalizer", "steps", "largest of a loss", "parameters", "statistics", "processes identical")


def render(results: dict) -> str:
    """Markdown of a results file of distributed.py with at least one row."""
    world, rows, machines = results["processes"], results["rows"], results.get("machines", 1)
    where = f" on {machines} machines" if machines > 1 else ""
    where = f" of one machine, taken for {machines}" if results.get("machines_pretended") else where
    parts = [
        f"# {results['model']}, {results['size']} px, {results['backend']}: one process against {world}",
        markdown_table(RATES, [_rate(row) for row in rows]),
        f"{rows[0]['dtype']}: forward, backward with the gradients' all-reduce, and SGD; synthetic "
        f"images. Efficiency: images/s over {world} times those of one process (sync_batch: of batch on one).",
        _exchanges({row["normalizer"] for row in rows}, machines),
        *_costs([row for row in rows if row["processes"] == world], machines),
        _wire(results.get("statistics_bytes_sent", {}), results.get("gradient_bytes_sent", 0)),
        f"Float32 without TF32, {world} processes against one, same global batches. Parameters and statistics: norm "
        "of the difference over the norm.",
        markdown_table(EXACTNESS, [_difference(row) for row in results["exactness_float32"]]),
        *_in_16_bits(results.get("exactness_bfloat16", [])),
        "\n".join(
            f"- Not built: {row['normalizer']}, {row['mode']}: {row['error']}" for row in results.get("not_built", [])
        ),
        f"{world} x {results['device']}{where}; {origin(results)}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _exchanges(names: set[str], machines: int) -> str:
    lines = []
    if "online_peers" in names:
        how = "where the kernels store moments into the other GPUs' memory while they run"
        if machines > 1:
            how = "where small messages are gathered between the machines and then within each"
        lines.append(
            f"Global statistics: of online_peers with exchange=auto, {how}; "
            "of online_global as by default (exchange=gather), by collectives."
        )
    if "sync_batch_traced" in names:
        lines.append(
            "BatchNorm over all processes: sync_batch is torch's, which torch.compile breaks into pieces; "
            "sync_batch_traced is made of operators that it compiles whole; its efficiency, too, is by batch on one."
        )
    return "\n".join(lines)


def _wire(sent: dict[str, int], gradients: int) -> str:
    """What each process sends in a step."""
    lines = [f"{name} {size / 1e6:,.1f} MB" for name, size in sent.items() if size]
    beside = f" Gradients: {gradients / 1e6:,.1f} MB." if gradients else ""
    return f"Statistics that a process sends in a step: {', '.join(lines)}.{beside}" if lines else ""


def _in_16_bits(rows: list[dict]) -> list[str]:
    if not rows:
        return []
    text = "The same in bfloat16, in which another order of sums rounds otherwise at once."
    return [text, markdown_table(EXACTNESS, [_difference(row) for row in rows])]


def _rate(row: dict) -> list:
    time = f"{row['milliseconds']:.2f} ± {row['repeat_spread'] / 2:.1%}"
    efficiency = "" if row["processes"] == 1 else "not measured"
    if row["processes"] > 1 and row["scaling_efficiency"] is not None:
        efficiency = f"{row['scaling_efficiency']:.1%}"
    rate = f"{row['images_per_second']:,.0f}"
    return [*(row[key] for key in ("normalizer", "mode", "processes", "batch_per_process")), time, rate, efficiency]


def _costs(rows: list[dict], machines: int) -> list[str]:
    """What synchronisation adds to a step of all processes, and which step is faster, of each mode and batch."""
    times = {(row["normalizer"], row["mode"], row["batch_per_process"]): row["milliseconds"] for row in rows}
    batches = {batch for _, _, batch in times}
    kinds = dict.fromkeys((mode, batch) for _, mode, batch in times)
    by_peers = " by peers' messages" if machines == 1 else " with exchange=auto"
    return [_cost(times, *kind, f", {kind[1]} images" if len(batches) > 1 else "", by_peers) for kind in kinds]


def _cost(times: dict[tuple[str, str, int], float], mode: str, batch: int, images: str, by_peers: str) -> str:
    together = {name: time for (name, *kind), time in times.items() if kind == [mode, batch]}
    lines = []
    for name, base in SYNCHRONISED.items():
        if name in together and base in together:
            cost = together[name] - together[base]
            share = cost / together[base]
            lines.append(f"- {mode}{images}: {name} takes {cost:+.2f} ms a step over {base} ({share:+.1%}).")
    rivals = {(rival, by): time for rival in RIVALS for by in (mode, UNCOMPILED.get((rival, mode), mode))
              if (time := times.get((rival, by, batch)))}  # fmt: skip
    for name, by in (("online_global", ""), ("online_peers", by_peers)):
        if rivals and name in together:
            rival = min(rivals, key=rivals.__getitem__)
            ratio = rivals[rival] / together[name]
            than = f"{'faster' if ratio > 1 else 'not faster'} than SyncBatchNorm's"
            than += "" if rival == ("sync_batch", mode) else f" ({', '.join(rival)})"
            lines.append(f"- {mode}{images}: a step with global statistics{by} is {than}: {ratio:.3f} times its rate.")
    return "\n".join(lines)


def _difference(row: dict) -> list:
    figures = [f"{row[f'{what}_difference']:.1e}" for what in ("largest_loss", "parameter", "statistic")]
    return [row["normalizer"], row["steps"], *figures, "yes" if row["ranks_identical"] else "NO"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("results", type=Path, help="a bench_distributed.json")
    options = parser.parse_args(arguments)
    text = render(json.loads(options.results.read_text(encoding="utf-8")))
    options.results.with_suffix(".md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_main(main)
