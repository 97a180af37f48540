"""Which of a run's processes this is, before Lightning has started."""

import os


def is_leader() -> bool:
    """Whether this process keeps the run's records: rank 0 under torchrun, srun or Lightning's own launcher."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "SLURM_PROCID", "NODE_RANK", "LOCAL_RANK"))
