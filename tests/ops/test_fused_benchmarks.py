"""The benchmark scripts run end to end at a tiny size, and their files have the agreed form."""

import importlib
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import programs
import pytest

pytest.importorskip("triton")

ROOT = str(Path(__file__).parents[2])


@pytest.fixture
def script():
    return importlib.import_module


def test_training_benchmark_writes_rows_and_a_picture(script, tmp_path):
    path = tmp_path / "bench.json"
    options = (
        "--normalizer batch online_clamp --backend torch --model resnet18 --size 32 --batch 2 --mode eager "
        "--dtype bf16 --rounds 2 --repeats 1 --optimizer without --stem space_to_depth"
    )
    script("scripts.bench.training").main([*options.split(), "--device", "cpu", "--output", str(path)])
    results = json.loads(path.read_text())
    assert {"device", "torch", "triton", "commit", "command", "rows"} <= results.keys()
    assert [row["normalizer"] for row in results["rows"]] == ["batch", "online_clamp"]
    columns = (
        "normalizer backend stem compiler mode dtype batch optimizer milliseconds images_per_second peak_memory_gib "
        "repeat_spread rounds"
    )
    assert all(list(row) == columns.split() for row in results["rows"])
    assert path.with_suffix(".png").stat().st_size > 1000
    page = script("scripts.bench.training_table").render(results)
    assert page.startswith("# A training step of resnet18 at 32 px on one ")
    assert "Rounds that a row was measured in: 2." in page


def test_the_rival_has_every_compiler_and_stem_and_the_deciding_rows_come_first(script):
    bench = script("scripts.bench.training")
    args = SimpleNamespace(
        compiler=list(bench.COMPILERS), stem=list(bench.STEMS), dtype=["bf16", "fp16"], batch=[32, 256],
        normalizer=["batch", "online_clamp"], mode=list(bench.MODES), backend=["fused"],
    )  # fmt: skip
    networks = [network for network, _ in bench.networks_of(args)]
    assert len(set(networks)) == len(networks)
    rivals = {key[2:4] for key in networks if key[0] == "batch" and key[4:] == ("bf16", 256)}
    assert rivals == {(stem, compiler) for stem in bench.STEMS for compiler in (*bench.COMPILERS, None)}
    ours = {key[2:] for key in networks if key[0] == "online_clamp"}
    assert ours == {*itertools.product(bench.STEMS[:1], ("default", None), args.dtype, args.batch)}
    decisive = [key for key in networks if key[3] is not None and key[4] == "bf16"]
    assert networks[: len(decisive)] == decisive


def test_sites_are_those_of_the_network(script):
    found = script("scripts.bench.norm_sites").sites("resnet50", 64)
    assert found.total() == 53
    assert sum(count for (*_, residual, _), count in found.items() if residual) == 16
    assert found[64, 32, False, True] == 1


def test_summary_compares_the_best_rows(script):
    def row(name, speed, memory=1.0, dtype="bf16"):
        return {
            "normalizer": name, "batch": 32, "optimizer": False, "mode": "graph", "dtype": dtype,
            "images_per_second": speed, "peak_memory_gib": memory,
        }  # fmt: skip

    rows = [row("batch", 90.0, 1.2), row("batch", 100.0, 1.0, "fp16"), row("online_clamp", 110.0, 1.5)]
    lines = script("scripts.bench.training").summary(rows)
    assert lines == ["N = 32, forward and backward: online_clamp / batch = 1.100 in speed, 1.250 in peak memory"]


def collected(where):
    """Name, file and whether it is marked gpu of every test there, found in this process, which has loaded them."""
    items = []

    class Collected:
        @staticmethod
        def pytest_collection_finish(session):
            items.extend(session.items)

    own = f"--rootdir={ROOT}", f"--config-file={ROOT}/pyproject.toml"
    options = "--collect-only", "-qq", "-p", "no:cacheprovider", "-o", "addopts="
    pytest.main([*own, *options, where], plugins=[Collected()])
    return [(item.nodeid, str(item.path), item.get_closest_marker("gpu") is not None) for item in items]


def test_every_gpu_test_is_recorded(script, monkeypatch):
    gpu_tests, every = script("scripts.dev.gpu_tests"), collected(f"{ROOT}/tests")
    text = [name for name, file, _ in every if file.endswith("/tests/test_text.py")]
    assert gpu_tests.collected("tests/test_text.py") == text != []

    def from_these(*words):
        return [name for name, file, marked in every if file in words and (marked or words[:2] != ("-m", "gpu"))]

    monkeypatch.setattr(gpu_tests, "collected", from_these)
    found = gpu_tests.gpu_tests()
    assert {name for name, _, marked in every if marked} <= set(found) and len(set(found)) == len(found) > 100
    assert "tests/training/test_resume.py" not in {test.partition("[")[0] for test in found}


def test_a_red_gate_stops_the_benchmark(script, monkeypatch):
    common = script("scripts.bench.common")
    monkeypatch.setattr(common, "_distance", lambda found, truth: float("nan"))
    with pytest.raises(SystemExit, match="gate: torch"):
        common.gate(common.torch.device("cpu"), "torch", shapes=[(2, 3, 2, 2)])


@pytest.mark.parametrize(
    "kernel, part",
    [
        ("online_norm_forward", "norm: single-read kernels"),
        ("triton_poi_fused_add_max_pool2d_with_indices_backward_10", "max-pool"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16", "convolutions and matrix products"),
        ("triton_red_fused__native_batch_norm_legit_functional_8", "norm: Triton"),
        ("triton_poi_fused__to_copy_21", "casts of weights"),
        ("something new", "other"),
    ],
)
def test_each_kernel_of_a_step_belongs_to_a_part(script, kernel, part):
    assert script("scripts.bench.kernels").part_of(kernel) == part


def test_kernels_are_not_measured_without_a_gpu(script, monkeypatch, capsys):
    kernels = script("scripts.bench.kernels")
    monkeypatch.setattr(kernels.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        kernels.main([])
    assert "need a GPU of the Hopper generation" in capsys.readouterr().err


TESTS = '''
import pytest


@pytest.mark.parametrize("k", [1, 2])
def test_holds(k):
    """What holds,
    in one sentence.

    And more.
    """
    print(f"apart by {k}")


def test_fails():
    assert 1 + 1 == 3


@pytest.fixture
def absent():
    pytest.skip("one GPU")


def test_second_gpu(absent):
    pass
'''


def test_tests_on_a_gpu_are_recorded_one_by_one(script, tmp_path):
    """In a process of its own, which is told that there is a GPU."""
    (tmp_path / "test_all.py").write_text(TESTS)
    told = "import torch; from scripts.dev import gpu_tests; torch.cuda.is_available = lambda: True; "
    told += "torch.cuda.get_device_name = lambda device: 'a GPU'; raise SystemExit(gpu_tests.main())"
    done = programs.call("-c", told, tmp_path / "test_all.py", "--output", tmp_path / "gpu_tests.json")
    assert done.returncode == 1, done.stdout + done.stderr
    results = json.loads((tmp_path / "gpu_tests.json").read_text())
    assert results["device"] == "a GPU" and [row["outcome"] for row in results["tests"]] == [
        "passed", "passed", "failed", "skipped",
    ]  # fmt: skip
    page = (tmp_path / "gpu_tests.md").read_text()
    assert page == script("scripts.dev.gpu_tests").render(results)
    assert "| What holds, in one sentence. | 2 passed |" in page and "apart by 1<br>apart by 2" in page
    assert "second gpu | 1 skipped |" in page and "Skipped: one GPU" in page
    assert "assert (1 + 1) == 3" in page


def test_processes_side_by_side_share_the_tests_and_their_records(script, tmp_path):
    gpu_tests = script("scripts.dev.gpu_tests")
    parts = gpu_tests.split({"a": 1.0, "b": 9.0, "c": 2.0, "d": 3.0, "e": 3.0}, 2)
    assert sorted(map(sorted, parts)) == [["a", "c", "d", "e"], ["b"]]
    assert gpu_tests.split({"a": 1.0}, 3) == [["a"]]
    row = {"summary": "", "seconds": 1.0, "printed": "", "outcome": "passed"}
    (tmp_path / "0.json").write_text(json.dumps({"tests": [{"test": "b", **row}]}))
    both = gpu_tests.merged({"device": "a GPU"}, [tmp_path / "0.json", tmp_path / "1.json"], ["a", "b"])
    assert both["device"] == "a GPU"
    assert [(found["test"], found["outcome"]) for found in both["tests"]] == [("a", "not run"), ("b", "passed")]


def test_tests_that_were_not_reached_are_recorded_as_such(script, tmp_path):
    item = SimpleNamespace(nodeid="test_all.py::test_later", obj=lambda: None)
    recorder = script("scripts.dev.gpu_tests").Recorder(tmp_path / "tests.json", {"tests": []})
    recorder.pytest_collection_finish(SimpleNamespace(items=[item]))
    (row,) = json.loads((tmp_path / "tests.json").read_text())["tests"]
    assert (row["outcome"], row["summary"]) == ("not run", "")
