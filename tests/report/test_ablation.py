"""One swept key: grouping, order, table and figure."""

import pytest
from run_folders import write_run
from study_folders import NAN, course

from onlinenorm.errors import ReportError
from onlinenorm.report.ablation import build_ablation
from onlinenorm.report.figures import draw_ablation, positions
from onlinenorm.report.render import render_ablation
from onlinenorm.report.runs import load_runs
from onlinenorm.report.swept import in_order, swept
from onlinenorm.report.words import ablation_table


def ablation_of(folder, spec):
    return build_ablation(load_runs(folder).runs, spec)


def clamps(value, compensation="clamp"):
    return {"_target_": "x", "clamp_value": value, "error_compensation": compensation}


def test_values_are_ordered_and_what_does_not_clamp_is_off(tmp_path, spec):
    for value in ("10", "2", "5.0"):
        folder = tmp_path / f"normalizer.clamp_value={value}"
        write_run(folder, "online_clamp", normalizer_config=clamps(float(value)))
    write_run(tmp_path, "online_none", normalizer_config=clamps(5.0, "none"))
    found = ablation_of(tmp_path, spec)
    assert (found.key, found.name, found.published) == ("normalizer.clamp_value", "clamp value", "5")
    assert found.values == ["2", "5", "10", "off"] and found.notes == []
    assert found.heading.startswith("Clamp value on Fashion-MNIST subset (embedded), not ImageNet")
    lines = ablation_table(found).splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| 2", "| 5 (published)", "| 10", "| off"]


def test_a_published_setting_is_that_of_its_rows(tmp_path, spec):
    """A key of one's own normalizer that is named as one of BatchNorm's was not published."""
    for row in ("batch", "moving_rms"):
        for value in (0.1, 0.5):
            folder = tmp_path / row / f"normalizer.momentum={value}"
            write_run(folder, row, normalizer_config={"_target_": "x", "momentum": value})
    published, own = (ablation_of(tmp_path / row, spec) for row in ("batch", "moving_rms"))
    assert published.published == "0.1" and published.name != published.key
    assert own.published is None and own.name == own.key == "normalizer.momentum"


def test_seeds_are_summarised_and_diverged_runs_counted(tmp_path, spec):
    folder = tmp_path / "recipe.batch_size=8"
    for seed, top1 in enumerate((0.88, 0.89)):
        write_run(folder, "batch", seed, top1=top1, loss=0.3, recipe={"batch_size": 8})
    write_run(folder, "batch", 2, done=0, failure=NAN, recipe={"batch_size": 8})
    write_run(tmp_path / "recipe.batch_size=1", "batch", 0, done=2, recipe={"batch_size": 1})
    found = ablation_of(tmp_path, spec)
    one, eight = ablation_table(found).splitlines()[2:]
    assert one == "| 1 | BatchNorm | 0; seed 0 running: epoch 2 of 5 | 0 | – | – | – | – |"
    assert eight.startswith("| 8 | BatchNorm | 2 | 1 |") and eight.endswith("| 88.50 ± 0.71 % | 0.300 ± 0.000 |")
    assert "- 8, BatchNorm: seed 2 diverged: step 40, epoch 1 of 5" in render_ablation(found)


def test_a_run_without_the_key_in_its_folder_takes_it_from_its_configuration(tmp_path, spec):
    write_run(tmp_path / "recipe.lr=0.5", "batch", recipe={"lr": 0.5})
    write_run(tmp_path, "batch", recipe={"lr": 0.1})
    assert ablation_of(tmp_path, spec).values == ["0.1", "0.5"]


def test_a_run_without_the_group_in_its_folder_stands_at_what_was_chosen(tmp_path, spec):
    write_run(tmp_path / "model=resnet18", "batch", model="resnet18")
    config = write_run(tmp_path, "batch", model="resnet50") / "config.yaml"
    config.write_text(config.read_text().replace("choices:\n", "choices:\n  model: resnet50\n"))
    found = build_ablation(load_runs(tmp_path).runs, spec)
    assert found.values == ["resnet18", "resnet50"] and found.heading.startswith("Network on Fashion-MNIST")


def test_a_second_key_makes_series(tmp_path, spec):
    for size in (8, 32, 128):
        for rate in (0.1, 0.2):
            folder = tmp_path / f"recipe.batch_size={size},recipe.lr={rate}"
            write_run(folder, "batch", recipe={"batch_size": size, "lr": rate})
    found = ablation_of(tmp_path, spec)
    assert found.key == "recipe.batch_size" and {p.series for p in found.points.itertuples()} == {
        "BatchNorm, lr 0.1",
        "BatchNorm, lr 0.2",
    }
    assert draw_ablation(found).startswith(b"\x89PNG")


def test_what_else_differs_is_told(tmp_path, spec):
    write_run(tmp_path / "recipe.batch_size=8", "batch", recipe={"batch_size": 8})
    write_run(tmp_path / "recipe.batch_size=32", "batch", epochs=7)
    text = render_ablation(ablation_of(tmp_path, spec))
    assert (
        "## Not only global batch size differs" in text
        and "- recipe.epochs: 7 (recipe.batch_size=32/batch/seed0) | 5 (" in text
    )


def test_a_seed_counts_once_and_plain_runs_are_no_ablation(tmp_path, spec):
    write_run(tmp_path / "plain", "batch")
    with pytest.raises(ReportError, match="no folder is named <key>=<value>"):
        ablation_of(tmp_path / "plain", spec)
    for value in ("5", "5.0"):
        write_run(tmp_path / f"normalizer.clamp_value={value}", "online_clamp", normalizer_config=clamps(5.0))
    with pytest.raises(ReportError, match=r"clamp_value=5\.0/online_clamp/seed0.*clamp_value=5/online_clamp/seed0"):
        runs = load_runs(tmp_path).runs
        build_ablation(runs[~runs["name"].str.contains("plain")], spec)


def test_a_folder_must_not_say_another_value_than_the_run(tmp_path, spec):
    write_run(tmp_path / "recipe.batch_size=128", "batch", 0, recipe={"batch_size": 128})
    write_run(tmp_path / "recipe.batch_size=128", "batch", 1, recipe={"batch_size": 64})
    with pytest.raises(ReportError, match=r"seed1: the folder says recipe.batch_size=128, its config.yaml 64"):
        ablation_of(tmp_path, spec)


def test_positions():
    places, label = positions(["0.9", "0.99", "0.999"], "normalizer.alpha_fwd")
    assert list(places.values()) == pytest.approx([1, 2, 3]) and "log scale" in label
    places, label = positions(["1", "10", "100", "off"], "normalizer.clamp_value")
    assert list(places.values()) == pytest.approx([0, 1, 2, 3]) and label == ", log scale"
    assert positions(["1", "2", "3"], "x") == ({"1": 1.0, "2": 2.0, "3": 3.0}, "")
    assert positions(["a", "b"], "x")[0] == {"a": 1.0, "b": 2.0}
    assert in_order(["off", "10", "9", "cosine"]) == ["9", "10", "cosine", "off"]


@pytest.mark.parametrize("finished", [True, False])
def test_the_figure_survives_what_blew_up_and_what_never_finished(tmp_path, spec, finished):
    for value, loss in ((1, 0.3), (5, 0.3), (8, 1e9)):
        options = {"normalizer_config": clamps(float(value)), "clamped": course(5, value, 0)}
        options |= {"loss": loss} if finished else {"done": 1, "failure": NAN}
        write_run(tmp_path / f"normalizer.clamp_value={value}", "online_clamp", **options)
    assert draw_ablation(ablation_of(tmp_path, spec)).startswith(b"\x89PNG")


def test_values_of_folders_are_read_without_their_quotes():
    assert swept("data.root='png',recipe.lr=0.10/batch/seed0") == {"data.root": "png", "recipe.lr": "0.1"}
    assert swept("batch/seed0") == {}
