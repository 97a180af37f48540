"""One step and one validation batch of the classifier."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from onlinenorm.records import read_rows
from onlinenorm.training.module import ImageClassifier, _losses, _sums, all_finite
from onlinenorm.training.recipe import Recipe

RECIPE = Recipe(epochs=1, batch_size=4)


def test_sums_leave_out_images_without_a_label():
    logits, labels = torch.randn(6, 7), torch.tensor([0, -1, 3, 6, -1, 2])
    mean, total = _losses(logits, labels)
    kept = labels >= 0
    torch.testing.assert_close(mean, F.cross_entropy(logits[kept], labels[kept]))
    loss, top1, top5, images = _sums(logits, labels, total).tolist()
    assert loss == pytest.approx(F.cross_entropy(logits[kept], labels[kept], reduction="sum").item())
    assert images == 4 and top1 == (logits.argmax(1) == labels)[kept].sum()
    ranks = (logits[kept] > logits[kept].gather(1, labels[kept, None])).sum(1)
    assert top5 == (ranks < 5).sum()
    assert _losses(logits, torch.full((6,), -1))[0] == 0


def test_labels_are_smoothed_in_training_alone(run, tmp_path):
    logits, labels = torch.randn(5, 7), torch.tensor([0, 1, 3, 6, 2])
    smoothed = 0.9 * F.cross_entropy(logits, labels) - 0.1 * logits.log_softmax(1).mean()
    torch.testing.assert_close(_losses(logits, labels, 0.1)[0], smoothed)
    untrained = ["recipe.epochs=1", "recipe.milestones=[]", "recipe.lr=1e-12", "normalizer=none"]
    plain, changed = (run(tmp_path / f"{s}", *untrained, f"recipe.label_smoothing={s}") for s in (0, 0.5))
    assert plain["last"]["val_loss"] == changed["last"]["val_loss"]
    losses = [read_rows(tmp_path / name / "metrics.csv")[0]["train_loss"] for name in ("0", "0.5")]
    assert losses[0] != losses[1]


def test_crops_are_averaged_as_probabilities():
    module = ImageClassifier(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), RECIPE, channels_last=False)
    images = torch.randn(3, 10, 3, 2, 2)
    expected = torch.stack([F.softmax(module.network(crop), 1) for crop in images.unbind(1)]).mean(0)
    torch.testing.assert_close(module(images).exp(), expected)
    torch.testing.assert_close(module(images[:, 0]), module.network(images[:, 0]))


def test_few_classes_have_a_top5_too():
    logits = torch.randn(4, 3)
    labels = torch.tensor([0, 1, 2, 0])
    assert _sums(logits, labels, _losses(logits, labels)[1])[2] == 4


def test_channels_last_reaches_weights_and_images():
    seen = []
    convolution = nn.Conv2d(4, 8, 3)
    convolution.register_forward_hook(lambda layer, inputs, out: seen.append(inputs[0]))
    module = ImageClassifier(convolution, RECIPE)
    module(torch.randn(2, 4, 6, 6))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last)


def test_the_first_bad_batch_is_remembered():
    module = ImageClassifier(nn.Linear(2, 2), RECIPE, channels_last=False)
    for value in (1.0, float("inf"), float("nan"), 2.0):
        module.training_loss(lambda x: x, torch.full((3, 2), value), torch.zeros(3, dtype=torch.int64))
    assert module.bad_batch == 2 and module.batches == 4 and module.train_sums[3] == 12


@pytest.mark.parametrize(
    "device, backend", [("cpu", "aot_eager"), pytest.param("cuda", "inductor", marks=pytest.mark.gpu)]
)
def test_the_loss_compiles_in_one_piece_and_is_the_same(device, backend):
    labels, found = torch.tensor([0, 1, 2, -1, 4], device=device), []
    for compiled in (False, True):
        module = ImageClassifier(nn.Linear(2, 2).to(device), Recipe(epochs=1, batch_size=5, label_smoothing=0.1))
        module.train_sums, module.batches = module.train_sums.to(device), module.batches.to(device)
        module.bad_batch = module.bad_batch.to(device)
        if compiled:
            module._compiled_loss = torch.compile(module._loss_of, backend=backend, fullgraph=True)
        generator = torch.Generator().manual_seed(0)
        for value in (1.0, 30.0, math.nan, math.inf, 2.0):
            logits = (value * torch.randn(5, 10, generator=generator)).to(device, torch.bfloat16).requires_grad_()
            loss = module.training_loss(lambda x: x, logits, labels)
            found.append([loss.detach(), *torch.autograd.grad(loss, logits), module.train_sums.clone()])
        assert module.bad_batch == 3 and module.batches == 5
    for plain, other in zip(found[:5], found[5:], strict=True):
        for a, b in zip(plain, other, strict=True):
            torch.testing.assert_close(
                b, a, rtol=1e-5 if a.dtype != torch.bfloat16 else 1e-2, atol=1e-6, equal_nan=True
            )


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_one_element_of_many_tensors_that_is_not_finite_is_found(device):
    tensors = [torch.randn(size, device=device) for size in (1, 70000, 3, 0, 129)]
    tensors += [torch.tensor([torch.finfo(torch.float32).max], device=device), torch.tensor(5, device=device)]
    tensors += [torch.randn(40, device=device, dtype=dtype) for dtype in (torch.float64, torch.bfloat16)]
    assert all_finite(tensors)
    for tensor in (tensors[0], tensors[1], tensors[4], *tensors[-2:]):
        for value in (math.nan, math.inf, -math.inf):
            before, tensor[-1] = tensor[-1].clone(), value
            assert not all_finite(tensors)
            tensor[-1] = before
    assert all_finite(tensors)


def test_a_validation_loss_that_is_not_finite_ends_the_run_before_it_is_saved(run, tmp_path, monkeypatch):
    """Weights still finite, and training losses too: what is kept is the epoch before."""
    from onlinenorm.errors import RunError
    from onlinenorm.training import ImageClassifier

    original = ImageClassifier.validation_step

    def overflow(self, batch, batch_idx):
        original(self, batch, batch_idx)
        if self.trainer.current_epoch == last:
            self.val_sums = self.val_sums + torch.tensor([float("nan"), 0, 0, 0], dtype=torch.float64)

    monkeypatch.setattr(ImageClassifier, "validation_step", overflow)
    last, two_epochs = 1, ("recipe.epochs=2", "recipe.milestones=[]")
    with pytest.raises(RunError, match=r"the validation loss became NaN or infinite at step \d+ \(epoch 2") as caught:
        run(tmp_path, *two_epochs)
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["position"]["epoch"] == 1 and not (tmp_path / "results.json").exists()
    assert f"The last good checkpoint is kept: {tmp_path}/checkpoints/last.ckpt." in str(caught.value)
    last = 0
    with pytest.raises(RunError, match=r"\(epoch 1.*No checkpoint had been saved yet\."):
        run(tmp_path / "other", *two_epochs)
