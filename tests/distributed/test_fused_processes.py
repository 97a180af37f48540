"""The fused kernels across processes, in Triton's interpreter: the same stream as one process with the global batch."""

import os

import process_groups
import pytest
import torch
import torch.distributed as dist

from onlinenorm import OnlineNorm2d

STEPS, BATCH, SHAPE = 3, 6, (4, 9, 7)
STATE = ("running_mean", "running_var", "control_u", "control_v")


def steps(error_compensation, processes, rank, scale):
    """Outputs, gradients and state of this rank's part of a few global batches; the loss's gradient is ``scale`` w."""
    generator = torch.Generator().manual_seed(7)
    torch.manual_seed(1)
    layer = OnlineNorm2d(
        SHAPE[0], backend="fused", error_compensation=error_compensation, clamp_value=1.0, alpha_fwd=0.9
    )
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1.5)
        layer.bias.normal_()
    found = {}
    for step in range(STEPS):
        x, residual, w = (
            t[rank::processes].to(memory_format=torch.channels_last)
            for t in torch.randn(3, BATCH, *SHAPE, generator=generator) - 2.3
        )
        x.requires_grad_()
        y = layer(x, residual=residual, relu=True)
        y.backward(w * scale)
        found |= {f"y{step}": y.detach(), f"grad_x{step}": x.grad / scale}
    state = {name: getattr(layer, name) for name in STATE}
    return found, state, {name: p.grad / scale for name, p in layer.named_parameters()}


def worker(rank, error_compensation):
    # each process's loss is a mean over its own part: twice the gradient of its share of the global mean
    processes = int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    try:
        return steps(error_compensation, processes, rank, float(processes))
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 without a GPU")
@pytest.mark.parametrize("error_compensation", ["clamp", "layer_scaling"])
def test_gathered_moments_give_one_stream(error_compensation):
    one, state, gradients = steps(error_compensation, 1, 0, 1.0)
    ranks = process_groups.run(2, worker, error_compensation)
    for name, expected in one.items():
        dealt = torch.stack([found[name] for found, _, _ in ranks], 1).flatten(0, 1)
        torch.testing.assert_close(dealt, expected, rtol=2e-5, atol=2e-5)
    for name, expected in state.items():
        assert torch.equal(ranks[0][1][name], ranks[1][1][name]), f"{name} differs between processes"
        torch.testing.assert_close(ranks[0][1][name], expected, rtol=2e-5, atol=1e-5)
    for name, expected in gradients.items():
        total = sum(found[name] for _, _, found in ranks)
        torch.testing.assert_close(total, expected, rtol=2e-5, atol=1e-4)
