import json
import os
import shutil

import numpy as np
import pytest
from run_folders import write_run

from onlinenorm.errors import ReportError
from onlinenorm.report.runs import load_runs


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_finished_run(tmp_path):
    write_run(tmp_path, "online_clamp", 3, top1=0.8812, loss=0.321)
    runs, epochs = load_runs(tmp_path)
    (run,) = runs.itertuples()
    assert (run.name, run.normalizer, run.seed, run.status) == ("online_clamp/seed3", "online_clamp", 3, "finished")
    assert (run.best_top1, run.best_loss) == (0.8812, 0.321)
    assert run.last_loss == pytest.approx(epochs["val_loss"].iloc[-1])
    assert epochs["epoch"].tolist() == [1, 2, 3, 4, 5] and set(epochs["folder"]) == {run.folder}
    assert run.config["recipe"]["epochs"] == 5 and run.environment["world_size"] == 1


def test_runs_are_found_at_any_depth_and_only_runs(tmp_path):
    for path in ("a/deep", "b"):
        write_run(tmp_path / path, "batch")
    inside = tmp_path / "b/batch/seed0/wandb/offline-run-1/files"
    inside.mkdir(parents=True)
    (inside / "config.yaml").write_text("x: 1\n")
    (tmp_path / "c").mkdir()
    (tmp_path / "c/config.yaml").write_text("not: a run\n")
    assert load_runs(tmp_path).runs["name"].tolist() == ["a/deep/batch/seed0", "b/batch/seed0"]
    (run,) = load_runs(tmp_path / "b/batch/seed0").runs.itertuples()
    assert run.name == "batch/seed0"


def test_links_to_runs_are_followed_to_each_folder_once(tmp_path):
    """A diverged seed that lies elsewhere must not go missing."""
    table, elsewhere = tmp_path / "table", tmp_path / "elsewhere"
    write_run(table, "batch", 0)
    (table / "batch" / "seed1").symlink_to(write_run(elsewhere, "batch", 1, done=1, failure="exit code 1"))
    (table / "group").symlink_to(write_run(elsewhere, "group", 0).parent)
    (table / "loop").symlink_to("..")
    (table / "twice").symlink_to("batch")
    runs = load_runs(table).runs
    assert runs["name"].tolist() == ["batch/seed0", "batch/seed1", "group/seed0"]
    assert runs["status"].tolist() == ["finished", "failed: epoch 1 of 5", "finished"]


def test_what_may_hold_a_run_and_cannot_be_read_is_told(tmp_path, monkeypatch):
    write_run(tmp_path, "batch", 0)
    link = tmp_path / "batch" / "seed1"
    link.symlink_to("gone")
    with pytest.raises(ReportError, match=r"batch/seed1: is a link to gone, which is not there"):
        load_runs(tmp_path)
    link.unlink()
    link.mkdir()
    real = os.scandir

    def scandir(path):
        if str(path) == str(link):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ReportError, match=r"batch/seed1: cannot be read \(Permission denied\), and may hold runs"):
        load_runs(tmp_path)


def test_a_copy_of_a_run_by_another_seed_does_not_count_twice(tmp_path):
    folder = write_run(tmp_path, "batch", 0)
    shutil.copytree(folder, copy := folder.with_name("seed1"))
    edit(copy / "results.json", lambda results: results.update(seed=1))
    with pytest.raises(ReportError, match=r"seed1/results.json: seed is 1, but config.yaml shows 0"):
        load_runs(tmp_path)
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace("seed: 0", "seed: 1"))
    told = r"^batch/seed0 \(seed 0\) and batch/seed1 \(seed 1\) ended with the same weights, which would count twice"
    with pytest.raises(ReportError, match=told):
        load_runs(tmp_path)


@pytest.mark.parametrize("done", [0, 1, 3])
def test_an_unfinished_run_says_how_far_it_is(tmp_path, done):
    write_run(tmp_path, "batch", done=done)
    run = next(load_runs(tmp_path).runs.itertuples())
    assert (run.finished, run.status, run.normalizer) == (False, f"running: epoch {done} of 5", "batch")


def test_a_run_that_has_just_begun_has_no_metrics(tmp_path):
    (write_run(tmp_path, "batch", done=0) / "metrics.csv").unlink()
    run = next(load_runs(tmp_path).runs.itertuples())
    assert run.status == "running: epoch 0 of 5"


def test_a_run_that_ended_in_nan_is_called_diverged(tmp_path):
    path = write_run(tmp_path, "none", done=2) / "metrics.csv"
    path.write_text(path.read_text() + "3,300,0.1,nan,0.1,nan,0.1,0.5,800,19\n")
    assert next(load_runs(tmp_path).runs.itertuples()).status == "diverged: epoch 3 of 5"


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (
            "the loss became NaN or infinite at step 41 (epoch 2, learning rate 0.1). The",
            "diverged: step 41, epoch 2 of 5",
        ),
        (
            "exit code 1\nRunError: a weight or statistic of the network became NaN or infinite at step 41",
            "diverged: step 41, epoch 2 of 5",
        ),
        ("exit code 1\nOut of memory", "failed: epoch 1 of 5"),
    ],
)
@pytest.mark.parametrize("metrics", ["kept", "header", "empty"])
def test_what_ended_a_run_is_told_from_running(tmp_path, failure, status, metrics):
    path = write_run(tmp_path, "batch", done=1, failure=failure) / "metrics.csv"
    if metrics != "kept":
        path.write_text(path.read_text().splitlines()[0] + "\n" if metrics == "header" else "")
        status = status.replace("epoch 1 of", "epoch 0 of") if "failed" in status else status
    run = next(load_runs(tmp_path).runs.itertuples())
    assert (run.status.split(", ")[0], run.diverged) == (status.split(", ")[0], "NaN" in failure)
    if "(epoch" in failure or metrics == "kept":
        assert run.status == status


def test_a_finished_run_has_not_failed(tmp_path):
    write_run(tmp_path, "batch", failure="exit code 1")
    assert next(load_runs(tmp_path).runs.itertuples()).status == "finished"


def test_clamping_over_training_is_read_and_checked(tmp_path):
    folder = write_run(tmp_path, "online_clamp", clamped=[(1e-3, 9.5), (0.0, 4.0)])
    epochs = load_runs(tmp_path).epochs
    assert epochs["clamped_fraction"].dropna().tolist() == [1e-3, 0.0] and epochs["recorded"].all()
    assert epochs["max_abs_activation"].dropna().tolist() == [9.5, 4.0] and len(epochs) == 5
    (folder / "clamping.csv").write_text("epoch,step\n1,10\n")
    with pytest.raises(ReportError, match=r"clamping\.csv: column clamped_fraction, max_abs_activation is missing"):
        load_runs(tmp_path)


def test_empty_fields_are_nan(tmp_path):
    path = write_run(tmp_path, "batch", done=1) / "metrics.csv"
    path.write_text(path.read_text() + "2,200,0.1,0.5,0.8,0.5,0.8,,,\n")
    epochs = load_runs(tmp_path).epochs
    assert np.isnan(epochs["val_top5"][1]) and epochs["val_top1"][1] == 0.8


def test_an_epoch_of_which_only_the_clamps_are_recorded_is_no_epoch_of_a_curve(tmp_path):
    write_run(tmp_path, "online_clamp", done=1, clamped=[(1e-3, 9.5), (0.0, 4.0)])
    runs, epochs = load_runs(tmp_path)
    assert epochs["epoch"].tolist() == [1, 2] and epochs["recorded"].tolist() == [True, False]
    assert runs["epochs"].tolist() == [1]


def test_folders_without_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ReportError, match=rf"^{tmp_path}/runs/nowhere: no such folder"):  # where it was looked for
        load_runs("runs/nowhere")
    with pytest.raises(ReportError, match=r"holds no run.*quickstart"):
        load_runs(tmp_path)


def test_a_missing_or_broken_config_is_named(tmp_path):
    folder = write_run(tmp_path, "batch")
    for content in ("recipe: [unclosed\n", "[" * 100_000, "- " * 100_000):
        (folder / "config.yaml").write_text(content)
        with pytest.raises(ReportError, match=r"seed0/config\.yaml: cannot be read"):
            load_runs(tmp_path)
    (folder / "config.yaml").unlink()
    with pytest.raises(ReportError, match=r"seed0/config\.yaml: missing"):
        load_runs(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": 1, "experiment": "x"', "\x00\x01"])
def test_a_damaged_results_file_is_named(tmp_path, content):
    (write_run(tmp_path, "batch") / "results.json").write_text(content)
    with pytest.raises(ReportError, match=r"batch/seed0/results\.json"):
        load_runs(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(schema=2), "schema is 2"),
        (lambda r: r.pop("scale"), "scale is None"),
        (lambda r: r.update(seed="0"), "seed is '0'"),
        (lambda r: r["best_top1"].update(val_top1=88.1), r"best_top1.val_top1 is 88.1.*fractions"),
        (lambda r: r["last"].update(val_loss=float("nan")), "last.val_loss is nan"),
        (lambda r: r["last"].pop("val_top1"), "last.val_top1 is missing"),
        (lambda r: r["clamping"]["without"].pop("val_loss"), "clamping.without.val_loss is missing"),
        (lambda r: r["clamping"].update(changed_predictions=2001), "clamping.changed_predictions is 2001"),
        (lambda r: r["best_loss"].update(val_loss=0.1), r"best_loss.val_loss is 0.1, but metrics.csv shows 0.3"),
        (lambda r: r["last"].update(val_loss=10**400), "last.val_loss is 1000.*outside"),
        (lambda r: r.update(normalizer="batch"), "normalizer is batch, but config.yaml shows online_clamp"),
        (lambda r: r.update(epochs=100), "epochs is 100, but config.yaml shows 5"),
    ],
)
def test_results_that_cannot_be_true_are_refused(tmp_path, change, message):
    edit(write_run(tmp_path, "online_clamp") / "results.json", change)
    with pytest.raises(ReportError, match=message):
        load_runs(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-30], r"line 6: \d+ fields"),
        (lambda text: text.replace("epoch,", "epok,"), "column epoch is missing"),
        (lambda text: text.replace("\n2,", "\ntwo,"), "line 3: could not convert"),
        (lambda text: text.replace("\n3,", "\n2,"), "epochs must be whole numbers that rise"),
        (lambda text: text.splitlines()[0] + "\n", "holds no epoch"),
        (lambda text: "", "holds no epoch"),
    ],
)
def test_damaged_metrics_are_refused_by_file_and_line(tmp_path, change, message):
    path = write_run(tmp_path, "batch") / "metrics.csv"
    path.write_text(change(path.read_text()))
    with pytest.raises(ReportError, match=rf"batch/seed0/metrics\.csv.*{message}"):
        load_runs(tmp_path)


def test_results_of_more_epochs_than_were_trained_are_refused(tmp_path):
    folder = write_run(tmp_path, "batch")
    edit(folder / "results.json", lambda results: results.update(epochs=100))
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("epochs: 5", "epochs: 100"))
    with pytest.raises(ReportError, match=r"epochs is 100, but metrics.csv shows 5 up to 5"):
        load_runs(tmp_path)


def test_results_without_metrics_are_refused(tmp_path):
    (write_run(tmp_path, "batch") / "metrics.csv").unlink()
    with pytest.raises(ReportError, match=r"metrics\.csv: missing"):
        load_runs(tmp_path)


def test_a_run_below_another_run_is_no_part_of_it(tmp_path):
    """One in run_dir=runs/photos, and another in run_dir=runs/photos/batch/seed0; attempts are a run's own."""
    outer = write_run(tmp_path, "online_clamp")
    inner = write_run(outer, "batch")
    shutil.copytree(inner, outer / "attempts" / "1")
    assert load_runs(outer).runs["folder"].tolist() == [str(outer), str(inner)]
