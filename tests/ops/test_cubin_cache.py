"""Kernels compiled once a machine: a second process reads what the first compiled, whatever happened to the files."""

import os
import time

import programs
import pytest
import torch

pytest.importorskip("triton")

from onlinenorm.ops.fused import cubin_cache, nvrtc

if torch.version.cuda is None:
    pytest.skip("torch without CUDA carries no NVRTC", allow_module_level=True)

# Load two kernels as a launch would, and tell how many NVRTC compiled; then write and read one file for a while.
PROGRAM = """
import hashlib, sys
import torch
from onlinenorm.ops.fused import cubin_cache, nvrtc, single_read
from onlinenorm.ops.fused.tiling import TUNINGS

compiled = 0
def counted(*arguments):
    global compiled
    compiled += 1
    return nvrtc.compile_source(*arguments)

cubin_cache.compile_source = counted
single_read.Kernel = lambda code, name: code
torch.cuda.get_device_capability = lambda device: (9, 0)
flags = dict.fromkeys(("HALF", "RESIDUAL", "SKIP_GRAD", "SCALED", "POOL", "SHORTCUT"), 0)
flags |= {"RELU": 1, "CLAMP": 1, "PEERS": 1, **TUNINGS[-1][-1].defines}
defines = tuple(f"-D{name}={value}" for name, value in flags.items())
code = b"".join(single_read._kernel(0, direction, defines) for direction in ("forward", "backward"))
print(compiled, hashlib.sha256(code).hexdigest())

cubin_cache.compile_source = lambda *arguments: code
for turn in range(int(sys.argv[1])):
    file = cubin_cache._folder() / "shared.cubin"
    assert cubin_cache._read(file, "key") in (None, code)
    cubin_cache._write(file, "key", code)
"""


def process(folder, turns=0):
    cache = {"USE_PYTORCH_KERNEL_CACHE": "1", "PYTORCH_KERNEL_CACHE_PATH": str(folder)}
    return programs.Program("-c", PROGRAM, turns, environment=os.environ | cache)


def ended(started):
    done = started.wait()
    assert done.returncode == 0, done.stderr
    compiled, digest = done.stdout.split()
    return int(compiled), digest


def test_two_processes_at_once_leave_whole_files_and_a_third_compiles_nothing(tmp_path):
    both = [ended(started) for started in [process(tmp_path, turns=300) for _ in range(2)]]
    compiled, digests = zip(*both, strict=True)
    assert 2 <= sum(compiled) <= 4 and len(set(digests)) == 1
    files = sorted(path.name for path in (tmp_path / "onlinenorm").iterdir())
    assert len(files) == 3 and all(name.endswith(".cubin") for name in files)
    assert ended(process(tmp_path)) == (0, digests[0])


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """What a stand-in for NVRTC was asked for."""
    calls = []

    def compile_source(*arguments):
        calls.append(arguments)
        return b"\x7fELF" + repr(arguments).encode()

    monkeypatch.setattr(cubin_cache, "compile_source", compile_source)
    monkeypatch.delenv("USE_PYTORCH_KERNEL_CACHE", raising=False)
    monkeypatch.setenv("PYTORCH_KERNEL_CACHE_PATH", str(tmp_path))
    return calls


ASKED = "source", "sm_90", ("-DA=1",)


def test_all_that_the_code_depends_on_is_told_apart(compiled, monkeypatch):
    others = [("source ", "sm_90", ("-DA=1",)), ("source", "sm_100", ("-DA=1",)), ("source", "sm_90", ("-DA=0",))]
    for _ in range(2):
        for asked in (ASKED, *others):
            assert cubin_cache.cubin(*asked) == b"\x7fELF" + repr(asked).encode()
    assert compiled == [ASKED, *others]
    major, minor, torch_version = nvrtc.compiler_version()
    assert major == int(torch.version.cuda.split(".")[0]) and torch_version == torch.__version__
    monkeypatch.setattr(cubin_cache, "compiler_version", lambda: (major, minor + 1, torch_version))
    cubin_cache.cubin(*ASKED)
    assert compiled[-1] == ASKED and len(compiled) == 5


DAMAGE = {
    "empty": lambda file, other: b"",
    "cut in the header": lambda file, other: file[: cubin_cache.HEADER - 1],
    "cut": lambda file, other: file[:-1],
    "longer": lambda file, other: file + b"\0",
    "one bit": lambda file, other: file[:-1] + bytes([file[-1] ^ 1]),
    "that of another kernel": lambda file, other: other,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_compiled_anew_and_replaced(damage, compiled, tmp_path, caplog):
    code = cubin_cache.cubin(*ASKED)
    (file,) = (tmp_path / "onlinenorm").iterdir()
    whole = file.read_bytes()
    cubin_cache.cubin("other", "sm_90", ())
    (other,) = set(file.parent.iterdir()) - {file}
    file.write_bytes(damage(whole, other.read_bytes()))
    assert cubin_cache.cubin(*ASKED) == code and len(compiled) == 3
    assert str(file) in caplog.text and file.read_bytes() == whole
    assert cubin_cache.cubin(*ASKED) == code and len(compiled) == 3


@pytest.mark.parametrize("age, stays", [(7200, False), (5, True)])
def test_what_a_killed_writer_left_is_removed_by_a_later_one(age, stays, compiled, tmp_path):
    left = tmp_path / "onlinenorm" / "key.cubinabc.tmp"
    left.parent.mkdir()
    left.write_bytes(b"part")
    os.utime(left, (time.time() - age,) * 2)
    cubin_cache.cubin(*ASKED)
    assert left.exists() == stays and len(list(left.parent.glob("*.cubin"))) == 1


def test_an_interrupted_write_leaves_nothing(compiled, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cubin_cache.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cubin_cache.cubin(*ASKED)
    assert not any((tmp_path / "onlinenorm").iterdir())


def unwritable(tmp_path, monkeypatch):
    """A folder whose files can be read and not written, also by root."""

    def refused(*arguments, **named):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(cubin_cache.tempfile, "mkstemp", refused)


def full(tmp_path, monkeypatch):
    def refused(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cubin_cache.os, "replace", refused)


def no_home(tmp_path, monkeypatch):
    def refused():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("PYTORCH_KERNEL_CACHE_PATH")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(cubin_cache.Path, "home", refused)


PLACES = {
    "a folder that cannot be written": unwritable,
    "a full disk": full,
    "a user without a home": no_home,
    "a file": lambda tmp_path, monkeypatch: (tmp_path / "onlinenorm").write_text(""),
    "/proc": lambda tmp_path, monkeypatch: monkeypatch.setenv("PYTORCH_KERNEL_CACHE_PATH", "/proc"),
    "turned off": lambda tmp_path, monkeypatch: monkeypatch.setenv("USE_PYTORCH_KERNEL_CACHE", "0"),
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_without_a_place_for_files_kernels_are_compiled_as_ever(place, compiled, tmp_path, monkeypatch):
    place(tmp_path, monkeypatch)
    code = [cubin_cache.cubin(*ASKED) for _ in range(2)]
    assert compiled == [ASKED] * 2 and code[0] == code[1] == b"\x7fELF" + repr(ASKED).encode()
    assert not any(path.is_file() and path.stat().st_size for path in tmp_path.rglob("*"))


def test_what_was_compiled_is_read_from_a_folder_that_cannot_be_written(compiled, tmp_path, monkeypatch):
    code = cubin_cache.cubin(*ASKED)
    unwritable(tmp_path, monkeypatch)
    assert cubin_cache.cubin(*ASKED) == code and compiled == [ASKED]


def test_files_lie_in_the_users_cache_folder(compiled, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTORCH_KERNEL_CACHE_PATH")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cubin_cache.cubin(*ASKED)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    cubin_cache.cubin(*ASKED)
    for folder in (tmp_path / "cache", tmp_path / "home" / ".cache"):
        assert len(list((folder / "onlinenorm" / "kernels").iterdir())) == 1
