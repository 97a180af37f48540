"""The tests of ops notice memory that is read before it is written."""

import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    if "triton" not in sys.modules:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton was imported without TRITON_INTERPRET=1", allow_module_level=True)

from onlinenorm import OnlineNorm2d
from onlinenorm.ops.fused import two_pass

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.int64, torch.bool])
def test_every_way_to_ask_for_memory_is_poisoned(dtype):
    like = torch.zeros(2, 3, dtype=dtype)
    ways = {
        "empty": torch.empty(2, 3, dtype=dtype),
        "empty_like": torch.empty_like(like),
        "empty_strided": torch.empty_strided((2, 3), (1, 2), dtype=dtype),
        "new_empty": like.new_empty(2, 3),
        "of another dtype": torch.zeros(1).new_empty((2, 3), dtype=dtype),
    }
    for name, tensor in ways.items():
        if dtype.is_floating_point:
            assert tensor.isnan().all(), name
        else:
            assert tensor.eq(True if dtype == torch.bool else torch.iinfo(dtype).max).all(), name
    assert torch.empty(2, 3, device="meta").is_meta


class WritesNothing:
    """A Triton kernel that does not do its work."""

    def __getitem__(self, grid):
        return lambda *arguments, **named: None


KERNELS = (
    ("forward_kernels", "moments_kernel"),
    ("forward_kernels", "forward_scan_kernel"),
    ("forward_kernels", "layer_scale_kernel"),
    ("forward_kernels", "apply_kernel"),
    ("backward_kernels", "gradient_moments_kernel"),
    ("backward_kernels", "project_kernel"),
    ("backward_kernels", "backward_scan_kernel"),
    ("backward_kernels", "gradient_apply_kernel"),
)


@pytest.mark.parametrize(("module", "kernel"), KERNELS, ids=[kernel for _, kernel in KERNELS])
def test_a_kernel_that_leaves_its_output_unwritten_is_noticed(module, kernel, monkeypatch):
    """Each of those of layer scaling's path, whose results others read."""

    def results():
        layer = OnlineNorm2d(4, backend="fused", error_compensation="layer_scaling", device=DEVICE)
        x = torch.randn(2, 4, 3, 3, device=DEVICE, requires_grad=True)
        y = layer(x)
        y.backward(torch.ones_like(y))
        return y, x.grad, layer.weight.grad, layer.bias.grad

    assert all(tensor.isfinite().all() for tensor in results())
    monkeypatch.setattr(getattr(two_pass, module), kernel, WritesNothing())
    assert any(tensor.isnan().any() for tensor in results())
