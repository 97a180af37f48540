"""A folder of studies: every file, its numbers, and what is told where runs are missing."""

import importlib.util
import json
from dataclasses import replace

import pytest
from run_folders import write_run
from study_folders import NAN, benchmark, write_studies

from onlinenorm.errors import ReportError
from onlinenorm.report import benchmarks, render, words
from onlinenorm.report.ablation import courses
from onlinenorm.report.build import load_studies, study_files
from onlinenorm.report.clamp_figures import draw_clamping
from onlinenorm.report.runs import load_runs
from onlinenorm.report.settings import StudySpec

ALL = ("online_none", "online_clamp", "online_layer_scaling", "batch")


@pytest.fixture(scope="module")
def studies(tmp_path_factory, spec):
    return load_studies(write_studies(tmp_path_factory.mktemp("study")), spec)


@pytest.fixture(scope="module")
def files(studies, spec):
    return study_files(studies, benchmark(*ALL), spec)


@pytest.fixture(scope="session")
def main(root):
    """main() of scripts/study.py."""
    module_spec = importlib.util.spec_from_file_location("study_script", root / "scripts" / "study.py")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return lambda *arguments: module.main([str(argument) for argument in arguments])


def test_every_study_has_its_files(studies, files):
    assert list(studies) == ["fashion_mnist", "resnet50", "clamp_value", "batch_size"]
    table, ablation = (
        {"table1.md", "table1.json", "curves.png", "paired.md"},
        {"ablation.md", "ablation.json", "ablation.png"},
    )
    together = {"clamping.md", "clamping.png", "removals.png", "cost.md", "imagenet.md", "overview.png"}
    assert {name: set(contents) for name, contents in files.items()} == {
        ".": together, "fashion_mnist": table, "resnet50": table, "clamp_value": ablation, "batch_size": ablation,
    }  # fmt: skip
    for contents in files.values():
        for name, content in contents.items():
            assert content.startswith(b"\x89PNG") == name.endswith(".png")
            assert not name.endswith(".json") or json.loads(content)["schema"] == 1


def test_runs_side_by_side_set_no_expectation(tmp_path, spec):
    write_run(
        tmp_path / "resnet50" / "runs", "batch", scale="fashion_mnist", model="resnet50", data={"image_size": 224}
    )
    studies = load_studies(tmp_path, spec)
    for parallel, shared in ((1, False), (3, True)):
        study = StudySpec("ResNet-50", "sweep.py", parallel=parallel)
        assert study.command == "sweep.py" + " --parallel 3" * shared
        told = replace(spec, studies={"resnet50": study})
        files = study_files(studies, benchmark("batch"), told)["."]
        assert ("by the training run at 224 px" in files["imagenet.md"].decode()) != shared


def test_many_studies_of_clamps_take_several_rows(tmp_path):
    runs = load_runs(write_run(tmp_path, "online_clamp", clamped=[(1e-3, 9.0)] * 5).parents[1])
    few, many = (draw_clamping({str(k): runs for k in range(count)}, {}) for count in (4, 5))
    sizes = [[int.from_bytes(png[at : at + 4], "big") for at in (16, 20)] for png in (few, many)]
    assert sizes[0][0] == sizes[1][0] and 2 * sizes[0][1] == sizes[1][1]


def test_the_commands_of_the_studies_are_those_of_their_experiments(root, spec):
    assert len(spec.studies) > 5
    for name, study in spec.studies.items():
        experiment = next(w for w in study.command.split() if w.startswith("experiment=")).partition("=")[2]
        assert (root / "configs" / "experiment" / f"{experiment}.yaml").exists(), name


def test_removal_that_changes_something_is_told(tmp_path, spec):
    clamping = {
        "layers": 19, "clamp_value": 5.0, "with": {"val_loss": 0.35, "val_top1": 0.87},
        "without": {"val_loss": 0.3504, "val_top1": 0.8695}, "changed_predictions": 30, "clamped_fraction": 2e-5,
        "max_abs_activation": 8.25,
    }  # fmt: skip
    runs = tmp_path / "fashion_mnist" / "runs"
    write_run(
        runs, "online_clamp", 0, scale="fashion_mnist", clamping=clamping, clamped=[(1e-3, 9.0)] * 4 + [(2e-3, 8.0)]
    )
    write_run(runs, "online_clamp", 1, scale="fashion_mnist", clamped=[(1e-3, 9.0)] * 4 + [(0.0, 4.0)])
    files = study_files(load_studies(tmp_path, spec), None, spec)
    row = "| fashion_mnist | online_clamp/seed0 | 19 | 5 | 30 of 10,000 | +4.0e-04 | -0.05 | 2.0e-05 | 8.25 |"
    assert row in files["."]["clamping.md"].decode()
    course = "| fashion_mnist | 5 | 2 | 1.0e-03 | 1.0e-03 | 0 to 2.0e-03 | 1 of 2 | 4 to 8 |"
    assert course in files["."]["clamping.md"].decode()


def test_courses_of_clamps(tmp_path):
    write_run(tmp_path, "online_clamp", epochs=6, clamped=[(0.1 / (i + 1), 7.0 - i) for i in range(6)])
    write_run(tmp_path, "batch")
    runs = load_runs(tmp_path)
    (found,) = courses({"x": runs}).itertuples()  # the first milestone is 2
    assert (found.first, found.before_drop, found.last, found.largest) == (0.1, 0.05, pytest.approx(0.1 / 6), 2.0)
    assert draw_clamping({"x": runs.of(runs.runs["normalizer"] == "batch")}, {}) is None


@pytest.mark.parametrize("fractions", [[0.0] * 5, [0.3] * 5, [1e-3, 0.0, 1e-5, 0.0, 0.0]])
def test_the_clamp_figure_draws_zeros(tmp_path, fractions):
    write_run(tmp_path, "online_clamp", clamped=[(value, 3.0) for value in fractions])
    assert draw_clamping({"x": load_runs(tmp_path)}, {}).startswith(b"\x89PNG")


def test_cost_is_told_against_no_compensation(spec):
    lines = words.table(words.cost_columns(spec), benchmarks.costs(benchmarks.steps(benchmark(*ALL)))).splitlines()[2:]
    assert len(lines) == 16
    where = "| batch 256, fused backend, compile+graph, bf16"
    assert f"{where} | OnlineNorm (activation clamping) | 32.00 ± 0.1% | 8,000 | 10.60 | +2.6% | +0.10 |" in lines
    assert f"{where} | BatchNorm | 35.20 ± 0.1% | 7,273 | 10.30 | +12.8% | -0.20 |" in lines
    told = words.cost_sentences(benchmark(*ALL))
    assert len(told) == 4 and "clamping is cheaper than layer scaling (32.00 against 33.60 ms a step" in told[0]
    assert [t.split(":")[0] for t in words.cost_sentences(benchmark(*ALL), trained=True)] == [
        "batch 256, fused backend, compile+graph, bf16", "batch 32, fused backend, compile+graph, bf16",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("milliseconds", "said"),
    [
        (31.0, "clamping is dearer than layer scaling"),
        (32.01, "clamping and layer scaling are equal within the spread"),
    ],
)
def test_the_cost_claim_can_fail(milliseconds, said):
    results = benchmark(*ALL)
    for row in results["rows"]:
        if row["normalizer"] == "online_layer_scaling":
            row["milliseconds"] = milliseconds * row["batch"] / 256
    assert said in words.cost_sentences(results, trained=True)[0]


def test_cost_without_a_rival_is_not_claimed(spec):
    text = render.render_cost(benchmark("batch", "online_clamp"), spec)
    assert words.cost_sentences(benchmark("batch", "online_clamp")) == [] and "not run here" in text


def test_hours_of_imagenet_follow_from_rates(spec):
    text = render.imagenet_table(benchmark("batch", "online_clamp"), {"batch": (1000.0, 256)}, spec)
    clamp, scaling, batch = text.splitlines()[2:]
    assert "| 4.4 h (8,000 images/s) |" in clamp  # 128,116,700 / 8000 / 3600
    settings = "data.root=IMAGENET"
    assert f"normalizer=online_clamp {settings}`" in clamp and clamp.endswith("| not run here | not run here |")
    assert scaling.count("not measured") == 2 and "35.6 h (1,000 images/s), batch 256" in batch
    with_optimizer = benchmark("batch")
    with_optimizer["rows"].append(
        {**with_optimizer["rows"][0], "batch": 256, "images_per_second": 500.0, "optimizer": True}
    )
    assert "71.2 h (500 images/s)" in render.imagenet_table(with_optimizer, {}, spec)
    half = benchmark("batch")
    half["rows"].append({**half["rows"][0], "dtype": "fp16", "images_per_second": 1e6})
    assert render.imagenet_table(half, {}, spec) == render.imagenet_table(benchmark("batch"), {}, spec), (
        "no fp16 training"
    )


def test_rates_of_what_train_py_does_not_run_stand_beside_no_command(spec):
    """Faster rows in float16, of other compilers and stems, or without the optimizer where it was measured."""
    results, plain = benchmark(*ALL), benchmark(*ALL)
    for row in (*results["rows"], *plain["rows"]):
        row["optimizer"] = True
    for row in list(plain["rows"]):
        fast = {"images_per_second": 9e6, "milliseconds": 0.001}
        results["rows"] += [{**row, **fast, **other} for other in ({"dtype": "fp16"}, {"optimizer": False})]
        if row["normalizer"] == "batch":
            results["rows"] += [{**row, **fast, "compiler": "max_autotune"}, {**row, **fast, "stem": "conv7x7"}]
        else:
            results["rows"].append({**row, **fast, "backend": "torch"})
    assert render.imagenet_table(results, {}, spec) == render.imagenet_table(plain, {}, spec)
    assert words.cost_sentences(results, trained=True) == words.cost_sentences(plain, trained=True)
    assert all("bf16, with optimizer" in sentence for sentence in words.cost_sentences(results, trained=True))
    assert "forward, backward and SGD; no input" in render.render_imagenet(results, {}, spec)
    assert "and SGD where that was recorded" in render.render_imagenet(benchmark("batch"), {}, spec)


def test_batch_norm_is_drawn_at_the_fastest_that_was_measured():
    """As README tells it; OnlineNorm by the fused kernels, in the precision of train.py and with the optimizer."""
    results = benchmark(*ALL)
    plain = [{**row, "optimizer": True} for row in results["rows"]]
    fast = {"images_per_second": 9e6, "milliseconds": 0.001}
    others = [{**row, **fast, **other} for row in plain for other in ({"dtype": "fp16"}, {"optimizer": False})]
    others += [{**row, **fast, "backend": "torch"} for row in plain if row["normalizer"] != "batch"]
    drawn = benchmarks.best({**results, "rows": plain + others})
    assert drawn.equals(benchmarks.best({**results, "rows": plain})) and drawn["normalizer"].tolist() == list(ALL)
    assert set(drawn["batch"]) == {256} and set(drawn["mode"]) == {"compile+graph"}
    tuned = [{**plain[-1], **fast, "compiler": "coordinate_descent"}]
    assert benchmarks.best({**results, "rows": plain + others + tuned})["milliseconds"].iloc[-1] == 0.001
    assert set(benchmarks.best({**results, "rows": plain}, 32)["batch"]) == {32}


def test_the_rate_beside_a_command_is_of_the_mode_that_the_command_names(spec):
    results = benchmark("batch")
    for row in results["rows"]:
        if row["batch"] == 256 and row["mode"] == "eager":
            row["images_per_second"] = 1e6
    (*_, batch) = render.imagenet_table(results, {}, spec).splitlines()
    assert "data.root=IMAGENET`" in batch and "1,000,000" not in batch  # which is compiled, as CUDA graphs


def test_runs_that_ended_before_they_began_are_not_passed_over(tmp_path, spec):
    write_run(tmp_path / "batch_size" / "runs" / "recipe.batch_size=8", "batch")
    folder = tmp_path / "batch_size" / "runs" / "recipe.batch_size=1" / "batch" / "seed0"
    folder.mkdir(parents=True)
    (folder / "failed.txt").write_text(NAN)
    with pytest.raises(
        ReportError, match=r"recipe.batch_size=1/batch/seed0/failed.txt: this run ended before it began"
    ):
        load_studies(tmp_path, spec)


def test_the_script_writes_studies_or_one_sweep(main, tmp_path, capsys):
    write_run(tmp_path / "sweep" / "recipe.lr=0.1", "batch")
    write_run(tmp_path / "sweep" / "recipe.lr=0.2", "batch", recipe={"lr": 0.2})
    assert main(tmp_path / "sweep", "--output", tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "ablation.json",
        "ablation.md",
        "ablation.png",
    ]
    assert "| 0.1 (published) | BatchNorm | 1 | 0 |" in capsys.readouterr().out
    write_run(tmp_path / "studies" / "own" / "runs", "batch")
    assert main(tmp_path / "studies", "--benchmark", tmp_path / "none.json") == 0
    assert (tmp_path / "studies" / "own" / "table1.md").exists()
    page = tmp_path / "README.md.j2"
    page.write_text("BatchNorm: n = {{ seeds('own', 'batch') }}.\n")
    assert main(tmp_path / "studies", "--page", page) == 0
    assert (tmp_path / "README.md").read_text() == "BatchNorm: n = 1.\n"
    assert main(tmp_path / "nowhere") == 1
    assert "no such folder" in capsys.readouterr().err
