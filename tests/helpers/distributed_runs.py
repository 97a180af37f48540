"""Runs of the real configuration in several processes: what they leave, and how far two of them are apart."""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from onlinenorm.data import FashionMNIST

sys.path.insert(0, str(Path(__file__).resolve().parent))  # in a process of its own
from tests_training import TINY, load_train_module, rows

# 5 epochs of 6 steps of 16 images: 30 steps; 21 validation images, which neither 2 nor 4 divide.
THIRTY_STEPS = (*TINY, "data.num_train=96", "recipe.epochs=5", "recipe.milestones=[3]", "recipe.scaling=none")


def train(rank: int, folder: str, *overrides: str) -> dict:
    """The results of a run into `folder`, on one of its processes."""
    module = load_train_module()
    return module.train(module.load_config([*overrides, f"run_dir={folder}"]))


def network_state(folder: Path) -> dict[str, torch.Tensor]:
    """Parameters and buffers of the last checkpoint."""
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return {name: value for name, value in state.items() if value.is_floating_point()}


def distance(found: Path, expected: Path) -> float:
    """Largest difference of a parameter or buffer, relative to the largest magnitude in it."""
    states = network_state(found), network_state(expected)
    assert states[0].keys() == states[1].keys()
    return max(
        float((states[0][name] - value).abs().max() / value.abs().max().clamp(min=1e-12))
        for name, value in states[1].items()
    )


def curve(folder: Path, *columns: str) -> torch.Tensor:
    """Columns of metrics.csv."""
    return torch.tensor([[float(row[column]) for column in columns] for row in rows(folder)], dtype=torch.float64)


def agree(rank: int, limit: float) -> list[str]:
    """Unreadable images of both processes, after each has met one of its own and one that both have met."""
    data = FashionMNIST(
        embedded=True, limit_train=10, limit_val=10, batch_size=2, on_unreadable="skip", unreadable_limit=limit
    )
    data.setup("fit")
    data.trainer = SimpleNamespace(global_rank=rank, world_size=2)
    dist.init_process_group("gloo")
    data.unreadable = ["train/shared", f"val/{rank}"]
    data.agree_on_unreadable()
    return data.unreadable
