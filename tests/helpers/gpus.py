"""Numbers of processes with a GPU each, for tests that run on as many as a machine has."""

import pytest
import torch


def gpu_counts(*counts: int, hopper: bool = False) -> list:
    """Parameters of a test, by default 2, 4 and 8, each a number of GPUs that it needs; ``-k gpus4`` takes those of 4.

    With ``hopper`` they must be of that generation or later.
    """
    capable = not hopper or (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0))
    found = torch.cuda.device_count() if capable else 0
    kind = ", Hopper or later" if hopper else ""
    return [
        pytest.param(count, id=f"gpus{count}", marks=[
            pytest.mark.gpu, pytest.mark.skipif(found < count, reason=f"needs {count} GPUs{kind}")
        ])
        for count in counts or (2, 4, 8)
    ]  # fmt: skip
