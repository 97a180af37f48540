"""Which of a run's processes this is, before Lightning has started."""

import os


def is_leader() -> bool:
    """Whether this process keeps the run's records: rank 0 under torchrun, srun or Lightning's own launcher."""
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        if (rank := os.environ.get(name)) is not None:
            return rank == "0"
    return True
