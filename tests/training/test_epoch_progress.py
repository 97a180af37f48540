"""What a run shows within its epochs, by a clock of the test's own."""

import sys
from types import SimpleNamespace

import pytest
import torch

from onlinenorm.training import progress
from onlinenorm.training.progress import RunProgress


@pytest.fixture
def epochs(monkeypatch, tmp_path):
    """Runs two epochs of batches of 8 images that take so many seconds each; -> how often the device was asked."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock.now)

    class Sums:
        asked = 0

        def tolist(self):
            self.asked += 1
            return [3.0 * 8, 0.0, 0.0, 8.0]

    def run(seconds, batches, validation=0.0, log_every_n_steps=50):
        trainer = SimpleNamespace(
            is_global_zero=True, max_epochs=2, num_training_batches=batches, accumulate_grad_batches=1,
            log_every_n_steps=log_every_n_steps,
        )  # fmt: skip
        module = SimpleNamespace(train_sums=Sums(), recipe=SimpleNamespace(batch_size=8))
        row = dict.fromkeys(["train_loss", "train_top1", "val_loss", "val_top1", "images_per_second"], 0.5)
        shown = RunProgress(SimpleNamespace(rows=[row]))
        shown.on_train_start(trainer, module)
        for trainer.current_epoch in range(2):
            row["epoch"] = trainer.current_epoch + 1
            shown.on_train_epoch_start(trainer, module)
            for batch in range(batches):
                clock.now += 60.0 if (trainer.current_epoch, batch) == (0, 0) else seconds  # the first compiles
                shown.on_train_batch_end(trainer, module, None, None, batch)
            clock.now += validation
            shown.on_train_epoch_end(trainer, module)
        shown.on_train_end(trainer, module)
        return module.train_sums.asked

    return run


def test_short_epochs_have_a_line_each(epochs, capsys):
    assert epochs(seconds=0.1, batches=50) == 0
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == ["epoch 1/2", "epoch 2/2"]


def test_within_long_epochs_there_are_lines_now_and_then(epochs, capsys):
    """1,000 batches of a second: the first after ten, then ten an epoch; each tells of the batches since the last."""
    asked = epochs(seconds=1.0, batches=1000, validation=100.0)
    lines = [line for line in capsys.readouterr().out.splitlines() if "step" in line]
    assert len(lines) == asked and 15 <= asked <= 22
    assert lines[0] == (
        "epoch 1/2 step 11/1,000  loss 3.000  8 images/s  16 min 29 s left in the epoch, 33 min 9 s in all"
    )
    assert lines[-1].startswith("epoch 2/2 step 9") and "8 images/s" in lines[-1]


def test_a_terminal_gets_a_bar_and_the_device_is_asked_every_n_steps(epochs, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert epochs(seconds=0.001, batches=100, log_every_n_steps=20) == 10
    assert "epoch 2/2" in capsys.readouterr().out


def test_the_loss_shown_is_that_of_the_epoch_so_far(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "FIRST_LINE_SECONDS", 0.0)
    monkeypatch.setattr(progress, "LINE_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(progress, "LINES_AN_EPOCH", 10**9)
    losses = []
    monkeypatch.setattr(
        progress.RunProgress, "on_train_batch_start",
        lambda shown, trainer, module, batch, batch_idx: losses.append(module.train_sums[0] / module.train_sums[3]),
    )  # fmt: skip
    run(tmp_path, "recipe.epochs=1", "recipe.milestones=[]")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch 1/1 step")]
    assert [line.split()[3] for line in lines] == ["2/4", "3/4"]
    assert [f"loss {loss:.3f}" in line for loss, line in zip(losses[2:4], lines, strict=True)] == [True, True]
    assert torch.stack(losses[1:]).isfinite().all()
