"""scripts/sweep.py: what is missing is run, what failed does not stop the rest, what is done stays."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import programs
import pytest
import yaml
from distributed_runs import TINY
from fake_training import FAKE_RESULTS, FAKE_TRAIN
from tests_training import RESULTS, ROOT, load_train_module

from onlinenorm.data.workers import STOP_SIGNALS
from onlinenorm.errors import ConfigError, FolderInUse, RunError
from onlinenorm.training import matrix
from onlinenorm.training.run_folder import RunFolder
from scripts import sweep

# ends only when two of its kind have met
MEETING_TRAIN = (
    """
import os, sys, time
from pathlib import Path
folder = Path(dict(argument.split("=", 1) for argument in sys.argv[1:])["run_dir"])
(folder / "gpu").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
while len(list(Path("runs").rglob("gpu"))) < 2:
    time.sleep(0.02)
print("met", flush=True)
"""
    + FAKE_RESULTS
)


# goes on once whoever started it is gone, and leaves "ended" in any case
ORPHANED_TRAIN = (
    """
import atexit, os, sys, time
from pathlib import Path
folder = Path(dict(argument.split("=", 1) for argument in sys.argv[1:])["run_dir"])
atexit.register(Path("ended").touch)
sweep = os.getppid()
print("alone soon", flush=True)
Path("waiting").touch()
while os.getppid() == sweep:
    time.sleep(0.02)
print("alone", flush=True)
"""
    + FAKE_RESULTS
)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["normalizer=batch,bach"], "'bach' is not one of its options"),
        (["run_dir=x"], "run_dir: a sweep names its folders itself"),
        (["seed=0,0"], "two runs would share"),
        (["normalizer=batch", "recipe.lr=1,1.0"], "recipe.lr=1/batch/seed0 and runs/default/recipe.lr=1.0/batch/seed0"),
        (
            ["normalizer=online_none,online_clamp", "normalizer.clamp_value=1,5"],
            "clamp_value=1/online_none/seed0 and runs/default/normalizer.clamp_value=5/online_none/seed0: are two",
        ),
        (["recipe.epocs=1,2"], "did you mean recipe.epochs"),
        (["normalizer=batch", "normalizer.momentum=0.1,7"], "normalizer.momentum: 7 must be larger than 0 and at most"),
        (["normalizer=group", "normalizer.num_groups=1,3"], "normalizer.num_groups: 3"),
        (["recipe.lr=0.1,-1"], "recipe.lr: must be a number > 0, got -1"),
        (["data.image_size=8,4"], "data.image_size: 4 is not a whole number 8 or larger"),
        (["recipe.augmentation=none,crop"], "recipe.augmentation: 'crop' is not"),
    ],
)
def test_nothing_starts_where_one_row_cannot_be_meant(run_sweep, tmp_path, arguments, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        run_sweep(*arguments)
    assert not (tmp_path / "runs").exists()


def test_folders_of_another_configuration_are_not_called_done(run_sweep, tmp_path):
    """All but the trainer is compared: what it resolves to is known only on the machine that trains."""
    (row,) = sweep.plan([*TINY, "normalizer=batch"], tmp_path / "runs")
    config = load_train_module().load_config(list(row.overrides))
    row.folder.mkdir(parents=True)
    (row.folder / "config.yaml").write_text(yaml.safe_dump(config | {"trainer": {"accelerator": "gpu"}}))
    (row.folder / "results.json").write_text(json.dumps(RESULTS))
    assert run_sweep("normalizer=batch") == 0
    with pytest.raises(ConfigError, match=r"another configuration:\n  recipe.lr: 0.1 -> 0.7"):
        run_sweep("normalizer=batch", "recipe.lr=0.7")


def test_a_failure_does_not_stop_the_others_and_only_what_is_missing_is_run(run_sweep, tmp_path, capsys):
    arguments = ("normalizer=batch", "recipe.lr=9,0.1")
    assert run_sweep(*arguments) == 1
    shown = capsys.readouterr().out
    assert "1 done, 1 failed" in shown and "0 s of computing left" in shown, "a failed row has no time left"
    assert re.search(r"failed +0/3 +-  runs", shown)
    failed, done = (tmp_path / "runs" / "default" / f"recipe.lr={lr}" / "batch" / "seed0" for lr in ("9", "0.1"))
    assert (failed / "failed.txt").read_text() == "exit code 1\nepoch 1/3\nthe loss became NaN\n"
    assert (done / "output.log").read_text() == "epoch 1/3\n"
    (tmp_path / "repaired").touch()
    assert run_sweep(*arguments) == 0
    assert (failed / "started").read_text() == "xx" and (done / "started").read_text() == "x"
    shown = capsys.readouterr().out
    assert (
        "2 done; 0 s of computing left" in shown
        and f"{failed.relative_to(tmp_path)}  (after 1 failed attempt)" in shown
    )
    assert (failed / "attempts" / "1" / "failed.txt").read_text().endswith("the loss became NaN\n")
    assert run_sweep(*arguments, "--status") == 0


def test_dry_run_starts_nothing(run_sweep, tmp_path, capsys):
    assert run_sweep("normalizer=batch,group", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "2 missing" in shown and "run_dir=runs/default/group/seed0" in shown and "python train.py" in shown
    assert run_sweep("normalizer=batch,group", "--status") == 1
    assert not (tmp_path / "runs").exists()


def test_a_run_that_is_under_way_is_left_alone(run_sweep, tmp_path, capsys):
    folder = tmp_path / "runs" / "default" / "batch" / "seed0"
    folder.mkdir(parents=True)
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a+'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(folder / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        assert run_sweep("normalizer=batch") == 1
        assert "1 running" in capsys.readouterr().out and not (folder / "started").exists()
        other.communicate(b"\n")
    assert run_sweep("normalizer=batch") == 0


def test_stopping_the_sweep_lets_the_run_save_itself(run_sweep, tmp_path):
    (tmp_path / "slow").touch()
    watch = f"until [ -e {tmp_path}/waiting ]; do sleep 0.02; done; kill -INT {os.getpid()}"
    with subprocess.Popen(["bash", "-c", watch]):
        assert run_sweep("normalizer=batch,group") == 128 + signal.SIGINT
    batch, group = (tmp_path / "runs" / "default" / name for name in ("batch", "group"))
    assert (batch / "seed0" / "saved").read_text() == "SIGINT", "the run says what has stopped it"
    assert not (batch / "seed0" / "failed.txt").exists()
    assert not group.exists(), "the next run is not begun"


def test_a_run_outlives_a_sweep_that_is_killed(run_sweep, tmp_path):
    (tmp_path / "train.py").write_text(ORPHANED_TRAIN)
    start = "from pathlib import Path; from scripts import sweep;"
    start += f"sweep.ROOT = Path.cwd(); sweep.main({[*TINY, 'normalizer=batch']})"
    with programs.running(tmp_path, "-c", start) as (killed, pipe):
        assert any(b"alone soon" in line for line in pipe), "the sweep shows what the run prints"
        while not (tmp_path / "waiting").exists():
            time.sleep(0.02)
        killed.kill()
    while not (tmp_path / "ended").exists():
        time.sleep(0.02)
    folder = tmp_path / "runs" / "default" / "batch" / "seed0"
    assert (folder / "output.log").read_text() == "alone soon\nalone\n"
    assert run_sweep("normalizer=batch", "--status") == 0


def test_lines_that_grow_are_shown_whole(run_sweep, tmp_path, capsys):
    parts = "import os, time\nfor part in (b'h', b'\\xc3', b'\\xbc\\n', b'last'): os.write(1, part); time.sleep(0.3)\n"
    (tmp_path / "train.py").write_text(parts + "raise SystemExit(3)")
    assert run_sweep("normalizer=batch") == 1
    assert "\n  hü\n  last" in capsys.readouterr().out
    failed = tmp_path / "runs" / "default" / "batch" / "seed0" / "failed.txt"
    assert failed.read_text(encoding="utf-8") == "exit code 3\nhü\nlast"


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_run_that_is_stopped_before_it_hears_signals_has_not_failed(run_sweep, tmp_path, number):
    (tmp_path / "train.py").write_text(
        f"import os, signal; signal.signal({int(number)}, signal.SIG_DFL); os.kill(os.getpid(), {int(number)})"
    )
    assert run_sweep("normalizer=batch") == 1
    assert not (tmp_path / "runs" / "default" / "batch" / "seed0" / "failed.txt").exists()


def test_several_at_a_time_on_the_gpus_in_turn(run_sweep, tmp_path, monkeypatch, capsys):
    (tmp_path / "train.py").write_text(MEETING_TRAIN)
    monkeypatch.setattr(matrix, "visible_gpus", lambda: ["4", "7"])
    assert run_sweep("normalizer=batch,group", "--parallel", "2") == 0
    folders = [tmp_path / "runs" / "default" / name / "seed0" for name in ("batch", "group")]
    assert sorted((folder / "gpu").read_text() for folder in folders) == ["4", "7"]
    shown = capsys.readouterr().out
    assert all(f"{folder.relative_to(tmp_path)}  met" in shown for folder in folders)


def test_runs_on_several_gpus_are_not_taken_side_by_side(run_sweep, capsys):
    with pytest.raises(SystemExit):
        run_sweep("normalizer=batch", "trainer.devices=2", "--parallel", "2")
    assert "--parallel: runs on several GPUs" in capsys.readouterr().err


def test_visible_gpus_are_those_that_the_user_left(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert matrix.visible_gpus() == ["2", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert matrix.visible_gpus() == []


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """slurm(command, script) puts a stand-in for one of SLURM's commands in front of PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def install(command, script):
        (folder / command).write_text(f"#!/bin/sh\n{script}\n")
        (folder / command).chmod(0o755)

    return install


def test_jobs_that_left_the_queue_without_results_have_failed(run_sweep, tmp_path, slurm, capsys):
    slurm("sbatch", 'echo "$@" >>submitted; echo 7')
    slurm("squeue", "echo asked >>asked; echo '7|PENDING'")
    script = tmp_path / "row.sbatch"
    assert run_sweep("normalizer=batch", "--sbatch", str(script), "--dry-run") == 0
    assert not (tmp_path / "asked").exists(), "nothing was submitted"
    assert run_sweep("normalizer=batch", "--sbatch", str(script)) == 0
    assert "1 queued" in capsys.readouterr().out
    folder = tmp_path / "runs" / "default" / "batch" / "seed0"
    submitted = (tmp_path / "submitted").read_text()
    assert f"{script} " in submitted and f"run_dir={folder}" in submitted and "normalizer=batch" in submitted
    assert run_sweep("normalizer=batch", "--sbatch", str(script)) == 0, "not twice"
    assert (tmp_path / "submitted").read_text() == submitted
    slurm("squeue", "echo slurm_load_jobs error: no controller >&2; exit 1")
    with pytest.raises(RunError, match=r"squeue: exit code 1 \(slurm_load_jobs error: .*\).* still waits or"):
        run_sweep("normalizer=batch", "--sbatch", str(script))
    assert (tmp_path / "submitted").read_text() == submitted
    slurm("squeue", "")
    assert run_sweep("normalizer=batch", "--status") == 1
    assert "1 failed" in capsys.readouterr().out
    (folder / "results.json").write_text(json.dumps(RESULTS))
    slurm("squeue", "exit 1")
    assert matrix.queued_jobs([SimpleNamespace(folder=folder, job=folder / "job.txt")]) == {}, "done, so not asked"


@pytest.mark.slow
def test_a_real_matrix(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [*TINY, "recipe.epochs=1", "recipe.milestones=[]", "normalizer=batch,none", "seed=0"]
    command = [sys.executable, str(ROOT / "scripts" / "sweep.py"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "2 done" in done.stdout, done.stdout + done.stderr
    assert (tmp_path / "runs" / "default" / "none" / "seed0" / "results.json").exists()


def test_a_diverged_run_is_not_run_again_unless_asked(run_sweep, tmp_path, capsys):
    (tmp_path / "train.py").write_text(
        FAKE_TRAIN.replace("the loss became NaN", "the loss became NaN or infinite at step 3")
    )
    folder = tmp_path / "runs" / "default" / "batch" / "seed0"
    for times in (1, 1):
        assert run_sweep("normalizer=batch", "recipe.lr=9") == 1
        assert (folder / "started").read_text() == "x" * times
        shown = capsys.readouterr().out
        assert re.search(r"diverged +0/3 +-  runs", shown) and "--retry starts them once more" in shown
    assert run_sweep("normalizer=batch", "recipe.lr=9", "--status") == 1
    (tmp_path / "repaired").touch()
    assert run_sweep("normalizer=batch", "recipe.lr=9", "--retry") == 0 and (folder / "started").read_text() == "xx"


@pytest.mark.parametrize(
    "name, content",
    [
        ("results.json", '{"schema": 1'),
        ("metrics.csv", "epoch,seconds\n1,abc\n"),
        ("metrics.csv", b"\xff\xfe"),
        ("attempts/1/environment.json", ""),
        ("failed.json", "{}"),
    ],
)
def test_damaged_records_are_told_by_name(run_sweep, tmp_path, name, content):
    assert run_sweep("normalizer=batch") == 0
    file = tmp_path / "runs" / "default" / "batch" / "seed0" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    if name == "failed.json":
        (file.parent / "results.json").unlink()
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RunError, match=rf"/{name}: is damaged \(.*; delete it"):
        run_sweep("normalizer=batch", "--status")


def test_a_run_that_another_sweep_has_begun_has_not_failed(run_sweep, tmp_path):
    """Both found it missing; the lock refuses the second."""
    (tmp_path / "train.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from onlinenorm.errors import FolderInUse, cli_errors\n"
        "with cli_errors(): raise FolderInUse('another run is writing')"
    )
    assert run_sweep("normalizer=batch") == 1
    folder = tmp_path / "runs" / "default" / "batch" / "seed0"
    assert "another run is writing" in (folder / "output.log").read_text() and not (folder / "failed.txt").exists()
    (folder / "failed.txt").write_text("exit code 1")
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a+'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(folder / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        with pytest.raises(FolderInUse):
            RunFolder(folder).keep_attempt()
        matrix.submit(matrix.Row((), folder, "batch", 3), tmp_path / "row.sbatch", tmp_path)  # without an sbatch here
        other.communicate(b"\n")
    assert (folder / "failed.txt").exists(), "its attempt is the other's"


def test_a_place_for_runs_that_is_none_is_told(run_sweep, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--runs: .*file is a file, not a folder"):
        run_sweep("normalizer=batch", "--runs", str(tmp_path / "file"))

    def read_only(self, *_, **__):
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", read_only)
        assert run_sweep("normalizer=batch", "--runs", "elsewhere") == 1
    assert re.search(r"run_dir: elsewhere/.* cannot be made \(Read-only file system\)", capsys.readouterr().err)
