"""Runs whose last epochs had no clamp: their network as trained is the one without, and nothing was removed from it."""

import importlib.util
import json

import pytest
from run_folders import write_run
from study_folders import NAN
from tests_training import TINY, load_train_module

from onlinenorm.errors import ReportError
from onlinenorm.report.ablation import build_ablation, clamp_removals
from onlinenorm.report.build import load_studies, study_files
from onlinenorm.report.findings import Findings
from onlinenorm.report.paired import read_predictions
from onlinenorm.report.removal import ways
from onlinenorm.report.render import render_ablation, render_markdown
from onlinenorm.report.runs import load_runs
from onlinenorm.report.tables import build_report

FAST = ("normalizer.clamp_value=0.5", "recipe.lr=0.1", "normalizer.alpha_fwd=0.9", "normalizer.alpha_bkw=0.9")
COST = {
    "layers": 9, "clamp_value": 5.0, "with": {"val_loss": 0.5, "val_top1": 0.84},
    "without": {"val_loss": 0.4, "val_top1": 0.86}, "changed_predictions": 60, "clamped_fraction": 1e-3,
    "max_abs_activation": 9.0,
}  # fmt: skip
OFF = {"recipe": {"clamp_off_epochs": 2}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two runs of one seed: the first kept its clamp, the last epoch of the second had none."""
    train, root = load_train_module(), tmp_path_factory.mktemp("trained")
    folders = []
    for epochs in (0, 1):
        folder = root / f"recipe.clamp_off_epochs={epochs}" / "online_clamp" / "seed0"
        settings = [*TINY, *FAST, f"recipe.clamp_off_epochs={epochs}", f"run_dir={folder}"]
        train.train(train.load_config(settings))
        folders.append(folder)
    return folders


@pytest.fixture(scope="module")
def compare(root):
    spec = importlib.util.spec_from_file_location("compare", root / "scripts" / "compare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: module.main([str(argument) for argument in arguments])


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def test_a_run_is_told_as_it_was_trained(trained, spec):
    folder = trained[1]
    results = results_of(folder)
    last, clamping = results["last"]["val_top1"], results["clamping"]
    assert clamping["with"]["val_top1"] != clamping["without"]["val_top1"] == last
    runs = load_runs(folder).runs
    (run,) = runs.itertuples()
    right = {clamp: read_predictions(run, clamp).eval("prediction == label").mean() for clamp in (None, "with")}
    assert right == pytest.approx({None: last, "with": clamping["with"]["val_top1"]})
    page = render_markdown(build_report(runs, spec))
    changed = f"{clamping['changed_predictions']} of 21 predictions changed"
    points = f"accuracy {100 * (clamping['with']['val_top1'] - last):+.2f} points"
    (line,) = (line for line in page.splitlines() if "put back" in line)
    assert "seed0: trained without the clamp in the last 1 epoch; with it put back, not identical" in line
    assert changed in line and points in line and "val accuracy without" not in page


def test_predictions_of_another_run_are_still_found(trained):
    path = trained[1] / "results.json"
    before = path.read_text()
    results = json.loads(before)
    results["clamping"]["with"]["val_top1"] += 1 / 21
    path.write_text(json.dumps(results))
    try:
        with pytest.raises(ReportError, match=r"clamping\.with\.val_top1 is .*, but predictions\.npz shows"):
            load_runs(trained[1])
    finally:
        path.write_text(before)


def test_a_sweep_of_trained_runs_is_tabulated(trained, spec):
    runs = load_runs(trained[0].parents[2]).runs
    page = render_ablation(build_ablation(runs, spec))
    assert "| clamp off in the last 1 epoch | 1 |" in page and "are of networks trained so" in page
    assert "Each against networks as trained, with their clamps, at the last epoch" in page
    assert clamp_removals({"x": load_runs(trained[0].parents[2])})["run"].tolist() == [
        "recipe.clamp_off_epochs=0/online_clamp/seed0"
    ]


@pytest.mark.parametrize(
    "options, figures, notes",
    [
        ((), ("with", "without"), ("seed 0)", "seed 0; trained without the clamp in the last 1 epoch)")),
        (("--clamp", "with"), ("with", "with"), ("seed 0)", "in the last 1 epoch; compared with the clamp put back)")),
        (
            ("--clamp", "without"), ("without", "without"),
            ("seed 0; compared with the clamp removed)", "seed 0; trained without the clamp in the last 1 epoch)"),
        ),
    ],
)  # fmt: skip
def test_networks_are_compared_as_trained_unless_asked_otherwise(trained, compare, capsys, options, figures, notes):
    assert compare(*trained, *options, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    expected = [results_of(run)["clamping"][side]["val_top1"] for run, side in zip(trained, figures, strict=True)]
    assert [content["top1_a"], content["top1_b"]] == pytest.approx(expected)
    assert compare(*trained, *options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith(note) for line, note in zip(lines, notes, strict=False)] == [True, True], lines[:2]


def test_nothing_counts_as_removed(tmp_path, spec):
    runs = tmp_path / "fashion_mnist" / "runs"
    common = {"scale": "fashion_mnist", "clamping": COST, "clamped": [(1e-3, 9.0)] * 5}
    for seed in range(3):
        write_run(runs, "online_clamp", seed, **common, **OFF)
    write_run(runs, "online_clamp", 3, done=1, failure=NAN, clamped=[(1e-3, 9.0)], scale="fashion_mnist", **OFF)
    kept = tmp_path / "resnet50" / "runs"
    for seed in range(3):
        common["clamping"] = COST | {"clamped_fraction": 1e-3 * (1 + seed), "changed_predictions": 60 + seed}
        common["clamping"]["max_abs_activation"] = 9.0 + seed
        write_run(kept, "online_clamp", seed, **common)
    studies = load_studies(tmp_path, spec)
    found = {name: study.runs for name, study in studies.items()}
    assert clamp_removals(found)["study"].unique().tolist() == ["resnet50"]
    told = Findings({name: study.made for name, study in studies.items()}, found, {}, None, spec)
    assert told.removal()["runs"] == "3 runs" and told.removal("fashion_mnist")["runs"] == "not run"
    assert told.association()["runs"] == "3"
    alone = Findings({}, {"fashion_mnist": found["fashion_mnist"]}, {}, None, spec)
    assert alone.removal_in_sweeps() == alone.association()["fraction"] == "not run"
    page = study_files(studies, None, spec)["."]["clamping.md"].decode()
    assert "| resnet50 | online_clamp/seed0 | 9 | 5 | 60 of" in page and "| fashion_mnist | online_clamp" not in page
    assert "Left out: 3 of the runs with clamps, trained without the clamp in their last epochs" in page


def test_a_clamp_whose_return_is_not_finite_is_told(tmp_path, spec):
    write_run(tmp_path, "online_clamp", clamping=COST | {"with": {"val_loss": None, "val_top1": 0.1}}, **OFF)
    page = render_markdown(build_report(load_runs(tmp_path).runs, spec))
    assert "in the last 2 epochs; with it put back, not finite: not identical: 60 of 2,000" in page


def test_the_sentence_on_ways_is_that_of_its_rows(tmp_path, spec):
    for seed in range(2):
        write_run(tmp_path / "kept", "online_clamp", seed, clamping=COST)
        write_run(tmp_path / "raised", "online_clamp", seed, clamping=COST, recipe={"clamp_raise_epochs": 1})
    kept, raised = (render_markdown(build_report(load_runs(tmp_path / name).runs, spec)) for name in ("kept", "raised"))
    assert "Each against the same networks as trained, with their clamps, at" in kept and "trained so" not in kept
    assert "the same networks" not in raised and "| clamp doubled in the last 1 epoch, then removed |" in raised
    assert "Rows whose clamp was doubled or off in training are of networks trained so" in raised


def test_a_clamp_doubled_before_it_was_off_is_told_in_order(tmp_path, spec):
    for raised, off in ((1, 1), (2, 3)):
        recipe = {"clamp_raise_epochs": raised, "clamp_off_epochs": off}
        again = {"images": 512, "val_loss": 0.4, "val_top1": 0.85, "changed_predictions": 7}
        write_run(tmp_path / str(raised), "online_clamp", clamping=COST, recipe=recipe, reestimated=again)
    first = [ways(load_runs(tmp_path / name).runs, spec)["way"].iloc[0] for name in "12"]
    assert first == [
        "clamp doubled in 1 epoch, then off in the last 1 epoch",
        "clamp doubled in each of 2 epochs, then off in the last 3 epochs",
    ]
