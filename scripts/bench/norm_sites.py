"""Time of every norm site of the real ResNet-50, forward and backward, normalizer against normalizer.

    python scripts/bench/norm_sites.py                   # all sites, batches 32 and 256, one GPU

The sites (channels, size, residual, ReLU) are read from the network by hooks, equal ones measured once and counted. A
row gives microseconds a call inside a CUDA graph over rotating inputs (20th to 80th percentile), the bytes that a
single read of every tensor moves, and those bytes' share of the measured copy bandwidth. The gate runs first.
"""

import argparse
import statistics
import sys
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts._venv import run_main

import torch
from torch import nn

from onlinenorm import OnlineNorm2d, models
from scripts.bench import common

ROTATE = 150e6  # bytes of inputs to rotate over, so that the L2 cache of one call does not serve the next


class _Site(OnlineNorm2d):
    """A normalizer that notes how the network calls it."""

    fuses_residual = True  # which is said of this forward

    found: ClassVar[Counter] = Counter()

    def forward(self, x, residual=None, relu=False):
        type(self).found[x.shape[1], x.shape[2], residual is not None, relu] += 1
        return x.clone()


def sites(model: str, size: int) -> Counter:
    """(channels, side, residual, relu) of each norm call of the network -> how often it occurs."""
    _Site.found.clear()
    with torch.no_grad():
        getattr(models, model)(_Site)(torch.zeros(1, 3, size, size))
    return Counter(_Site.found)


class BatchNormSite(nn.Module):
    """BatchNorm with torch's own addition and ReLU."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x, residual=None, relu=False):
        y = self.norm(x)
        y = y if residual is None else y + residual
        return torch.relu(y) if relu else y


def provider(name: str, channels: int, device: torch.device):
    kind, _, how = name.partition(":")
    if kind == "batch":
        layer = BatchNormSite(channels).to(device).train()
        return torch.compile(layer, dynamic=False) if how == "compile" else layer
    return OnlineNorm2d(channels, backend=kind, error_compensation=how or "clamp", device=device)


def measure(name: str, site, batch: int, dtype: torch.dtype, device: torch.device, repeats: int) -> dict:
    """Microseconds of forward and backward of one provider at one site."""
    channels, side, residual, relu = site
    size = batch * channels * side * side * dtype.itemsize
    layer = provider(name, channels, device)
    sets = []
    for _ in range(max(1, min(6, int(ROTATE // size)))):
        draw = torch.randn((3, batch, channels, side, side), device=device, dtype=dtype)
        x, r, grad = (t.contiguous(memory_format=torch.channels_last) for t in draw)
        sets.append((x.requires_grad_(), r.requires_grad_() if residual else None, grad))

    def forward():
        return [layer(x, residual=r, relu=relu) for x, r, _ in sets]

    def backward(outputs):
        for y, (x, r, grad) in zip(outputs, sets, strict=True):
            inputs = [x, *([] if r is None else [r]), *layer.parameters()]
            torch.autograd.grad(y, inputs, grad, retain_graph=True)

    found = {}
    # One stream for all: backward runs where its forward ran, and the default stream cannot be captured.
    with common.side_stream() if device.type == "cuda" else nullcontext():
        outputs = forward()
        measured = {}
        for direction, step in (("forward", forward), ("backward", partial(backward, outputs))):
            step()
            replay = common.captured(step) if device.type == "cuda" else step
            measured[direction] = common.timed(replay, device, repeats)
    for direction, milliseconds in measured.items():
        times = [1e3 * t / len(sets) for t in milliseconds]
        low, _, _, high = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times * 4
        tensors = 2 + residual if direction == "forward" else 3 + (residual and relu)
        found[direction] = {
            "microseconds": round(statistics.median(times), 2),
            "p20": round(low, 2),
            "p80": round(high, 2),
            "bytes": tensors * size,
        }
    return found


def copy_bandwidth(device: torch.device, repeats: int) -> float:
    """Bytes a second, read and written, of a large elementwise copy."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**20, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    times = common.timed(lambda: torch.mul(source, 1, out=target), device, repeats + 2)[2:]
    return 2 * source.numel() * source.itemsize / (1e-3 * statistics.median(times))


LOOKS = {  # provider: legend, colour, marker
    "fused": ("OnlineNorm + clamp, fused", "#0072B2", "o"),
    "fused:layer_scaling": ("OnlineNorm + layer scaling, fused", "#D55E00", "^"),
    "batch:compile": ("BatchNorm, compiled", "#009E73", "s"),
    "batch": ("BatchNorm, eager", "#009E73", "x"),
    "torch": ("OnlineNorm + clamp, PyTorch", "#7F7F7F", "+"),
}


def plot(results: dict, path: str) -> None:
    """Share of copy bandwidth by site, largest first, a mark a provider."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    batches = sorted({row["batch"] for row in results["rows"]}, reverse=True)
    sites = len({(row["channels"], row["side"], row["residual"], row["relu"]) for row in results["rows"]})
    size = (12, len(batches) * (0.28 * sites + 1.1) + 1)
    figure, axes = plt.subplots(len(batches), 2, figsize=size, sharex=True, sharey="row", squeeze=False)
    for across, batch in zip(axes, batches, strict=True):
        for ax, direction in zip(across, ("forward", "backward"), strict=True):
            for name in dict.fromkeys(row["provider"] for row in results["rows"]):
                rows = [row for row in results["rows"] if row["provider"] == name and row["batch"] == batch]
                rows.sort(key=lambda row: row["forward"]["bytes"])
                labels = [f"{r['channels']} x {r['side']}²{', residual' * r['residual']}" for r in rows]
                label, colour, marker = LOOKS.get(name, (name, "black", "d"))
                shares = [100 * row[direction]["share"] for row in rows]
                ax.plot(shares, labels, marker, color=colour, label=label, markersize=6)
            ax.set_title(f"{direction}, batch {batch}", fontsize=11)
            ax.grid(alpha=0.3)
            ax.set_xlim(0, 100)
            ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[-1]:
        ax.set_xlabel("% of copy bandwidth, every tensor counted once")
    handles, names = axes[-1, 0].get_legend_handles_labels()
    figure.suptitle(f"Norm sites of ResNet-50, {results['dtype']}, {results['device']}")
    figure.tight_layout(rect=(0, 0.045, 1, 0.99))
    figure.legend(handles, names, loc="lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--size", type=int, default=224, help="pixels a side of the network's input")
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 256])
    parser.add_argument(
        "--provider", nargs="+", default=["batch", "batch:compile", "fused", "fused:layer_scaling", "torch"]
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", default="results/bench_normalizer.json", help="the picture lands beside it")
    args = parser.parse_args(argv)
    common.check_device(parser, args)
    device = torch.device(args.device)
    if device.type == "cuda":
        common.gate(device, "fused")
    torch._functorch.config.donated_buffer = False  # compiled backward passes are repeated
    bandwidth = copy_bandwidth(device, args.repeats)
    results = {**common.head(device), "copy_bytes_per_second": bandwidth, "dtype": "bf16", "rows": []}
    for batch in args.batch:
        for site, count in sites(args.model, args.size).items():
            for name in args.provider:
                if name.startswith("torch") and batch > 64:
                    continue  # a reference: a dozen float32 copies of each tensor
                torch._dynamo.reset()
                found = measure(name, site, batch, torch.bfloat16, device, args.repeats)
                for part in found.values():
                    part["share"] = round(part["bytes"] / (1e-6 * part["microseconds"]) / bandwidth, 3)
                row = dict(zip(("channels", "side", "residual", "relu"), site, strict=True))
                results["rows"].append({"provider": name, "batch": batch, "count": count, **row, **found})
                times = " ".join(f"{k} {v['microseconds']:.0f} us ({v['share']:.0%})" for k, v in found.items())
                print(f"N = {batch} {site} x{count} {name}: {times}", flush=True)
            common.write(args.output, results)
    plot(results, str(args.output).removesuffix(".json") + ".png")


if __name__ == "__main__":
    run_main(main)
