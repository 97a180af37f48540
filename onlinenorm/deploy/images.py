"""Images for a network outside of training."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from onlinenorm.data import DataError
from onlinenorm.data.workers import worker_loader
from onlinenorm.deploy.source import Trained, elsewhere
from onlinenorm.errors import DeployError


def pick_device(name: str) -> torch.device:
    """The device for "auto", "cpu" or "cuda"; DeployError where there is no GPU and one is asked for."""
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise DeployError("--device cuda: torch finds no GPU; use --device cpu")
    return torch.device("cuda" if has_gpu and name != "cpu" else "cpu")


def training_batches(trained: Trained, count: int) -> tuple[int, Iterator[Tensor]]:
    """How many training images, and these as the network takes them: those that `final_validation.reestimate` takes.

    At least `count`, augmented and in whole batches as in training, but of one epoch at most. On the CPU. Raises
    DataError where the dataset is missing.
    """
    recipe = trained.recipe
    data = replace(trained.data, augmentation=recipe.augmentation)
    try:
        data.setup()
    except DataError as error:
        raise elsewhere(error) from error
    data.resume(recipe.epochs, 0)
    steps = min(-(-count // recipe.batch_size), data.train_images // recipe.batch_size)
    batches = (tuple(data.on_before_batch_transfer(batch)) for batch in data.train_dataloader())
    images = (data.on_after_batch_transfer(batch)[0] for batch in itertools.islice(batches, steps))
    return steps * recipe.batch_size, images


def validation_batches(
    trained: Trained, limit: int | None, device: torch.device, batch_size: int = 64
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(images, labels, indices) as the network takes them, on `device`.

    `limit` images spread evenly over the set, or all. A label of -1 marks an image that could not be read. Raises
    DataError where the dataset is missing, or an image of it unreadable and not to be skipped.
    """
    data = trained.data
    if limit is not None and limit < 1:
        raise DeployError(f"--images {limit}: must be at least 1")
    try:
        data.setup()
        if data.num_classes != trained.num_classes:
            raise DeployError(f"the dataset has {data.num_classes} classes and the network {trained.num_classes}")
        total = data.val_images
        whole = data.val_dataloader()
    except DataError as error:
        raise elsewhere(error) from error
    count = min(limit or total, total)
    chosen = [(0, index * total // count) for index in range(count)]
    batches = [chosen[start : start + batch_size] for start in range(0, count, batch_size)]
    for batch in worker_loader(whole.dataset, batches, whole.num_workers):
        batch = [part.to(device) for part in data.on_before_batch_transfer(batch)]
        images, labels, indices = data.on_after_batch_transfer(tuple(batch))
        yield images, labels, indices
