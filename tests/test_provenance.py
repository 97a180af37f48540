"""What is recorded of the code and the machine that figures were made with."""

import subprocess

from onlinenorm.provenance import environment, git_state


def test_environment_says_what_a_table_needs(tmp_path):
    found = environment(3)
    assert found["world_size"] == 3 and found["hardware"] and found["command"]
    assert found["versions"]["torch"] and found["versions"]["pytorch-lightning"]
    assert git_state(tmp_path) == {"commit": "unknown", "dirty": None}


def test_outside_a_repository_the_commit_is_what_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    assert git_state(tmp_path) == {"commit": "unknown", "dirty": None}
    monkeypatch.setenv("GIT_COMMIT", "abc123")
    assert git_state(tmp_path) == {"commit": "abc123", "dirty": None}


def test_untracked_code_makes_the_state_dirty(tmp_path):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    def touch(name):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
        return tmp_path / name

    git("init")
    for name in ("train.py", "onlinenorm/a.py", "configs/model/a.yaml"):
        touch(name)
    touch(".gitignore").write_text("ignored/\n")
    git("add", ".")
    git("commit", "-m", "a")
    elsewhere = [touch("notes.txt"), touch("runs/a/results.json"), touch("configs/ignored/a.yaml")]
    commit = git_state(tmp_path)["commit"]
    assert len(commit) == 40 and git_state(tmp_path)["dirty"] is False, elsewhere
    for name in ("configs/model/own.yaml", "onlinenorm/models/own.py"):
        file = touch(name)
        assert git_state(tmp_path) == {"commit": commit, "dirty": True}, name
        file.unlink()
    own = [touch("my_norms.py"), tmp_path.parent / "elsewhere.py"]
    assert git_state(tmp_path)["dirty"] is False and git_state(tmp_path, own)["dirty"] is True
    touch("train.py").write_text("edited")
    assert git_state(tmp_path)["dirty"] is True


def test_a_repository_that_ignores_the_package_does_not_keep_it(tmp_path, monkeypatch):
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    subprocess.run(["git", "init"], cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / ".gitignore").write_text(".venv/\n")
    (tmp_path / ".venv" / "onlinenorm").mkdir(parents=True)
    assert git_state(tmp_path / ".venv") == {"commit": "unknown", "dirty": None}
