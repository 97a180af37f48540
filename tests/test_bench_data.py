import argparse
import json
import subprocess
import sys

import pytest
import torch

from onlinenorm.data.gpu_cache import GpuCacheLoader
from scripts.bench import jpeg_set, loaders
from scripts.bench import loaders_table as report


def test_generated_files_have_the_sizes_of_imagenet(tmp_path):
    sizes = [jpeg_set.size_of(n) for n in range(40)]
    widths, heights = zip(*sizes, strict=True)
    assert abs(sum(widths) / 40 - 500) < 10 and abs(sum(heights) / 40 - 375) < 20
    found = jpeg_set.make_set(tmp_path, 8, 20, 4)
    files = sorted(tmp_path.glob("train/*/*.JPEG"))
    assert len(files) == 20 and len({path.stat().st_ino for path in files}) == 8
    assert abs(found["mean_bytes"] / (found["mean_width"] * found["mean_height"]) - 0.59) < 0.12
    before = [path.stat().st_mtime_ns for path in files]
    assert jpeg_set.make_set(tmp_path, 8, 20, 4) == found
    assert [path.stat().st_mtime_ns for path in files] == before


def test_loaders_are_measured_beside_the_reference(tmp_path, capsys):
    output = tmp_path / "bench.json"
    arguments = ["--images", tmp_path / "images", "--unique", 4, "--train", 64, "--rounds", 1, "--seconds", "0.05"]
    arguments += ["--batch", 2, "--workers", 1, "--stages", "decode,loader", "--output", output]
    for _ in range(2):  # the same machine: in place of the first
        assert loaders.main([str(argument) for argument in arguments]) == 0
    (run,) = json.loads(output.read_text())["runs"]
    assert {"device", "cores", "versions", "git", "command", "images"} <= set(run)
    for stage in ("decode", "loader"):
        rows = {row["provider"]: row for row in run["rows"] if row["stage"] == stage}
        assert {report.REFERENCE, "pillow", "torchvision"} <= set(rows)
        assert rows[report.REFERENCE]["ratio"] == 1 and all(row["images_per_second"] > 0 for row in rows.values())
    assert output.with_suffix(".png").stat().st_size > 10_000
    page = output.with_suffix(".md").read_text()
    assert page.split("\n\n")[1] in capsys.readouterr().out and f"{run['cores']} cores" in page


def test_providers_are_chosen_by_name(tmp_path):
    options = argparse.Namespace(batch=2, workers=0, device=torch.device("cpu"), providers=["pillow"])
    assert list(loaders.providers(tmp_path, options)) == [report.REFERENCE, "pillow"]
    options.providers = ["pilow"]
    with pytest.raises(SystemExit, match="no pilow here, but torchvision ImageFolder, pillow"):
        loaders.providers(tmp_path, options)


def test_what_a_gpu_does_is_measured_apart(tmp_path):
    """With the CPU as the device."""
    device = torch.device("cpu")
    jpeg_set.make_set(tmp_path, 4, 6, 6)
    calls = {name: (call, images) for name, call, images in loaders.device_calls(tmp_path, 5, device)}
    assert list(calls) == ["nvjpeg", "nvjpeg and crops", "crops alone"]
    assert all(images == 5 for _, images in calls.values())
    both, alone = (calls[name][0]() for name in ("nvjpeg and crops", "crops alone"))
    assert both[0].shape == (5, 3, 224, 224) and torch.equal(both[0], alone)
    cached = loaders.Ours(tmp_path, "torchvision", 2, 0, device, on_device=True, limit_train=4)
    images, labels = next(iter(cached))
    assert isinstance(cached.loader, GpuCacheLoader) and images.shape == (2, 3, 224, 224) and len(labels) == 2


def test_the_page_names_what_is_short():
    def row(stage, provider, rate, **more):
        return {"stage": stage, "provider": provider, "workers": 2, "images_per_second": rate, "ratio": 2.0,
                "spread": 0.1, **more}  # fmt: skip

    run = {
        "device": "GPU", "processor": "P", "cores": 4, "git": {"commit": "abc", "dirty": True}, "command": "bench",
        "versions": dict.fromkeys(("torch", "torchvision", "pillow", "timm"), "1"),
        "images": {"unique": 2, "mean_width": 500.0, "mean_height": 375.0, "mean_bytes": 110_000},
        "rows": [row("loader", *given) for given in ((report.REFERENCE, 9e9), ("pillow", 1100.0), ("nvjpeg", 1300.0))],
    }  # fmt: skip
    rates = [("batch", 1000.0), ("batch", 900.0), ("online_clamp", 1250.0)]
    training = {"device": "GPU", "rows": [{"normalizer": n, "images_per_second": rate} for n, rate in rates]}
    run["rows"].append(row("loader", report.ON_DEVICE, 8e9))
    text = report.render({"runs": [run]}, training)
    start = "| GPU, 4 cores | nvjpeg | 1,300 | 2.00 | "
    assert f"{start}1,250 (resnet50, online_clamp) | 1.04 | short by 200 images/s |" in text
    assert f"{start}1,000 (resnet50, batch) | 1.30 | yes |" in text and "900" not in text
    assert "was not measured" in text and "commit abc with local changes" in text
    assert f"{start}not measured |" in report.render({"runs": [run]}, {**training, "device": "another"})
    of_batch = {"normalizer": "batch", "mode": "graph"}
    training["rows"] = [
        {**of_batch, "images_per_second": rate, "dtype": dtype, "optimizer": optimizer, "compiler": compiler}
        for rate, dtype, optimizer, compiler in (
            (9e3, "fp16", True, "default"),
            (8e3, "bf16", True, "max_autotune"),
            (1250.0, "bf16", True, "default"),
            (7e3, "bf16", False, "default"),
        )
    ]
    assert f"{start}1,250 (resnet50, batch, graph, bf16, with SGD) | 1.04 |" in report.render({"runs": [run]}, training)
    run["rows"].append(row("training", "resident batch", 1100.0, model="resnet18", normalizer="batch"))
    text = report.render({"runs": [run]}, training)
    assert "1,100 (resnet18, batch) | 1.18 | short by 20 images/s |" in text and "resnet50" not in text


def test_recorded_page_is_what_the_recorded_figures_give(root):
    read = [json.loads((root / "results" / f"{name}.json").read_text()) for name in ("bench_data", "bench_training")]
    assert (root / "results" / "bench_data.md").read_text() == report.render(*read)


@pytest.mark.slow
def test_memory_of_workers_stays_flat(root, tmp_path):
    command = "scripts/bench/loader_memory.py", "--images", "200000", "--output", tmp_path / "found.json"
    subprocess.run([sys.executable, *command], cwd=root, check=True)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["growth"]["pss"] < 0.05
    assert found["growth_since_first_batches"]["pss_in_use"] < 0.05
