"""scripts/bench/end_to_end.py: the processes it starts, in the smallest form, and what it makes of their epochs."""

import argparse
import json
from types import SimpleNamespace

import programs
import pytest

from scripts.bench import end_to_end, end_to_end_peers, end_to_end_table

TINY = [
    "--device", "cpu", "--no-compile", "--model", "resnet18", "--size", "32", "--batch", "8", "--epochs", "2",
    "--decoder", "torchvision", "--unique", "4", "--train", "16", "--on-device", "16", "--workers", "1",
    "--repeats", "1", "--runs", "2", "--cifar-train", "500", "--cifar-epochs", "3", "--set", "model.compile=false",
]  # fmt: skip


class Forked:
    """What the benchmark starts by subprocess.Popen, of which it asks this much."""

    def __init__(self, command, cwd, env, stdout, **_):
        program = programs.Program(*command[1:], folder=cwd, environment=env, alone=True, log=stdout.name)
        self.process, self.pid, self.wait = program.process, program.process.pid, program.wait

    def poll(self):
        return self.process.exitcode

    returncode = property(poll)


def bench(tmp_path, *words):
    output = tmp_path / "found.json"
    arguments = [*TINY, "--images", tmp_path / "images", "--output", output, *words]
    assert end_to_end.main([str(argument) for argument in arguments]) == 0
    return json.loads(output.read_text())


def test_training_is_held_against_its_step_and_the_reference_loop(tmp_path, monkeypatch):
    monkeypatch.setattr(end_to_end, "subprocess", SimpleNamespace(Popen=Forked, STDOUT=None))
    results = bench(tmp_path, "--normalizer", "online_clamp", "--data", "jpeg", "--peers", "reference")
    assert {"device", "cores", "commit", "command", "images"} <= set(results) and results["not_run"] == []
    ours, peer = results["rows"]
    assert (ours["program"], ours["normalizer"], ours["decoder"]) == ("train.py", "online_clamp", "torchvision")
    assert peer["normalizer"] == "batch" and "reference" in peer["program"]
    for row in results["rows"]:
        rate, step = row["images_per_second"], row["step_images_per_second"]
        assert row["batch"] == 8 and row["ratio"] == pytest.approx(rate / step, abs=0.01)
    assert (tmp_path / "found.png").stat().st_size > 10_000
    ours["images_per_second"] = 5999.0
    ours["ratio"] = 0.5
    missing = {**ours, "data": "cifar10", "runs": 15, "why": "out of time"}
    page = end_to_end_table.render({**results, "not_run": [missing]})
    assert "| 5,999 |" in page and "| 0.500 |" in page and "6,000 images/s | **no** |" in page
    assert "15 runs side by side" in page and "(out of time)" in page and "Of commit" not in page
    page = end_to_end_table.render({**results, "rows": [{**ours, "commit": "123abc", "command": "one"}, peer]})
    assert "Of commit 123abc: train.py, OnlineNorm" in page and page.endswith("torchvision; `one`\n")
    assert "| yes |" in end_to_end_table.render({**results, "rows": [{**ours, "images_per_second": 6000.0}, peer]})


def test_several_processes_train_a_batch_each_against_the_step_of_all(tmp_path, monkeypatch):
    overrides = []

    def train(self, words, runs):
        overrides.extend(words)
        (tmp_path / "metrics.csv").write_text("images_per_second\n1\n90\n")
        return [(tmp_path, [(0.0, 2), (1.0, 4)])]

    monkeypatch.setattr(end_to_end.Bench, "train", train)
    monkeypatch.setattr(end_to_end.Bench, "peer", lambda self, program, processes, **_: 25.0 * processes)
    results = bench(tmp_path, "--normalizer", "online_clamp", "--data", "jpeg", "--peers", "--processes", "4")
    assert {"trainer.devices=4", "recipe.batch_size=32"} <= set(overrides)
    (row,) = results["rows"]
    assert (row["ratio"], row["batch"], row["wall_images_per_second"], results["processes"]) == (0.9, 8, 64.0, 4)
    page = end_to_end_table.render(results)
    assert "on 4 cpu with" in page and "| 0.90 of the bare step | yes |" in page and "![](end_to_end_4.png)" in page
    with pytest.raises(SystemExit):
        bench(tmp_path, "--data", "cifar10", "--processes", "2")


@pytest.mark.parametrize("normalizer, row", [("online_clamp", "online_global"), ("batch", "batch")])
def test_the_step_of_several_processes_is_that_of_their_own_benchmark(tmp_path, monkeypatch, normalizer, row):
    def run(command, check):
        assert f"--normalizer={row}" in command and "--mode=eager" in command and "--nproc-per-node=3" in command
        output = next(word.partition("=")[2] for word in command if word.startswith("--output="))
        rows = [{"processes": count, "images_per_second": 10.0 * count} for count in (1, 3)]
        end_to_end_peers.Path(output).write_text(json.dumps({"rows": rows}))

    monkeypatch.setattr(end_to_end_peers.subprocess, "run", run)
    output = tmp_path / "step.json"
    words = [f"--normalizer={normalizer}", "--processes=3", "--device=cpu", "--no-compile", f"--output={output}"]
    assert end_to_end_peers.main(["step", *words]) == 0
    assert json.loads(output.read_text()) == {"images_per_second": 30.0}


@pytest.mark.slow
def test_runs_side_by_side_join_what_was_measured_before(tmp_path):
    both = bench(tmp_path, "--normalizer", "batch", "--data", "on_device", "--peers")
    assert [row["data"] for row in both["rows"]] == ["on_device"]
    both = bench(tmp_path, "--normalizer", "batch", "--data", "cifar10", "--peers")
    assert [(row["data"], row["runs"]) for row in both["rows"]] == [("on_device", 1), ("cifar10", 2)]
    assert both["rows"][1]["training_images_per_second"] > 0
    again = bench(tmp_path, "--normalizer", "batch", "--data", "cifar10", "--peers", "--seconds", "3")
    assert [row["data"] for row in again["rows"]] == ["on_device", "cifar10"]  # what cannot be measured stays
    assert [(row["data"], row["why"]) for row in again["not_run"]] == [("cifar10", "out of time")]


def test_rates_of_runs_together_are_of_the_time_in_which_all_train():
    first, second = [(0.0, 10), (10.0, 20), (20.0, 30)], [(4.0, 10), (9.0, 20), (14.0, 30)]
    # from 4 s to 14 s: 1 step/s of the first and 2 steps/s of the second
    assert end_to_end.together([first, second], 100) == pytest.approx(300.0)
    with pytest.raises(end_to_end.NotRun, match="cifar-epochs"):
        end_to_end.together([first, [(21.0, 10), (22.0, 20)]], 100)


def test_processes_end_with_the_time(tmp_path):
    """What fails is told by its last line, what takes too long is ended with its children."""
    bench = end_to_end.Bench(argparse.Namespace(seconds=0.5), tmp_path)
    sleeping = bench.start(["-c", "import time; time.sleep(60)"])
    with pytest.raises(end_to_end.NotRun, match="out of time"):
        bench.follow([sleeping], [])
    assert sleeping[0].returncode is not None
    bench = end_to_end.Bench(argparse.Namespace(seconds=60.0), tmp_path)
    with pytest.raises(end_to_end.NotRun, match="gone wrong"):
        bench.follow([bench.start(["-c", "import sys; print('so'); sys.exit('gone wrong')"])], [])


@pytest.mark.parametrize("words", [["--epochs", "1"], ["--device", "cuda"]])
def test_nonsense_ends_with_usage(words, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        bench(tmp_path, *words)
    assert ended.value.code == 2


def test_timm_may_be_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    bench = end_to_end.Bench(argparse.Namespace(seconds=1.0), None)
    with pytest.raises(end_to_end.NotRun, match="timm is not installed"):
        end_to_end.peer_row(bench, {"program": end_to_end.PEERS["timm"]})


def test_rows_of_other_machines_do_not_stand_together_and_those_of_other_commits_say_so(tmp_path):
    head = {"device": "GPU", "torch": "2", "triton": "3", "commit": "a", "cores": 2, "command": "first"}
    path = tmp_path / "found.json"
    path.write_text(json.dumps({**head, "rows": [{}], "not_run": []}))
    joined = end_to_end.earlier(path, {**head, "command": "second"})
    assert joined["rows"] == [{}] and joined["command"] == "first && second"
    assert end_to_end.earlier(path, {**head, "device": "CPU"})["rows"] == []
    for _ in range(2):  # the second time the row keeps its origin
        joined = end_to_end.earlier(path, {**head, "commit": "b", "command": "second"})
        assert joined["rows"] == [{"commit": "a", "command": "first"}]
        assert (joined["commit"], joined["command"]) == ("b", "second")
        path.write_text(json.dumps({**joined, "commit": "c", "command": "third"}))
