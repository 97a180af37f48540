"""Files appear whole or not at all, and nothing of a failed attempt stays."""

import os

import pytest

from onlinenorm import files
from onlinenorm.errors import DataError, RunError


@pytest.fixture
def full_disk(monkeypatch):
    """full_disk(): from here on nothing reaches the disk."""

    def full(descriptor):
        raise OSError(28, "No space left on device")

    return lambda: monkeypatch.setattr(files.os, "fsync", full)


def test_a_file_is_replaced_or_left(tmp_path, full_disk):
    path = tmp_path / "metrics.csv"
    files.write_atomically(path, "old")
    files.write_atomically(path, b"newer")
    assert path.read_bytes() == b"newer"
    full_disk()
    with pytest.raises(RunError, match=r"metrics.csv: could not be written \(.*No space left.*; free some space"):
        files.write_atomically(path, "newest")
    assert path.read_bytes() == b"newer" and [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]


def test_only_a_full_disk_is_told_to_be_emptied(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"written \(Not a directory\); mend that"):
        files.write_atomically(tmp_path / "file" / "metrics.csv", "x")


def test_a_link_is_replaced_and_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("theirs")
    (tmp_path / "link").symlink_to(outside)
    files.write_atomically(tmp_path / "link", "ours")
    assert outside.read_text() == "theirs" and not (tmp_path / "link").is_symlink()


def test_files_keep_the_users_mask(tmp_path):
    former = os.umask(0o002)
    try:
        files.write_atomically(tmp_path / "a", "x")
    finally:
        os.umask(former)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o664


def test_files_of_one_folder_appear_together(tmp_path):
    folder = tmp_path / "above" / "report"
    files.write_together(folder, {"a": b"1", "b": b"2"})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"a": b"1", "b": b"2"}
    with pytest.raises(ZeroDivisionError), files.staging(folder) as work:
        (work / "a").write_text("3")
        1 / 0  # noqa: B018
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"a": b"1", "b": b"2"}


def test_nothing_is_replaced_when_one_file_cannot_be_written(tmp_path, full_disk):
    (tmp_path / "a").write_text("old")
    with pytest.raises(DataError, match="could not be written"):
        files.write_together(tmp_path, {"a": b"new", "missing/b": b"new"}, DataError)
    full_disk()
    with pytest.raises(DataError, match=r"could not be written .*No space left"):
        files.write_together(tmp_path, {"a": b"new", "b": b"new"}, DataError)
    assert (tmp_path / "a").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["a"]


def test_of_folders_made_for_nothing_nothing_stays(tmp_path, full_disk):
    full_disk()
    with pytest.raises(RunError, match="could not be written"):
        files.write_together(tmp_path / "above" / "report", {"a": b"new"})
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot be written to \(Not a directory\); name another folder"):
        files.write_together(tmp_path / "file" / "below", {"a": b"new"})


def test_the_cache_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.user_cache() == tmp_path / "onlinenorm"


def test_a_user_without_a_home_has_a_cache(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user id that has no entry
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path))
    assert files.user_cache().parent == tmp_path
