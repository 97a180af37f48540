"""What removing the clamp does, at the end and at every epoch, and other ways to take it away or to mend statistics."""

import json

import pytest
from matplotlib.figure import Figure
from run_folders import write_run
from study_folders import NAN

from onlinenorm.report import clamp_words, words
from onlinenorm.report.ablation import build_ablation, clamp_removals
from onlinenorm.report.build import load_studies, study_files
from onlinenorm.report.clamp_figures import draw_removal
from onlinenorm.report.findings import Findings
from onlinenorm.report.removal import removal_courses, removal_epochs, ways
from onlinenorm.report.render import render_ablation, render_markdown, render_page
from onlinenorm.report.runs import load_runs
from onlinenorm.report.swept import in_order
from onlinenorm.report.tables import build_report

COMMON = {"scale": "imagenette", "model": "resnet50", "data": {"image_size": 128}}
KEPT, REMOVED = "clamp kept", "clamp removed after training, as published"


def write_clamped(root, seed, top1=0.81, cost=0.05, anew=0.02, recipe=None, removals=None, **options):
    """A run whose last accuracy is `top1` with its clamp, `cost` less without and `anew` less on other statistics."""
    clamping = {
        "layers": 53, "clamp_value": 5.0, "with": {"val_loss": 0.6, "val_top1": top1},
        "without": {"val_loss": 1.1, "val_top1": top1 - cost}, "changed_predictions": 400, "clamped_fraction": 1e-3,
        "max_abs_activation": 22.0,
    }  # fmt: skip
    again = {"images": 9440, "val_loss": 0.7, "val_top1": top1 - anew, "changed_predictions": 200}
    clamped = [(1e-3, 20.0)] * 5 if removals else None
    options = COMMON | {"clamping": clamping, "reestimated": again, "clamped": clamped, "removals": removals} | options
    return write_run(root, "online_clamp", seed, recipe=recipe, **options)


def by_way(frame):
    return {(row.normalizer, row.setting, row.way): row for row in frame.itertuples()}


def test_each_way_stands_against_the_network_as_trained(tmp_path, spec):
    for seed in range(3):
        write_clamped(tmp_path, seed, top1=0.81 + 0.001 * seed, cost=0.05 + 0.001 * seed, anew=0.001 * seed)
        again = {"images": 9440, "val_loss": 0.5, "val_top1": 0.8 + 0.001 * seed, "changed_predictions": 100}
        write_run(tmp_path, "batch", seed, top1=0.79, loss=0.8, reestimated=again, **COMMON)
        write_run(tmp_path, "online_layer_scaling", seed, **COMMON)
    found = by_way(ways(load_runs(tmp_path).runs, spec))
    anew = "statistics anew (9,440 images)"
    assert list(found) == [
        ("online_clamp", "", KEPT), ("online_clamp", "", REMOVED), ("online_clamp", "", f"clamp removed, {anew}"),
        ("batch", "", "as trained"), ("batch", "", anew),
    ]  # fmt: skip
    removed = found["online_clamp", "", REMOVED]
    assert removed.verdicts["last_top1"].outcome == "different" and removed.changed == pytest.approx(400 / 3925)
    assert removed.gaps["last_top1"] == pytest.approx(-0.051) and removed.gaps["last_loss"] == pytest.approx(0.5)
    assert found["online_clamp", "", f"clamp removed, {anew}"].verdicts["last_top1"].outcome == "equivalent"
    batch = found["batch", "", anew]
    assert batch.summaries["last_top1"].mean == pytest.approx(0.801)
    assert found["online_clamp", "", KEPT].verdicts is None


def test_two_seeds_give_a_difference_and_no_interval(tmp_path, spec):
    for seed in range(2):
        write_clamped(tmp_path, seed)
    (row,) = (row for row in ways(load_runs(tmp_path).runs, spec).itertuples() if row.way == REMOVED)
    assert str(clamp_words.way_verdict(row, "last_top1")) == "-5.00 points<br>inconclusive: n = 2"


def test_a_way_that_is_equivalent_is_not_where_a_run_diverged(tmp_path, spec):
    for seed in range(3):
        write_clamped(tmp_path, seed, cost=0.0001 * seed)
    write_run(tmp_path, "online_clamp", 3, done=1, failure=NAN, **COMMON)
    row = by_way(ways(load_runs(tmp_path).runs, spec))["online_clamp", "", REMOVED]
    assert row.verdicts["last_top1"].outcome == "inconclusive" and "1 of 4 diverged" in row.mark


def test_a_way_that_changes_no_prediction_is_equivalent(tmp_path, spec):
    for seed in range(3):
        write_run(tmp_path, "online_clamp", seed, **COMMON)  # whose clamp did nothing
    row = by_way(ways(load_runs(tmp_path).runs, spec))["online_clamp", "", REMOVED]
    verdict = row.verdicts["last_top1"]
    assert (row.changed, verdict.outcome, verdict.reason) == (0, "equivalent", "no prediction changed")


def test_remedies_of_training_stand_beside_the_run_that_keeps_its_clamp(tmp_path, spec):
    for seed in range(3):
        write_clamped(tmp_path, seed, top1=0.81 + 0.001 * seed)
        for epochs in (1, 3, 12):
            folder = tmp_path / f"recipe.clamp_off_epochs={epochs}"
            write_clamped(folder, seed, recipe={"clamp_off_epochs": epochs}, cost=0.01 * epochs + 0.001 * seed)
    study = load_runs(tmp_path)
    found = by_way(ways(study.runs, spec))
    order = [way for _, _, way in found if "off" in way and "anew" not in way]
    assert order == [f"clamp off in the last {told}" for told in ("1 epoch", "3 epochs", "12 epochs")]
    off = found["online_clamp", "", "clamp off in the last 3 epochs"]
    assert off.changed is None and off.gaps["last_top1"] == pytest.approx(-0.032)
    for epochs in (1, 2, 12):
        folder = tmp_path / "raised" / f"recipe.clamp_raise_epochs={epochs}"
        write_clamped(folder, 0, recipe={"clamp_raise_epochs": epochs})
    names = [row.way for row in ways(load_runs(tmp_path / "raised").runs, spec).itertuples()]
    doubled = [f"clamp doubled in {told}" for told in ("the last 1", "each of the last 2", "each of the last 12")]
    assert [name.partition(" epoch")[0] for name in names[::3]] == doubled
    raised = write_clamped(tmp_path / "other", 0, recipe={"clamp_raise_epochs": 2, "clamp_off_epochs": 1})
    names = [row.way for row in ways(load_runs(raised).runs, spec).itertuples()]
    assert names[0] == "clamp doubled in each of 2 epochs, then off in the last 1 epoch"
    raised = write_clamped(tmp_path / "third", 0, recipe={"clamp_raise_epochs": 2})
    names = [row.way for row in ways(load_runs(raised).runs, spec).itertuples()]
    assert names[:2] == [f"clamp doubled in each of the last 2 epochs, {end}" for end in ("kept", "then removed")]
    page = render_ablation(build_ablation(study.runs, spec))
    assert "| clamp off in the last 12 epochs | 3 |" in page and len(removal_epochs(study)) == 0


def test_runs_that_have_one_way_make_no_section(tmp_path, spec):
    write_run(tmp_path, "batch")
    assert "Without the clamp" not in render_markdown(build_report(load_runs(tmp_path).runs, spec))
    write_clamped(tmp_path, 0)
    (tmp_path / "x").mkdir()
    report = build_report(load_runs(tmp_path / "online_clamp").runs, spec)
    assert "## Without the clamp" in render_markdown(report)
    page = render_page(report, {})
    assert "<h2>Without the clamp" in page and "&lt;br" not in page
    assert '-5.00 points<span class="detail">inconclusive: n = 1</span>' in page


def write_curves(root, **options):
    """Removal costs 400, 300, ... predictions of an epoch; the learning rate drops after the second and third epoch."""
    removals = [(1.5, 0.5, 400), (float("nan"), 0.6, 300), (1.0, 0.7, 200), (0.9, 0.8, 100), (0.8, 0.8, 50)]
    for seed in range(2):
        write_clamped(root, seed, removals=removals, recipe={"milestones": [2, 3], **options.get("recipe", {})})


def test_removal_over_a_run_is_told_by_the_drops_of_the_rate(tmp_path):
    write_curves(tmp_path)
    rows = list(removal_courses({"x": load_runs(tmp_path)}).itertuples())
    assert [(row.drops, row.runs, len(row.changed)) for row in rows] == [(0, 2, 4), (1, 2, 2), (2, 2, 4)]
    assert rows[0].changed == pytest.approx([400 / 3925, 300 / 3925] * 2) and len(rows[0].loss) == 2
    table = words.table(clamp_words.REMOVAL_COURSES, removal_courses({"x": load_runs(tmp_path)}))
    assert "| x | 2 | 0.001 | 4 of 2 runs | 1.91% | 1.27% to 2.55% |" in table


def test_pictures_and_pages_of_removal(tmp_path, spec):
    write_curves(tmp_path / "imagenette" / "runs")
    for rate in (0.05, 0.2):
        folder = tmp_path / "imagenette_lr" / "runs" / f"recipe.lr={rate}"
        write_curves(folder, recipe={"lr": rate})
    write_curves(tmp_path / "imagenette_lr" / "runs")
    studies = load_studies(tmp_path, spec)
    files = study_files(studies, None, spec)["."]
    assert files["removal.png"].startswith(b"\x89PNG") and files["ways.png"].startswith(b"\x89PNG")
    page = files["clamping.md"].decode()
    assert "(removal.png)" in page and "(ways.png)" in page and "| imagenette_lr, lr 0.2 | 0 |" in page
    assert [row.setting for row in studies["imagenette_lr"].made.ways.itertuples() if row.way == KEPT] == [
        "lr 0.05", "lr 0.1", "lr 0.2",
    ]  # fmt: skip


def test_many_studies_of_removal_take_several_rows_and_settings_stand_by_size(tmp_path):
    for value in (16, 3):
        settings = {"clamp_value": float(value), "error_compensation": "clamp", "_target_": "x"}
        folder = tmp_path / f"normalizer.clamp_value={value}"
        write_clamped(folder, 0, normalizer_config=settings, removals=[(1.5, 0.5, 400)] * 5)
    study = load_runs(tmp_path)
    few, many = (draw_removal({str(k): study for k in range(count)}, {}) for count in (4, 5))
    sizes = [[int.from_bytes(png[at : at + 4], "big") for at in (16, 20)] for png in (few, many)]
    assert sizes[0][0] == sizes[1][0] and 2 * sizes[0][1] == sizes[1][1]
    assert in_order(removal_epochs(study)["setting"]) == ["clamp_value 3", "clamp_value 16"]
    told = [(row.setting, row.drops) for row in removal_courses({"x": study}).itertuples()]
    assert told == [(f"clamp_value {value}", drops) for value in (3, 16) for drops in range(4)]


def test_runs_without_curves_make_no_picture(tmp_path, spec):
    write_run(tmp_path / "own" / "runs", "online_clamp", clamped=[(1e-3, 9.0)] * 5)
    files = study_files(load_studies(tmp_path, spec), None, spec)["."]
    assert not {"removal.png", "ways.png"} & files.keys() and "every epoch" not in files["clamping.md"].decode()


def test_the_summary_of_photographs_has_removal_and_loss_over_their_epochs(tmp_path, spec, monkeypatch):
    drawn = {}
    monkeypatch.setattr("onlinenorm.report.figures.draw_overview", lambda panels: drawn.update(panels) or b"")
    write_curves(tmp_path / "imagenette" / "runs")
    write_run(tmp_path / "imagenette" / "runs", "batch", **COMMON, recipe={"milestones": [2, 3]})
    write_run(tmp_path / "imagenette" / "runs", "batch", 1, **COMMON, recipe={"milestones": [2, 3]}, done=3)
    study_files(load_studies(tmp_path, spec), None, spec)
    loss, removal = "Imagenette: validation loss, a line a seed", "the clamp removed after each epoch"
    assert {loss, removal} <= drawn.keys()
    axis = Figure().subplots()
    drawn[loss](axis)
    assert [len(line.get_xdata()) for line in axis.lines if line.get_color() == "#009E73"] == [5], "of the finished run"


@pytest.mark.parametrize("named", [True, False])
def test_the_summary_shows_removal_by_clamp_value_where_no_epochs_were_asked(tmp_path, spec, monkeypatch, named):
    titles = []
    monkeypatch.setattr("onlinenorm.report.figures.draw_overview", lambda panels: titles.extend(panels) or b"")
    clamped = [(1e-3, 9.0)] * 5
    write_run(tmp_path / "fashion_mnist" / "runs", "online_clamp", scale="fashion_mnist", clamped=clamped)
    for value in (2, 8):
        folder = tmp_path / ("clamp_value" if named else "another") / "runs" / f"normalizer.clamp_value={value}"
        settings = {"clamp_value": float(value), "error_compensation": "clamp", "_target_": "x"}
        write_clamped(folder, 0, cost=0.1 / value, normalizer_config=settings)
    study_files(load_studies(tmp_path, spec), None, spec)
    removal, fraction = "Imagenette:\nthe clamp removed after training", "activations beyond the clamp, a line a seed"
    assert (removal in titles) == named and (fraction in titles) != named


def test_a_run_that_two_studies_show_counts_once(tmp_path, spec):
    for study in ("first", "second"):
        for seed, cost in enumerate((0.01, 0.03, 0.05, 0.0)):  # of the last an activation was not finite
            folder = write_clamped(tmp_path / study / "runs", seed, cost=cost)
            results = json.loads((folder / "results.json").read_text())
            results["clamping"] |= {
                "clamped_fraction": cost, "changed_predictions": round(1e4 * cost),
                "max_abs_activation": 9 - seed if seed < 3 else None,
            }  # fmt: skip
            (folder / "results.json").write_text(json.dumps({**results, "parameters_sha256": f"weights {seed}"}))
    studies = load_studies(tmp_path, spec)
    found = Findings({}, {name: study.runs for name, study in studies.items()}, {}, None, spec)
    assert found.association() == {"fraction": "1.00", "largest": "-1.00", "runs": "3"}


def test_what_is_not_finite_without_the_clamp_is_told_and_in_no_mean(tmp_path, spec):
    for seed in range(3):
        write_clamped(tmp_path, seed, top1=0.81 + 0.001 * seed, cost=0.001 * seed)
    path = tmp_path / "online_clamp" / "seed1" / "results.json"
    results = json.loads(path.read_text())
    results["clamping"]["without"]["val_loss"] = results["reestimated"]["val_loss"] = None
    results["clamping"]["max_abs_activation"] = None
    path.write_text(json.dumps(results))
    runs = load_runs(tmp_path)
    removed = by_way(ways(runs.runs, spec))["online_clamp", "", REMOVED]
    assert list(removed.figures["last_loss"]) == [0, 2] and list(removed.figures["last_top1"]) == [0, 1, 2]
    assert removed.mark == "1 of 3 not finite" and "1 of 3 not finite" in removed.verdicts["last_top1"].reason
    assert removed.verdicts["last_top1"].outcome != "equivalent"
    report = build_report(runs.runs, spec)
    for page in (render_markdown(report), render_page(report, {})):
        assert "not finite without the clamp: not identical" in page and "1 of 3 not finite" in page
    removals = words.table(clamp_words.CLAMP_REMOVALS, clamp_removals({"study": runs}))
    assert removals.count("not finite") == 2
