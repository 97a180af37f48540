import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).parent / "data"))

from image_folders import write_tree
from tests_training import load_train_module

from onlinenorm.data import decoded
from onlinenorm.training import ImageClassifier, preflight
from onlinenorm.training.config_check import AUTO_KEYS, build
from onlinenorm.training.fast_path import Choice, left_to_choose, with_values
from onlinenorm.training.recipe import Recipe
from onlinenorm.training.trainer import resolve
from scripts import check

TINY = ("recipe=cifar", "model=cifar_resnet8", "trainer=cpu", "normalizer=batch", "recipe.batch_size=8")
SYNTHETIC = (*TINY, "data=synthetic", "data.num_train=64", "data.num_val=16", "data.image_size=16")


@pytest.fixture
def train_module():
    return load_train_module()


@pytest.fixture
def script():
    return check


@pytest.fixture
def findings(script, capsys, tmp_path):
    def run(*overrides):
        arguments = [f"run_dir={tmp_path / 'run'}", *map(str, overrides), "--seconds", "0.2", "--json"]
        code = script.main(arguments)
        told = json.loads(capsys.readouterr().out)
        assert told["exit_code"] == code and told["ready"] == (code == 0)
        return code, {finding["check"]: finding for finding in told["findings"]}

    return run


def test_a_normalizer_that_never_leaves_its_warm_up_is_a_warning(findings):
    code, found = findings(*SYNTHETIC, "normalizer=batch_renorm", "normalizer.warmup_steps=5000")
    assert code == 0 and found["settings"]["status"] == "warning" and "5,000 batches" in found["settings"]["text"]


def test_a_run_that_would_train_is_ready(findings, tmp_path):
    code, found = findings(*SYNTHETIC)
    assert code == 0
    assert list(found) == ["config", "data", "disk", "step", "speed", "time", "recipe"]
    assert all(found[name]["status"] == "ok" for name in ("config", "data", "disk", "step"))
    assert found["speed"]["bottleneck"] in ("loader", "network")
    rates = found["speed"]["loader_images_per_second"], found["speed"]["network_images_per_second"]
    assert found["speed"]["bottleneck"] == ("loader" if rates[0] < rates[1] else "network")
    steps, validation = 64 / min(rates), 16 / found["speed"]["val_images_per_second"]
    expected = 250 * (steps + validation) + validation + found["step"]["first_seconds"]
    assert found["time"]["expected_seconds"] == pytest.approx(expected)
    assert f"to {found['time']['expected_end']}" in found["time"]["text"]
    assert {key: found["step"][key] for key in AUTO_KEYS} == AUTO_KEYS, "as the run would resolve them"
    assert not (tmp_path / "run").exists(), "nothing is written"


def test_departures_from_the_published_recipe_are_listed(findings):
    _, found = findings(*SYNTHETIC)
    departures = {d["name"]: d for d in found["recipe"]["departures"]}
    assert departures["epochs"] == {"name": "epochs", "published": 100, "actual": 250, "decisive": True}
    assert found["recipe"]["status"] == "ok"
    assert found["recipe"]["text"].startswith("nothing is published on these images (synthetic), any recipe")


def test_a_decisive_departure_on_the_published_images_is_a_warning_that_says_what_it_means(script):
    config = script.load_config(["experiment=table1", "trainer=cpu", "recipe.epochs=120"])
    found = script.check_recipe(config, "imagenet")
    assert found["status"] == "warning"
    assert found["text"] == (
        "epochs is 120, published 100 (decisive); with a decisive departure tables compare with no published figure"
    )


@pytest.mark.parametrize("experiment", ["table1", "cifar10", "cifar100"])
def test_the_published_recipe_departs_in_nothing(script, experiment):
    config = script.load_config([f"experiment={experiment}", "trainer=cpu"])
    found = script.check_recipe(config, "imagenet" if experiment == "table1" else experiment)
    assert (found["status"], found["departures"], found["text"]) == ("ok", [], "the published setting")


def test_a_time_limit_is_compared(findings):
    _, found = findings(*SYNTHETIC, "--time-limit", "0:01")
    assert found["time"]["status"] == "warning" and "has to be started" in found["time"]["text"]
    _, found = findings(*SYNTHETIC, "--time-limit", "99-00")
    assert found["time"]["status"] == "ok"


def test_the_time_of_a_slurm_job_is_found(script, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(script.time.time()) + 3600))
    assert 3590 < script.time_left() <= 3600
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    assert script.time_left() is None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("1:00:30", 3630), ("2-12", 216_000), ("1-00:01", 86_460), ("1-00:00:01", 86_401)],
)
def test_times_are_read_as_slurm_does(script, text, seconds):
    assert script.parse_limit(text) == seconds


def test_a_full_disk_fails(findings, script, monkeypatch):
    usage = preflight.shutil.disk_usage("/")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    code, found = findings(*SYNTHETIC)
    assert code == 1 and found["disk"]["status"] == "FAIL" and "free some space" in found["disk"]["text"]


def test_unreadable_images_are_found(findings, tmp_path):
    tree = write_tree(tmp_path / "set")
    (tree / "train" / "bee" / "1.JPEG").write_bytes(b"no image")
    arguments = (*TINY, "data=imagenet", f"data.root={tree}", "data.image_size=16", "data.num_workers=0")
    code, found = findings(*arguments)
    assert code == 1 and found["data"]["status"] == "FAIL" and "train/bee/1.JPEG" in found["data"]["text"]
    assert "data.on_unreadable=skip" in found["data"]["text"] and "data.unreadable_limit" in found["data"]["text"]
    code, found = findings(*arguments, "data.on_unreadable=skip")
    assert code == 0 and found["data"]["status"] == "warning"
    (tree / "train" / "bee" / "2.JPEG").write_bytes(b"no image")
    _, found = findings(*arguments, "data.on_unreadable=skip")
    assert found["data"]["status"] == "FAIL" and found["data"]["text"].startswith("data.unreadable_limit: 2 of 15")


def test_a_config_that_cannot_be_meant(script, capsys):
    assert script.main(["recipe.epoch=3"]) == 2
    assert "did you mean recipe.epochs" in capsys.readouterr().err


def test_missing_data_fail(findings):
    code, found = findings(*TINY, "data=imagenet", "data.root=/nowhere")
    assert code == 1 and found["data"]["text"].startswith("data.root: /nowhere does not exist")


def test_too_little_memory_is_told(findings, script, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ImageClassifier, "training_step", full)
    monkeypatch.setattr(preflight, "_gpu_memory", lambda device: 80.0)
    code, found = findings(*SYNTHETIC)
    assert code == 1 and "does not fit" in found["step"]["text"] and "accumulate_grad_batches" in found["step"]["text"]
    assert "speed" not in found


def test_what_would_end_the_run_at_once_is_told(script, capsys, tmp_path):
    arguments = [*SYNTHETIC, "--seconds", "0.2"]
    assert script.main([f"run_dir={tmp_path / 'run'}", "trainer.accumulate_grad_batches=3", *arguments]) == 2
    assert "does not divide by 1 processes x 3 accumulated batches" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert script.main([f"run_dir={tmp_path / 'file'}", *arguments]) == 2
    assert "is a file, not a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["normalizer=batch", "normalizer.momentum=7"], "normalizer.momentum: 7 must be"),
        (["normalizer=batch", "normalizer.eps=-1"], "normalizer.eps: -1 must be"),
        (["normalizer=instance", "model=resnet18", "data.image_size=32"], "normalizer: instance has a single value"),
        (["data.on_device=true"], "data.on_device: the 80 decoded images of synthetic take about"),
        (["normalizer=batch", "--epochs", "3"], "--epochs: no such flag"),
        (["normalizer=batch", "--seconds", "0"], "--seconds: 0 must be larger than 0"),
    ],
)
def test_what_train_would_refuse_is_refused_in_its_words(script, capsys, monkeypatch, overrides, message):
    monkeypatch.setattr(decoded, "free_memory", lambda device: 0)
    assert script.main([*SYNTHETIC, *overrides]) == 2
    assert message in capsys.readouterr().err


def test_the_step_that_is_timed_is_the_run_s_own(findings, monkeypatch):
    """Its trainer's precision, accumulation and CUDA graphs; and nothing of what keeps a run."""
    seen, captured = [], []
    step = ImageClassifier.training_step

    def watched(module, batch, batch_idx):
        seen.append((module.dtype, module.trainer.accumulate_grad_batches, len(batch[0]), module.trainer.callbacks))
        return step(module, batch, batch_idx)

    monkeypatch.setattr(ImageClassifier, "training_step", watched)
    monkeypatch.setattr(ImageClassifier, "graph_steps", lambda module: captured.append(module.trainer.datamodule))
    monkeypatch.setattr(preflight, "resolve_in", lambda _, node: {**resolve({**node, "cuda_graph": False}), **node})
    monkeypatch.setattr(check, "resolve", lambda node: preflight.resolve_in(None, node))
    precision = "trainer.precision=64-true", "trainer.accumulate_grad_batches=2"
    code, found = findings(*SYNTHETIC, *precision, "trainer.cuda_graph=true")
    assert code == 0 and found["step"]["batch"] == 4
    (data,) = captured
    assert data.name == "synthetic" and not data.raw_training, "which a captured step asks how its input is made"
    assert {entry[:3] for entry in seen} == {(torch.float64, 2, 4)} and len(seen) >= 3
    kept = {type(callback).__name__ for callback in seen[0][3]}
    assert {"TrainingGraph", "StepTimer"} <= kept and not kept & {"EpochLog", "Checkpoints", "RunProgress"}


def test_what_is_left_of_a_run_that_was_begun_is_forecast(findings, train_module, tmp_path, monkeypatch, capsys):
    overrides = [*SYNTHETIC, "recipe.epochs=4", "recipe.milestones=[]"]
    folder = tmp_path / "run"
    train_module.train(train_module.load_config([*overrides, f"run_dir={folder}"]))
    (folder / "results.json").unlink()
    capsys.readouterr()
    monkeypatch.setattr(preflight, "resumable", lambda *_: (None, {"epoch": 2, "step": 4, "global_step": 20}))
    _, found = findings(*overrides)
    rates = found["speed"]["loader_images_per_second"], found["speed"]["network_images_per_second"]
    validation = 16 / found["speed"]["val_images_per_second"]
    expected = 1.5 * (64 / min(rates) + validation) + validation + found["step"]["first_seconds"]
    assert found["time"]["expected_seconds"] == pytest.approx(expected)
    assert "1.5 of them left" in found["time"]["text"]
    monkeypatch.setattr(preflight, "resumable", lambda *_: (None, {"epoch": 4, "step": 0, "global_step": 32}))
    assert ", none left, take" in findings(*overrides)[1]["time"]["text"]


@pytest.mark.parametrize(
    "normalizer, changes, validations",
    [
        ("batch", {}, (0, 1, 0)),
        ("online_clamp", {}, (0, 2, 0)),
        ("online_clamp", {"clamp_off_epochs": 3, "removal_every_epoch": True}, (7, 2, 0)),
        ("online_clamp", {"reestimate_images": 64}, (0, 3, 64)),
        ("group", {"removal_every_epoch": True, "reestimate_images": 64}, (0, 1, 0)),
    ],
)
def test_validations_that_are_no_epochs_are_forecast(normalizer, changes, validations):
    """At 10 images/s of the network, 30 of it forward, and 5 of the loader; files are decoded once."""
    config = load_train_module().load_config([*SYNTHETIC, f"normalizer={normalizer}"])
    network = build(config, "model", normalizer=build(config, "normalizer"), num_classes=10, in_channels=3)
    recipe = Recipe(epochs=10, batch_size=16, **changes)
    of = preflight.Validations.of(network, recipe)
    assert tuple(of) == validations
    data, step = SimpleNamespace(train_images=40, val_images=15), {"first_seconds": 1.0}
    speed = {"loader_images_per_second": 5.0, "network_images_per_second": 10.0, "val_images_per_second": 5.0}
    position = {"epoch": 2, "step": 0}

    def seconds(kept):
        found = preflight.check_time(data, recipe, step, {**speed, "val_kept": kept}, of, position, None)
        return found["expected_seconds"]

    more = 1.0 + 0.5 * max(validations[0] - 2, 0) + validations[2] / 5
    assert seconds(False) == pytest.approx(8 * (8 + 3) + 3 * validations[1] + more)
    assert seconds(True) == pytest.approx(8 * (8 + 0.5) + 2.5 + 0.5 * validations[1] + more)


def test_settings_without_effect_are_told(findings):
    code, found = findings(*SYNTHETIC, "normalizer=group", "recipe.clamp_off_epochs=2")
    assert code == 0 and found["settings"]["text"].startswith("recipe.clamp_off_epochs: without effect, as no layer")


def test_what_the_run_would_do_without_is_told_and_not_timed(findings, monkeypatch):
    """Capturing fails where auto chose it: a warning, and the step as the run would then take it."""

    def refuse(module):
        raise RuntimeError("operation not permitted when stream is capturing")

    def chosen(config, open_data):
        graphed = config["trainer"]["cuda_graph"] == "auto"
        values = {key: AUTO_KEYS[key] for key in left_to_choose(config)} | {"trainer.cuda_graph": graphed}
        config = with_values(config, values)
        return Choice(config, open_data(config), {}, ["trainer.cuda_graph"] * graphed)

    monkeypatch.setattr(ImageClassifier, "graph_steps", refuse)
    monkeypatch.setattr(preflight, "choose", chosen)
    code, found = findings(*SYNTHETIC)
    assert code == 0 and found["step"]["trainer.cuda_graph"] is False and found["step"]["images_per_second"] > 0


@pytest.mark.parametrize("first, enough", [(59.0, False), (61.0, True)])
def test_a_slow_first_batch_on_the_cpu_is_the_only_one(first, enough):
    timer = preflight.StepTimer((torch.zeros(1),), seconds=6.0)
    assert next(iter(timer)) is timer.batch
    timer.times = [first]
    assert (next(iter(timer), None) is None) == enough
    timer.times += [1.0, 2.0, 4.0]
    assert next(iter(timer), None) is None and timer.seconds_a_batch == 2.0


@pytest.mark.parametrize("text", ["", "abc", "1:2:3:4", "-5", "1-"])
def test_times_that_are_none(script, capsys, text):
    with pytest.raises(SystemExit):
        script.main([f"--time-limit={text}"])
    assert f"{text!r} is no time; write 90 (minutes)" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu_the_step_is_the_captured_one_and_the_set_lies_there(findings):
    """The default settings of a run of some length: images as bytes go into the graph, as in the run."""
    overrides = [word for word in SYNTHETIC if word != "trainer=cpu"]
    code, found = findings(*overrides, "trainer=gpu")
    assert code == 0 and found["step"]["trainer.cuda_graph"] and found["step"]["data.on_device"]
    assert "as CUDA graphs" in found["step"]["text"] and "(on the device)" in found["speed"]["text"]
