from onlinenorm.data import progress


def test_progress_tells_rate_and_time_to_go(capsys, monkeypatch):
    clock = iter([0.0, 10.0, 20.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    report = progress.Progress(interval=1)
    for done in (0, 1000, 4000):
        report("writing", done, 4000)
    lines = capsys.readouterr().err.splitlines()
    assert [line.rstrip() for line in lines] == [
        "writing: 1,000 of 4,000 (25.0%), 100/s, 30 s to go",
        "writing: 4,000 of 4,000 (100.0%), 200/s, 0 s to go",
    ]  # fmt: skip
