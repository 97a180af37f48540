"""Every script is a module with a main(), starts in .venv where the calling Python lacks packages, and ends alike."""

import ast
import importlib
import importlib.metadata
import inspect
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from scripts import _venv

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "scripts").rglob("*.py"))
PROGRAMS = [file for file in FILES if '__name__ == "__main__"' in (ROOT / file).read_text(encoding="utf-8")]
BARE = [sys.executable, "-S"]  # a Python without packages


@pytest.mark.parametrize("file", PROGRAMS, ids=str)
def test_scripts_are_modules_that_end_through_one_function(file):
    module = importlib.import_module(".".join(file.with_suffix("").parts))
    (parameter,) = inspect.signature(module.main).parameters.values()
    assert parameter.default is None
    text = (ROOT / file).read_text(encoding="utf-8")
    assert text.endswith('if __name__ == "__main__":\n    run_main(main)\n')


def test_one_place_starts_another_python():
    assert len(PROGRAMS) > 20
    assert [file.name for file in FILES if "os.exec" in (ROOT / file).read_text(encoding="utf-8")] == ["_venv.py"]


@pytest.fixture
def checkout(tmp_path):
    """A copy of train.py and scripts/ alone."""
    shutil.copyfile(ROOT / "train.py", tmp_path / "train.py")
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def call(checkout, *words):
    return subprocess.run([*BARE, *words], cwd=checkout, capture_output=True, text=True)


@pytest.mark.parametrize("script", ["train.py", "scripts/table1.py", "scripts/bench/loaders.py"])
def test_a_python_without_packages_hands_over_to_the_environment(checkout, script):
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "environment: $@"\nexit 7\n')
    python.chmod(0o755)
    done = call(checkout, script, "runs", "--output", "a b")
    assert (done.returncode, done.stdout) == (7, f"environment: {script} runs --output a b\n"), done.stderr


@pytest.mark.parametrize(
    "script, there, missing",
    [
        ("scripts/check.py", (), "torch"),
        ("train.py", (), "torch"),
        ("train.py", ("torch",), "hydra"),
        ("scripts/table1.py", ("torch",), "rich"),
    ],
)
def test_a_missing_package_is_told_with_what_installs_it(checkout, script, there, missing):
    """As after `pip install .`, which brings torch alone."""
    for module in there:
        (checkout / f"{module}.py").write_text("")
    done = call(checkout, script)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert f" has no {missing}; " in done.stderr and "pip install -e '.[train,report,deploy]'" in done.stderr
    assert "scripts/environment.sh" in done.stderr


@pytest.mark.parametrize(
    ("script", "module"),
    [("train.py", "hydra"), *((f"scripts/{name}.py", "onlinenorm") for name in ("prepare_imagenet", "sweep", "check"))],
)
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_imports_leaves_no_traceback(checkout, script, module, signum):
    (checkout / "torch.py").write_text("")
    (checkout / f"{module}.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    command = {"args": [*BARE, script], "cwd": checkout, "text": True}
    with subprocess.Popen(**command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signum)
        assert process.wait(30) == 128 + signum and process.stderr.read() == ""


def test_a_command_has_signals_as_they_were(checkout):
    """So that Ctrl-C is an exception, which it may handle."""
    (checkout / "scripts" / "own.py").write_text(
        "import signal, sys\nsys.path[0] = sys.path[0] + '/..'\nfrom scripts._venv import run_main\n"
        "def main():\n    try:\n        signal.raise_signal(signal.SIGINT)\n"
        "    except KeyboardInterrupt:\n        return 7\nrun_main(main)\n"
    )
    done = subprocess.run([sys.executable, "scripts/own.py"], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr


def test_an_error_of_our_own_keeps_its_traceback(checkout):
    (checkout / "torch.py").write_text("")
    (checkout / "scripts" / "own.py").write_text("import scripts._venv\nimport onlinenorm.absent\n")
    done = call(checkout, "-c", "import runpy, sys; sys.argv = ['scripts/own.py']; runpy.run_path('scripts/own.py')")
    assert "Traceback" in done.stderr and "has no onlinenorm" not in done.stderr


def test_all_packages_of_the_extras_are_looked_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = (project["optional-dependencies"][extra] for extra in ("train", "report", "deploy"))
    wanted = {re.match(r"[\w-]+", r)[0] for requirements in extras for r in requirements} - {"onlinenorm"}
    owners = importlib.metadata.packages_distributions()
    found = {owner.lower().replace("_", "-") for module in _venv.NEEDED for owner in owners.get(module, ())}
    assert wanted <= found and "torch" in _venv.NEEDED


def test_a_program_that_imports_a_script_is_not_replaced(checkout):
    done = call(checkout, "-c", "import scripts._venv; print('goes on')")
    assert (done.returncode, done.stdout) == (0, "goes on\n"), done.stderr


def test_every_command_has_its_line():
    listed = set(re.findall(r"`([\w/]+\.(?:py|sh|sbatch))`", (ROOT / "scripts/README.md").read_text(encoding="utf-8")))
    files = [path for path in (ROOT / "scripts").rglob("*.*") if path.suffix in (".py", ".sh", ".sbatch")]
    names = {path.name if path.parent.name != "slurm" else f"slurm/{path.name}" for path in files}
    assert names - listed == {"__init__.py", "_venv.py", "slurm/requeue.sh"} and listed <= names


def test_entry_points_of_users_are_short():
    for path in (ROOT / "scripts").glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 130, path


def test_a_python_that_is_too_old_is_told_in_a_line(monkeypatch, tmp_path):
    with monkeypatch.context() as old:
        old.setattr(sys, "version_info", (3, 9, 18))
        old.setattr(sys, "argv", [str(ROOT / "scripts" / "table1.py")])
        old.setattr(_venv, "PYTHON", tmp_path / ".venv" / "bin" / "python")
        with pytest.raises(
            SystemExit, match=r"^table1\.py: Python 3\.11 or newer is needed, and this is .*environment\.sh"
        ):
            _venv.enter()
    text = (ROOT / "scripts" / "_venv.py").read_text(encoding="utf-8")
    assert "from __future__ import annotations" in text
    ast.parse(text, feature_version=(3, 8))  # reached before any other module's syntax is
    assert f'requires-python = ">={_venv.OLDEST[0]}.{_venv.OLDEST[1]}"' in (ROOT / "pyproject.toml").read_text()
