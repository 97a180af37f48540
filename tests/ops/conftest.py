"""Memory that an op asks for holds NaN, or the largest integer, until the op has written it."""

import functools

import pytest
import torch

with torch.device("meta"):
    torch.empty(0)  # torch notes once, for the whole process, which functions take a default device: its own, not these


def poisoned(allocate):
    """``allocate``, and what no op may read in what it gives."""

    @functools.wraps(allocate)
    def wrapper(*arguments, **named):
        tensor = allocate(*arguments, **named)
        if type(tensor) is torch.Tensor and not tensor.is_meta:  # tracers' stand-ins hold nothing
            inexact = tensor.is_floating_point() or tensor.is_complex()
            value = float("nan") if inexact else tensor.dtype == torch.bool or torch.iinfo(tensor.dtype).max
            with torch.no_grad():
                tensor.fill_(value)
        return tensor

    return wrapper


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
