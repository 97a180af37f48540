"""Every backend replays recorded training sequences of the published numpy code."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from onlinenorm import OnlineNorm1d, OnlineNorm2d

VECTORS = sorted((Path(__file__).parent / "golden").glob("*.npz"))
STATE = ("running_mean", "running_var", "control_u", "control_v")


def relative_error(actual: torch.Tensor, expected: np.ndarray) -> float:
    """Largest deviation over the largest expected entry."""
    difference = np.abs(actual.detach().double().numpy().reshape(expected.shape) - expected).max()
    return float(difference / (np.abs(expected).max() + 1e-12))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [
        ("reference", torch.float64, 1e-10),
        ("torch", torch.float64, 1e-10),
        ("reference", torch.float32, 2e-5),
        ("torch", torch.float32, 2e-5),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
def test_recorded_sequence(path, backend, dtype, tolerance, memory_format):
    vectors = np.load(path)
    meta = json.loads(str(vectors["meta"]))
    layer_class = OnlineNorm2d if len(meta["shape"]) == 4 else OnlineNorm1d
    keys = ("alpha_fwd", "alpha_bkw", "eps", "affine", "error_compensation", "clamp_value", "layer_scaling_eps")
    layer = layer_class(meta["shape"][1], backend=backend, dtype=dtype, **{key: meta[key] for key in keys})
    if meta["affine"]:
        layer.load_state_dict({"weight": torch.tensor(vectors["weight"]), "bias": torch.tensor(vectors["bias"])}, False)
    for step in range(meta["steps"]):
        x = torch.tensor(vectors[f"x{step}"], dtype=dtype)
        if x.dim() == 4:
            x = x.contiguous(memory_format=memory_format)
        x.requires_grad_()
        layer.zero_grad()
        y = layer(x)
        y.backward(torch.tensor(vectors[f"grad_y{step}"], dtype=dtype))
        actual = {"y": y, "grad_x": x.grad} | {name: getattr(layer, name) for name in STATE}
        if meta["affine"]:
            actual |= {"grad_weight": layer.weight.grad, "grad_bias": layer.bias.grad}
        errors = {name: relative_error(value, vectors[f"{name}{step}"]) for name, value in actual.items()}
        assert max(errors.values()) <= tolerance, (step, errors)


def test_there_are_vectors():
    assert len(VECTORS) == 8
