"""Mirrors of metrics.csv. Each is a logger of Lightning that only rank 0 opens."""

import contextlib
import netrc
import os
import secrets
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger

from onlinenorm.errors import Interrupted, RunError
from onlinenorm.files import write_atomically
from onlinenorm.text import first_line
from onlinenorm.training.launch import is_rank_zero

ANSWER_SECONDS = 20.0  # for which wandb's server is waited for


def csv_only(folder: Path, name: str, config: dict[str, Any], resumed_step: int | None = None) -> list[Logger]:
    """No mirror: metrics.csv is written by every run."""
    return []


def wandb_logger(
    folder: Path,
    name: str,
    config: dict[str, Any],
    resumed_step: int | None = None,
    project: str = "onlinenorm",
    entity: str | None = None,
    mode: Literal["auto", "online", "offline", "disabled"] = "auto",
    tags: list[str] | None = None,
) -> list[Logger]:
    """Weights & Biases, never asking for a key; the id is kept in the run folder, so that a resumed run is one run.

    Args:
        folder: the run folder.
        name: of the run as it is shown.
        config: the run's configuration, shown beside its curves.
        resumed_step: optimizer steps of the checkpoint that the run continues from, or None.
        project, entity, tags: where and how the run is listed.
        mode: "auto" is what WANDB_MODE says, else online where a key is found (WANDB_API_KEY or netrc) and the server
            answers, else offline. Where "online" is asked for by name, a server that does not answer ends the run.
    """
    import wandb  # which takes a second

    asked = mode if mode != "auto" else wandb_mode()
    if asked == "disabled" or not is_rank_zero():
        return []
    identity = folder / "wandb_id"
    if not identity.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(identity, secrets.token_hex(4))

    def open_run(mode: str) -> WandbLogger:
        logger = WandbLogger(
            name=name,
            save_dir=folder,
            id=identity.read_text(encoding="utf-8").strip(),
            project=project,
            entity=entity,
            tags=tags or None,
            mode=mode,
            config=config,
            settings={"console": "off", "silent": True, "init_timeout": ANSWER_SECONDS},
        )
        # Lightning passes this on even where it is not set, and wandb warns about it
        logger._wandb_init.pop("anonymous", None)
        _ = logger.experiment  # now, not when training has begun
        return logger

    online = asked == "online" or (asked == "auto" and has_wandb_key())
    try:
        return [open_run("online" if online else "offline")]
    except (wandb.errors.Error, TimeoutError) as error:
        cause = first_line(error)
        if asked == "online":
            raise RunError(
                f"logger.mode: online, and Weights & Biases cannot be used ({cause}); see to network and key, or use "
                "logger.mode=offline"
            ) from error
        print(f"Weights & Biases cannot be used ({cause}); the run is kept offline in {folder}/wandb", file=sys.stderr)
        wandb.teardown()  # which has not given up the run's id yet
        return [open_run("offline")]


def wandb_mode() -> str:
    """What wandb's own environment variables ask for: "online", "offline", "disabled", or "auto" where they do not."""
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on"):
        return "disabled"
    modes = {"dryrun": "offline", "run": "online"} | {mode: mode for mode in ("online", "offline", "disabled")}
    return modes.get(os.environ.get("WANDB_MODE", "").lower(), "auto")


def has_wandb_key() -> bool:
    """Whether a key for wandb's server is at hand."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0].split(":")[0]
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def tensorboard_logger(
    folder: Path, name: str, config: dict[str, Any], resumed_step: int | None = None
) -> list[Logger]:
    """TensorBoard event files in `folder`/tensorboard; what a run that was killed logged after `resumed_step`, where it
    continues, is not shown twice."""
    purge: dict[str, Any] = {} if resumed_step is None else {"purge_step": resumed_step + 1}
    return [TensorBoardLogger(save_dir=folder, name="", version="tensorboard", **purge)]


def upload_hint(folder: Path) -> str:
    """Where the offline runs of a run folder lie and how they get to Weights & Biases; "" where there are none."""
    runs = sorted((folder / "wandb").glob("offline-run-*"))
    return f"W&B: kept offline; upload with: wandb sync {shlex.join(map(str, runs))}" if runs else ""


@contextlib.contextmanager
def closing(loggers: list[Logger]) -> Iterator[None]:
    """Context at whose end the mirrors of a run are closed with its exit code, so that the next run opens its own."""
    code = 1
    interrupted = False
    try:
        yield
        code = 0
    except Interrupted as error:
        code, interrupted = error.exit_code, True
        raise
    finally:
        for logger in loggers:
            logger.finalize("failed" if code else "success")
            if isinstance(logger, WandbLogger) and getattr(logger, "_experiment", None) is not None:
                if interrupted:
                    logger.experiment.mark_preempting()
                logger.experiment.finish(exit_code=code)
