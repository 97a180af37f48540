"""Mirrors of metrics.csv that also hold loss and learning rate by step: loggers of Lightning, on rank 0 alone."""

import contextlib
import netrc
import os
import secrets
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from onlinenorm.errors import Interrupted, RunError
from onlinenorm.files import write_atomically
from onlinenorm.text import first_line
from onlinenorm.training.launch import is_rank_zero

ANSWER_SECONDS = 20.0  # for which wandb's server is waited for


def open_loggers(
    folder: Path,
    name: str,
    config: dict[str, Any],
    resumed_step: int | None = None,
    tensorboard: bool = False,
    wandb: bool = False,
    project: str = "onlinenorm",
    entity: str | None = None,
    mode: Literal["auto", "online", "offline", "disabled"] = "auto",
    tags: list[str] | None = None,
) -> list[Logger]:
    """The mirrors asked for: `tensorboard_logger`, `wandb_logger`, both or none; arguments are theirs."""
    mirrors = wandb_logger(folder, name, config, resumed_step, project, entity, mode, tags) if wandb else []
    return mirrors + (tensorboard_logger(folder, name, config, resumed_step) if tensorboard else [])


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
    identity, logged = folder / "wandb_id", folder / WandbBySteps.LOGGED
    if resumed_step is None and logged.exists():  # another attempt, and another run there
        identity.unlink(missing_ok=True)
        logged.unlink()
    if not identity.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(identity, secrets.token_hex(4))

    def open_run(mode: str) -> WandbLogger:
        logger = WandbBySteps(
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


class WandbBySteps(WandbLogger):
    """Curves over optimizer steps, each logged once: a run that was killed goes over some again when it continues."""

    LOGGED = "wandb_step"  # file of the run folder: the last step that was logged
    _last: int | None = None

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        assert step is not None and self.save_dir is not None
        file = Path(self.save_dir, self.LOGGED)
        if self._last is None:
            self._last = int(file.read_text(encoding="utf-8")) if file.exists() else -1
        if step <= self._last:
            return
        self.experiment.log({**metrics, "trainer/global_step": step}, step=step)
        partial = file.with_suffix(".partial")  # replaced, not synced: between steps the disk is not waited for
        partial.write_text(str(step), encoding="utf-8")
        partial.replace(file)
        self._last = step


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
    """TensorBoard event files in `folder`/tensorboard, with the configuration as hparams beside validation's curves.

    What a run that was killed logged after `resumed_step` (None: all of it) is not shown twice.
    """
    if not is_rank_zero():
        return []
    step = 0 if resumed_step is None else resumed_step + 1
    logger = TensorBoardLogger(
        save_dir=folder, name="", version="tensorboard", default_hp_metric=False, purge_step=step
    )
    logger.log_hyperparams(config)  # hparams.yaml
    if resumed_step is None:
        from torch.utils.tensorboard.summary import hparams

        plain = {key: v if isinstance(v, bool | int | float | str) else str(v) for key, v in config.items()}
        for summary in hparams(plain, dict.fromkeys(("val_loss", "val_top1"), 0.0)):
            logger.experiment._get_file_writer().add_summary(summary)
    return [logger]


def upload_hint(folder: Path) -> list[str]:
    """A line on where the offline runs of a run folder lie and how they get to Weights & Biases; none without."""
    runs = sorted((folder / "wandb").glob("offline-run-*"))
    return [f"W&B: kept offline; upload with: wandb sync {shlex.join(map(str, runs))}"] if runs else []


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
