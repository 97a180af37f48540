"""What an installation needs and holds, and what an image knows of its origin."""

import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import tomllib
from importlib import metadata
from pathlib import Path
from string import Template

import pytest
import yaml

import onlinenorm

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]

# A training step on the CPU, of a network in which BatchNorm was exchanged and one layer was made by hand.
STEP = """
import sys, torch
from torch import nn
if {ours}:
    from onlinenorm import OnlineNorm2d, convert
else:
    OnlineNorm2d, convert = nn.BatchNorm2d, lambda network, *_: network
network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
convert(network, "online")
network.extend([OnlineNorm2d(8), nn.Flatten(), nn.LazyLinear(2)])
optimizer = torch.optim.SGD(network.parameters(), 0.1)
for _ in range(2):
    network(torch.randn(4, 3, 8, 8)).square().mean().backward()
    optimizer.step()
"""
# After hide(NAMES): as if the packages that own these modules were not installed, but for what is imported.
HIDE = """
import importlib.metadata as metadata, sys
from importlib.machinery import PathFinder
absent, hidden = set(), set()
class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in absent else PathFinder.find_spec(name, path, target)
sys.meta_path[:] = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
class Distribution(metadata.Distribution):
    @classmethod
    def from_name(cls, name):
        if name.lower().replace("_", "-") in hidden:
            raise metadata.PackageNotFoundError(name)
        return metadata.Distribution.from_name(name)
metadata.distribution = Distribution.from_name
metadata.version = lambda name: Distribution.from_name(name).version
def hide(names):
    absent.clear(), hidden.clear()
    absent.update(names)
    owners = {owner for top, each in metadata.packages_distributions().items() if top in names for owner in each}
    hidden.update(owner.lower().replace("_", "-") for owner in owners)
"""
PRINT = """
import sys
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def names(requirements):
    return {re.match(r"[\w-]+", requirement)[0].lower().replace("_", "-") for requirement in requirements}


def closure(distribution):
    """The distributions that an installation of one brings, by normalised name."""
    found, waiting = set(), [distribution]
    while waiting:
        name = waiting.pop()
        if name not in found:
            try:
                requirements = metadata.requires(name) or []
            except metadata.PackageNotFoundError:  # of another platform
                continue
            found.add(name)
            waiting += names(r for r in requirements if "extra ==" not in r)
    return found


def modules(code):
    """What code prints, a set a line."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [set(line.split()) for line in done.stdout.splitlines()]


def absent(*extras):
    """Modules of this environment that an installation of the library with `extras` would lack."""
    wanted = list(names(PROJECT["dependencies"]))
    for extra in extras:
        wanted += names(EXTRAS[extra]) - {"onlinenorm"}
        wanted += names(EXTRAS["train"]) if extra == "deploy" else set()
    brought = {"onlinenorm"}.union(*map(closure, wanted))
    return {
        top for top, owners in metadata.packages_distributions().items()
        if not {owner.lower().replace("_", "-") for owner in owners} & brought
    }  # fmt: skip


def test_the_library_needs_torch_alone():
    assert names(PROJECT["dependencies"]) == {"torch"}
    assert {"numpy", "torchvision", "hydra", "matplotlib", "pytorch_lightning"} <= absent()
    (alone,) = modules(HIDE + f"hide({absent()})" + STEP.format(ours=True) + PRINT)
    assert "onlinenorm" in alone and not alone & absent()
    before = "import sys\nbefore = set(sys.modules)\n"
    after = PRINT.replace("in sys.modules", "in sys.modules.keys() - before")
    (more,) = modules(STEP.format(ours=False) + before + STEP.format(ours=True) + after)
    assert not (more - {"onlinenorm"}) & absent(), "packages that are there are not loaded either"


@pytest.mark.parametrize(
    "installed",
    [
        {
            "train": ("train", "onlinenorm.training.run", "scripts.sweep", "scripts.prepare_imagenet"),
            "deploy": ("scripts.export", "scripts.predict", "scripts.audit_clamping"),
        },
        {"report": ("scripts.table1", "scripts.study", "scripts.compare"), "train,report": ("scripts.check",)},
    ],
    ids=["train, then deploy", "report, then train"],
)
def test_an_extra_is_enough_for_its_programs(installed):
    """Each is imported without the packages that torch and the extras so far do not bring."""
    lacking = [absent(*extras.split(",")) for extras in installed]
    code = HIDE
    for names, programs in zip(lacking, installed.values(), strict=True):
        code += f"hide({names})\n" + "".join(f"import {program}\n" for program in programs) + PRINT
    for loaded, names in zip(modules(code), lacking, strict=True):
        assert not loaded & names


def test_the_extras_are_what_the_tests_and_the_scripts_install():
    assert set(EXTRAS) == {"train", "report", "deploy", "onnx", "parquet", "submitit", "test"}
    (rest,) = [requirement for requirement in EXTRAS["test"] if requirement.startswith("onlinenorm")]
    assert rest == "onlinenorm[train,report,deploy,onnx,parquet]"
    assert ".[train,report,deploy${extra:+,$extra}]" in (ROOT / "scripts/environment.sh").read_text(encoding="utf-8")


def test_every_requirement_is_pinned():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = names(line for line in lines if not line.startswith("#"))
    wanted = names(PROJECT["dependencies"] + [r for extra in EXTRAS.values() for r in extra]) - {"onlinenorm"}
    assert wanted - pinned == {"hydra-submitit-launcher"}, "which is not part of the tests"


def test_type_checkers_read_the_annotations():
    assert Path(onlinenorm.__file__).with_name("py.typed").exists()
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    assert "py.typed" in data["onlinenorm"]


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions in order, as docker splits them: (ARG, "GIT_COMMIT=unknown")."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def test_what_a_container_runs_can_be_run():
    commands = [shlex.split(rest) for word, rest in instructions() if word == "RUN"]
    commands += [json.loads(rest) for word, rest in instructions() if word == "CMD"]
    ours = [word for command in commands for word in command if word.startswith("scripts/")]
    assert ours == ["scripts/environment.sh", "scripts/quickstart.sh"]
    assert all(os.access(ROOT / script, os.X_OK) for script in ours)


def test_a_change_of_code_does_not_install_everything_anew():
    """What an installation reads is copied before it, the rest of the repository after."""
    order = [(word, rest) for word, rest in instructions() if word in ("COPY", "RUN", "USER")]
    installs = next(i for i, (word, rest) in enumerate(order) if word == "RUN" and "environment.sh" in rest)
    copied = " ".join(rest for word, rest in order[:installs] if word == "COPY").split()
    assert {"pyproject.toml", "constraints.txt", *PROJECT["license-files"], "scripts/environment.sh"} <= set(copied)
    assert "." not in copied and any(word == "COPY" and rest.endswith(". .") for word, rest in order[installs:])
    assert [rest for word, rest in order if word == "USER"] not in ([], ["root"]), "a container needs no root"


def test_an_image_holds_nothing_that_git_leaves_out():
    left_out = {line.strip("/").removeprefix("**/") for line in (ROOT / ".dockerignore").read_text().splitlines()}
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if "results" not in line}
    assert ignored <= left_out and "build" in ignored


def test_a_source_distribution_is_the_repository(tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    files = {file for file in files if file and not file.startswith("results/study/")}  # whose runs are many
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes((ROOT / file).read_bytes())
    code = "import setuptools.build_meta as build; print(build.build_sdist('dist'))"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=True)
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as packed:
        held = {name.partition("/")[2] for name in packed.getnames()}
        metadata_of_it = packed.extractfile(f"{packed.getnames()[0]}/PKG-INFO").read().decode()
    assert not files - held
    assert "repository" in metadata_of_it and not re.search(r"\]\((?!https:)", metadata_of_it), (
        "links lead nowhere there"
    )


def test_an_image_records_the_commit_that_it_was_built_from(tmp_path):
    """The environment of an image, and what a run in a folder without a repository makes of it."""
    given, environment = {"GIT_COMMIT": "abc123"}, {}
    arguments: dict[str, str] = {}
    for word, rest in instructions():
        name, _, value = rest.partition("=")
        if word == "ARG":
            arguments[name] = given.get(name, value)
        elif word == "ENV":
            environment[name] = Template(value).substitute(arguments)
    assert ".git" in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    (tmp_path / "onlinenorm").symlink_to(ROOT / "onlinenorm")
    code = "import sys; from pathlib import Path; from onlinenorm import provenance; "
    code += "print(provenance.git_state(Path(sys.argv[1]))['commit'])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, "-c", code, tmp_path], env=environment, capture_output=True, text=True)
    assert done.stdout == "abc123\n", done.stderr


def test_what_is_to_be_cited_is_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    assert any("1905.05894" in reference.get("url", "") for reference in citation["references"])


@pytest.mark.parametrize("file", [".pre-commit-config.yaml", ".github/workflows/ci.yml"])
def test_hooks_and_ci_run_what_is_there(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    yaml.safe_load(text)
    named = re.findall(r"^ *(?:- )?(?:entry|run): (.+)", text, re.MULTILINE)
    assert named
    for command in named:
        if tool := re.search(r'exec "\$\{VENV:-\.venv\}/bin/(\w+)"', command):  # of the environment that VENV names
            assert Path(sys.prefix, "bin", tool[1]).exists(), command
        else:
            assert (ROOT / command.split()[0]).exists(), command
