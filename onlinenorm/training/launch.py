"""How this process was started (alone, by torchrun or by srun), and which of a run's processes it is."""

import os
from typing import NamedTuple

from pytorch_lightning.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)


class Launch(NamedTuple):
    """What a launcher has started: its name, processes on this machine, machines."""

    name: str
    devices: int
    num_nodes: int


def launched() -> Launch | None:
    """The processes that torchrun or srun has started; None for a process that stands alone, also on a SLURM node."""
    environ = os.environ
    if "TORCHELASTIC_RUN_ID" in environ:
        devices = int(environ["LOCAL_WORLD_SIZE"])
        return Launch("torchrun", devices, int(environ["WORLD_SIZE"]) // devices)
    if (tasks := int(environ.get("SLURM_STEP_NUM_TASKS", "1"))) > 1:
        nodes = int(environ.get("SLURM_STEP_NUM_NODES", "1"))
        return Launch("srun", tasks // nodes, nodes)
    return None


def cluster_environment() -> ClusterEnvironment:
    """Lightning's view of `launched`: its own guess takes every process of a SLURM allocation for one of srun's."""
    launch = launched()
    if launch is None:
        return LightningEnvironment()
    if launch.name == "torchrun":
        return TorchElasticEnvironment()
    os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(launch.devices))  # srun -n leaves out what Lightning needs
    return SLURMEnvironment(auto_requeue=False)  # that is the batch script's business: the run saves itself and leaves


def is_leader() -> bool:
    """Whether this process keeps the run's records: rank 0 under torchrun, srun or Lightning's own launcher."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "SLURM_PROCID", "NODE_RANK", "LOCAL_RANK"))
