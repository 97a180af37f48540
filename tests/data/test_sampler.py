import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onlinenorm.data.randomness import permutation
from onlinenorm.data.sampler import GlobalBatchSampler, ValidationSampler


def indices(sampler):
    return [[index for _, index in batch] for batch in sampler]


def taking_turns(ranks):
    """The images of all processes' batches in the order of one process: the first of each, then the second of each."""
    return [index for parts in zip(*ranks, strict=True) for turn in zip(*parts, strict=True) for index in turn]


@settings(max_examples=60)
@given(
    world_size=st.sampled_from([1, 2, 3, 7]),
    accumulate=st.integers(1, 3),
    local=st.integers(1, 4),
    steps=st.integers(1, 5),
    rest=st.integers(0, 5),
    epoch=st.integers(0, 3),
)
def test_ranks_together_give_the_order_of_one_process(world_size, accumulate, local, steps, rest, epoch):
    size = world_size * accumulate * local
    images = size * steps + min(rest, size - 1)
    ranks = [
        indices(GlobalBatchSampler(images, size, 5, rank, world_size, accumulate, epoch)) for rank in range(world_size)
    ]
    assert {len(batches) for batches in ranks} == {steps * accumulate}
    gathered = taking_turns(ranks)
    one_process = [index for batch in indices(GlobalBatchSampler(images, size, 5, epoch=epoch)) for index in batch]
    assert gathered == one_process == permutation(5, epoch, images)[: steps * size].tolist()


def test_an_epoch_visits_every_image_once_and_epochs_differ():
    sampler = GlobalBatchSampler(120, 8, seed=1)
    seen = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == 15 and all(e == epoch for batch in batches for e, _ in batch)
        order = [index for batch in batches for _, index in batch]
        assert sorted(order) == list(range(120))
        seen.append(order)
    assert seen[0] != seen[1] != seen[2]


@pytest.mark.parametrize(("old", "new"), [((1, 1), (1, 1)), ((2, 1), (1, 2)), ((1, 2), (4, 1))])
@pytest.mark.parametrize("step", [0, 3, 10])
def test_resuming_yields_exactly_the_remaining_batches(old, new, step):
    """Also on another number of processes or with another accumulation."""

    def gathered(world_size, accumulate, **start):
        ranks = [GlobalBatchSampler(83, 8, 2, rank, world_size, accumulate, **start) for rank in range(world_size)]
        assert all(len(sampler) == 10 * accumulate for sampler in ranks)
        return taking_turns(map(indices, ranks))

    assert gathered(*new, epoch=4, start_step=step) == gathered(*old, epoch=4)[step * 8 :]


def test_the_offset_holds_for_the_resumed_epoch_only_and_for_every_iteration_of_it():
    sampler = GlobalBatchSampler(40, 4, seed=0, epoch=2, start_step=7)
    assert len(list(sampler)) == len(list(sampler)) == 3 and len(sampler) == 10
    sampler.set_epoch(3)
    assert len(list(sampler)) == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_batch_size": 10, "world_size": 4}, "^batch_size: .* does not divide by 4 processes"),
        ({"global_batch_size": 8, "world_size": 2, "accumulate": 3}, "^batch_size: .* choose a multiple of 6"),
        ({"global_batch_size": 128}, "^batch_size: 128 exceeds the 100 training images"),
        ({"global_batch_size": 0}, "^batch_size: 0 is not a whole number 1 or larger"),
        ({"global_batch_size": 10, "start_step": 11}, "^step: 11 is not a whole number from 0 to 10"),
    ],
)
def test_impossible_batches_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GlobalBatchSampler(100, seed=0, **arguments)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize(("images", "size"), [(7, 2), (50, 4), (33, 4), (100, 64), (29, 2), (1000, 33)])
def test_validation_covers_every_image_once_without_padding(world_size, images, size):
    ranks = [ValidationSampler(images, size, rank, world_size) for rank in range(world_size)]
    batches = [indices(sampler) for sampler in ranks]
    for rank, own in enumerate(batches):
        assert [i for batch in own for i in batch] == list(range(rank, images, world_size))
    assert len({len(rank) for rank in batches}) == 1, "unequal numbers of batches would block collectives"
    assert all(batches) and all(1 <= len(batch) <= size for rank in batches for batch in rank)
    assert [len(sampler) for sampler in ranks] == [len(rank) for rank in batches]
    assert np.ptp([sum(map(len, rank)) for rank in batches]) <= 1


def test_validation_needs_an_image_a_process():
    with pytest.raises(ValueError, match=r"^limit_val: 2 validation images cannot be spread over 3 processes"):
        ValidationSampler(2, 4, 0, 3)
