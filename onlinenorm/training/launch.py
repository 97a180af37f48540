"""How this process was started (alone, by torchrun, srun or by hand), and which of a run's processes it is."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from onlinenorm.errors import ConfigError

if TYPE_CHECKING:
    from pytorch_lightning.plugins.environments import ClusterEnvironment

MEETING_POINT = ("MASTER_ADDR", "MASTER_PORT")
# What sets of variables must hold to describe one process of several.
COMPLETE = {
    "torchrun": ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", *MEETING_POINT),
    "srun": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "SLURM_STEP_NUM_NODES"),
    "environment variables": ("RANK", "WORLD_SIZE", *MEETING_POINT),
}
# Each says that this is one process of several unless it is 0; those of launchers that are not served as well.
RANKS = (
    "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "OMPI_COMM_WORLD_RANK",
    "PMI_RANK",
)  # fmt: skip


class Launch(NamedTuple):
    """What a launcher has started: its name, processes on this machine, machines."""

    name: str
    devices: int
    num_nodes: int


def launched() -> Launch | None:
    """The processes that torchrun, srun or torch's variables describe, else None.

    None for a process that stands alone, also on a SLURM node, and for those of Lightning's own launcher. Raises
    ConfigError where the description is not complete.
    """
    environ = os.environ
    if "TORCHELASTIC_RUN_ID" in environ:
        _check_complete("torchrun", "TORCHELASTIC_RUN_ID")
        return _of_variables("torchrun", _number("LOCAL_WORLD_SIZE"))
    if (tasks := _number("SLURM_STEP_NUM_TASKS", 1)) > 1:
        _check_complete("srun", "SLURM_STEP_NUM_TASKS")
        nodes = _number("SLURM_STEP_NUM_NODES")
        if tasks % nodes:
            raise ConfigError(f"srun: {tasks} tasks on {nodes} nodes; start as many on each, with --ntasks-per-node")
        return Launch("srun", tasks // nodes, nodes)
    # LOCAL_RANK without LOCAL_WORLD_SIZE leaves the number of processes on this machine to trainer.devices
    counted = "LOCAL_RANK" not in environ or "LOCAL_WORLD_SIZE" in environ
    if "RANK" in environ and counted and _number("WORLD_SIZE", 1) > 1:
        _check_complete("environment variables", "RANK")
        return _of_variables("environment variables", _number("LOCAL_WORLD_SIZE", 1))
    return None


def process_count(trainer: Mapping[str, Any]) -> int:
    """The processes of a trainer node, on all its machines; its devices are a number."""
    return trainer.get("devices", 1) * trainer.get("num_nodes", 1)


def check_alone(devices: int, num_nodes: int) -> None:
    """Raises ConfigError where nothing was `launched` and yet variables make this one process of several.

    Zeros are taken for leftovers and, where Lightning starts the others, removed, for they would be handed on.
    """
    environ = os.environ
    missing = [name for name in ("WORLD_SIZE", *MEETING_POINT) if name not in environ]
    processes = devices * num_nodes
    of_several = processes > 1
    if "LOCAL_RANK" in environ and (of_several or _number("LOCAL_RANK")):  # a process of Lightning's launcher, or alike
        if num_nodes > 1 and "NODE_RANK" not in environ:
            missing.append("NODE_RANK")
        if missing:
            raise _incomplete("LOCAL_RANK", missing)
        rank = _number("NODE_RANK", 0) * devices + _number("LOCAL_RANK")
        fits = _number("WORLD_SIZE") == processes and _number("RANK", rank) == rank
        if not fits or _number("LOCAL_RANK") >= devices:
            raise ConfigError(
                f"LOCAL_RANK: {environ['LOCAL_RANK']} with WORLD_SIZE={environ['WORLD_SIZE']} does not fit "
                f"trainer.devices={devices} trainer.num_nodes={num_nodes}; make them agree, or unset LOCAL_RANK"
            )
        return
    if _number("WORLD_SIZE", 1) > 1:
        names = ("RANK", *MEETING_POINT, "LOCAL_WORLD_SIZE")
        raise _incomplete("WORLD_SIZE", [name for name in names if name not in environ])
    for name in RANKS:
        if _number(name, 0) == 0:
            continue
        if name in ("NODE_RANK", "GROUP_RANK"):
            if num_nodes > _number(name) and not (lacking := [n for n in MEETING_POINT if n not in environ]):
                continue
            raise _incomplete(name, lacking if num_nodes > 1 else [f"trainer.num_nodes={_number(name) + 1} or more"])
        if name in ("RANK", "LOCAL_RANK"):
            raise _incomplete(name, missing)
        raise _incomplete(name, ["SLURM_STEP_NUM_TASKS"] if name == "SLURM_PROCID" else ["RANK", *missing])
    if of_several:
        for name in set(RANKS) - {"NODE_RANK", "GROUP_RANK"}:
            environ.pop(name, None)


def cluster_environment() -> "ClusterEnvironment":
    """Lightning's view of `launched`: its own guess takes every process of a SLURM allocation for one of srun's."""
    # not above: which process this is, is asked before Lightning is loaded
    from pytorch_lightning.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

    launch = launched()
    if launch is None:
        return LightningEnvironment()
    if launch.name == "srun":
        os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(launch.devices))  # srun -n leaves out what Lightning needs
        return SLURMEnvironment(auto_requeue=False)  # that is the batch script's business: the run saves itself, leaves
    if "LOCAL_RANK" not in os.environ:  # torch's own variables do without it: one process a machine
        os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ.setdefault("GROUP_RANK", str(_number("RANK") // launch.devices))
    return TorchElasticEnvironment()


def is_rank_zero() -> bool:
    """Whether this process keeps the run's records: rank 0 under torchrun, srun or Lightning's own launcher."""
    launch = launched()
    if launch is None:
        return all(_number(name, 0) == 0 for name in RANKS)
    return _number("SLURM_PROCID" if launch.name == "srun" else "RANK") == 0


def is_child() -> bool:
    """Whether Lightning's own launcher has started this process beside the first."""
    return launched() is None and _number("LOCAL_RANK", 0) > 0


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, default)
    try:
        return int(text)  # type: ignore[arg-type]  # None raises TypeError
    except (TypeError, ValueError):
        raise ConfigError(f"{name}: {text!r} in the environment is not a whole number; correct or unset it") from None


def _of_variables(name: str, devices: int) -> Launch:
    """The launch that RANK, WORLD_SIZE and LOCAL_RANK tell of; raises ConfigError where they contradict each other."""
    world_size = _number("WORLD_SIZE")
    for key, size, whole in (("RANK", world_size, "WORLD_SIZE"), ("LOCAL_RANK", devices, "LOCAL_WORLD_SIZE")):
        if not 0 <= _number(key, 0) < size:
            raise ConfigError(
                f"{key}: {_number(key, 0)} is not one of {whole}={size} processes, 0 to {size - 1}; correct it"
            )
    if world_size % devices:
        raise ConfigError(
            f"LOCAL_WORLD_SIZE: {devices} of {world_size} processes are on this machine; start as many on each"
        )
    return Launch(name, devices, world_size // devices)


def _check_complete(launcher: str, mark: str) -> None:
    if missing := [name for name in COMPLETE[launcher] if name not in os.environ]:
        raise _incomplete(mark, missing)


def _incomplete(name: str, missing: list[str]) -> ConfigError:
    lacking = ", ".join(missing)
    return ConfigError(
        f"{name}: {os.environ[name]} in the environment describes one process of several, and {lacking} "
        f"{'are' if len(missing) > 1 else 'is'} missing; use torchrun or srun, set what is missing, or run alone, "
        f"after: unset {name}"
    )
