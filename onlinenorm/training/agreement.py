"""What the processes of a run must have alike, compared before training, which a difference would hang or spoil."""

from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist

from onlinenorm.arguments import flatten
from onlinenorm.errors import ConfigError
from onlinenorm.provenance import git_state
from onlinenorm.training.own_code import own_code

# Keys that may differ: where a machine keeps what, how it loads images, and what the first process alone does.
MAY_DIFFER = ("choices.logger", "data.keep_decoded", "data.num_workers", "data.root", "logger", "run_dir")


class Agreement(pl.Callback):
    """Raises ConfigError, on every process, where one has another configuration, code or images than the first.

    Args:
        config: of the run, "auto" replaced by what this process has chosen.
    """

    def __init__(self, config: dict[str, Any]):
        self.config = config

    def setup(self, trainer, module, stage) -> None:
        if stage != "fit" or trainer.world_size == 1:
            return
        facts = facts_of(self.config, trainer.datamodule.fingerprint)
        everyone: list[dict[str, Any]] = [{}] * trainer.world_size
        dist.all_gather_object(everyone, facts)
        if lines := differences(everyone):
            raise ConfigError(
                "\n  ".join(lines) + "\nStart all processes of a run with the same command, code and images; where "
                "machines have made two things of auto, give the key one of them"
            )


def facts_of(config: dict[str, Any], fingerprint: str) -> dict[str, Any]:
    """What is compared of a process, by name."""
    free = tuple(f"{key}." for key in MAY_DIFFER)
    found = {key: value for key, value in flatten(config).items() if not f"{key}.".startswith(free)}
    found |= {"code": git_state()["commit"], "torch": torch.__version__, "images": fingerprint}
    return found | flatten({"own code": own_code(config)})


def differences(everyone: list[dict[str, Any]]) -> list[str]:
    """A line for each fact in which a process differs from the first, which says in what, of the first such process."""
    first = everyone[0]
    lines: dict[str, str] = {}
    for rank, facts in enumerate(everyone):
        for key in (first | facts).keys() - lines.keys():
            one, other = first.get(key, "absent"), facts.get(key, "absent")
            if one != other and not (key == "code" and "unknown" in (one, other)):
                lines[key] = f"{key}: {one} on process 0, {other} on process {rank}"
    return [lines[key] for key in sorted(lines)]
