"""Runs on the CPU whose steps are captured, as far as that can be had without CUDA graphs."""

import pytorch_lightning as pl
import torch

from onlinenorm import models
from onlinenorm.data import Synthetic
from onlinenorm.normalizers import OnlineNorm2d
from onlinenorm.training import cuda_graph
from onlinenorm.training.cuda_graph import GraphedStep
from onlinenorm.training.module import ImageClassifier
from onlinenorm.training.recipe import Recipe
from onlinenorm.training.trainer import TrainingGraph, quiet_lightning


class Again:
    """Stands for a graph: what was captured is done again, into the memory of its first result."""

    def __init__(self, function, result, parameters):
        self.function, self.result = function, result
        self.gradients = [(parameter, parameter.grad) for parameter in parameters]

    def pool(self):
        return None

    def replay(self):
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        with torch.enable_grad():
            result = self.function()
        for parameter, _ in self.gradients:
            parameter.grad = None
        for memory, value in zip(self.result or (), result or (), strict=True):
            memory.copy_(value)


def stand_in(monkeypatch):
    """Lets what is captured run again where a graph would be replayed; a list of what was captured, by name."""
    captured, graphed = [], []
    original = GraphedStep.__init__

    def capture(function, stream, pool=None):
        captured.append(function.__name__)
        if function.__name__ == "step":  # of the optimizer: a capture does nothing, and what is else done is undone
            return Again(function, None, graphed[-1]._parameters), None
        result = function()
        return Again(function, result, ()), result

    def initialise(self, *arguments, **options):
        original(self, *arguments, **options)
        graphed.append(self)

    monkeypatch.setattr(cuda_graph, "warm_up", lambda function, device: [function() for _ in range(3)])
    monkeypatch.setattr(cuda_graph, "capture", capture)
    monkeypatch.setattr(GraphedStep, "__init__", initialise)
    return captured


def train(graph, augmentation="pad_crop", recipe=None, callbacks=(), **options):
    """Weights, statistics and sums of a short run on the CPU."""
    torch.manual_seed(0)
    data = Synthetic(num_train=32, num_val=20, batch_size=8, val_batch_size=8, image_size=16, augmentation=augmentation)
    recipe = Recipe(epochs=3, batch_size=8, **(recipe or {"milestones": (2,)}))
    module = ImageClassifier(models.cifar_resnet8(OnlineNorm2d), recipe)
    with quiet_lightning():
        pl.Trainer(
            accelerator="cpu", max_epochs=3, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, use_distributed_sampler=False,
            callbacks=[*callbacks, *([TrainingGraph()] if graph else [])], **options,
        ).fit(module, data)  # fmt: skip
    sums = {"train_sums": module.train_sums, "val_sums": module.val_sums, "batches": module.batches}
    return module.network.state_dict() | sums


def loss_of(forward, images, labels):
    return torch.nn.functional.cross_entropy(forward(images), labels)
