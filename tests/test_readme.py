"""The README's commands run, its files exist, its tables are the recorded ones."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jinja2 import UndefinedError

from onlinenorm.cli.compose import load_config
from scripts.dev.readme import filled

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHRUNK = ["recipe.epochs=1", "recipe.milestones=[]", "recipe.batch_size=16", "data.limit_train=32", "data.limit_val=16"]


def environment():
    return {**os.environ, "VENV": sys.prefix, "OMP_NUM_THREADS": "1"}


def test_readme_is_short_and_soon_has_a_command():
    assert len(README.splitlines()) <= 100 and max(map(len, README.splitlines())) <= 200
    before, _, after = README.partition("```bash\n")
    assert after.startswith("scripts/quickstart.sh") and len(before.split()) <= 150


@pytest.fixture
def checkout(tmp_path):
    """A copy of what quickstart.sh needs."""
    for name in ("onlinenorm", "configs", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    sources = b"".join((ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))
    made_of = hashlib.sha256(sources).hexdigest()
    if all(stamp.read_text().strip() != made_of for stamp in Path(sys.prefix).glob(".installed*")):
        pytest.skip(f"{sys.prefix} was not made by scripts/environment.sh: the script would install into it")
    return tmp_path


def test_quickstart_tells_of_runs_of_other_settings_before_it_trains(checkout):
    other = checkout / "runs/quickstart/group/seed0"
    other.mkdir(parents=True)
    config = load_config(["experiment=quickstart", "normalizer=group", "data.limit_train=1500"])
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    (other / "environment.json").write_text("{}")
    done = subprocess.run([checkout / "scripts/quickstart.sh"], env=environment(), capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "" and "data.limit_train: null (this command) | 1500" in done.stderr
    assert "Nothing was trained" in done.stderr and "--fresh" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in (checkout / "runs/quickstart").iterdir()] == ["group"]


def test_quickstart_from_nothing_to_table(checkout):
    """The script itself in a copy of the repository: runs, table, and the same table again without training."""
    call = [str(checkout / "scripts/quickstart.sh"), *SHRUNK]
    first = subprocess.run(call, env=environment(), capture_output=True, text=True, check=True).stdout
    for label in ("OnlineNorm (activation clamping)", "OnlineNorm (layer scaling)", "BatchNorm"):
        assert label in first
    assert "not ImageNet" in first
    before = (checkout / "runs/quickstart/batch/seed0/results.json").stat().st_mtime_ns
    again = subprocess.run(call, env=environment(), capture_output=True, text=True, check=True).stdout
    assert (checkout / "runs/quickstart/batch/seed0/results.json").stat().st_mtime_ns == before
    assert "BatchNorm" in again


def test_named_files_exist():
    named = re.findall(r"`((?:onlinenorm|configs|scripts|tests)/[\w./]+)`", README)
    linked = re.findall(r"\]\(((?!http)[\w./-]+)\)", README)
    assert named and linked
    assert [path for path in (*named, *linked) if not (ROOT / path).exists()] == []


def test_figures_of_the_readme_are_those_recorded(tmp_path):
    rows = [
        {"normalizer": name, "batch": batch, "dtype": "bf16", "optimizer": True, "backend": backend}
        | {"images_per_second": speed}
        for name, batch, backend, speed in (
            ("batch", 32, "torch", 1000.0), ("batch", 32, "torch", 1250.0), ("online_clamp", 32, "fused", 2000.4),
            ("online_clamp", 32, "torch", 9000.0),
        )
    ]  # fmt: skip
    rows.append(rows[0] | {"optimizer": False, "images_per_second": 8000.0})
    table = {
        "scale_label": "S, not ImageNet (7 images, 3 epochs)",
        "rows": [
            {"normalizer": "batch", "seeds": [0, 4], "published": {"best_top1": 0.7641}}
            | {"summaries": {"best_top1": {"mean": 0.9126}}}
        ],
        "comparisons": [
            {"first": "a", "second": "batch", "metric": "best_top1", "margin": 0.005, "verdict": {"outcome": "equal"}},
            {"first": "a", "second": None, "metric": "best_top1", "margin": 1, "verdict": {"outcome": "other"}},
        ],
    }
    (tmp_path / "bench_training.json").write_text(json.dumps({"device": "D", "rows": rows}))
    for study in ("s", "fashion_mnist"):
        (tmp_path / "study" / study).mkdir(parents=True)
        (tmp_path / "study" / study / "table1.json").write_text(json.dumps(table))

    def figure(text):
        return filled(f"{{{{ {text} }}}}", tmp_path)

    assert figure("device()") == "D"
    assert (figure("rate('batch', 32)"), figure("rate('online_clamp', 32)")) == ("1,250", "2,000")
    assert figure("faster('online_clamp', 32)") == "1.60"
    assert (figure("top1('s', 'batch')"), figure("published('batch')")) == ("91.3 %", "76.4 %")
    assert (figure("seeds('s', 'batch')"), figure("details('s')")) == ("2", "3 epochs")
    assert (figure("margin('s')"), figure("verdict('s', 'a', 'batch')")) == ("0.5 points", "equal")
    with pytest.raises(KeyError, match="batches of 64"):
        figure("rate('batch', 64)")
    with pytest.raises(UndefinedError):
        figure("speed()")


def test_recorded_tables_are_what_their_data_give():
    script = ROOT / "scripts" / "dev" / "reproduce.sh"
    result = subprocess.run(
        [str(script), "--check"], env=environment() | {"PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_tables_and_figures_that_are_not_what_the_data_give_are_found(tmp_path):
    """In a copy with a study of its own: rebuilt, then changed by hand in three ways."""
    for name in ("onlinenorm", "configs", "scripts", "results"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "study"))
    (tmp_path / "README.md.j2").write_text("# Title\n\n{{ seeds('own', 'batch') }} seed\n")
    page = "# Page\n\n**own** ([table](study/own/table1.md)): {{ row('own', 'batch') }} ![all](study/overview.png)\n"
    (tmp_path / "results" / "README.md.j2").write_text(page)
    study = tmp_path / "results" / "study"
    run = study / "own" / "runs" / "batch" / "seed0"
    shutil.copytree(ROOT / "results/study/quickstart/runs/batch/seed0", run)

    def reproduce(*arguments):
        script = str(tmp_path / "scripts" / "dev" / "reproduce.sh")
        options = {"env": environment() | {"PYTHON": sys.executable}, "capture_output": True, "text": True}
        return subprocess.run([script, *arguments], **options)

    rebuilt = reproduce()
    assert rebuilt.returncode == 0, rebuilt.stdout + rebuilt.stderr
    readme = (tmp_path / "README.md").read_text()
    assert readme == "# Title\n\n1 seed\n"
    assert "**own** ([table](study/own/table1.md)" in (tmp_path / "results" / "README.md").read_text()
    (study / "own" / "table1.md").write_text((study / "own" / "table1.md").read_text().replace("BatchNorm", "BestNorm"))
    (study / "own" / "curves.png").unlink()
    (study / "by_hand.md").write_text("# 99.9 %\n")
    (tmp_path / "README.md").write_text(readme.replace("1 seed", "5 seeds"))
    checked = reproduce("--check")
    assert checked.returncode == 1
    for line in (
        "results/study/own/table1.md: not what the recorded data give", "results/study/own/curves.png: missing",
        "results/study/by_hand.md: nothing here makes it", "README.md differs from what is recorded",
    ):  # fmt: skip
        assert line in checked.stderr, checked.stderr
    assert "results/README.md: as recorded" in checked.stdout
