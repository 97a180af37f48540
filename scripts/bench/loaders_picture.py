"""The picture of results/bench_data.json: a panel a machine and stage, a bar a provider."""

import json
from pathlib import Path

import matplotlib.pyplot as plt

STAGES = {
    "decode": "decode and crop (CPU decoders: one core)",
    "loader": "loader alone, batches on the device",
    "training": "training",
}
_COLOURS = {"torchvision ImageFolder": "#B0B0B0", "timm": "#B0B0B0", "resident batch": "#D55E00"}  # others are ours


def draw(results: Path) -> Path:
    """Writes the picture beside `results` and returns its path."""
    runs = json.loads(results.read_text())["runs"]
    stages = [stage for stage in STAGES if any(row["stage"] == stage for run in runs for row in run["rows"])]
    height = 0.8 + 2.6 * len(runs)
    figure, panels = plt.subplots(
        len(runs), len(stages), figsize=(5.2 * len(stages), height), squeeze=False, layout="constrained"
    )
    for line, run in zip(panels, runs, strict=True):
        for panel, stage in zip(line, stages, strict=True):
            rows = [row for row in run["rows"] if row["stage"] == stage]
            if not rows:
                panel.set_axis_off()
                continue
            _bars(panel, rows)
            where = f"{run['device']}, {run['cores']} cores" if run["device"] != "cpu" else f"{run['cores']} cores"
            model = f" {rows[0]['model']}" if "model" in rows[0] else ""
            panel.set_title(f"{STAGES[stage]}{model}\n{where}", fontsize=9, loc="left")
    figure.supxlabel("images/s (times the reference of the same run)", fontsize=9)
    path = results.with_suffix(".png")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _bars(panel, rows: list[dict]) -> None:
    names = [row["provider"] + (f" ({row['normalizer']})" if "normalizer" in row else "") for row in rows]
    colours = [_COLOURS.get(row["provider"], "#0072B2") for row in rows]
    values = [row["images_per_second"] for row in rows]
    panel.barh(range(len(rows)), values, color=colours)
    panel.set_yticks(range(len(rows)), names, fontsize=8)
    panel.invert_yaxis()
    panel.set_xlim(0, max(values) * 1.35)
    for place, row in enumerate(rows):
        text = f" {row['images_per_second']:,.0f} ({row['ratio']:.2f}x)"
        panel.text(row["images_per_second"], place, text, va="center", fontsize=8)
    panel.spines[["top", "right"]].set_visible(False)
