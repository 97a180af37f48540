"""Files of a finished run that contradict each other are found; what was counted by two rules is told."""

import json

import numpy as np
import pytest
from run_folders import read_yaml, write_run

from onlinenorm.errors import ReportError
from onlinenorm.report.mixtures import check_one_table
from onlinenorm.report.render import render_markdown, render_page
from onlinenorm.report.runs import load_runs
from onlinenorm.report.tables import build_report

RULE = "argmax of float32 logits, the lowest class of equal ones"


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def write_predictions(folder, right, without=None):
    """predictions.npz of the run's 2,000 images, of which the first `right` are right; `without` the clamp."""
    label = np.arange(2000) % 10
    with_clamp = np.where(np.arange(2000) < right, label, (label + 1) % 10)
    arrays = {"prediction": with_clamp}
    if without is not None:
        arrays = {
            "with_clamp": with_clamp,
            "without_clamp": np.where(np.arange(2000) < without, label, (label + 1) % 10),
        }
    np.savez(folder / "predictions.npz", index=np.arange(2000), label=label, **arrays)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r["best_top1"].update(val_top1=r["best_top1"]["val_top1"] + 0.0009), "best_top1.val_top1 is 0.88"),
        (lambda r: r["best_loss"].update(val_loss=r["best_loss"]["val_loss"] - 1e-6), "best_loss.val_loss is"),
        (lambda r: r["last"].update(val_top1=r["last"]["val_top1"] + 1 / 2000), "last.val_top1 is"),
        (lambda r: r["last"].update(val_loss=r["last"]["val_loss"] - 1e-4), "last.val_loss is"),
        (lambda r: r["last"].update(epoch=4), "last.epoch is 4, but metrics.csv shows 5"),
        (lambda r: r["best_top1"].update(epoch=1), "best_top1.epoch is 1, but metrics.csv shows 4"),
        (lambda r: r["best_loss"].update(epoch=9), "best_loss.epoch is 9, but metrics.csv shows 4"),
    ],
)  # fmt: skip
def test_results_that_exceed_their_metrics_are_refused(tmp_path, change, message):
    folder = write_run(tmp_path, "batch")
    edit(folder / "results.json", change)
    with pytest.raises(ReportError, match=rf"results\.json: {message}"):
        load_runs(tmp_path)


def marked(folder, right, without=None):
    """Gives a run its predictions, the figures that they stand for, and the rule."""

    def change(results):
        results["top1_rule"] = RULE
        results["last"]["val_top1"] = right / 2000
        if without is not None:
            clamping = results["clamping"]
            clamping["with"], clamping["without"] = ({"val_loss": 0.4, "val_top1": n / 2000} for n in (right, without))
            clamping["changed_predictions"] = abs(right - without)

    edit(folder / "results.json", change)
    path = folder / "metrics.csv"
    lines = path.read_text().splitlines()
    last = lines[-1].split(",")
    last[lines[0].split(",").index("val_top1")] = repr(right / 2000)
    path.write_text("\n".join([*lines[:-1], ",".join(last)]) + "\n")
    write_predictions(folder, right, without)


def test_predictions_must_give_the_accuracies_of_results(tmp_path):
    folder = write_run(tmp_path, "online_clamp")
    marked(folder, 1700, 1690)
    assert load_runs(tmp_path).runs["last_top1"].tolist() == [0.85]
    for change, message in (
        (lambda r: r["clamping"].update(changed_predictions=9), "clamping.changed_predictions is 9.*shows 10"),
        (lambda r: r["clamping"]["without"].update(val_top1=0.8455), "clamping.without.val_top1 is 1691.*shows 1690"),
        (lambda r: r["clamping"]["with"].update(val_top1=0.8505), "clamping.with.val_top1 is 1701.*shows 1700"),
    ):
        before = (folder / "results.json").read_text()
        edit(folder / "results.json", change)
        with pytest.raises(ReportError, match=message):
            load_runs(tmp_path)
        (folder / "results.json").write_text(before)
    write_predictions(folder, 1704, 1694)
    with pytest.raises(ReportError, match=r"last.val_top1 is 1700, but predictions\.npz shows 1704"):
        load_runs(tmp_path)


def test_runs_from_before_the_one_rule_are_counted_again_and_told(tmp_path, spec):
    plain = write_run(tmp_path, "batch", 0)
    marked(plain, 1700)
    clamped = write_run(tmp_path, "online_clamp", 0)
    marked(clamped, 1700, 1690)
    for folder in (plain, clamped):
        edit(folder / "results.json", lambda r: r.pop("top1_rule"))
    assert build_report(load_runs(tmp_path).runs, spec).recounts.empty
    write_predictions(plain, 1696)
    write_predictions(clamped, 1700, 1693)
    report = build_report(load_runs(tmp_path).runs, spec)
    page = render_markdown(report)
    assert "## Accuracies by one rule" in page and "| batch/seed0 | last.val_top1 | 1,700 | 1,696 | 2,000 |" in page
    assert "| online_clamp/seed0 | clamping.without.val_top1 | 1,690 | 1,693 | 2,000 |" in page
    assert "| online_clamp/seed0 | clamping.changed_predictions | 10 | 7 | 2,000 |" in page
    assert "online_clamp/seed0 | last.val_top1" not in page
    assert "Accuracies by one rule" in render_page(report, {})


def divide(folder, **trainer):
    """Sets keys of a run's trainer in its configuration, as one recorded before divisions were."""
    path = folder / "config.yaml"
    config = read_yaml(path)
    config["trainer"].update(trainer)
    path.write_text(json.dumps(config))


def test_batch_norm_of_other_statistics_does_not_share_a_row(tmp_path):
    for seed, parts in enumerate((1, 8, 32)):
        divide(write_run(tmp_path, "batch", seed), accumulate_grad_batches=parts)
        divide(write_run(tmp_path, "online_clamp", seed), accumulate_grad_batches=parts)
    with pytest.raises(ReportError, match=r"the row of batch[\s\S]*accumulation .*: 1 .* \| 8 .* \| 32 "):
        check_one_table(load_runs(tmp_path).runs)
    runs = load_runs(tmp_path).runs
    check_one_table(runs[runs["normalizer"] == "online_clamp"])


@pytest.mark.parametrize(
    "normalizer, settings, refused",
    [
        ("batch", {}, True),
        ("batch", {"sync_batchnorm": True}, False),
        ("online_clamp", {}, False),
        ("own", {"recorded": {"images": 16, "processes": 2}}, True),
        ("own", {"recorded": {}}, False),
    ],
)
def test_processes_divide_what_a_statistic_sees(tmp_path, normalizer, settings, refused):
    one, two = write_run(tmp_path, normalizer, 0), write_run(tmp_path, normalizer, 1)
    recorded = settings.pop("recorded", None)
    for folder, processes in ((one, 1), (two, 2)):
        divide(folder, devices=processes, **settings)
        environment = {"world_size": processes}
        if recorded is not None:
            environment["statistics"] = recorded and {**recorded, "processes": processes}
        (folder / "environment.json").write_text(json.dumps(environment))
    runs = load_runs(tmp_path).runs
    if refused:
        with pytest.raises(ReportError, match="processes"):
            check_one_table(runs)
    else:
        check_one_table(runs)


def test_local_statistics_and_synchronised_ones_do_not_mix(tmp_path):
    local = {"_target_": "onlinenorm.normalizers.OnlineNorm2d", "statistics": "local"}
    for seed, processes in enumerate((1, 2)):
        folder = write_run(tmp_path / "a", "online_clamp", seed, normalizer_config=local)
        (folder / "environment.json").write_text(json.dumps({"world_size": processes}))
        folder = write_run(tmp_path / "b", "batch", seed)
        (folder / "environment.json").write_text(json.dumps({"world_size": 2}))
        divide(folder, sync_batchnorm=processes == 2)
    for part in "ab":
        with pytest.raises(ReportError, match="processes"):
            check_one_table(load_runs(tmp_path / part).runs)
