import importlib.util
import json
import subprocess
import sys

import pytest
import yaml
from run_folders import write_run

FILES = {"table1.md", "table1.json", "curves.png", "index.html"}


@pytest.fixture(scope="session")
def main(root):
    """main() of scripts/table1.py."""
    spec = importlib.util.spec_from_file_location("table1", root / "scripts" / "table1.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: module.main([str(argument) for argument in arguments])


def test_the_report_is_written_and_printed(root, tmp_path):
    for normalizer in ("online_clamp", "batch"):
        write_run(tmp_path / "runs", normalizer)
    command = [sys.executable, root / "scripts" / "table1.py", tmp_path / "runs", "--output", tmp_path / "report"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "report").iterdir()} == FILES
    assert "not ImageNet" in done.stdout and "BatchNorm" in done.stdout and "not run" in done.stdout
    assert str(tmp_path / "report" / "index.html") in done.stdout
    assert json.loads((tmp_path / "report" / "table1.json").read_text())["rows"][2]["seeds"] == [0]


def test_the_report_lies_beside_the_runs_and_can_be_made_again(main, tmp_path):
    write_run(tmp_path, "batch")
    contents = []
    for _ in range(2):
        assert main(tmp_path) == 0
        contents.append({name: (tmp_path / name).read_bytes() for name in FILES})
    assert contents[0] == contents[1]


def test_damaged_runs_end_with_the_file_and_leave_the_old_report(main, tmp_path, capsys):
    folder = write_run(tmp_path, "batch")
    (folder / "results.json").write_text('{"schema": 1,')
    (tmp_path / "table1.md").write_text("old")
    assert main(tmp_path) == 1
    output = capsys.readouterr()
    assert output.out == "" and "batch/seed0/results.json" in output.err
    assert (tmp_path / "table1.md").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"batch", "table1.md"}


def test_exit_codes_without_runs_and_without_arguments(main, tmp_path, capsys):
    assert main(tmp_path / "nowhere") == 1
    assert "no such folder" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2


def test_a_run_of_other_settings_is_named_and_can_be_left_out(main, tmp_path, capsys):
    for normalizer in ("online_clamp", "batch"):
        write_run(tmp_path, normalizer)
    odd = write_run(tmp_path, "batch", seed=7)
    config = yaml.safe_load((odd / "config.yaml").read_text())
    config["recipe"]["lr"] = 0.7
    (odd / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(tmp_path) == 1
    assert "recipe.lr" in (told := capsys.readouterr().err) and "--without batch/seed7, or" in told
    assert main(tmp_path, "--without", "batch/seed7") == 0
    assert "Left out, as asked: batch/seed7" in capsys.readouterr().out
    assert main(tmp_path, "--without", "batch/seed8") == 1
    assert "--without batch/seed8: there is no such run below" in capsys.readouterr().err
