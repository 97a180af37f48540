"""The walks of CONTRIBUTING.md as they are printed: files into a folder of one's own, and commands to the table."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "training"))
from tests_training import ROOT, load_train_module

from onlinenorm.deploy import load_trained
from onlinenorm.errors import ConfigError
from onlinenorm.training.roles import parameter_roles

PAGE = (ROOT / "CONTRIBUTING.md").read_text()
SECTIONS = dict(re.findall(r"^### (?:A|An) ([\w ]+)\n(.*?)(?=^##)", PAGE, re.MULTILINE | re.DOTALL))
PLACES = {"moving_rms": "normalizers", "stripes": "data", "two_layers": "models"}  # module -> its folder in onlinenorm
# Added to a quickstart, which takes minutes.
SHORT = ("recipe.epochs=1", "recipe.milestones=[]", "data.limit_train=64", "data.limit_val=16")


def files(section):
    """Path -> content of what a walk has one write."""
    return dict(re.findall(r"`(mine/[\w./]+)`[^\n]*:\n```\w+\n(.*?)```", SECTIONS[section], re.DOTALL))


def commands(section):
    text = "\n".join(re.findall(r"```sh\n(.*?)```", SECTIONS[section], re.DOTALL))
    lines = text.replace(" \\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines]


@pytest.fixture
def walk(tmp_path, monkeypatch):
    """Writes the files of sections into a scratch folder, and runs their commands there, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "mine")  # export PYTHONPATH=mine
    modules = set(sys.modules)

    def of(*sections, run=None):
        for section in sections:
            for path, content in files(section).items():
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                Path(path).write_text(content)
        for python, script, *words in commands(run or sections[-1]):
            assert python == "python"
            call(script, words)

    yield of
    for name in set(sys.modules) - modules:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def call(script, words):
    if script == "train.py":
        load_train_module().main([*words, *(SHORT if "experiment=quickstart" in words else ())])
        return
    name = f"{Path(script).stem}_of_contributing"
    spec = importlib.util.spec_from_file_location(name, ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(words) == 0, words


def table():
    page, told = Path("table/table1.md").read_text(), json.loads(Path("table/table1.json").read_text())
    return page, {row["normalizer"]: row for row in told["rows"] if row["seeds"]}, told


def test_a_thing_is_at_most_two_files():
    counts = {section: len(files(section)) for section in SECTIONS}
    assert counts == {"normalizer": 2, "data set": 2, "network": 2, "experiment": 1}
    assert len(PAGE.splitlines()) < 200
    fences = [line for line in PAGE.splitlines() if line.startswith("```")]
    assert len(fences) == 2 * (7 + 5), "a block that no test writes or runs"


def check(*command, cwd, **environment):
    """Runs a tool of the one check; fails with what it prints."""
    environment = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-m", *map(str, command)], cwd=cwd, env=environment, capture_output=True)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    return done.stdout.decode()


def test_the_types_of_what_is_printed_are_right(tmp_path):
    for section in SECTIONS:
        for path, content in files(section).items():
            (tmp_path / Path(path).name).write_text(content)
    modules = sorted(tmp_path.glob("*.py"))
    assert {path.stem for path in modules} == set(PLACES)
    check("mypy", *modules, cwd=ROOT)  # with the cache of the one check


def test_in_the_repository_it_passes_lint_and_the_tests_of_all_normalizers_and_networks(tmp_path):
    for folder in ("onlinenorm", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    tests = ("tests/models/test_model_configs.py", "tests/normalizers/test_dependence.py")
    for file in ("pyproject.toml", *tests):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, tmp_path / file)
    for section in SECTIONS:
        for path, content in files(section).items():
            module, target = Path(path).stem, f"_target_: onlinenorm.{PLACES.get(Path(path).stem)}.{Path(path).stem}."
            place = tmp_path / "configs" / Path(path).relative_to("mine")
            if path.endswith(".py"):
                place = tmp_path / "onlinenorm" / PLACES[module] / f"{module}.py"
            place.write_text(content.replace(f"_target_: {module}.", target))
    check("ruff", "check", "--no-cache", "onlinenorm", cwd=tmp_path)
    check("ruff", "format", "--check", "--no-cache", "onlinenorm", cwd=tmp_path)
    chosen = "two_layers or moving_rms or every_network"
    told = check("pytest", "-p", "no:cacheprovider", "-k", chosen, *tests, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert "4 passed" in told, "of the network: a config, its arguments, what it makes; of the normalizer: dependence"


def test_a_normalizer_to_the_table(walk):
    walk("normalizer")
    page, rows, told = table()
    row = rows["moving_rms"]
    assert ("moving_rms", "batch") in {(found["first"], found["second"]) for found in told["comparisons"]}
    assert "moving RMS" in page and (row["label"], row["colour"]) == ("moving RMS", "#332288")
    trained = load_trained("runs/quickstart/moving_rms/seed0", allowed=["moving_rms.MovingRMS"])
    for parameter in trained.network.parameters():
        parameter.requires_grad_()
    roles = parameter_roles(trained.network)
    assert roles["bn1.gamma"] == roles["layer2.0.downsample.1.gamma"] == "norm_weight"
    assert roles["bn1.beta"] == "norm_bias"
    assert (trained.network.bn1.mean_square != 1).all()


def test_a_data_set_to_the_table(walk):
    walk("data set")
    page, rows, told = table()
    assert told["scale"] == "stripes" and "stripes, not ImageNet" in page and "online_clamp" in rows
    published = [c for c in told["comparisons"] if c["first"] == "online_clamp" and c["second"] is None]
    assert {c["verdict"]["outcome"] for c in published} == {"not comparable"}
    dataset = json.loads(Path("runs/lines/online_clamp/seed0/results.json").read_text())["dataset"]
    assert (dataset["name"], dataset["licence"]) == ("Stripes", "CC0")


def test_a_network_to_an_export(walk, monkeypatch):
    walk("network")
    assert list(Path("exports").glob("*.pt2"))
    monkeypatch.setattr("onlinenorm.data.FashionMNIST.class_names", property(lambda self: pytest.fail("needs data")))
    trained = load_trained("runs/net", allowed=["two_layers.TwoLayers"])
    assert (trained.num_classes, trained.in_channels) == (10, 1)


def test_an_experiment_of_all_that_is_ones_own(walk, capsys):
    walk(*SECTIONS)
    _, rows, told = table()
    assert rows["moving_rms"]["label"] == "moving RMS" and told["scale"] == "stripes"
    planned = capsys.readouterr().out
    assert all(name in planned for name in ("moving_rms", "batch", "seed1"))


ROLE_UNKNOWN = r"moving_rms.MovingRMS: whether weight decay acts on its parameter gamma is not known; say in the class"


@pytest.mark.parametrize(
    "section, path, old, new, message",
    [
        ("normalizer", "mine/moving_rms.py", '"gamma": "norm_weight", ', "", ROLE_UNKNOWN),
        (
            "normalizer",
            "mine/moving_rms.py",
            "1, 1))\n\n",
            "1, 1), persistent=False)\n\n",
            "Keep mean_square in buffers",
        ),
        (
            "normalizer",
            "mine/moving_rms.py",
            "Module):",
            "Module)",
            r"could not be imported \(SyntaxError.*rms.py, line 7",
        ),
        ("normalizer", "mine/moving_rms.py", "register_buffer(", "__setattr__(", r"keeps the tensor mean_square"),
        ("normalizer", "mine/normalizer/moving_rms.yaml", "moving RMS", "a|b", r"normalizer._label_: 'a\|b' is not"),
        ("data set", "mine/stripes.py", "scale, licence =", "name_of_set, licence =", r"stripes.Stripes has no scale"),
        ("data set", "mine/stripes.py", "scale, licence =", "scale, terms =", r"stripes.Stripes has no licence"),
        (
            "data set",
            "mine/stripes.py",
            "def build(",
            "def bild(",
            r"Stripes could not be opened \(NotImplementedError",
        ),
        ("data set", "mine/stripes.py", "= 8\n", "= 4\n", "^data.image_size: 4 is not a whole number 8"),
        ("network", "mine/two_layers.py", "normalizer(width), ", "", "TwoLayers holds no layer of the normalizer"),
        (
            "network",
            "mine/two_layers.py",
            "width, num_classes)",
            "width, 3)",
            r"TwoLayers built with num_classes=7 makes",
        ),
    ],
)
def test_what_is_left_out_is_told(walk, section, path, old, new, message, monkeypatch):
    content = files(section)
    assert old in content[path]
    content[path] = content[path].replace(old, new)
    monkeypatch.setattr(sys.modules[__name__], "files", lambda _: content)
    with pytest.raises(ConfigError, match=message):
        walk(section)
    assert not list(Path().rglob("results.json"))
