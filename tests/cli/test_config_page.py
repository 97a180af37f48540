"""configs/README.md: every key of every file, as the files say."""

import re
import shutil

import pytest
import yaml

from onlinenorm.arguments import flatten
from onlinenorm.cli import help
from onlinenorm.cli.files import CONFIGS, GROUPS
from scripts.dev import config_page

PAGE = config_page.PAGE.read_text(encoding="utf-8")
FILES = sorted(CONFIGS.rglob("*.yaml"))


def names(file):
    """Keys of a file as the command line spells them, and marks such as _target_."""
    group, *below = file.relative_to(CONFIGS).parts
    prefix = "" if not below else "normalizer." if group == "experiment" and len(below) == 2 else f"{group}."
    prefix = "" if group == "experiment" and len(below) == 1 else prefix
    for key in flatten({k: v for k, v in yaml.safe_load(file.read_text()).items() if k != "defaults"}):
        leaf = key.rpartition(".")[2]
        yield leaf if leaf.startswith("_") else prefix + key


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_every_key_of_every_file_is_told(file):
    assert [name for name in names(file) if f"`{name}" not in PAGE] == []


def test_every_file_is_told():
    for file in FILES:
        if file.parent.name != "base" and file.stem != "train":
            assert f"| `{file.stem}` |" in PAGE, file


def test_every_row_of_keys_has_a_meaning():
    rows = re.findall(r"^\| `[a-z_]+\.\w+` \| (.*?) \| (.*) \|$", PAGE, re.MULTILINE)
    assert len(rows) > 80 and all(value.startswith("`") and len(meaning) > 4 for value, meaning in rows)


def test_the_page_is_what_the_files_say():
    assert config_page.page() == PAGE, "run scripts/dev/reproduce.sh"


def test_a_comment_that_was_changed_is_found(tmp_path, monkeypatch, capsys):
    shutil.copytree(CONFIGS, tmp_path, dirs_exist_ok=True)
    for module in (help, config_page, __import__("onlinenorm.cli.files", fromlist=["files"])):
        monkeypatch.setattr(module, "CONFIGS", tmp_path)
    monkeypatch.setattr(config_page, "PAGE", tmp_path / "README.md")
    assert config_page.main(["--check"]) == 0
    file = tmp_path / "recipe" / "reference.yaml"
    file.write_text(file.read_text().replace("passes over the training images", "passes <all> a|b"))
    assert config_page.main(["--check"]) == 1 and "config_page.py" in capsys.readouterr().err
    assert config_page.main([]) == 0 and r"passes &lt;all> a\|b" in (tmp_path / "README.md").read_text()
    assert config_page.main(["--check"]) == 0


def test_groups_are_sections():
    assert [heading for heading in re.findall(r"^## (\w+)$", PAGE, re.MULTILINE) if heading in GROUPS] == list(GROUPS)
