"""Every command line of the README runs, made small: in order, in one folder, each with what those before have left."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tests_training import load_train_module

from onlinenorm.training import matrix

sys.path.append(str(Path(__file__).parent / "data"))
from image_folders import write_tree

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = ("recipe.epochs=1", "recipe.milestones=[]", "data.limit_train=32", "data.limit_val=16", "recipe.batch_size=16")
ON_CPU = ("trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.cuda_graph=false", "model.compile=false")
# What a command of an experiment gets besides, so that it takes seconds without a GPU, a download or ImageNet.
SHRUNK = {
    "quickstart": SMALL,
    "embedded": SMALL,
    "fashion_mnist": (*SMALL, *ON_CPU, "data=embedded", "data.on_device=false", "model=cifar_resnet8"),
    "table1": (*SMALL[:2], *ON_CPU, "data.image_size=32", "data.num_workers=0", "recipe.batch_size=4"),
}
SLOW = ("torchrun", "sbatch", "pip", "pytest")  # programs of others: started as processes
MORE = {
    "scripts/check.py": ["--seconds", "0.1", "trainer=cpu"],
    "scripts/export.py": ["--latency", "0"],
}
ELSEWHERE = {
    "scripts/quickstart.sh": "test_readme.py::test_quickstart_from_nothing_to_table",
    "scripts/test.sh": "itself",
}


def written():
    """The command lines of the README: of its code blocks, their comments and its texts and tables."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = [line.split("  #") for block in blocks for line in block.splitlines() if line.strip()]
    found = [line[0].strip() for line in lines]
    found += [more.split("or: ")[1].strip() for line in lines for more in line[1:] if "or: " in more]
    found += re.findall(r"`((?:python |scripts/|torchrun |sbatch |pip )[^`]*[ .][^`]+)`", README)
    return list(dict.fromkeys(command for command in found if " " in command or command in ELSEWHERE))


COMMANDS = written()


def shrunk(words, here):
    """The words of a command with the miniature of ImageNet, and what makes its experiment small."""
    words = [re.sub(r"^data.root=.*", f"data.root={here}/imagenet", word) for word in words]
    if not any(word.startswith("experiment=") for word in words):  # what the text shows a part of
        words = [*words, "experiment=quickstart"]
    (experiment,) = [word.partition("=")[2] for word in words if word.startswith("experiment=")]
    return [*words, *SHRUNK[experiment]]


def take_all(sweep, rows):
    for row in rows:
        load_train_module().main([*row.overrides, f"run_dir={row.folder}"])


def is_slow(command):
    return command.split()[0] in SLOW or "trainer=ddp" in command


def script(name):
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with the repository's files and a miniature of ImageNet."""
    folder = tmp_path_factory.mktemp("here")
    for name in (
        "train.py",
        "scripts",
        "configs",
        "onlinenorm",
        "tests",
        "pyproject.toml",
        "constraints.txt",
        "README.md",
    ):
        (folder / name).symlink_to(ROOT / name)
    write_tree(folder / "imagenet", train=3)
    return folder


def test_the_commands_are_found():
    programs = {command.split()[0] for command in COMMANDS}
    assert programs >= {"python", "scripts/sweep.py", "scripts/study.py", *SLOW, *ELSEWHERE} and len(COMMANDS) > 20


def test_commands_run_in_order(here, monkeypatch, capsys):
    monkeypatch.chdir(here)
    train, ran = load_train_module(), []
    for command in COMMANDS:
        program, *words = shlex.split(command)
        if is_slow(command) or command in ELSEWHERE:
            continue
        if program == "python":
            program, *words = words
        try:
            if program == "train.py":
                trained = shrunk(words, here)
                monkeypatch.setattr(sys, "argv", ["train.py", *trained])
                train.main(trained)
            elif program == "scripts/prepare_imagenet.py":
                with pytest.raises(SystemExit) as left:
                    script(program).main(words)
                assert left.value.code == 0
            else:
                words = [re.sub("^/tmp/", f"{here}/", word) for word in words]
                if program in ("scripts/check.py", "scripts/sweep.py"):
                    words = shrunk(words, here)
                words += MORE.get(program, [])
                module = script(program)
                if program == "scripts/sweep.py":  # its runs in this process; the slow test starts them as it does
                    monkeypatch.setattr(matrix.Sweep, "take_all", take_all)
                assert module.main(words) == 0
        except BaseException as error:
            error.add_note(command)
            raise
        ran.append(command)
    assert len(ran) >= 15
    for folder in ("table1/batch", "quickstart/layer/seed1", "fashion_mnist/batch", "quickstart/online_clamp/seed2"):
        assert any((here / "runs" / folder).rglob("results.json")), folder
    assert (here / "runs/table1/index.html").exists() and (here / "runs/clamp/embedded/ablation.md").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if is_slow(c) or "sweep.py" in c])
def test_commands_that_start_other_programs(command, here, tmp_path):
    """torchrun with two processes; sbatch and srun as stand-ins that run what they are given at once."""
    program, *words = shlex.split(command)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHON": sys.executable}
    if program == "torchrun":
        words[words.index("--nproc-per-node") + 1] = "2"
        words = [*shrunk(words, here), f"run_dir={tmp_path}/run"]
        words = [sys.executable, "-m", "torch.distributed.run", *words]
    elif program == "sbatch":
        (tmp_path / "srun").write_text('#!/bin/sh\nwhile [ "${1#-}" != "$1" ]; do shift; done\nexec "$@"\n')
        (tmp_path / "srun").chmod(0o755)
        environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "1"}
        words = ["bash", *shrunk(words[[word.startswith("-") for word in words].index(False) :], here)]
        words.append(f"run_dir={tmp_path}/run")
    elif program == "python":
        words = [sys.executable, *shrunk([word.replace("devices=8", "devices=2") for word in words], here)]
        words.append(f"run_dir={tmp_path}/run")
    elif program == "scripts/sweep.py":
        words = [sys.executable, program, *shrunk(words, here), "--runs", f"{tmp_path}/run"]
    elif program == "pip":
        words = [sys.executable, "-m", "pip", *words, "--dry-run", "--no-deps", "--no-index", "--no-build-isolation"]
        words = ["--no-input" if word == "-e" else word for word in words]
    else:
        words = [sys.executable, "-m", "pytest", *words, "--collect-only", "-q", "tests/test_readme_commands.py"]
    done = subprocess.run(words, cwd=here, env=environment, capture_output=True, text=True)
    empty = 5 if words[-1].endswith("test_readme_commands.py") and "gpu" in words else 0  # pytest: nothing is marked so
    assert done.returncode == empty, done.stdout + done.stderr
    assert program in ("pip", "pytest") or any((tmp_path / "run").rglob("results.json"))
