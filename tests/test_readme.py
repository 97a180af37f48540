"""The README's commands run, its files exist, its tables are the recorded ones."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.dev.readme import filled

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHRUNK = ["recipe.epochs=1", "recipe.milestones=[]", "recipe.batch_size=16", "data.limit_train=32", "data.limit_val=16"]


def environment():
    return {**os.environ, "VENV": sys.prefix, "OMP_NUM_THREADS": "1"}


def test_readme_is_short_and_has_commands():
    assert len(README.splitlines()) < 250 and "scripts/quickstart.sh" in README


def test_quickstart_from_nothing_to_table(tmp_path):
    """The script itself in a copy of the repository: runs, table, and the same table again without training."""
    for name in ("onlinenorm", "configs", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    sources = b"".join((ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))
    made_of = hashlib.sha256(sources).hexdigest()
    if all(stamp.read_text().strip() != made_of for stamp in Path(sys.prefix).glob(".installed*")):
        pytest.skip(f"{sys.prefix} was not made by scripts/environment.sh: the script would install into it")
    call = [str(tmp_path / "scripts/quickstart.sh"), *SHRUNK]
    first = subprocess.run(call, env=environment(), capture_output=True, text=True, check=True).stdout
    for label in ("OnlineNorm (activation clamping)", "OnlineNorm (layer scaling)", "BatchNorm"):
        assert label in first
    assert "not ImageNet" in first
    before = (tmp_path / "runs/quickstart/batch/seed0/results.json").stat().st_mtime_ns
    again = subprocess.run(call, env=environment(), capture_output=True, text=True, check=True).stdout
    assert (tmp_path / "runs/quickstart/batch/seed0/results.json").stat().st_mtime_ns == before
    assert "BatchNorm" in again


def test_named_files_exist():
    named = re.findall(r"`((?:onlinenorm|configs|scripts|tests)/[\w./]+)`", README)
    linked = re.findall(r"\]\(((?!http)[\w./-]+)\)", README)
    assert named and linked
    assert [path for path in (*named, *linked) if not (ROOT / path).exists()] == []


def test_texts_come_without_their_heading_and_with_links_from_the_readme(tmp_path):
    (tmp_path / "a").mkdir()
    text = "# Heading\n\n- [x](b/c.md), [y](https://z), ![p](p.png)\n\n| 1 |\n| 2 |\n"
    (tmp_path / "a" / "f.md").write_text(text)
    readme = "<!-- text: a/f.md -->\nold\n<!-- end -->\n<!-- table: a/f.md -->\n<!-- end -->\n"
    whole = "- [x](a/b/c.md), [y](https://z), ![p](a/p.png)\n\n| 1 |\n| 2 |\n"
    expected = f"<!-- text: a/f.md -->\n{whole}<!-- end -->\n<!-- table: a/f.md -->\n| 1 |\n| 2 |\n<!-- end -->\n"
    assert filled(readme, tmp_path) == expected == filled(expected, tmp_path)


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
    block = "<!-- text: results/README.md -->\n<!-- end -->\n"
    (tmp_path / "README.md").write_text(f"# Title\n\n{block}")
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
    assert "**own** ([table](results/study/own/table1.md)" in readme and "](results/study/overview.png)" in readme
    (study / "own" / "table1.md").write_text((study / "own" / "table1.md").read_text().replace("BatchNorm", "BestNorm"))
    (study / "own" / "curves.png").unlink()
    (study / "by_hand.md").write_text("# 99.9 %\n")
    (tmp_path / "README.md").write_text(readme.replace("**own**", "**ours**"))
    checked = reproduce("--check")
    assert checked.returncode == 1
    for line in (
        "results/study/own/table1.md: not what the recorded data give", "results/study/own/curves.png: missing",
        "results/study/by_hand.md: nothing here makes it", "README.md differs from what is recorded",
    ):  # fmt: skip
        assert line in checked.stderr, checked.stderr
    assert "results/README.md: as recorded" in checked.stdout
