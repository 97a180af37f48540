"""Time of the norms at the end of a residual block with a projection: one kernel each way against two.

    python scripts/bench/shortcut.py                                 # the four sites of ResNet-50, one Hopper GPU
    python scripts/bench/shortcut.py --tuning 128,2,16,300 ...       # and other tunings of the one kernel

What SHORTCUT_TUNINGS of onlinenorm/ops/fused/tiling.py are chosen from. Both ways run in one process on the same
tensors, in CUDA graphs over rotating inputs, in turn; a row gives the median microseconds of each and the bytes that it
moves, every tensor counted once. Backward adds a second gradient, as a block's output has two readers. A tuning whose
results leave those of two kernels, or that gives other bits the second time, is told and left out.
"""

import argparse
import itertools
import statistics
import sys
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts._venv import run_main

import torch
from torch import Tensor

from onlinenorm.ops.fused import shortcut, single_read
from onlinenorm.ops.fused.tiling import Tuning
from onlinenorm.ops.spec import NormSpec
from scripts.bench import common, norm_sites
from scripts.bench.kernels import SPECS, Use, drawn, microseconds, name_of

SITES = ((256, 56), (512, 28), (1024, 14), (2048, 7))  # channels and side


class Layers:
    """Parameters and state of both layers, and forward and backward of them by one kernel or by two."""

    def __init__(self, channels: int, spec: NormSpec):
        self.spec, self.arguments = spec, spec.as_arguments()
        start = torch.rand((2, 6, channels), device="cuda", generator=torch.Generator("cuda").manual_seed(channels))
        self.layers = [[0.5 + p[0], p[1] - 0.5, 0.1 * p[2], 0.5 + p[3], 1e-3 * p[4], 1e-3 * p[5]] for p in start]

    def forward_one(self, x, y, *_):
        a, b = self.layers
        return shortcut.fused_shortcut_forward(x, y, *a[:4], *b[:4], *self.arguments)

    def forward_two(self, x, y, *_):
        a, b = self.layers
        residual, tables, _ = single_read.forward(y, None, *b[:4], self.spec, False)
        return (*single_read.forward(x, residual, *a[:4], self.spec, True), tables)

    def backward_one(self, saved, x, y, grad, extra):
        a, b = self.layers
        _, tables, mask = saved
        controls = *a[4:], *b[4:]
        return shortcut.fused_shortcut_backward(
            grad, extra, x, y, *a[:2], *b[:2], tables, mask, *controls, *self.arguments
        )

    def backward_two(self, saved, x, y, grad, extra):
        a, b = self.layers
        _, tables, mask, other = saved
        grad_x, residual, *of_layer = single_read.backward(
            grad, extra, x, mask, *a[:2], tables, *a[4:], self.spec, True
        )
        grad_y, _, *of_other = single_read.backward(residual, None, y, None, *b[:2], other, *b[4:], self.spec, False)
        return grad_x, grad_y, *of_layer, *of_other


def agrees(tuning: Tuning | None, spec: NormSpec, shape: tuple[int, ...]) -> bool:
    """Whether one kernel gives what two give, and the same bits twice."""

    def step(way: str) -> list[Tensor]:
        layers = Layers(shape[1], spec)
        torch.manual_seed(0)
        tensors = drawn(4, *shape)
        saved = getattr(layers, f"forward_{way}")(*tensors)
        found = getattr(layers, f"backward_{way}")(saved, *tensors)
        return [saved[0], *found, *itertools.chain(*layers.layers)]

    with use(tuning):
        found, again = step("one"), step("one")
    far = max(common._distance(a, b) for a, b in zip(found, step("two"), strict=True))
    same = all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    if far < 5e-2 and same:  # two kernels round the shortcut's output: values move across the edge of the ReLU
        return True
    where = f"{label(tuning)} at {shape}, {spec.error_compensation}"
    print(f"{where}: off by {far:.1e}, the same bits twice: {same}", flush=True)
    return False


def use(tuning: Tuning | None):
    """Context in which both directions take one tuning; None: those of the table."""
    return nullcontext() if tuning is None else Use(tuning)


def label(tuning: Tuning | None) -> str:
    return "in use" if tuning is None else name_of(tuning)


def measure(spec: NormSpec, shape: tuple[int, ...], tunings: list, rounds: int, repeats: int) -> list[dict]:
    """A row a direction: microseconds of two kernels and of one, by tuning."""
    batch, channels, side, _ = shape
    size = 2 * batch * channels * side * side
    sets = [tuple(drawn(4, *shape)) for _ in range(max(1, min(4, int(norm_sites.ROTATE // size))))]
    layers, rows = Layers(channels, spec), []
    fit = [tuning for tuning in tunings if agrees(tuning, spec, shape)]
    for direction in ("forward", "backward"):
        times: dict[str, list[float]] = {}
        for _ in range(rounds):
            for way, tuning in (("two", None), *(("one", tuning) for tuning in fit)):
                with use(tuning):
                    saved = {id(given[0]): getattr(layers, f"forward_{way}")(*given) for given in sets}
                    call = getattr(layers, f"{direction}_{way}")
                    if direction == "backward":
                        call = _with_saved(call, saved)
                    name = "two kernels" if way == "two" else label(tuning)
                    times.setdefault(name, []).append(microseconds(call, sets, repeats))
        found = {name: round(statistics.median(each), 1) for name, each in times.items()}
        tensors = {"two kernels": 5 if direction == "forward" else 8, "one": 3 if direction == "forward" else 6}
        rows.append({
            "error_compensation": spec.error_compensation, "batch": batch, "channels": channels, "side": side,
            "direction": direction, "megabytes": {way: round(n * size / 1e6, 1) for way, n in tensors.items()},
            "microseconds": found,
        })  # fmt: skip
    return rows


def _with_saved(call, saved):
    return lambda x, *others: call(saved[id(x)], x, *others)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 32])
    parser.add_argument("--error-compensation", nargs="+", default=list(SPECS), choices=list(SPECS))
    parser.add_argument("--tuning", nargs="+", default=[], metavar="G,S,C,R", help="besides that in use")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("results/bench_shortcut.json"))
    args = parser.parse_args(argv)
    if not (torch.cuda.is_available() and single_read.supports_device(0)):
        parser.error("the single-read kernels need a GPU of the Hopper generation or later")
    tunings = [None, *(Tuning(*map(int, text.split(","))) for text in args.tuning)]
    device = torch.device("cuda")
    results = {**common.head(device), "copy_bytes_per_second": norm_sites.copy_bandwidth(device, 20), "rows": []}
    for name, batch, (channels, side) in itertools.product(args.error_compensation, args.batch, SITES):
        shape = batch, channels, side, side
        for row in measure(SPECS[name], shape, tunings, args.rounds, args.repeats):
            results["rows"].append(row)
            print(row, flush=True)
        common.write(args.output, results)
    for name, batch in itertools.product(args.error_compensation, args.batch):
        rows = [row for row in results["rows"] if (row["error_compensation"], row["batch"]) == (name, batch)]
        sums = {way: sum(row["microseconds"].get(way, float("nan")) for row in rows) for way in rows[0]["microseconds"]}
        print(f"{name}, N = {batch}, all sites, ms: " + ", ".join(f"{way} {us / 1e3:.3f}" for way, us in sums.items()))


if __name__ == "__main__":
    run_main(main)
