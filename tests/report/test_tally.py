"""No attempt vanishes from a row, a mean or a verdict."""

import importlib.util
import json
import shutil

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from run_folders import write_run
from study_folders import NAN

from onlinenorm.report import words
from onlinenorm.report.ablation import build_ablation
from onlinenorm.report.build import load_studies, study_files
from onlinenorm.report.figures import accuracy_panel, draw_curves, draw_overview
from onlinenorm.report.findings import Findings
from onlinenorm.report.render import render_ablation, render_markdown, render_page
from onlinenorm.report.runs import load_runs
from onlinenorm.report.seeds import tally
from onlinenorm.report.tables import build_report
from onlinenorm.report.words import ablation_table, main_table

ENDS = {"diverged": NAN, "failed": "exit code 1\nNo space left on device", "stopped": None}


def add_attempt(folder, number, end="diverged", epochs=0, starts=()):
    """What an attempt that ended so leaves in a run folder."""
    kept = folder / "attempts" / str(number)
    kept.mkdir(parents=True)
    shutil.copy(folder / "config.yaml", kept)
    lines = (folder / "metrics.csv").read_text().splitlines(keepends=True)
    (kept / "metrics.csv").write_text("".join(lines[: 1 + epochs]))
    (kept / "environment.json").write_text(json.dumps({"starts": list(starts)}))
    if ENDS[end] is not None:
        (kept / "failed.txt").write_text(ENDS[end])
    return kept


def write_row(folder, normalizer, ends, **options):
    """Runs of a row: an end for each of the attempts of each seed, "finished" or a key of ENDS the last of them."""
    for seed, (*former, last) in enumerate(ends):
        unfinished = {} if last == "finished" else {"done": 1, "failure": ENDS[last]}
        run = write_run(folder, normalizer, seed, **options, **unfinished)
        for number, end in enumerate(former, 1):
            add_attempt(run, number, end)


def verdicts(report):
    return {(c.first, c.second, c.metric): c.verdict for c in report.comparisons.itertuples()}


ends = st.lists(
    st.lists(st.sampled_from(sorted(ENDS)), max_size=2).flatmap(
        lambda former: st.sampled_from(["finished", *ENDS]).map(lambda last: [*former, last])
    ),
    max_size=5,
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(clamp=ends, batch=ends)
def test_every_attempt_that_is_put_in_is_counted_in_the_table(tmp_path_factory, spec, clamp, batch):
    assume(clamp or batch)
    folder = tmp_path_factory.mktemp("runs")
    write_row(folder, "online_clamp", clamp)
    write_row(folder, "batch", batch)
    report = build_report(load_runs(folder).runs, spec)
    table = main_table(report)
    for row, put_in in ((report.rows.iloc[0], clamp), (report.rows.iloc[2], batch)):
        flat = [end for run in put_in for end in run]
        found = row.tally
        assert found.tries == len(flat) == found.finished + found.diverged + found.failed + found.running
        assert (found.finished, found.diverged) == (flat.count("finished"), flat.count("diverged"))
        assert len(row.attempts) == len(flat) - len(put_in) and len(row.seeds) == found.finished
        for told in (*row.unfinished, *row.attempts):
            assert told in table
        if row.seeds and found.diverged:
            assert table.count(found.mark) >= 4, "beside each mean"
    diverged = any(counts.diverged for counts in report.rows["tally"])
    assert not diverged or all(v.outcome != "equivalent" for v in verdicts(report).values())


def test_rows_with_diverged_seeds_are_not_equivalent(tmp_path, spec):
    """Five seeds of BatchNorm, three of which diverged, are no match for five that finished, however alike the rest."""
    for seed in range(5):
        alike = 0.88 + 0.0001 * seed
        write_run(tmp_path, "online_clamp", seed, top1=alike, loss=0.3 + 0.0001 * seed)
        ended = {"done": 0, "failure": NAN} if seed > 1 else {}
        write_run(tmp_path, "batch", seed, top1=alike, loss=0.3, **ended)
    runs = load_runs(tmp_path)
    report = build_report(runs.runs, spec)
    verdict = verdicts(report)["online_clamp", "batch", "best_top1"]
    assert (verdict.outcome, verdict.difference) == ("inconclusive", None) and "3 of 5 diverged" in verdict.reason
    for seed in (5, 6):
        write_run(tmp_path, "batch", seed, top1=0.8802 + 0.0001 * seed, loss=0.3)
        write_run(tmp_path, "online_clamp", seed, top1=0.8802, loss=0.3 + 0.0001 * seed)
    runs = load_runs(tmp_path)
    report = build_report(runs.runs, spec)
    verdict = verdicts(report)["online_clamp", "batch", "best_top1"]
    assert verdict.outcome == "inconclusive" and verdict.difference is not None
    assert "BatchNorm: 4 of 7 finished, 3 of 7 diverged" in verdict.reason
    found = Findings({"own": report}, {"own": runs}, {}, None, spec)
    sentences = found.row("own", "batch"), found.verdict("own", "online_clamp", "batch")
    for told in (render_markdown(report), render_page(report, {}), *sentences):
        assert "3 of 7 diverged" in told, told


def test_an_attempt_that_diverged_before_it_was_run_again_is_counted(tmp_path, spec):
    for seed in range(4):
        write_run(tmp_path / "own" / "runs", "batch", seed, top1=0.88 + 0.0001 * seed, wrong=[1])
        write_run(tmp_path / "own" / "runs", "online_clamp", seed, top1=0.88, wrong=[2])
        write_run(tmp_path / "own" / "runs", "online_none", seed)
    equivalent = build_report(load_runs(tmp_path).runs, spec)
    assert verdicts(equivalent)["online_clamp", "batch", "best_top1"].outcome == "equivalent"
    add_attempt(tmp_path / "own" / "runs" / "batch" / "seed1", 1)
    add_attempt(tmp_path / "own" / "runs" / "online_none" / "seed0", 1)
    studies = load_studies(tmp_path, spec)
    report = studies["own"].made
    assert verdicts(report)["online_clamp", "batch", "best_top1"].outcome == "inconclusive"
    assert report.rows.iloc[2].attempts == ["seed 1, attempt 1 of 2 diverged: step 40, epoch 1 of 5"]
    files = study_files(studies, None, spec)
    for folder, name in (("own", "table1.md"), ("own", "paired.md")):
        assert "4 of 5 attempts finished, 1 of 5 attempts diverged" in files[folder][name].decode(), name
    assert json.loads(files["own"]["table1.json"])["rows"][2]["tally"]["diverged"] == 1


def test_a_continued_run_is_one_attempt_unless_it_diverged(tmp_path):
    first, second = ({"time": f"2026-01-0{day}"} for day in (1, 2))
    folder = write_run(tmp_path, "batch", environment={"starts": [first, second]})
    add_attempt(folder, 1, "failed", starts=[first])
    assert load_runs(tmp_path).runs["attempts"].tolist() == [[]]
    add_attempt(folder, 2, "diverged", starts=[first])
    add_attempt(folder, 10, "failed", epochs=2, starts=[{"time": "2026-01-03"}])
    statuses = load_runs(tmp_path).runs["attempts"][0]
    assert statuses == ["diverged: step 40, epoch 1 of 5", "failed: epoch 2 of 5"]


def test_attempts_whose_data_are_gone_are_told(tmp_path, spec):
    folder = write_run(tmp_path, "batch")
    results = json.loads((folder / "results.json").read_text())
    results["attempts"] = [
        {"folder": "attempts/1", "epochs": 0, "failure": NAN.splitlines()[1]},
        {"folder": "attempts/2", "epochs": 3, "failure": None},
    ]
    (folder / "results.json").write_text(json.dumps(results))
    add_attempt(folder, 2, "stopped", epochs=3)
    runs = load_runs(tmp_path).runs
    assert tally(runs).tries == 3
    told = main_table(build_report(runs, spec))
    assert "attempt 2 of 3 diverged: step 40, epoch 1 of 5; its data no longer exist" in told
    assert "attempt 1 of 3 stopped: epoch 3 of 5" in told


def test_swept_values_count_their_attempts(tmp_path, spec):
    for size in (8, 32):
        write_row(
            tmp_path / f"recipe.batch_size={size}",
            "batch",
            [["diverged", "finished"], ["finished"], ["diverged"]],
            recipe={"batch_size": size},
        )
    ablation = build_ablation(load_runs(tmp_path).runs, spec)
    assert [counts.tries for counts in ablation.points["tally"]] == [4, 4]
    assert ablation_table(ablation).count("| 2 | 2 of 4 attempts finished, 2 of 4 attempts diverged |") == 2
    text = render_ablation(ablation)
    assert text.count("seed 0, attempt 1 of 2 diverged") == 2 and text.count("seed 2 diverged") == 2


def test_runs_of_one_swept_value_must_agree_in_all_else(tmp_path, spec):
    from onlinenorm.errors import ReportError

    for seed, rate in enumerate((0.1, 0.2)):
        write_run(tmp_path / "recipe.batch_size=8", "batch", seed, recipe={"batch_size": 8, "lr": rate})
    with pytest.raises(ReportError, match=r"BatchNorm at 8[\s\S]*recipe.lr"):
        build_ablation(load_runs(tmp_path).runs, spec)


def test_an_attempt_that_ended_before_it_began_does_not_stop_a_report(tmp_path, spec):
    folder = write_run(tmp_path / "own" / "runs", "batch")
    (add_attempt(folder, 1, "failed") / "config.yaml").unlink()
    (row,) = (row for row in load_studies(tmp_path, spec)["own"].made.rows.itertuples() if row.seeds)
    assert row.attempts == ["seed 0, attempt 1 of 2 failed: epoch 0 of 5"]


def test_two_runs_side_by_side_tell_their_attempts(tmp_path, root, capsys):
    spec = importlib.util.spec_from_file_location("compare_script", root / "scripts" / "compare.py")
    compare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compare)
    folders = [write_run(tmp_path, name, wrong=[1]) for name in ("batch", "online_none")]
    add_attempt(folders[1], 1)
    assert compare.main([str(folder) for folder in folders]) == 0
    shown = capsys.readouterr().out
    assert "(batch, seed 0)" in shown
    assert "(online_none, seed 0; seed 0, attempt 1 of 2 diverged: step 40, epoch 1 of 5)" in shown


def test_pictures_name_what_they_leave_out(tmp_path, spec):
    write_row(tmp_path, "batch", [["finished"], ["diverged"]])
    write_row(tmp_path, "online_clamp", [["diverged"]])
    runs = load_runs(tmp_path)
    report = build_report(runs.runs, spec)
    seen = []

    def panel(axis):
        accuracy_panel(axis, report, runs.runs)
        seen.extend(label.get_text() for label in axis.get_yticklabels())

    assert draw_overview({"accuracy": panel}).startswith(b"\x89PNG")
    assert any("1 of 2 diverged" in label for label in seen) and any("1 of 1 diverged" in label for label in seen)
    assert draw_curves(runs, report).startswith(b"\x89PNG")
    assert words.seeds_cell(report.rows.iloc[0]).detail == "0 of 1 finished, 1 of 1 diverged"
