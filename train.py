"""Trains a network with a normalizer: python train.py experiment=table1 normalizer=batch seed=1"""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import scripts._venv  # noqa: F401  (signals until train() takes them; .venv's Python where this one lacks packages)

import hydra
from hydra.core.hydra_config import HydraConfig

from onlinenorm.cli import help
from onlinenorm.cli.arguments import Arguments, literal, parse
from onlinenorm.cli.compose import jobs, load_config, to_plain
from onlinenorm.cli.files import CONFIGS
from onlinenorm.errors import ConfigError, cli_errors
from onlinenorm.training.opening import announce


def train(config: dict[str, Any]) -> dict[str, Any]:
    """Runs, continues or reprints the run of a configuration (of `load_config`); returns its results."""
    announce(config)
    from onlinenorm.training import run  # not above: a wrong key is an error before torch and Lightning are loaded

    return run.train(config)


def main(words: list[str]) -> None:
    """The command line: help, one run, or with -m several; Hydra answers --cfg and the like."""
    arguments = parse(words)
    if {"-h", "--help"} & set(arguments.flags):
        print(help.render(arguments.overrides, config_dir=arguments.config_dir), end="")
        return
    if arguments.multirun:
        check_jobs(arguments)
    elif set(arguments.flags[::2]) <= {"--config-dir", "-cd"}:
        train(load_config(arguments.overrides, arguments.config_dir))
        return
    else:
        load_config(arguments.overrides, arguments.config_dir)  # for its errors
    sys.argv[1:] = [*arguments.flags, *literal(arguments.overrides, several=arguments.multirun)]
    hydra_main()


def check_jobs(arguments: Arguments) -> None:
    """Raises ConfigError, before the first run of --multirun starts, for one that cannot be meant or has no folder."""
    configs = [load_config(job, arguments.config_dir) for job in jobs(arguments.overrides, arguments.config_dir)]
    from onlinenorm.records import run_path
    from onlinenorm.training.probe import probe_settings

    folders: Counter[Path] = Counter()
    for config in configs:
        probe_settings(config)
        if config["trainer"].get("devices") != 1:
            raise ConfigError("trainer.devices: --multirun is for one process a run; for several use scripts/sweep.py")
        folders[run_path(config)] += 1
    if doubled := [folder for folder, count in folders.items() if count > 1]:
        raise ConfigError(
            f"run_dir: {folders[doubled[0]]} of these runs would share {doubled[0]}; scripts/sweep.py with the same "
            "arguments gives each a folder of its own"
        )


@hydra.main(config_path=str(CONFIGS), config_name="train", version_base="1.3")
def hydra_main(config) -> None:
    """What Hydra calls for each job of --multirun."""
    with cli_errors():
        job = HydraConfig.get()
        train(to_plain(config, job.runtime.choices, list(job.overrides.task)))


if __name__ == "__main__":
    with cli_errors():
        main(sys.argv[1:])
