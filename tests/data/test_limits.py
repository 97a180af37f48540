"""data.limit_train and data.limit_val keep the classes in proportion, in every kind of dataset by one rule."""

import numpy as np
import pytest
from image_folders import write_tree

from onlinenorm.data import FashionMNIST, ImageNet, Synthetic
from onlinenorm.data.index import load_index
from onlinenorm.data.limits import proportional
from onlinenorm.data.prepare import pack

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("limit", [1, 2, 7, 50, 99])
@pytest.mark.parametrize("shuffled", [False, True])
def test_each_class_gets_its_share(limit, shuffled):
    labels = np.repeat(np.arange(4), [10, 20, 30, 40])
    if shuffled:
        labels = np.random.default_rng(0).permutation(labels)
    chosen = proportional(labels, limit)
    assert len(np.unique(chosen)) == limit and np.array_equal(chosen, np.sort(chosen))
    share = np.array([10, 20, 30, 40]) * limit / 100
    assert np.abs(np.bincount(labels[chosen], minlength=4) - share).max() < 1


def test_equal_classes_stay_equal_and_fewer_images_than_classes_are_spread():
    labels = np.repeat(np.arange(10), 100)
    assert np.bincount(labels[proportional(labels, 30)]).tolist() == [3] * 10
    assert len(set(labels[proportional(labels, 5)].tolist())) == 5
    assert (
        proportional(labels, 1000) is None and proportional(labels, 2000) is None and proportional(labels, None) is None
    )


def folders(tmp_path, **arguments):
    return ImageNet(root=str(write_tree(tmp_path / "set")), image_size=32, num_workers=0, **arguments)


def shards(tmp_path, **arguments):
    tree = write_tree(tmp_path / "set")
    for split in ("train", "val"):
        index = load_index(tree / split)
        pack(index, tmp_path / "packed", split, index.class_names)
    return ImageNet(root=str(tmp_path / "packed"), image_size=32, num_workers=0, **arguments)


def embedded(_, **arguments):
    return FashionMNIST(embedded=True, **arguments)


def synthetic(_, **arguments):
    return Synthetic(num_train=300, num_val=30, classes=3, **arguments)


@pytest.mark.parametrize("kind", [folders, shards, embedded, synthetic])
def test_every_kind_of_dataset_is_limited_by_the_rule(kind, tmp_path):
    whole = kind(tmp_path)
    whole.setup()
    limits = {"limit_train": whole.train_images * 2 // 5, "limit_val": whole.val_images // 2}
    part, again = (kind(tmp_path, seed=seed, batch_size=5, **limits) for seed in (0, 1))
    for split, limit in enumerate(limits.values()):
        chosen = proportional(whole._sets[split].labels(), limit)
        assert len(part._sets[split]) == limit
        np.testing.assert_array_equal(part._sets[split].labels(), whole._sets[split].labels()[chosen])
        ours, theirs = (
            data._sets[split].__getitems__([(0, int(i)) for i in indices])
            for data, indices in ((part, range(3)), (whole, chosen[:3]))
        )
        assert (ours[0] == theirs[0]).all() and (ours[1] == theirs[1]).all()
    assert part.fingerprint == again.fingerprint != whole.fingerprint
    told = part.describe()["limited"]
    assert told["train_images"] == f"{limits['limit_train']} of {whole.train_images}"
    assert "limited" not in whole.describe()
