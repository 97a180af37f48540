"""Training as captured graphs: refused without a GPU, and the same run with one."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from tests_training import outcome

from onlinenorm import models
from onlinenorm.data import Synthetic
from onlinenorm.errors import ConfigError
from onlinenorm.normalizers import BatchRenorm2d, OnlineNorm2d
from onlinenorm.training.cuda_graph import GraphedStep
from onlinenorm.training.module import ImageClassifier, _step
from onlinenorm.training.recipe import Recipe
from onlinenorm.training.trainer import TrainingGraph


def test_without_a_gpu_it_is_refused(run, tmp_path):
    with pytest.raises(ConfigError, match=r"trainer\.cuda_graph: CUDA graphs need an NVIDIA GPU"):
        run(tmp_path, "trainer.cuda_graph=true")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's advice on loggers and numbers of workers
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("augmentation", ["pad_crop", "random_resized_crop", "scale_jitter"])
def test_bytes_go_to_the_graph(monkeypatch, augmentation):
    """What is captured makes the network's input itself, and the weights are those of a run without; on the CPU."""

    class Eager:
        def __init__(self, module, step, accumulates):
            self.module, self.step = module, step

        def __call__(self, images, labels):
            dtypes.append(images.dtype)
            return self.step(self.module, images, labels)

    def train(callbacks):
        torch.manual_seed(0)
        data = Synthetic(num_train=32, num_val=16, batch_size=8, image_size=16, augmentation=augmentation)
        module = ImageClassifier(models.cifar_resnet8(OnlineNorm2d), Recipe(epochs=2, batch_size=8))
        pl.Trainer(
            accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, use_distributed_sampler=False, callbacks=callbacks,
        ).fit(module, data)  # fmt: skip
        return module.network.state_dict()

    dtypes = []
    plain = train([])
    monkeypatch.setattr("onlinenorm.training.module.GraphedStep", Eager)
    graphed = train([TrainingGraph()])
    assert set(dtypes) == {torch.float32 if augmentation == "scale_jitter" else torch.uint8} and len(dtypes) == 8
    assert all(torch.equal(graphed[name], value) for name, value in plain.items())


@pytest.mark.gpu
@pytest.mark.parametrize("normalizer", ["online_clamp", "online_layer_scaling", "batch", "batch_renorm"])
def test_same_gradients_and_buffers_as_without(normalizer):
    makers = {
        "online_clamp": OnlineNorm2d,
        "online_layer_scaling": lambda c: OnlineNorm2d(c, error_compensation="layer_scaling"),
        "batch": torch.nn.BatchNorm2d,
        "batch_renorm": partial(BatchRenorm2d, warmup_steps=1, r_max_steps=4, d_max_steps=3),
    }
    torch.backends.cudnn.benchmark, before = False, torch.backends.cudnn.benchmark
    found = []
    for graphed in (False, True):
        torch.manual_seed(0)
        network = models.cifar_resnet8(makers[normalizer], in_channels=1).cuda().train()
        run = GraphedStep(network, _step, accumulates=False) if graphed else partial(_step, network)
        optimizer = torch.optim.SGD(network.parameters(), 0.01, 0.9)
        for _ in range(5):
            x = torch.randn(16, 1, 28, 28, device="cuda")
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", torch.bfloat16):
                loss, sums = run(x, torch.arange(16, device="cuda") % 10)
            loss.backward()
            optimizer.step()
        found.append({**network.state_dict(), "loss": loss.detach(), "sums": sums})
    torch.backends.cudnn.benchmark = before
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "overrides",
    [[], ["trainer.accumulate_grad_batches=2"], ["model.compile=true"], ["trainer.precision=16-mixed"]],
)
def test_same_run_as_without(run, tmp_path, overrides):
    shared = ["trainer=gpu", "trainer.precision=32-true", "trainer.deterministic=true", *overrides]
    plain = run(tmp_path / "plain", *shared)
    graphed = run(tmp_path / "graphed", *shared, "trainer.cuda_graph=true")
    assert graphed["last"]["val_loss"] == pytest.approx(plain["last"]["val_loss"], rel=1e-4)
    rows = [outcome(tmp_path / name)[1] for name in ("plain", "graphed")]
    for a, b in zip(*rows, strict=True):
        assert float(b["train_loss"]) == pytest.approx(float(a["train_loss"]), rel=1e-4)
