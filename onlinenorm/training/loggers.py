"""Mirrors of metrics.csv that also hold loss and learning rate by step: loggers of Lightning, on rank 0 alone."""

import contextlib
import json
import netrc
import os
import secrets
import shlex
import shutil
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
_EMPTY = 7  # bytes of a .wandb file without records


@contextlib.contextmanager
def _named(folder: Path | str | None, key: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise RunError(
            f"logger={key}: the package {error.name or key} is not installed ({first_line(error)}); install it, or use "
            "logger=csv"
        ) from error
    except (OSError, ValueError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__  # Lightning hides it in a ValueError
        if not isinstance(cause, OSError):
            raise
        raise RunError(
            f"{folder}: the curves of logger={key} cannot be written there ({cause.strerror or first_line(cause)}); "
            "mend that and run the same command again, or go on with logger=csv"
        ) from error


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
    asked = mode if mode != "auto" else wandb_mode()
    if asked == "disabled" or not is_rank_zero():
        return []
    with _named(folder / "wandb", "wandb"):
        import wandb  # which takes a second
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
        with _named(folder / "wandb", "wandb"):
            logger.open()  # now, not when training has begun
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
    """Curves over optimizer steps, each logged once: a run that was killed goes over some again when it continues.

    wandb's process keeps rows back for seconds, which are lost where it is killed too. Until it has closed the run they
    are therefore in a file of the run folder as well, and logged anew by the next start.
    """

    LOGGED = "wandb_step"  # [the last step before this start, wandb's folder of it], then a line [step, metrics] each
    _last = -1

    def open(self) -> None:
        """Opens the run, and logs what a start that was killed may not have got to wandb."""
        assert self.save_dir is not None
        self._file = Path(self.save_dir, self.LOGGED)
        self._last, killed, rows = read_logged(self._file)
        run = self.experiment
        lines = [[self._last, Path(run.dir).parent.name], *rows]
        write_atomically(self._file, "".join(f"{json.dumps(line)}\n" for line in lines))
        for step, metrics in rows:
            if step >= run.step:  # of an online run, wandb's server knows the others
                run.log({**metrics, "trainer/global_step": step}, step=step)
            self._last = max(self._last, step)
        if killed.startswith("offline-run-"):
            shutil.rmtree(Path(self.save_dir, "wandb", Path(killed).name), ignore_errors=True)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        assert step is not None
        if step <= self._last:
            return
        with _named(self._file, "wandb"), open(self._file, "a", encoding="utf-8") as file:  # not synced: nobody waits
            file.write(f"{json.dumps([step, dict(metrics)])}\n")
        self.experiment.log({**metrics, "trainer/global_step": step}, step=step)
        self._last = step

    def close(self, exit_code: int) -> None:
        """Ends wandb's run with the exit code of ours."""
        self.experiment.finish(exit_code=exit_code)
        with contextlib.suppress(RunError):  # on a full disk, where wandb may have lost rows as well
            write_atomically(self._file, f"{self._last}\n")


def read_logged(file: Path) -> tuple[int, str, list[tuple[int, dict[str, float]]]]:
    """What `WandbBySteps.LOGGED` holds: (last step that wandb has, folder of the start since, its rows).

    (-1, "", []) where it is missing or damaged.
    """
    last, folder, rows = -1, "", []
    with contextlib.suppress(OSError, ValueError):  # the last line of a start that was killed may be half a line
        for line in file.read_text(encoding="utf-8").splitlines():
            match json.loads(line):
                case int(step):
                    last = step
                case [int(step), str(name)]:
                    last, folder = step, name
                case [int(step), dict(metrics)]:
                    rows.append((step, metrics))
    return last, folder, rows


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
    with _named(folder / "tensorboard", "tensorboard"):
        logger = TensorBoardBySteps(
            save_dir=folder, name="", version="tensorboard", default_hp_metric=False, purge_step=step
        )
        logger.log_hyperparams(config)  # hparams.yaml
        if resumed_step is None:
            from torch.utils.tensorboard.summary import hparams

            plain = {key: v if isinstance(v, bool | int | float | str) else str(v) for key, v in config.items()}
            for summary in hparams(plain, dict.fromkeys(("val_loss", "val_top1"), 0.0)):
                logger.experiment._get_file_writer().add_summary(summary)
    return [logger]


class TensorBoardBySteps(TensorBoardLogger):
    """Lightning's, whose writing thread leaves errors to the next call: here they are RunErrors."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        with _named(self.log_dir, "tensorboard"):
            super().log_metrics(metrics, step)

    @rank_zero_only
    def save(self) -> None:
        with _named(self.log_dir, "tensorboard"):
            super().save()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        try:
            with _named(self.log_dir, "tensorboard"):
                super().finalize(status)
        except RunError:
            if status == "success":  # else the run ends with an error of its own
                raise


def upload_hint(folder: Path) -> list[str]:
    """A line on where the offline runs of a run folder lie and how they get to Weights & Biases; none without."""
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    runs = [file.parent for file in files if file.stat().st_size > _EMPTY]  # the others were killed at once
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
            if isinstance(logger, WandbBySteps):
                if interrupted:
                    logger.experiment.mark_preempting()
                logger.close(code)
