"""A run that was interrupted anywhere ends with the bits of one that was not."""

import math
import os
import signal
import subprocess
import sys

import pytest
import torch
from tests_training import ROOT, TINY, outcome, rows, scaled_by

from onlinenorm.data import ImageDataModule
from onlinenorm.data.workers import STOP_SIGNALS
from onlinenorm.errors import ConfigError, DataError, Interrupted, RunError
from onlinenorm.training import ImageClassifier, checkpoint, precision
from onlinenorm.training.checkpoint import read
from onlinenorm.training.run_folder import RunFolder

STEPS, VALIDATIONS = 4, 1  # of an epoch: batches of 16 of 70 images; 21 images in one batch


@pytest.fixture(scope="module")
def undisturbed(run, tmp_path_factory):
    """folder of an undisturbed run of a normalizer; made once."""
    folders = {}

    def folder(normalizer, *overrides):
        key = (normalizer, *overrides)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("undisturbed")
            run(folders[key], f"normalizer={normalizer}", *overrides)
        return folders[key]

    return folder


@pytest.fixture
def interrupt(monkeypatch):
    """interrupt(name, call, signum): the signal arrives while the module's method `name` is called for that time."""

    def arrange(name, call, signum=signal.SIGTERM):
        calls = iter(range(1, 1000))
        original = getattr(ImageClassifier, name)

        def method(self, *arguments):
            if next(calls) == call:
                os.kill(os.getpid(), signum)
            return original(self, *arguments)

        monkeypatch.setattr(ImageClassifier, name, method)

    return arrange


@pytest.mark.parametrize("normalizer", ["online_clamp", "online_layer_scaling", "batch", "batch_renorm"])
def test_stopped_within_an_epoch(undisturbed, run, interrupt, tmp_path, normalizer):
    steps = {"warmup_steps": 2, "r_max_steps": 9, "d_max_steps": 7} if normalizer == "batch_renorm" else {}
    options = [f"normalizer.{key}={value}" for key, value in steps.items()]
    interrupt("training_step", 1 * STEPS + 2)
    with pytest.raises(Interrupted, match="saved at step 2 of epoch 2; the same command continues") as stopped:
        run(tmp_path, f"normalizer={normalizer}", *options)
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    results = run(tmp_path, f"normalizer={normalizer}", *options)
    assert results["resumed"] == 1
    assert outcome(tmp_path) == outcome(undisturbed(normalizer, *options))


@pytest.mark.parametrize("epoch", [0, 1])  # within the warm-up, and within the cosine
def test_rates_that_change_at_each_step_go_on_where_they_were(undisturbed, run, interrupt, tmp_path, epoch):
    options = ["recipe.warmup_epochs=1", "recipe.schedule=cosine", "recipe.milestones=[]", "recipe.label_smoothing=0.1"]
    interrupt("training_step", epoch * STEPS + 2)
    with pytest.raises(Interrupted):
        run(tmp_path, *options)
    run(tmp_path, *options)
    expected = undisturbed("online_clamp", *options)
    assert outcome(tmp_path) == outcome(expected)
    full = 0.00163546
    ends = [full, full * (1 + math.cos(math.pi * 3 / 8)) / 2, full * (1 + math.cos(math.pi * 7 / 8)) / 2]
    assert [float(row["lr"]) for row in rows(expected)] == pytest.approx(ends, rel=5e-6)


def test_a_changing_loss_scale_goes_on_where_it_was(undisturbed, run, interrupt, tmp_path, monkeypatch):
    monkeypatch.setattr(precision.ScaledHalf, "__init__", scaled_by(2.0**20, growth_interval=2))
    expected = undisturbed("online_clamp", "trainer.precision=16-mixed")
    interrupt("training_step", 1 * STEPS + 2)
    with pytest.raises(Interrupted):
        run(tmp_path, "trainer.precision=16-mixed")
    assert read(tmp_path / "checkpoints" / "last.ckpt")["ScaledHalf"]["scale"] != 2.0**20
    run(tmp_path, "trainer.precision=16-mixed")
    assert outcome(tmp_path) == outcome(expected)
    ends = [read(folder / "checkpoints" / "last.ckpt")["ScaledHalf"] for folder in (tmp_path, expected)]
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    "method, call, where",
    [
        ("training_step", 1, "step 1 of epoch 1"),
        ("training_step", STEPS, "step 4 of epoch 1"),  # trained, not validated
        ("validation_step", 1, "step 4 of epoch 1"),
        ("on_train_epoch_end", 2, "the end of epoch 2"),
        ("training_step", 3 * STEPS, "step 4 of epoch 3"),
        ("validation_step", 3 * VALIDATIONS + 1, "the end of epoch 3"),  # final validation, with clamp
        ("validation_step", 3 * VALIDATIONS + 2, "the end of epoch 3"),  # and without
    ],
)
def test_stopped_anywhere(undisturbed, run, interrupt, tmp_path, method, call, where):
    interrupt(method, call, signal.SIGUSR1)
    with pytest.raises(Interrupted, match=f"SIGUSR1: saved at {where}") as stopped:
        run(tmp_path, "normalizer=online_clamp")
    assert stopped.value.exit_code == 128 + signal.SIGUSR1
    run(tmp_path, "normalizer=online_clamp")
    assert outcome(tmp_path) == outcome(undisturbed("online_clamp"))


@pytest.mark.parametrize("before_training", [True, False])
def test_a_reader_of_the_output_that_leaves_stops_the_run_where_it_can_go_on(
    undisturbed, run, tmp_path, monkeypatch, before_training
):
    reader, writer = map(os.fdopen, os.pipe(), ("r", "w"))
    place, name = (RunFolder, "recorded_config") if before_training else (ImageClassifier, "on_train_epoch_start")
    original = getattr(place, name)

    def leave(*arguments):
        found = original(*arguments)
        reader.close()
        return found

    with monkeypatch.context() as context, writer:
        context.setattr(sys, "stdout", writer)
        context.setattr(place, name, leave)
        where = "stopped before training had begun" if before_training else "saved at"
        with pytest.raises(Interrupted, match=f"the reader of the output has left: {where}") as stopped:
            run(tmp_path)
        assert stopped.value.exit_code == 128 + signal.SIGPIPE and sys.stdout is writer
    assert not (tmp_path / "failed.json").exists()
    assert run(tmp_path)["resumed"] == (0 if before_training else 1)
    assert outcome(tmp_path) == outcome(undisturbed("online_clamp"))


def test_ctrl_c_saves_where_what_read_the_output_has_ended_too(undisturbed, run, interrupt, tmp_path):
    """As `2>&1 | tee log` does."""
    interrupt("training_step", STEPS + 2, signal.SIGINT)
    reader, writer = os.pipe()
    os.close(reader)
    errors = os.dup(2)
    os.dup2(writer, 2)
    try:
        with pytest.raises(Interrupted, match="Ctrl-C: saved at step 2 of epoch 2"):
            run(tmp_path)
    finally:
        os.dup2(errors, 2)
        for number in (writer, errors):
            os.close(number)
    run(tmp_path)
    assert outcome(tmp_path) == outcome(undisturbed("online_clamp"))


def test_plateau_schedule_and_accumulation_and_workers_survive(undisturbed, run, interrupt, tmp_path):
    plateau = ("recipe.schedule=plateau", "recipe.milestones=[]", "recipe.plateau_patience=0", "recipe.lr=0.01")
    parts = "trainer.accumulate_grad_batches=2"
    interrupt("training_step", 2 * STEPS * 2 + 3)
    with pytest.raises(Interrupted, match="step 2 of epoch 3"):
        run(tmp_path, "normalizer=online_clamp", parts, *plateau)
    run(tmp_path, "normalizer=online_clamp", parts, "data.num_workers=1", *plateau)
    reference = undisturbed("online_clamp", parts, *plateau)
    assert outcome(tmp_path) == outcome(reference)
    assert len({row["lr"] for row in rows(reference)}) > 1, "the plateau must have been met for this to test anything"


@pytest.fixture
def failing_data(monkeypatch):
    """failing_data(call, error): the data module raises it in place of handing over batch `call`, from 1, of a run."""

    def arrange(call, error):
        calls, original = iter(range(1, 1000)), ImageDataModule.on_before_batch_transfer

        def method(self, *arguments):
            if next(calls) == call:
                raise error
            return original(self, *arguments)

        monkeypatch.setattr(ImageDataModule, "on_before_batch_transfer", method)

    return arrange


@pytest.mark.parametrize(
    "error, parts, call, where",
    [
        (RuntimeError("DataLoader worker (pid 7) is killed"), 1, STEPS + VALIDATIONS + 3, "step 2 of epoch 2"),
        (DataError("unreadable"), 1, STEPS + 1, "step 4 of epoch 1"),  # in its validation
        (DataError("unreadable"), 2, 2 * STEPS + VALIDATIONS + 6, "step 2 of epoch 2"),  # the second part of a step
        (DataError("unreadable"), 2, 2 * STEPS + VALIDATIONS + 5, "step 2 of epoch 2"),  # the first
    ],
)
def test_data_that_fail_cost_no_step(undisturbed, run, failing_data, tmp_path, capsys, error, parts, call, where):
    parts = f"trainer.accumulate_grad_batches={parts}"
    failing_data(call, error)
    with pytest.raises(DataError):
        run(tmp_path, "normalizer=online_clamp", parts)
    assert f"saved at {where}; the same command continues from there ({tmp_path})" in capsys.readouterr().err
    assert run(tmp_path, "normalizer=online_clamp", parts)["resumed"] == 1
    assert outcome(tmp_path) == outcome(undisturbed("online_clamp", parts))


@pytest.mark.parametrize("call", [1, STEPS + VALIDATIONS + 1])
def test_data_that_fail_where_nothing_is_unsaved_save_nothing(run, failing_data, tmp_path, capsys, call):
    failing_data(call, DataError("unreadable"))
    with pytest.raises(DataError):
        run(tmp_path, "normalizer=batch")
    assert "saved" not in capsys.readouterr().err and (tmp_path / "checkpoints" / "last.ckpt").exists() == (call > 1)


class Killed(BaseException):
    """Stands for kill -9: nothing of the run's own gets to act on it."""


def test_killed_falls_back_to_the_periodic_checkpoint_and_loses_no_row(undisturbed, run, monkeypatch, tmp_path):
    for call in (2 * STEPS, STEPS + 1, 3):
        calls = iter(range(1, 1000))
        original = ImageClassifier.training_step

        def step(self, *arguments, _calls=calls, _call=call, _original=original):
            if next(_calls) == _call:
                raise Killed
            return _original(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(ImageClassifier, "training_step", step)
            with pytest.raises(Killed):
                run(tmp_path, "normalizer=batch", "trainer.checkpoint_every_n_steps=3")
    results = run(tmp_path, "normalizer=batch", "trainer.checkpoint_every_n_steps=3")
    assert results["resumed"] == 3
    assert outcome(tmp_path) == outcome(undisturbed("batch"))


def test_periodic_checkpoints_have_one_before_each_validation(run, monkeypatch, tmp_path):
    """Which no error there undoes, on any number of processes."""

    def validation_step(*_):
        raise Killed

    monkeypatch.setattr(ImageClassifier, "validation_step", validation_step)
    with pytest.raises(Killed):
        run(tmp_path, "normalizer=batch", "trainer.checkpoint_every_n_steps=1000")
    assert read(tmp_path / "checkpoints" / "last.ckpt")["position"] == {"epoch": 0, "step": 4, "global_step": 4}


def test_damaged_checkpoint_is_reported_and_the_previous_used(undisturbed, run, interrupt, tmp_path, capsys):
    interrupt("training_step", 2 * STEPS + 2)
    with pytest.raises(Interrupted):
        run(tmp_path, "normalizer=batch")
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-1000])
    run(tmp_path, "normalizer=batch")
    assert f"{last} is damaged" in capsys.readouterr().err
    assert outcome(tmp_path) == outcome(undisturbed("batch"))


def test_finished_run_is_reprinted_and_another_configuration_refused(undisturbed, run, capsys, monkeypatch):
    folder = undisturbed("batch")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    results = run(folder, "normalizer=batch", "data.num_workers=2", "trainer.log_every_n_steps=7")
    assert results["normalizer"] == "batch"
    assert " seed 0 on synthetic, 3 epochs: done" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"(?s)run_dir: .*recipe.lr: 0.1 -> 0.2\n.*another run_dir"):
        run(folder, "normalizer=batch", "recipe.lr=0.2")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_not_a_number_stops_before_the_last_good_checkpoint_is_replaced(run, monkeypatch, tmp_path):
    calls = iter(range(1, 1000))
    original = ImageClassifier.training_step

    def step(self, *arguments):
        loss = original(self, *arguments)
        if next(calls) == STEPS + 2:
            self.train_sums[0] = float("nan")
            self._watch(loss.detach() * float("nan"))
        return loss

    monkeypatch.setattr(ImageClassifier, "training_step", step)
    with pytest.raises(RunError, match=r"loss became NaN or infinite at step 6 \(epoch 2, learning rate .*recipe.lr"):
        run(tmp_path, "normalizer=batch", "trainer.log_every_n_steps=3")
    assert read(tmp_path / "checkpoints" / "last.ckpt")["position"] == {"epoch": 1, "step": 0, "global_step": 4}
    assert "the loss became NaN or infinite at step 6" in (tmp_path / "failed.txt").read_text()
    monkeypatch.setattr(ImageClassifier, "training_step", original)
    run(tmp_path, "normalizer=batch")
    assert not (tmp_path / "failed.txt").exists() and (tmp_path / "results.json").exists()


def test_infinite_weights_are_not_saved_either(run, monkeypatch, tmp_path):
    original = ImageClassifier.on_train_epoch_end

    def poison(self):
        original(self)
        if self.current_epoch == 1:
            self.network.fc.weight.data[0, 0] = float("inf")

    monkeypatch.setattr(ImageClassifier, "on_train_epoch_end", poison)
    with pytest.raises(RunError, match="a weight or statistic of the network became NaN or infinite"):
        run(tmp_path, "normalizer=batch")
    assert read(tmp_path / "checkpoints" / "last.ckpt")["position"]["epoch"] == 1


def test_disk_full_leaves_the_last_good_checkpoint(undisturbed, run, monkeypatch, tmp_path):
    calls = iter(range(1, 1000))

    def save(state, file, _save=checkpoint.torch.save):
        _save(state, file)
        if next(calls) > 3:  # best and last of the first epoch, best of the second
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.torch, "save", save)
        with pytest.raises(RunError, match=r"could not be saved .*No space left on device.*Free some space"):
            run(tmp_path, "normalizer=batch")
    assert not list((tmp_path / "checkpoints").glob("*.partial"))
    run(tmp_path, "normalizer=batch")
    assert outcome(tmp_path) == outcome(undisturbed("batch"))


@pytest.mark.parametrize("signum, name", [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_stopped_before_training(undisturbed, run, monkeypatch, tmp_path, signum, name):
    """While data are being looked for: there is nothing to wait for and nothing to save."""
    with monkeypatch.context() as patch:
        patch.setattr(ImageDataModule, "prepare_data", lambda self: os.kill(os.getpid(), signum))
        with pytest.raises(
            Interrupted, match=f"^{name}: stopped before training had begun; nothing is lost"
        ) as stopped:
            run(tmp_path, "normalizer=batch")
    assert stopped.value.exit_code == 128 + signum and not list(tmp_path.iterdir())
    run(tmp_path, "normalizer=batch")
    assert outcome(tmp_path) == outcome(undisturbed("batch"))


def test_former_handlers_come_back(run, interrupt, tmp_path):
    former = [signal.getsignal(number) for number in STOP_SIGNALS]
    interrupt("training_step", 2, signal.SIGINT)
    with pytest.raises(Interrupted, match=r"^Ctrl-C: saved at step 2 of epoch 1"):
        run(tmp_path, "normalizer=batch")
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == former


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [[], ["trainer.cuda_graph=true"], ["model=resnet18", "data.image_size=64"]], ids=str
)
@pytest.mark.parametrize("normalizer", ["online_clamp", "online_layer_scaling", "batch"])
def test_deterministic_runs_on_a_gpu_continue_with_the_same_bits(run, interrupt, tmp_path, normalizer, options):
    """In another process, which would choose other algorithms."""
    options = [f"normalizer={normalizer}", "trainer=gpu", "trainer.deterministic=true", *options]
    deterministic, benchmark = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    try:
        run(tmp_path / "undisturbed", *options)
        interrupt("training_step", 1 * STEPS + 2)
        with pytest.raises(Interrupted, match="saved at step 2 of epoch 2"):
            run(tmp_path / "stopped", *options)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = deterministic, benchmark
    command = [sys.executable, str(ROOT / "train.py"), *TINY, *options, f"run_dir={tmp_path / 'stopped'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "undisturbed")
