import json
import re

import numpy as np
import pytest
import yaml
from run_folders import DATASETS, NORMALIZERS, write_run

from onlinenorm.errors import ReportError
from onlinenorm.report.build import as_json
from onlinenorm.report.figures import draw_curves, over_runs
from onlinenorm.report.render import render_markdown, render_page
from onlinenorm.report.runs import load_runs, read_yaml
from onlinenorm.report.settings import PUBLISHED as FILE
from onlinenorm.report.settings import parse_spec
from onlinenorm.report.tables import build_report
from onlinenorm.report.words import difference, main_table

THREE = ("online_clamp", "online_layer_scaling", "batch")
PUBLISHED = {"scale": "imagenet", "model": "resnet50", "epochs": 100, "recipe": {"milestones": [30, 60, 80, 90]}}


def report_on(folder, spec):
    return build_report(load_runs(folder).runs, spec)


def verdicts(report, metric="best_top1"):
    return {(c.first, c.second): c.verdict for c in report.comparisons.itertuples() if c.metric == metric}


def test_without_runs_every_row_says_not_run(tmp_path, spec):
    report = build_report(load_runs(write_run(tmp_path, "batch").parents[1]).runs[:0], spec)
    assert report.rows["label"].tolist() == [
        "OnlineNorm (activation clamping)",
        "OnlineNorm (layer scaling)",
        "BatchNorm",
    ]
    lines = main_table(report).splitlines()[2:]
    assert [line.count("not run") for line in lines] == [4, 4, 4]
    assert "0.93" in lines[0] and "76.3 %" in lines[1] and "76.4 %" in lines[2]
    assert {v.outcome for v in verdicts(report).values()} == {"not run"}


def test_five_seeds_are_summarised(tmp_path, spec):
    for seed, top1 in enumerate((0.880, 0.882, 0.884, 0.881, 0.883)):
        write_run(tmp_path, "batch", seed, top1=top1)
    batch = report_on(tmp_path, spec).rows.iloc[2]
    summary = batch.summaries["best_top1"]
    assert batch.seeds == [0, 1, 2, 3, 4]
    assert (summary.mean, summary.minimum, summary.maximum) == pytest.approx((0.882, 0.880, 0.884))
    assert summary.sd == pytest.approx(0.00158114, abs=1e-8)
    assert "88.20 ± 0.16 %<br>95 % CI 88.00 to 88.40; min–max 88.00–88.40" in main_table(report_on(tmp_path, spec))


def test_unfinished_runs_are_shown_and_never_averaged(tmp_path, spec):
    write_run(tmp_path, "batch", 0, top1=0.88)
    write_run(tmp_path, "batch", 1, top1=0.50, done=3)
    write_run(tmp_path, "online_clamp", 0, done=2)
    clamp, _, batch = report_on(tmp_path, spec).rows.itertuples()
    assert (batch.seeds, batch.summaries["best_top1"].mean) == ([0], 0.88)
    assert batch.unfinished == ["seed 1 running: epoch 3 of 5"]
    assert (clamp.seeds, clamp.summaries["best_top1"]) == ([], None)
    lines = main_table(report_on(tmp_path, spec)).splitlines()[2:]
    assert "seed 0 running: epoch 2 of 5" in lines[0] and "not run" in lines[1] and "88.00 %<br>epoch 4" in lines[2]


def test_further_normalizers_follow_without_published_values(tmp_path, spec):
    for normalizer in ("zeta", "layer", "online_clamp", "group"):
        write_run(tmp_path, normalizer)
    rows = report_on(tmp_path, spec).rows
    assert rows["normalizer"].tolist() == [*THREE, "group", "layer", "zeta"]
    assert all(published is None for published in rows["published"][3:])


def test_a_row_is_called_and_drawn_as_its_normalizers_file_says(tmp_path, spec):
    shown = {"moving": ("moving RMS", "#123456"), "other": ("BatchNorm", "red; x"), "third": ("<b>", None)}
    for name, (label, colour) in shown.items():
        write_run(tmp_path, name, normalizer_config={"_target_": "x", "_label_": label, "_colour_": colour})
    for seed, label in enumerate(("mine", "called otherwise later")):
        write_run(tmp_path, "batch", seed, normalizer_config={"_target_": "x", "_label_": label})
    rows = {row.normalizer: row for row in report_on(tmp_path, spec).rows.itertuples()}
    assert (rows["moving"].label, rows["moving"].colour) == shown["moving"]
    assert rows["other"].label == "BatchNorm (other)" and rows["other"].colour == spec.row("other").colour
    assert rows["third"].label == "third"
    assert len({row.colour for row in rows.values()}) == len(rows)
    assert rows["batch"].label == "BatchNorm" and rows["batch"].seeds == [0, 1]


def test_one_epoch_is_singular_and_nothing_has_no_sign(tmp_path, spec):
    write_run(tmp_path, "batch", epochs=1, recipe={"milestones": []})
    assert report_on(tmp_path, spec).scale_label.endswith(", 28 px, 1 epoch)")
    assert difference(-1e-6, "last_loss") == "+0.0000" and difference(-1e-6, "last_top1") == "+0.00"


def test_a_small_run_cannot_be_read_as_imagenet(tmp_path, spec):
    for normalizer in THREE:
        write_run(tmp_path, normalizer, top1=0.7635, loss=0.935)
    report = report_on(tmp_path, spec)
    details = "10,000 training, 2,000 validation images, cifar_resnet8, 28 px, 5 epochs"
    label = f"Fashion-MNIST subset (embedded), not ImageNet ({details})"
    page = render_page(report, {})
    assert report.scale_label == label
    assert render_markdown(report).startswith(f"# Table 1 on {label}\n")
    assert f"<title>Table 1 on {label}</title>" in page and f'<div class="badge small">{label}</div>' in page
    published = [v for (_, second), v in verdicts(report).items() if second is None]
    assert {v.outcome for v in published} == {"not comparable"}
    assert published[0].reason == "scale Fashion-MNIST subset (published: ImageNet)"


def test_imagenet_runs_of_the_published_setting_are_compared(tmp_path, spec):
    for seed, shift in enumerate((-0.0005, 0.0005, 0.0002, -0.0002)):
        write_run(tmp_path, "online_clamp", seed, top1=0.763 + shift, loss=0.93, **PUBLISHED)
        write_run(tmp_path, "batch", seed, top1=0.744 + shift / 2, loss=0.97, **PUBLISHED)
    found = verdicts(report_on(tmp_path, spec))
    assert found["online_clamp", None].outcome == "equivalent"
    assert found["batch", None].outcome == "different"
    assert found["online_layer_scaling", None].outcome == "not run"
    assert found["online_clamp", "batch"].outcome == "different"
    assert found["online_clamp", "batch"].difference.paired


def write_cifar(folder, spec, normalizer, top1, loss):
    """Three runs as published on CIFAR-10."""
    found = spec.elsewhere["cifar10"].setting
    recipe = {key.removeprefix("recipe."): value for key, value in found.items() if key.startswith("recipe.")}
    layer = {**NORMALIZERS[normalizer]}
    layer |= {key: found[f"normalizer.{key}"] for key in ("alpha_fwd", "alpha_bkw") if key in layer}
    for seed in range(3):
        write_run(
            folder, normalizer, seed, scale="cifar10", model="cifar_resnet20", epochs=250, recipe=recipe,
            data={"image_size": 32}, normalizer_config=layer, top1=top1 + 1e-4 * seed, loss=loss + 1e-3 * seed,
        )  # fmt: skip


def test_cifar_is_held_against_what_was_published_there(tmp_path, spec, monkeypatch):
    write_cifar(tmp_path, spec, "online_layer_scaling", 0.9228, 0.259)
    write_cifar(tmp_path, spec, "batch", 0.902, 0.26)
    write_cifar(tmp_path, spec, "online_clamp", 0.92, 0.27)
    report = report_on(tmp_path, spec)
    assert report.heading.startswith("Published rows on CIFAR-10, not ImageNet (50,000 training")
    assert "published: CIFAR-10" in main_table(report) and "published: ImageNet" not in render_page(report, {})
    found = verdicts(report)
    assert found["online_layer_scaling", None].outcome == "equivalent" and found["batch", None].outcome == "different"
    assert ("online_clamp", None) not in found
    monkeypatch.setitem(DATASETS, "cifar10", {**DATASETS["cifar10"], "name": "cifar10 (JPEG)"})
    for row in ("online_layer_scaling", "batch"):
        write_cifar(tmp_path / "jpeg", spec, row, 0.92, 0.26)
    report = report_on(tmp_path / "jpeg", spec)
    verdict = verdicts(report)["batch", None]
    assert verdict.outcome == "not comparable"
    assert verdict.reason == "images cifar10 (JPEG) (published: cifar10); by the figures alone equivalent"
    told = "**not comparable**<br>-0.19 points (90 % CI -0.21 to -0.17, which excludes 0), margin ±0.5; images cifar10"
    assert told in render_markdown(report)


def test_a_decisive_departure_forbids_the_comparison(tmp_path, spec):
    for seed in range(3):
        write_run(tmp_path, "batch", seed, top1=0.764, loss=0.97, **{**PUBLISHED, "model": "resnet18"})
    verdict = verdicts(report_on(tmp_path, spec))["batch", None]
    assert (verdict.outcome, verdict.reason) == ("not comparable", "network resnet18 (published: resnet50)")


def test_another_batch_size_is_listed_but_comparable(tmp_path, spec):
    for seed in range(3):
        recipe = {**PUBLISHED["recipe"], "batch_size": 256}
        write_run(tmp_path, "batch", seed, top1=0.764 + 1e-4 * seed, loss=0.97, **{**PUBLISHED, "recipe": recipe})
    report = report_on(tmp_path, spec)
    assert report.departures["name"].tolist() == ["global batch size"]
    assert verdicts(report)["batch", None].outcome == "equivalent"


def test_clamp_removal_is_told_for_every_row(tmp_path, spec):
    clamping = {
        "layers": 9, "clamp_value": 5.0, "with": {"val_loss": 0.35, "val_top1": 0.87},
        "without": {"val_loss": 0.351, "val_top1": 0.8695}, "changed_predictions": 3, "clamped_fraction": 1.5e-6,
        "max_abs_activation": 5.6,
    }  # fmt: skip
    for normalizer in THREE:
        write_run(tmp_path, normalizer, clamping=clamping if normalizer == "online_clamp" else None)
    text = render_markdown(report_on(tmp_path, spec))
    row = "| online_clamp/seed0 | 9 | 5 | 0.3500 | 0.3510 | 87.00 % | 86.95 % | 3 of 2,000 | 1.50e-06 | 5.6 |"
    assert row in text
    assert "not identical: 3 of 2,000 predictions changed (0.15 %), accuracy -0.05 points" in text
    assert "no inference-time equivalent" in text and "BatchNorm has no error compensation" in text


def test_missing_provenance_is_unknown(tmp_path, spec):
    write_run(tmp_path, "batch", environment={})
    (provenance,) = report_on(tmp_path, spec).provenance.itertuples()
    assert (provenance.command, provenance.commit, provenance.hardware, provenance.world_size) == ("unknown",) * 4


def test_uncommitted_changes_are_told(tmp_path, spec):
    write_run(tmp_path, "batch", environment={"git": {"commit": "abc", "dirty": True}})
    assert report_on(tmp_path, spec).provenance["commit"][0] == "abc with uncommitted changes"


def test_the_report_is_plain_json_and_does_not_vary(tmp_path, spec):
    for normalizer in THREE:
        write_run(tmp_path, normalizer, done=3 if normalizer == "batch" else None)
    texts = [as_json(report_on(tmp_path, spec)) for _ in range(2)]
    assert texts[0] == texts[1] and json.loads(texts[0])["scale"] == "embedded"


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize(
    ("normalizers", "seeds", "epochs"), [(THREE, 1, 1), ((*THREE, "group", "layer", "none"), 2, 30)]
)
def test_curves_are_drawn(tmp_path, spec, normalizers, seeds, epochs, narrow):
    for normalizer in normalizers:
        for seed in range(seeds):
            write_run(
                tmp_path, normalizer, seed, epochs=epochs, done=4 if (normalizer, epochs) == ("none", 30) else None
            )
    runs = load_runs(tmp_path)
    picture = draw_curves(runs, build_report(runs.runs, spec), narrow)
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


def test_curves_without_an_epoch(tmp_path, spec):
    write_run(tmp_path, "batch", done=0)
    runs = load_runs(tmp_path)
    assert draw_curves(runs, build_report(runs.runs, spec)).startswith(b"\x89PNG")


def test_the_bold_curve_is_the_mean(tmp_path):
    for seed in range(3):
        write_run(tmp_path, "batch", seed)
    epochs = load_runs(tmp_path).epochs
    curves = [of.set_index("epoch")["val_loss"] for _, of in epochs.groupby("folder")]
    mean = over_runs(curves, np.mean)
    assert mean.index.tolist() == [1, 2, 3, 4, 5]
    assert mean[1] == pytest.approx(epochs[epochs["epoch"] == 1]["val_loss"].mean())
    assert over_runs([curves[0], curves[1][2:]], np.max).index.tolist() == [3, 4, 5]


def test_a_spec_with_an_unknown_key_or_a_margin_of_zero_is_refused():
    content = read_yaml(FILE)
    content["rows"]["batch"]["color"] = "red"
    with pytest.raises(ReportError, match=r"published\.yaml.*color"):
        parse_spec(content)
    content = read_yaml(FILE)
    content["equivalence"]["margins"]["embedded"]["best_top1"] = 0
    with pytest.raises(ReportError, match="margins of embedded"):
        parse_spec(content)


@pytest.mark.parametrize("name", ["mine", "batch_renorm", "group"])
def test_any_other_row_is_compared_with_batch_norm(name, tmp_path, spec):
    for seed, top1 in enumerate((0.880, 0.882, 0.884)):
        write_run(tmp_path, "batch", seed, top1=top1)
        write_run(tmp_path, name, seed, top1=top1 - 0.002 + 0.0001 * seed)
    report = report_on(tmp_path, spec)
    assert list(verdicts(report))[-1] == (name, "batch") and ("batch", "batch") not in verdicts(report)
    assert f"{report.rows.iloc[-1].label} − BatchNorm | **equivalent**<br>-0.19 points" in render_markdown(report)


def test_a_row_without_batch_norm_beside_it_is_told_to_be_compared_with_nothing(tmp_path, spec):
    write_run(tmp_path, "mine", top1=0.88)
    assert verdicts(report_on(tmp_path, spec))["mine", "batch"].outcome == "not run"


def test_images_of_ones_own_have_a_table_and_no_verdict(tmp_path, spec):
    for seed in range(3):
        for normalizer in ("online_clamp", "batch"):
            write_run(tmp_path, normalizer, seed, scale="moths", top1=0.8 + 0.01 * seed)
    report = report_on(tmp_path, spec)
    assert report.scale == report.scale_short == "moths" and report.scale_label.startswith("moths")
    told = [c.verdict for c in report.comparisons.itertuples() if c.verdict.outcome != "not run"]
    assert told and {verdict.outcome for verdict in told} == {"not comparable"}
    assert "onlinenorm/report/published.yaml has no margin for moths" in {verdict.reason for verdict in told}


def test_cifar_runs_that_are_not_done_are_beside_what_was_published_there(tmp_path, spec):
    data = {"_target_": "onlinenorm.data.CIFAR100", "image_size": 32}
    write_run(tmp_path, "batch", scale="cifar100", data=data, done=2)
    report = report_on(tmp_path, spec)
    assert (report.scale, report.published_short) == ("cifar100", "CIFAR-100") and "68.6 %" in main_table(report)


def test_the_margin_that_the_page_of_data_names_gives_folders_of_ones_own_a_verdict(tmp_path, root):
    page = (root / "onlinenorm/data/README.md").read_text(encoding="utf-8")
    content = read_yaml(FILE)
    content["equivalence"]["margins"] |= yaml.safe_load(re.search(r"a line `(folder: \{.*?\})`", page)[1])
    for seed in range(3):
        for normalizer in ("online_clamp", "batch"):
            write_run(tmp_path, normalizer, seed, scale="folder", top1=0.8 + 0.01 * seed)
    outcome = verdicts(report_on(tmp_path, parse_spec(content)))["online_clamp", "batch"].outcome
    assert outcome not in ("not comparable", "not run")
