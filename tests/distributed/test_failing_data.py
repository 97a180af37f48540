"""An image that one of several processes cannot read: all say so, and the run goes on from the step before it."""

import shutil

import process_groups
import pytest
from distributed_runs import train
from image_folders import write_tree
from tests_training import outcome

from onlinenorm.data.imagenet import open_splits
from onlinenorm.data.sampler import GlobalBatchSampler, ValidationSampler
from onlinenorm.training.checkpoint import read

RUN = (
    "data=imagenet", "data.image_size=16", "data.num_workers=1", "data.val_batch_size=2", "model=cifar_resnet8",
    "normalizer=online_clamp", "recipe=cifar", "recipe.epochs=2", "recipe.milestones=[]", "recipe.batch_size=4",
    "recipe.augmentation=random_resized_crop", "trainer=cpu",
)  # fmt: skip
DDP = ("trainer.strategy=ddp", "trainer.devices=auto")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("set"), train=9, val=8)  # 27 and 24 of three classes


@pytest.fixture(scope="module")
def undisturbed(tree, tmp_path_factory):
    """undisturbed(accumulate) -> what a finished run leaves; made once."""
    found = {}

    def call(accumulate):
        if accumulate not in found:
            folder = tmp_path_factory.mktemp("undisturbed")
            process_groups.run(2, train, str(folder), *options(tree, accumulate))
            found[accumulate] = outcome(folder)
        return found[accumulate]

    return call


def options(root, accumulate):
    return (*RUN, *DDP, f"data.root={root}", f"trainer.accumulate_grad_batches={accumulate}")


def image_of(split, rank, batch, accumulate):
    """Index of the last image of a batch of one of the two processes, in the first epoch."""
    training = GlobalBatchSampler(27, 4, 0, rank, 2, accumulate)
    return list(training if split == "train" else ValidationSampler(24, 2, rank, 2))[batch][-1][1]


@pytest.mark.parametrize(
    "split, rank, batch, accumulate, step",
    [
        ("train", 1, 1, 1, 0),  # found before the first step
        ("train", 1, 2, 1, 2),
        ("train", 0, 5, 1, 5),
        ("train", 1, 7, 2, 3),  # the second part of the fourth step
        ("val", 1, 0, 1, 6),  # the first batch of validation and the last
        ("val", 0, 5, 1, 6),
    ],
)
def test_all_end_with_its_sentence_and_nothing_is_lost(
    tree, undisturbed, tmp_path, split, rank, batch, accumulate, step
):
    root, folder = shutil.copytree(tree, tmp_path / tree.name), tmp_path / "run"
    path = open_splits(str(root))[split == "val"].path(image_of(split, rank, batch, accumulate))
    good = path.read_bytes()
    path.write_bytes(bytes(len(good)))
    run = (2, train, str(folder), *options(root, accumulate))
    errors = [error for _, error in process_groups.finish(process_groups.start(*run))]
    assert {(kind, message) for kind, message, _ in errors} == {("UnreadableImageError", errors[0][1])}
    assert errors[0][1].startswith(f"data.on_unreadable: {path} cannot be decoded")
    assert bool(step) == (folder / "checkpoints" / "last.ckpt").exists()
    if step:
        assert read(folder / "checkpoints" / "last.ckpt")["position"] == {"epoch": 0, "step": step, "global_step": step}
    path.write_bytes(good)
    process_groups.run(*run)
    results, *rest = outcome(folder)
    assert ({**results, "attempts": []} if step == 0 else results, *rest) == undisturbed(accumulate)
