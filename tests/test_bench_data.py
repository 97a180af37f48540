import importlib.util
import json
import sys

import pytest


def load(root, name):
    sys.path.insert(0, str(root / "scripts"))
    spec = importlib.util.spec_from_file_location(name, root / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench(root):
    return load(root, "bench_data")


def test_generated_files_have_the_sizes_of_imagenet(root, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "scripts"))
    jpeg_set = importlib.import_module("jpeg_set")  # by its name: its functions go to other processes
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


def test_loaders_are_measured_beside_the_reference(bench, tmp_path, capsys):
    output = tmp_path / "bench.json"
    arguments = ["--images", tmp_path / "images", "--unique", 4, "--train", 64, "--rounds", 1, "--seconds", "0.3"]
    arguments += ["--batch", 2, "--workers", 1, "--stages", "decode,loader", "--output", output]
    for _ in range(2):  # the same machine: in place of the first
        assert bench.main([str(argument) for argument in arguments]) == 0
    (run,) = json.loads(output.read_text())["runs"]
    assert {"device", "cores", "versions", "git", "command", "images"} <= set(run)
    for stage in ("decode", "loader"):
        rows = {row["provider"]: row for row in run["rows"] if row["stage"] == stage}
        assert {bench.REFERENCE, "pillow", "torchvision"} <= set(rows)
        assert rows[bench.REFERENCE]["ratio"] == 1 and all(row["images_per_second"] > 0 for row in rows.values())
    assert output.with_suffix(".png").stat().st_size > 10_000


def test_the_verdict_names_what_is_short(bench):
    def rows(loader, training):
        return [
            {"stage": "loader", "provider": bench.REFERENCE, "images_per_second": 9e9},
            {"stage": "loader", "provider": "pillow", "images_per_second": loader},
            {"stage": "training", "provider": "resident batch", "images_per_second": training},
        ]

    assert bench.verdict(rows(1300.0, 1000.0)) == "fastest path pillow: 1,300 images/s, 1.30 x training's 1,000"
    assert bench.verdict(rows(900.0, 1000.0)).endswith("0.90 x training's 1,000; short of 1.2 x by 300 images/s")
    assert bench.verdict([]) == ""


@pytest.mark.slow
def test_memory_of_workers_stays_flat(root, tmp_path):
    script = load(root, "loader_memory")
    assert script.main(["--images", "200000", "--output", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["growth"]["pss"] < 0.05 and found["start_up_seconds"] < 2
    assert found["growth_since_first_batches"]["pss_in_use"] < 0.05
