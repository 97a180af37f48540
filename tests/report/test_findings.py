"""The page that people write about recorded studies, and the figures that it asks for."""

import re
import shutil

import pandas as pd
import pytest
from run_folders import DATASETS, write_run
from study_folders import NAN, benchmark, write_photographs, write_studies

from onlinenorm.errors import ReportError
from onlinenorm.report.build import findings_page, load_studies
from onlinenorm.report.findings import Findings
from onlinenorm.report.render import fill

ALL = ("online_none", "online_clamp", "online_layer_scaling", "batch")
NAMES = r"\bResNet-50\b|\bCIFAR-100?\b|\bbfloat16\b"  # that have a number in them


def findings(studies, spec, results=None):
    pooled = {name: study.pooled for name, study in studies.items() if study.pooled is not None}
    made = {name: study.made for name, study in studies.items()}
    return Findings(made, {name: study.runs for name, study in studies.items()}, pooled, results, spec)


@pytest.fixture(scope="module")
def studies(tmp_path_factory, spec):
    return load_studies(write_studies(tmp_path_factory.mktemp("study")), spec)


@pytest.fixture(scope="module")
def found(studies, spec):
    return findings(studies, spec, benchmark(*ALL))


def typed_numbers(template):
    """Numbers of a template that are not filled in: those outside of {{ }}, {% %}, links and names."""
    text = re.sub(r"\{\{.*?\}\}|\{%.*?%\}|\]\([^)]*\)", " ", template, flags=re.DOTALL)
    return re.findall(r"\S*\d\S*", re.sub(NAMES, "", text))


def test_no_number_of_the_page_is_typed_by_hand(root):
    template = (root / "results" / "README.md.j2").read_text()
    assert template.count("{{") > 40 and typed_numbers(template) == []
    assert typed_numbers("ResNet-50 reached 76.3 % [here](a/b1.md), {{ row('x', 'y1') }}, 2x") == ["76.3", "2x"]


def test_rows_have_the_numbers_of_the_tables(studies, found):
    for row in studies["fashion_mnist"].made.rows.itertuples():
        mean, sd = row.summaries["best_top1"].mean, row.summaries["best_top1"].sd
        assert found.row("fashion_mnist", row.normalizer) == f"{100 * mean:.2f} ± {100 * sd:.2f} %"
    assert found.seeds("fashion_mnist", "batch") == "3"
    assert found.details("fashion_mnist").endswith("cifar_resnet20, 28 px, 6 epochs")


def test_verdicts_are_those_of_the_tables(studies, found):
    made = studies["fashion_mnist"].made.comparisons.dropna(subset="second")
    assert len(made) == 2 * (3 + 4), "the three pairs, and four further rows with BatchNorm"
    for row in made.itertuples():
        told = found.verdict("fashion_mnist", row.first, row.second, row.metric)
        if row.verdict.difference is None:  # of two seeds
            assert told == f"inconclusive: {row.verdict.reason}" and "n = 2" in told
        else:
            assert told.startswith(f"{row.verdict.outcome} (") and "90 % CI" in told
    assert (found.margin("fashion_mnist"), found.margin("fashion_mnist", "best_loss")) == ("0.5 points", "0.01 nats")
    assert found.verdict("resnet50", "online_clamp", "batch") == "inconclusive: n = 1"


def test_agreement_stands_beside_that_of_two_seeds(studies, found):
    pair = studies["fashion_mnist"].pooled.iloc[0]
    either = f"{pair['same_first']:.1%} and {pair['same_second']:.1%}"
    told = found.same("fashion_mnist", "online_clamp", "batch")
    assert told == f"{pair['same']:.1%} of the images (two seeds of either: {either})"


def test_clamps_are_told_over_all_tables(found):
    assert found.course() == {"fallen": "4", "compared": "4", "zero": "4", "runs": "4"}
    assert found.removal() == {"exact": "4", "runs": "4 runs", "share": "0.0 %", "points": "+0.00 points"}
    assert found.removal("resnet50")["runs"] == "1 run"


def test_removal_that_changes_something_is_told(tmp_path, spec):
    clamping = {
        "layers": 19, "clamp_value": 5.0, "with": {"val_loss": 0.35, "val_top1": 0.87},
        "without": {"val_loss": 0.3504, "val_top1": 0.8695}, "changed_predictions": 30, "clamped_fraction": 2e-5,
        "max_abs_activation": 8.25,
    }  # fmt: skip
    runs = tmp_path / "own" / "runs"
    write_run(runs, "online_clamp", 0, clamping=clamping, clamped=[(1e-3, 9.0)] * 4 + [(2e-3, 8.0)])
    write_run(runs, "online_clamp", 1, clamped=[(1e-3, 9.0)] * 4 + [(0.0, 4.0)])
    write_run(runs, "online_clamp", 2, failure=NAN, done=1)
    found = findings(load_studies(tmp_path, spec), spec)
    told = found.removal()
    assert told["runs"] == "2 runs (2 of 3 finished, 1 of 3 diverged)"
    assert (told["exact"], told["share"], told["points"]) == ("1", "0.0 to 1.5 %", "-0.05 points")
    assert found.course() == {"fallen": "1", "compared": "2", "zero": "1", "runs": "2"}


def test_removal_in_sweeps_is_told_by_its_worst_runs(tmp_path, spec):
    def clamping(top1):
        sides = {"with": {"val_loss": 0.35, "val_top1": 0.87}, "without": {"val_loss": 0.4, "val_top1": 0.87 + top1}}
        counts = {"changed_predictions": 30, "clamped_fraction": 2e-5, "max_abs_activation": 8.25}
        return {"layers": 19, "clamp_value": 5.0, **sides, **counts}

    sizes, clamps = tmp_path / "batch_size" / "runs", tmp_path / "clamp_value" / "runs"
    for size, top1 in ((8, 0.001), (512, -0.4975)):
        recipe = {"batch_size": size}
        write_run(sizes / f"recipe.batch_size={size}", "online_clamp", clamping=clamping(top1), recipe=recipe)
    value = {"normalizer_config": {"clamp_value": 1.0}}
    write_run(clamps / "normalizer.clamp_value=1", "online_clamp", clamping=clamping(0.01), **value)
    write_run(clamps, "online_clamp", clamping=clamping(-0.8))  # of another study: the value that is swept elsewhere
    found = findings(load_studies(tmp_path, spec), spec)
    assert found.removal_in_sweeps() == "-49.75 at recipe.batch_size=512, +1.00 at normalizer.clamp_value=1"
    assert found.removal()["runs"] == "not run"


def test_swept_values_say_what_they_leave_out(found):
    assert found.at("batch_size", "1", "BatchNorm").startswith("seed 0 diverged: step 40")
    told = found.at("clamp_value", "off", "OnlineNorm (no compensation)")
    assert told.endswith("% (1 of 2 finished, 1 of 2 diverged)")
    over = found.over("clamp_value", "OnlineNorm (activation clamping)")
    assert re.fullmatch(r"\S+ ± \S+ % at 1, \S+ ± \S+ % at 5 \(published\), \S+ ± \S+ % at 8", over), over


def test_a_row_of_which_nothing_finished_says_how_it_ended(tmp_path, spec):
    write_run(tmp_path / "own" / "runs", "online_none", 1, failure=NAN, finish=False, done=0)
    found = findings(load_studies(tmp_path, spec), spec)
    assert found.row("own", "online_none").startswith("seed 1 diverged: step 40")
    assert found.cost(256) == "not measured here"


def test_cost_is_that_of_the_batch(found):
    assert found.cost(256).startswith("batch 256, fused backend, compile+graph, bf16: clamping is cheaper")
    assert found.device() == "a GPU"


@pytest.mark.parametrize(
    "asked",
    [
        "row('nowhere', 'batch')",
        "row('resnet50', 'nothing')",
        "verdict('resnet50', 'batch', 'group')",
        "at('batch_size', '7', 'BatchNorm')",
        "cost(7)",
        "same('clamp_value', 'a', 'b')",
    ],
)
def test_what_is_not_there_is_named(found, asked):
    with pytest.raises(ReportError, match=r"findings: there is no .*its run data are missing"):
        fill(f"{{{{ {asked} }}}}", found)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory, spec):
    return load_studies(write_photographs(tmp_path_factory.mktemp("photographs")), spec)


@pytest.fixture(scope="module")
def recorded(root, spec, photographs):
    """Studies of the repository, without those that `photographs` stands for."""
    studies = load_studies(root / "results" / "study", spec)
    return {name: study for name, study in studies.items() if name not in photographs}


def test_findings_about_photographs_appear_with_their_runs(root, spec, photographs, recorded):
    template = root / "results" / "README.md.j2"
    both = (recorded, recorded | photographs)
    before, after = (findings_page(template, studies, benchmark(*ALL), spec).decode() for studies in both)
    for told in (
        "## Which way of taking it away", "on photographs in small batches?", "moving statistics?", "## Does CIFAR-10",
        "On CIFAR-100", "In a quarter of the epochs", "by epochs of warm-up", "By network", "By clamp value",
        "On Tiny ImageNet", "Minus the published values",
    ):  # fmt: skip
        assert told in after and told not in before, told
    for page in (before, after):
        assert page.count("What would change our mind") >= page.count("\n## ") - 1
        assert page.count("not run") == page.count("**ImageNet** was not run"), "all of these are there"
        assert "\n\n\n" not in page and not re.search(r"[.;)][A-Z]", page), "sentences run into one another"


def test_ways_are_told_with_their_difference(spec, photographs):
    told = findings(photographs, spec)
    assert told.way("imagenette", "online_clamp", "clamp kept") == "81.10 ± 0.10 %"
    removed = told.way("imagenette", "online_clamp", "clamp removed after")
    assert removed == "76.09 ± 0.09 % (-5.01 points, 90 % CI -5.03 to -4.99, which excludes 0: different)"
    off = told.ways_to("imagenette_clamp_off", "online_clamp", "off")
    assert off.startswith("clamp off in the last 1 epoch 78.50 % (-2.50 points, n = 1); ")
    by_rate = told.way_at("imagenette_lr", "online_clamp", "clamp removed after")
    assert by_rate == "-4.76 at 0.05 (n = 1), -5.00 at 0.1 (n = 1)"
    assert told.free() == {"equivalent": "2", "tables": "3"}  # on CIFAR no prediction changed
    with pytest.raises(ReportError, match="no online_clamp, clamp off of imagenette; its run data are missing"):
        told.way("imagenette", "online_clamp", "clamp off")


def test_batchnorm_is_told_on_statistics_estimated_anew_too(spec, photographs):
    told = findings(photographs, spec)
    anew = told.against_anew("imagenette", "online_clamp", "batch")
    assert anew.startswith("inconclusive (+1.00 points, 90 % CI") and anew.endswith("n = 3)")
    gap = told.last("imagenette", "online_clamp", "batch")
    assert gap == "equivalent (-0.08 points, 90 % CI -0.13 to -0.04, which excludes 0, n = 3)"
    loss = told.way("imagenette", "batch", "statistics anew", metric="last_loss")
    assert re.fullmatch(r"0\.500 ± 0\.000 \(\+0\.\d+ nats, 90 % CI \S+ to \S+, which excludes 0: different\)", loss), (
        loss
    )
    rises = re.fullmatch(r"(0\.\d\d)( to 0\.\d\d)? nats", told.jump("imagenette", "batch"))
    assert rises and float(rises[1]) > 0


def test_values_of_a_sweep_are_compared_seed_by_seed(spec, photographs):
    told = findings(photographs, spec)
    gap = told.between("imagenette_256", "5", "0", "BatchNorm")
    assert gap.startswith("equivalent (-0.46 points") and gap.endswith("n = 3)")
    assert told.between("imagenette_256", "5", "0", "OnlineNorm (layer scaling)").endswith("points, n = 1")
    assert told.setting("imagenette", "recipe.batch_size") == "32"
    with pytest.raises(ReportError, match=r"recipe\.lr of imagenette_lr is not one value but 2"):
        told.setting("imagenette_lr", "recipe.lr")
    assert told.over_drops("imagenette").endswith(" at 0.0001")


@pytest.mark.parametrize(
    "losses",
    [
        [
            ("imagenette/runs/batch", "", "BatchNorm not run (n = 3, 3, 0)"),
            ("cifar100/runs/batch", "", "(n = 3, 3, 0); within 1 point: clamping − BatchNorm not run"),
            ("imagenette_short/runs", "results.json", "(study/imagenette_short/table1.md)): not run with it, not"),
        ],
        [
            ("imagenette/runs/online_clamp", "", "In numbers: not run."),
            ("imagenette_clamp_value/runs", "results.json", "(study/imagenette_clamp_value/ablation.md)): not run."),
        ],
        [
            ("imagenette/runs/online_clamp", "results.json", "activation clamping seed 0 running: epoch 5 of 5;"),
            ("imagenette_256/runs/recipe.warmup_epochs=5/batch", "", "points, n = 1; BatchNorm not run."),
        ],
        [
            ("imagenette/runs", "results.json", "Within 1 point: clamping − BatchNorm not run;"),
            ("tiny_imagenet/runs/online_layer_scaling", "", "layer scaling not run, BatchNorm"),
        ],
    ],
)
def test_a_study_that_lacks_rows_or_values_has_its_place_on_the_page(tmp_path, root, spec, recorded, losses):
    write_photographs(tmp_path)
    for lost, gone, _ in losses:
        for path in (tmp_path / lost).rglob(gone) if gone else [tmp_path / lost]:
            path.unlink() if gone else shutil.rmtree(path)
    studies = recorded | load_studies(tmp_path, spec)
    page = findings_page(root / "results" / "README.md.j2", studies, None, spec).decode()
    assert [told for _, _, told in losses if told not in page] == []
    assert not re.search(r" [.,;]|: \.", page), "no place is empty"


def test_the_way_that_costs_least_is_named(spec, photographs):
    studies = ("imagenette", "imagenette_clamp_off", "imagenette_clamp_raised")
    told = findings(photographs, spec).cheapest("online_clamp", *studies, "nowhere")
    assert told == "clamp off in the last 2 epochs, statistics anew (9,440 images) (-0.83 points, n = 1)"
    assert findings(photographs, spec).cheapest("batch", "cifar10") == "not run"


def test_rows_are_held_against_what_was_published_of_them(tmp_path, spec, monkeypatch):
    monkeypatch.setattr("onlinenorm.report.tables.departures", lambda *_: pd.DataFrame(columns=["decisive"]))
    options = {
        "scale": "cifar10",
        "model": "cifar_resnet20",
        "dataset": dict(DATASETS["cifar10"], name="cifar10 (JPEG)"),
    }
    for seed in range(3):
        write_run(tmp_path / "cifar10" / "runs", "batch", seed, top1=0.920 + 0.001 * seed, **options)
    write_run(tmp_path / "cifar10" / "runs", "group", 0, top1=0.9, **options)
    write_run(tmp_path / "cifar10" / "runs", "batch_renorm", 0, done=2, **options)
    found = findings(load_studies(tmp_path, spec), spec)
    told = found.against_published("cifar10", "batch")
    assert told.startswith("not comparable (-0.10 points, 90 % CI ") and "by the figures alone equivalent" in told
    assert found.against_published("cifar10", "online_layer_scaling") == "not run"
    assert found.further("cifar10") == (
        "GroupNorm 90.00 % (published 90.3 %, n = 1), batch_renorm seed 0 running: epoch 2 of 5 (n = 0)"
    )


def test_figures_on_the_page_are_text_and_not_html(tmp_path, spec):
    write_run(tmp_path / "own" / "runs", "R&D", 0, done=1)
    assert "R&D seed 0" in fill("{{ further('own') }}", findings(load_studies(tmp_path, spec), spec))
