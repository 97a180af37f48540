"""How a run divides its batches, as far as the statistics of its normalizer see it: a part of the run's identity."""

import math
from typing import Any

from onlinenorm.normalizers.dependence import ACCUMULATION, PROCESSES, statistics_depend_on
from onlinenorm.training.config_check import build, full_keys
from onlinenorm.training.launch import process_count

# Keys that divide a batch. They are free where the statistics do not depend on the division.
KEYS = ("trainer.accumulate_grad_batches", "trainer.devices", "trainer.num_nodes", "trainer.sync_batchnorm")


def divisions(config: dict[str, Any], dependent: set[str]) -> dict[str, int | None]:
    """The parts of a batch by division, of those in `dependent`; None where "auto" leaves it open."""
    trainer = config.get("trainer", {})
    processes = None if trainer.get("devices") == "auto" else process_count(trainer)
    parts = {PROCESSES: processes, ACCUMULATION: trainer.get("accumulate_grad_batches", 1)}
    return {name: count for name, count in parts.items() if name in dependent}


def dependence(config: dict[str, Any]) -> set[str]:
    """The divisions of a batch that the statistics of a configuration's normalizer depend on; {} without one."""
    if "_target_" not in (config.get("normalizer") or {}):
        return set()
    with full_keys(config, "normalizer"):
        layer = build(config, "normalizer")(num_features=64)
    return statistics_depend_on(layer, bool(config.get("trainer", {}).get("sync_batchnorm")))


def statistics_seen(config: dict[str, Any]) -> dict[str, int]:
    """For environment.json: images that a statistic sees, and the parts of a batch; {} where no division matters."""
    parts = {name: count for name, count in divisions(config, dependence(config)).items() if count is not None}
    return {"images": config["recipe"]["batch_size"] // math.prod(parts.values()), **parts} if parts else {}


def changed_divisions(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether two configurations of one normalizer divide batches otherwise, in a way that its statistics see."""

    def seen(trainer: dict[str, Any]) -> dict[str, int | None]:
        config = {**new, "trainer": trainer}
        return divisions(config, dependence(config))

    before, after = (seen(config.get("trainer", {})) for config in (old, new))
    pairs = [(before.get(name, 1), after.get(name, 1)) for name in before | after]
    return any(None not in pair and pair[0] != pair[1] for pair in pairs)
