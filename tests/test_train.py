"""train.py as people call it: messages, the run folder, multirun, kill -9."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import programs
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "training"))
from tests_training import ROOT, TINY, load_train_module, outcome

from onlinenorm.cli.files import GROUPS
from onlinenorm.data import DataError
from onlinenorm.errors import ConfigError, Interrupted, RunError, cli_errors
from onlinenorm.training.checkpoint import resumable
from onlinenorm.training.config_check import check_config
from onlinenorm.training.epoch_log import COLUMNS
from onlinenorm.training.final_validation import parameters_sha256

train = load_train_module()


def call(folder, *arguments):
    return programs.call(ROOT / "train.py", *arguments, folder=folder)


@pytest.mark.parametrize(
    "override, message",
    [
        ("normaliser=batch", r"^normaliser: no such key; did you mean normalizer\?$"),
        ("recipe.epocs=3", r"^recipe.epocs: no such key; did you mean recipe.epochs\?$"),
        ("+recipe.epocs=3", r"^recipe.epocs: no such key; did you mean recipe.epochs\?$"),
        ("++normalizer.alpha_fw=0.5", r"did you mean normalizer.alpha_fwd\?"),
        ("normalizer=online_clmap", r"^normalizer: 'online_clmap' .* did you mean normalizer=online_clamp\?$"),
        ("normalizer.alpha_fwd=1.5", r"^normalizer.alpha_fwd: 1.5 must be .*0 < alpha_fwd < 1"),
        ("normalizer.backend=tortch", r"^normalizer.backend: .*did you mean torch"),
        ("recipe.milestones=[200]", r"^recipe.milestones: 200 lies past the last epoch \(100\)"),
        ("recipe.epochs=many", r"^recipe.epochs: 'many' is not a whole number$"),
        ("trainer.foo.bar=1", r"^trainer.foo.bar: no such key"),
        (
            "experiment=null",
            r"^experiment: None is not one of its options; there are batch_size, cifar10, cifar100, embedded",
        ),
        ("~normalizer", r"^normalizer: is missing"),
        ("recipe.batch_size=[", r"^recipe.batch_size: '\[' cannot be read .*quote it: 'recipe.batch_size=\"\[\"'$"),
        ("normalizer._target_=os.system", r"^normalizer._target_: 'os.system' is refused"),
        ("experiment=quickstart data.root=/photos", r"^data.root: /photos would not be read: .*data=imagenet"),
        ("data=synthetic data.root=/photos", r"^data.root: /photos would not be read"),
        *(
            (f"data={name} data.root=", r"^data.root: is empty, as of a shell variable that is not set; name a folder")
            for name in ("imagenet", "imagenette", "tiny_imagenet", "cifar10", "fashion_mnist", "embedded", "synthetic")
        ),
    ],
)
def test_mistakes_get_one_message_that_names_the_key(override, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        train.train(train.load_config(override.split(" ")))
    assert not list(tmp_path.iterdir()), "nothing is made for a run that cannot start"


def test_missing_data_is_told_in_one_screen(tmp_path):
    done = call(tmp_path, "experiment=table1")
    assert done.returncode == 1 and done.stdout.startswith(
        "runs/table1/online_clamp/seed0: new run: normalizer=online_clamp "
    )
    assert len(done.stdout.splitlines()) == 2, "what is about to start, at once: the rest may take long"
    assert done.stderr.startswith("data.root: ") and "Then: python train.py experiment=table1 data.root=" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) < 24
    with pytest.raises(DataError, match=r"^data.root: .*/nowhere"):
        train.train(train.load_config(["data.root=/nowhere", f"run_dir={tmp_path / 'run'}"]))
    assert not (tmp_path / "run").exists(), "nothing is made for a run that cannot start"


@pytest.mark.parametrize(
    "error, code",
    [
        (ConfigError("recipe.epocs: no such key"), 2),
        (RunError("disk full"), 1),
        (DataError("root: nothing there"), 1),
        (Interrupted("SIGTERM: saved", signal.SIGTERM), 143),
        (torch.OutOfMemoryError("CUDA out of memory.\nlong"), 1),
    ],
)
def test_deliberate_errors_are_the_message_alone_and_an_exit_code(error, code, capsys):
    with pytest.raises(SystemExit) as left, cli_errors():
        raise error
    assert left.value.code == code
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith(str(error).splitlines()[0]) and "Traceback" not in told.err
    with pytest.raises(KeyError), cli_errors():
        raise KeyError("a bug keeps its traceback")


def test_hydras_own_switches_work(tmp_path):
    done = call(tmp_path, "--cfg", "job", "experiment=quickstart")
    assert done.returncode == 0 and "cifar_resnet8" in done.stdout
    assert not list(tmp_path.iterdir())


def every_choice():
    for group in GROUPS:
        for file in sorted((ROOT / "configs" / group).glob("*.yaml")):
            yield f"{group}={file.stem}"


@pytest.mark.parametrize("choice", list(every_choice()))
def test_every_file_of_every_group_composes_and_checks(choice):
    check_config(train.load_config([choice]))


def test_experiments_say_what_their_heads_say():
    table1 = train.load_config(["experiment=table1"])
    assert table1["choices"]["model"] == "resnet50" and table1["recipe"]["epochs"] == 100
    assert table1["recipe"]["batch_size"] == 32 and table1["recipe"]["milestones"] == [30, 60, 80, 90]
    assert train.load_config(["experiment=quickstart", "recipe.epochs=7"])["recipe"]["epochs"] == 7


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder of a finished run of the clamp row in its own place, its results)."""
    here = tmp_path_factory.mktemp("here")
    before = os.getcwd()
    os.chdir(here)
    try:
        results = train.train(train.load_config([*TINY, "normalizer=online_clamp", "seed=3"]))
    finally:
        os.chdir(before)
    return here / "runs" / "default" / "online_clamp" / "seed3", results


def test_run_folder(finished):
    folder, returned = finished
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == {
        "config.yaml", "environment.json", "metrics.csv", "clamping.csv", "results.json", "checkpoints",
        "predictions.npz",
    }  # fmt: skip
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"last.ckpt", "previous.ckpt", "best.ckpt"}
    results, rows, predictions = outcome(folder)
    assert json.loads((folder / "results.json").read_text()) == returned
    assert [row["epoch"] for row in rows] == ["1", "2", "3"] and [row["step"] for row in rows] == ["4", "8", "12"]
    assert (folder / "metrics.csv").read_text().splitlines()[0] == ",".join(COLUMNS)
    assert results["experiment"] == "default" and results["seed"] == 3 and results["scale"] == "synthetic"
    assert results["dataset"] == {**results["dataset"], "train_images": 70, "val_images": 21}
    assert results["best_loss"]["val_loss"] == min(float(row["val_loss"]) for row in rows)
    assert results["best_top1"]["val_top1"] == max(float(row["val_top1"]) for row in rows)
    assert float(rows[2]["lr"]) == pytest.approx(float(rows[1]["lr"]) / 10), "milestone 2: the third epoch is slower"
    assert sorted(predictions) == ["index", "label", "with_clamp", "without_clamp"]
    assert predictions["index"] == list(range(21))
    hits = np.array(predictions["with_clamp"]) == predictions["label"]
    assert results["clamping"]["with"]["val_top1"] == pytest.approx(hits.mean()) == results["last"]["val_top1"]
    assert results["clamping"]["with"]["val_loss"] == results["last"]["val_loss"]
    changed = np.array(predictions["with_clamp"]) != predictions["without_clamp"]
    assert results["clamping"]["changed_predictions"] == changed.sum() and results["clamping"]["layers"] == 9


def test_checkpoint_weights_are_those_of_the_results(finished):
    folder, results = finished
    last = resumable(folder / "checkpoints")
    assert last[1] == {"epoch": 3, "step": 0, "global_step": 12}
    state = torch.load(last[0], weights_only=True)["state_dict"]

    class Network:
        @staticmethod
        def state_dict():
            return {name.removeprefix("network."): value for name, value in state.items()}

    assert parameters_sha256(Network) == results["parameters_sha256"]


def test_multirun_is_checked_job_by_job_before_the_first_starts():
    jobs = train.jobs(["normalizer=batch,bach", "seed=range(2)", "recipe.milestones=[1,2]", "~recipe.lr"])
    assert len(jobs) == 4 and jobs[0] == ["normalizer=batch", "seed=0", "recipe.milestones=[1,2]", "~recipe.lr"]
    with pytest.raises(ConfigError, match=r"'bach' is not one of its options; did you mean normalizer=batch"):
        [train.load_config(job) for job in jobs]
    with pytest.raises(ConfigError, match=r"^normalizer.momentum: 7 must be larger than 0 and at most 1"):
        train.main(["-m", *TINY, "normalizer=batch", "normalizer.momentum=0.1,7"])


def test_multirun_makes_a_folder_a_job_and_nothing_else(tmp_path):
    done = call(tmp_path, "-m", *TINY, "recipe.epochs=1", "recipe.milestones=[]", "normalizer=batch,none")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]
    assert {path.parent.parent.name for path in tmp_path.rglob("results.json")} == {"batch", "none"}


def test_kill_9_then_the_same_command(tmp_path, finished):
    undisturbed = finished[0]
    arguments = [
        *TINY,
        "normalizer=online_clamp",
        "seed=3",
        "trainer.checkpoint_every_n_steps=1",
        f"run_dir={tmp_path}",
    ]
    run = programs.Program(ROOT / "train.py", *arguments)
    deadline = time.monotonic() + 60
    while not (tmp_path / "checkpoints" / "previous.ckpt").exists() and run.process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    run.process.kill()
    assert run.wait().returncode == -signal.SIGKILL and not (tmp_path / "results.json").exists()
    assert train.train(train.load_config(arguments))["resumed"] == 1
    assert outcome(tmp_path) == outcome(undisturbed)
