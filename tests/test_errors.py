"""How a command ends: a message and an exit code, once for all processes, and no word where nobody reads on."""

import json
import os
import pickle
import shlex
import subprocess
import sys

import pytest

from onlinenorm import errors
from onlinenorm.errors import (
    ArgumentError,
    ConfigError,
    DataError,
    Interrupted,
    RunError,
    UnreadableImageError,
    cli_errors,
)
from onlinenorm.training.config_check import full_keys

TALKER = """
import sys
from onlinenorm.errors import cli_errors
with cli_errors():
    for number in range(100_000):
        print(number, flush={flush})
    sys.exit(0)
"""


@pytest.fixture
def process(monkeypatch):
    """process(rank, **environment): this process is that of torchrun, alone with its environment."""

    def be(rank, **environment):
        shared = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "h"}
        own = {"MASTER_PORT": "1", "RANK": str(rank), "LOCAL_RANK": str(rank), **environment}
        for name, value in (shared | own).items():
            monkeypatch.setenv(name, value)

    monkeypatch.setattr(errors, "RANK_ZERO_SECONDS", 0.1)
    return be


def end(error):
    with pytest.raises(SystemExit) as left, cli_errors():
        raise error
    return left.value.code


def test_the_first_process_speaks_for_all(process, capsys, monkeypatch):
    process(0)
    assert end(RunError("gone")) == 1 and capsys.readouterr().err == "gone\n"
    assert end(Interrupted("SIGTERM: saved", 15)) == 143 and capsys.readouterr().err == "SIGTERM: saved\n"
    process(1)
    assert end(Interrupted("SIGTERM: saved", 15)) == 143 and capsys.readouterr().err == ""
    assert end(RunError("this machine's disk")) == 1, "which the first process, alive, knows nothing of"
    assert capsys.readouterr().err == "this machine's disk\n"
    parents = iter((1, 1, 2))
    monkeypatch.setattr(errors.os, "getppid", lambda: next(parents))
    assert end(RunError("gone")) == 1 and capsys.readouterr().err == "", "its launcher has gone with the first"


def test_a_child_of_lightnings_launcher_leaves_the_exit_code_to_the_first(monkeypatch, capsys):
    for name, value in {"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert end(Interrupted("SIGTERM: saved", 15)) == 0
    error = UnreadableImageError("5.JPEG", key="on_unreadable")
    assert end(error) == 1 and capsys.readouterr().err == "on_unreadable: 5.JPEG\n", "of this process alone"
    error.on_all_processes = True
    with pytest.raises(SystemExit) as left, cli_errors(), full_keys({"data": {"on_unreadable": "raise"}}, "data"):
        raise error
    assert left.value.code == 0 and capsys.readouterr().err == ""


def test_torchrun_shows_the_sentence_in_its_table(process, tmp_path, capsys):
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    file = tmp_path / "error.json"
    process(0, TORCHELASTIC_ERROR_FILE=str(file))
    assert end(ConfigError("seed: -1 is not a whole number")) == 2
    failure = ProcessFailure(0, 1, 2, str(file))
    assert failure.message["extraInfo"]["py_callstack"] == "seed: -1 is not a whole number"
    assert json.loads(file.read_text())["message"]["message"] == "seed: -1 is not a whole number"


def test_ctrl_c_has_no_traceback(capsys):
    assert end(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "Ctrl-C\n"


@pytest.mark.parametrize("flush", [True, False])
def test_a_reader_that_leaves_early_ends_the_command_quietly(flush, root):
    command = f"set -o pipefail; {shlex.join([sys.executable, '-c', TALKER.format(flush=flush)])} | head -n 3"
    done = subprocess.run(["bash", "-c", command], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (141, "0\n1\n2\n", "")


def test_so_does_one_of_output_and_errors(root):
    talker = (
        "from onlinenorm.errors import Interrupted, cli_errors\n"
        "with cli_errors():\n    raise Interrupted('SIGPIPE: saved', 13)\n"
    )
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as left:
        assert subprocess.run([sys.executable, "-c", talker], cwd=root, stdout=left, stderr=left).returncode == 141


def test_other_broken_pipes_are_errors():
    with pytest.raises(BrokenPipeError), cli_errors():
        raise BrokenPipeError("a worker is gone")


def test_ctrl_c_is_told_in_a_word(capsys):
    with pytest.raises(SystemExit) as left, cli_errors("table1.py: "):
        raise KeyboardInterrupt
    assert left.value.code == 130 and capsys.readouterr().err == "table1.py: Ctrl-C\n"


@pytest.mark.parametrize("error", [ArgumentError("eps", "0 must be larger"), DataError("is missing", "root")])
def test_errors_by_key_travel_between_processes(error):
    twin = pickle.loads(pickle.dumps(error))
    assert type(twin) is type(error) and str(twin) == str(error) and twin.key == error.key
    assert str(error).startswith(f"{error.key}: ")


def test_names_that_are_no_text_or_too_long_end_in_their_own_error(root, tmp_path):
    talker = (
        "import os; from pathlib import Path; from onlinenorm.errors import RunError, cli_errors\n"
        "from onlinenorm.files import write_atomically\n"
        "with cli_errors():\n"
        "    name = os.fsdecode(b'\\xe4pfel'); print(name)\n"
        f"    write_atomically(Path({str(tmp_path)!r}, 'failed.txt'), name)\n"
        "    raise {error}\n"
    )
    for error, code, told in (
        ("RunError(name)", 1, r"\udce4pfel"),
        ("OSError(36, 'File name too long', 'x' * 3)", 2, "xxx: File name too long; choose a shorter path"),
    ):
        command = [sys.executable, "-X", "utf8", "-c", talker.replace("{error}", error)]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (code, "\\udce4pfel\n", f"{told}\n")
    assert (tmp_path / "failed.txt").read_text() == r"\udce4pfel"
