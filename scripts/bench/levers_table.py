#!/usr/bin/env python3
"""What each lever saves of a training step, predicted and measured, as a table.

scripts/bench/levers_table.py results/bench_levers.json          # writes the .md beside it
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts._venv import run_main

from onlinenorm.report.words import markdown_table, origin

HEAD = "batch", "lever", "ms without", "ms with", "saved, ms", "predicted, ms"

# Written down by hand, by the measurements of the time: nothing here is computed from a file. Lever, predicted, found.
TAKEN = (
    (
        "first norm, ReLU and max-pool in one kernel each way",
        "1.9 and 0.24 ms",
        "2.06 ms at batch 256 in kernels timed alone, on an H100: 0.76 in place of 2.82",
    ),
    (
        "the first convolution as 4x4 on 2x2 blocks, not 7x7, of BatchNorm's step, whose stem is everybody's",
        "0.5 and 0.06 ms",
        "1.56 of 36.92, 0.18 of 6.70 at 32",
    ),
    (
        "the shortcut's norm inside the kernel of the block's last norm, each way",
        "1.2 and 0.20 ms",
        "0.62 of 27.10, 0.11 of 5.33 at 32",
    ),
    ("a launch's messages cleared by the launch after, not filled", "0.15 ms", "0.11 ms of 26.82 at batch 256"),
    ("norm kernels begin before the kernel in front of them has ended", "0.10 ms", "0.09 of 27.19, 0.04 of 5.44 at 32"),
    ("small memsets of a captured graph as kernels", "0.32 and 0.13 ms", "0.24 of 27.19, 0.07 of 5.44 at 32"),
    ("the first convolution as 4x3 on 2x4 blocks, not 4x4 on 2x2", "0.45 and 0.06 ms", "0.15 of 27.19, 0.02 of 5.44"),
    (
        "what a norm kernel can work out before the kernel in front has ended",
        "0.01 ms at 32",
        "0.06 of the 4.52 ms of norms without shortcut or pool, 0.03 of 1.52 at 32",
    ),
)
DROPPED = (
    (
        "a 1x1 convolution and the norm behind it in one kernel, forward (causal GEMM)",
        "0.75 and 0.17 ms",
        "0.47 of 26.28 ms and 0.13 of 5.03 in kernels timed alone, where it is faster: 0.77 to 0.93 of the roofline "
        "at 56 x 56 pixels, but 0.17 to 0.71 from 28 x 28 on, where it reads weights and rows again from L2; not built",
    ),
    (
        "a norm kernel's first item without an atomic, its tiles' sums asked for at once, its weights read before the "
        "tile, its last sample's sums asked for earlier",
        "0.10 ms at 32",
        "-0.03 of 4.52 ms, 0.00 of 1.55 at 32",
    ),
    (
        "weights cast together, and their gradients, in one kernel each way",
        "0.24 ms",
        "-0.02 ms of 26.82 at batch 256; in a test torch.compile had added a kernel for each",
    ),
    (
        "warps of their own for the recurrence of a norm, which no other warp then waits for",
        "0.7 and 0.20 ms",
        "-0.94 ms of a step's norms, which take 11.46 at batch 256, -0.15 of 2.06 at 32",
    ),
    (
        "messages of other samples asked for ahead, into shared memory, so that they come while a tile is written",
        "0.30 and 0.05 ms",
        "-0.30 ms of a step's norms, which take 11.41, -0.05 of 2.05 at 32; with the best tiles -0.11 and -0.03",
    ),
    (
        "small tensors' messages in the shared memory of a cluster (distributed shared memory), not in L2",
        "0.67 and 0.20 ms",
        "0.00 of the 4.79 ms that norms of its sites take, 0.00 of 0.96 at 32: 2 to 4 % faster at 3 of 25, else slower",
    ),
    (
        "kernels in place of memsets begin before the norm in front of them has ended",
        "0.05 and 0.05 ms",
        "-0.01 of 26.32, -0.02 of 5.09 at 32",
    ),
    ("casts of weights on a stream beside", "0.15 ms", "0.04 of 27.19 ms at 256, 0.00 of 5.44 at 32"),
    ("weight gradients of convolutions on a stream beside", "0.5 and 0.4 ms", "0.02 of 27.19, 0.01 of 5.44"),
    ("small pointwise kernels in one by torch.compile (`combo_kernels`)", "0.15 ms", "0.00 of 5.17 ms at 32"),
    ("all of cuDNN's kernels tried (`benchmark_limit = 0`)", "0 to 0.5 ms", "-0.01 of BatchNorm's 44.45 ms at 256"),
    ("1x1 convolutions as products (`conv_1x1_as_mm`)", "0 to 0.5 ms", "-0.05 of BatchNorm's 44.45 ms at 256"),
)  # fmt: skip
NEVER_BUILT = (
    ("the recurrence of a norm's kernel in log depth over samples, as PyTorch's backend has it", "0.4 and 0.10 ms"),
    ("gradients of strided 1x1 shortcuts kept compact, without the zeros between their pixels", "0.4 and 0.05 ms"),
    ("a 1x1 convolution's input gradient and the norm behind it in one kernel", "1.9 and 0.40 ms"),
    ("both gradients of a 1x1 convolution in one kernel", "0.6 and 0.10 ms"),
    ("the convolutions and norms about a block's end in one kernel, at 56 x 56 pixels", "1.1 and 0.15 ms"),
    ("a 3x3 convolution and the norm behind it in one kernel", "1.4 and 0.35 ms"),
)
BY_HAND = "lever", "predicted to save", "found"


def render(results: dict) -> str:
    """Markdown of a results file in the form of bench_levers.json."""
    title = f"# Levers of a training step of {results['model']}, {results['normalizer']}, on one {results['device']}"
    told = "Forward and backward as one CUDA graph, each step with and without in turn; predictions are of an H100."
    if results.get("leave_one_out"):
        told += " Each lever is off alone, and all others on; the last rows are of none on and all."
    rows = [(row["batch"], row["what"], row["without"], row["with"], row["predicted"]) for row in results["rows"]]
    parts = [title, told, _table(rows), origin(results)]
    if absent := [f"{row['lever']} at batch {row['batch']}" for row in results.get("not_run", [])]:
        parts[3:3] = [f"Not run, for want of time: {', '.join(absent)}."]
    parts += ["## Taken, by hand", "Noted when each was turned on, on an H200 if not said; not of the commits above."]
    parts += [markdown_table(BY_HAND, [list(entry) for entry in TAKEN]), "## Given up, by hand"]
    parts += ["Noted when each was taken out. The last two on an H100, the others on an H200."]
    parts += [markdown_table(BY_HAND, [list(entry) for entry in DROPPED]), "## Never built"]
    return "\n\n".join([*parts, markdown_table(BY_HAND[:2], [list(entry) for entry in NEVER_BUILT])]) + "\n"


def _table(rows: list[tuple]) -> str:
    lines = []
    for batch, what, without, with_, predicted in rows:
        cells = [str(batch), what, f"{without:.2f}", f"{with_:.2f}", f"{without - with_:.2f}"]
        lines.append([*cells, "none" if predicted is None else f"{predicted:.2f}"])
    return markdown_table(HEAD, lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("results", type=Path, help="a bench_levers.json")
    path = parser.parse_args(arguments).results
    results = json.loads(path.read_text(encoding="utf-8"))
    path.with_suffix(".md").write_text(render(results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_main(main)
