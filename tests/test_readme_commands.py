"""Every command line of the pages runs, made small: in order, in one folder, each with what those before have left."""

import argparse
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tests_training import load_train_module

from onlinenorm.training import matrix

sys.path.append(str(Path(__file__).parent / "data"))
from image_folders import write_tree

ROOT = Path(__file__).resolve().parents[1]
# In this order: what the first have left, the others find.
PAGES = (
    "scripts/README.md", "README.md", "configs/README.md", "onlinenorm/data/README.md", "onlinenorm/deploy/README.md",
    "scripts/slurm/README.md",
)  # fmt: skip
SMALL = (
    "recipe.epochs=1", "recipe.milestones=[]", "data.limit_train=32", "data.limit_val=16", "recipe.batch_size=16",
    "model=cifar_resnet8",
)  # fmt: skip
ON_CPU = ("trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.cuda_graph=false", "model.compile=false")
# What a command of an experiment gets besides, so that it takes seconds without a GPU, a download or ImageNet.
SHRUNK = {
    "quickstart": SMALL,
    "embedded": SMALL,
    "fashion_mnist": (*SMALL, *ON_CPU, "data=embedded", "data.on_device=false"),
    "table1": (
        *SMALL[:2], *ON_CPU, "recipe.warmup_epochs=0", "recipe.batch_size=4", "data.image_size=32",
        "data.num_workers=0", "model=cifar_resnet8",
    ),
}  # fmt: skip
SLOW = ("torchrun", "sbatch", "pip", "pytest")  # programs of others: started as processes
MORE = {
    "scripts/check.py": ["--seconds", "0.1", "trainer=cpu"],
    "scripts/export.py": ["--latency", "0"],
}
ELSEWHERE = {
    "scripts/quickstart.sh": "test_readme.py::test_quickstart_from_nothing_to_table",
    "scripts/test.sh": "itself",
    "scripts/environment.sh": "the first line of scripts/test.sh",
    "scripts/dev/reproduce.sh": "test_readme.py::test_recorded_tables_are_what_their_data_give",
    "scripts/dev/gpu_check.sh": "needs a GPU; its parts' tests are those of scripts/bench",
}
MEASURES = ("scripts/bench/", "scripts/dev/")  # minutes, or a GPU: their words are read, and there it ends


def written(page):
    """The command lines of a page: of its code blocks, their comments and its texts and tables."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    blocks = [re.sub(r" \\\n *", " ", block) for block in blocks]
    lines = [re.split("(?:^| +)# ", line) for block in blocks for line in block.splitlines() if line.strip()]
    found = [line[0].strip() for line in lines]
    found += [more.split("or: ")[1].strip() for line in lines for more in line[1:] if "or: " in more]
    found += re.findall(r"`((?:python |scripts/|torchrun |sbatch |pip )[^`]*[ .][^`]+)`", text)
    return [command for command in found if (" " in command or command in ELSEWHERE) and "..." not in command]


COMMANDS = list(dict.fromkeys(command for page in PAGES for command in written(page)))


def shrunk(words, here):
    """The words of a command with the miniature of ImageNet, and what makes its experiment small."""
    words = [re.sub(r"^data.root=.*", f"data.root={here}/imagenet", word) for word in words]
    named = [word.partition("=")[2] for word in words if word.startswith("experiment=")]
    if not named and "data=imagenet" in words:
        return [*words, *SHRUNK["table1"]]
    (experiment,) = named or ["quickstart"]
    words = words if named else [*words, f"experiment={experiment}"]  # what the text shows a part of
    return [*words, *SHRUNK[experiment]]


def take_all(sweep, rows):
    for row in rows:
        load_train_module().main([*row.overrides, f"run_dir={row.folder}"])


def is_slow(command):
    return (command.split()[0] in SLOW or "trainer=ddp" in command) and not measuring(command)


def measuring(command):
    """The script and the words of a command of `MEASURES`, or None."""
    words = shlex.split(command)
    at = next((i for i, word in enumerate(words) if word.startswith(MEASURES) and word.endswith(".py")), None)
    return None if at is None else (words[at], words[at + 1 :])


def script(name):
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class WordsRead(BaseException):
    """What ends a script once its parser has taken its words."""


def check_words(monkeypatch, name, words):
    """That a script's parser takes the words; it goes no further."""
    method = (
        "parse_known_args" if name.endswith("gpu_tests.py") else "parse_args"
    )  # the former's other words are pytest's
    parse = getattr(argparse.ArgumentParser, method)

    def then_end(*arguments, **keywords):
        parse(*arguments, **keywords)
        raise WordsRead

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, method, then_end)
        patch.setattr(sys, "argv", [name, *words])  # which those that are never called read
        main = script(name).main
        with pytest.raises(WordsRead):
            main(words) if main.__code__.co_argcount else main()


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
    Image.new("L", (28, 28), 128).save(folder / "photo.png")
    return folder


def test_the_commands_are_found():
    programs = {command.split()[0] for command in COMMANDS}
    assert all(written(page) for page in PAGES)
    assert programs >= {"python", "scripts/sweep.py", *SLOW, *ELSEWHERE} and len(COMMANDS) > 50


def test_commands_run_in_order(here, monkeypatch, capsys):
    monkeypatch.chdir(here)
    train, ran = load_train_module(), []
    for command in COMMANDS:
        program, *words = shlex.split(command)
        if is_slow(command) or program in ELSEWHERE:
            continue
        if program == "python":
            program, *words = words
        try:
            if measured := measuring(command):
                check_words(monkeypatch, *measured)
            elif program == "train.py":
                trained = shrunk(words, here)
                monkeypatch.setattr(sys, "argv", ["train.py", *trained])
                train.main(trained)
            elif "--help" in words:
                with pytest.raises(SystemExit) as left:
                    script(program).main(words)
                assert left.value.code == 0
            else:
                words = [re.sub("^/tmp/", f"{here}/", word) for word in words]
                words = [
                    {"ARCHIVES": "imagenet", "ROOT": "prepared", "PACKED": "packed"}.get(word, word) for word in words
                ]
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
    for folder in (
        "table1/online_clamp",
        "quickstart/layer/seed1",
        "fashion_mnist/batch",
        "quickstart/online_clamp/seed2",
    ):
        assert any((here / "runs" / folder).rglob("results.json")), folder
    assert (here / "runs/table1/index.html").exists() and (here / "runs/clamp/embedded/ablation.md").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if is_slow(c) or ("sweep.py" in c and "--status" not in c)])
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
        environment |= {"SLURM_ARRAY_TASK_ID": "0"} if "--array" in command else {}
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
