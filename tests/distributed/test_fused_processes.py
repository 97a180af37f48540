"""The fused kernels across processes, in Triton's interpreter: the same stream as one process with the global batch."""

import os

import process_groups
import pytest
import torch
import torch.distributed as dist

from onlinenorm import OnlineNorm2d

STEPS, BATCH, SHAPE = 2, 6, (4, 9, 7)
SLICED = (64, 13, 20)  # of which each sample is reduced in slices, the last a short one
STATE = ("running_mean", "running_var", "control_u", "control_v")


needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 without a GPU"
)


def steps(error_compensation, processes, rank, scale, shape=SHAPE):
    """Outputs, gradients and state of this rank's part of a few global batches; the loss's gradient is ``scale`` w."""
    generator = torch.Generator().manual_seed(7)
    torch.manual_seed(1)
    layer = OnlineNorm2d(
        shape[0], backend="fused", error_compensation=error_compensation, clamp_value=1.0, alpha_fwd=0.9
    )
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1.5)
        layer.bias.normal_()
    found = {}
    for step in range(STEPS):
        x, residual, w = (
            t[rank::processes].to(memory_format=torch.channels_last)
            for t in torch.randn(3, BATCH, *shape, generator=generator) - 2.3
        )
        x.requires_grad_()
        y = layer(x, residual=residual, relu=True)
        y.backward(w * scale)
        found |= {f"y{step}": y.detach(), f"grad_x{step}": x.grad / scale}
    state = {name: getattr(layer, name) for name in STATE}
    return found, state, {name: p.grad / scale for name, p in layer.named_parameters()}


def worker(rank, error_compensation, shape):
    from onlinenorm.ops.fused import two_pass

    # each process's loss is a mean over its own part: twice the gradient of its share of the global mean
    processes = int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    messages, gather = [], two_pass.gather_samples
    two_pass.gather_samples = lambda table, *peers: messages.append(table.shape) or gather(table, *peers)
    try:
        found = steps(error_compensation, processes, rank, float(processes), shape)
    finally:
        dist.destroy_process_group()
    each = 1, BATCH // processes, 2 * shape[0]  # two numbers a sample and channel, however many slices they are of
    assert messages == [each] * 2 * STEPS
    return found


@needs_interpreter
@pytest.mark.parametrize("error_compensation", ["clamp", "layer_scaling"])
@pytest.mark.parametrize("shape", [SHAPE, SLICED])
def test_gathered_moments_give_one_stream(error_compensation, shape):
    one, state, gradients = steps(error_compensation, 1, 0, 1.0, shape)
    ranks = process_groups.run(2, worker, error_compensation, shape)
    for name, expected in one.items():
        dealt = torch.stack([found[name] for found, _, _ in ranks], 1).flatten(0, 1)
        torch.testing.assert_close(dealt, expected, rtol=2e-5, atol=2e-5)
    for name, expected in state.items():
        assert torch.equal(ranks[0][1][name], ranks[1][1][name]), f"{name} differs between processes"
        torch.testing.assert_close(ranks[0][1][name], expected, rtol=2e-5, atol=1e-5)
    for name, expected in gradients.items():
        total = sum(found[name] for _, _, found in ranks)
        torch.testing.assert_close(total, expected, rtol=2e-5, atol=1e-4)


@needs_interpreter
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, in Triton's interpreter
def test_slices_merged_before_the_gather_leave_every_bit():
    from onlinenorm.ops.fused.kernels import backward, forward

    samples, splits, rows, pixels, channels = 5, 4, 32, 100, 6  # the last slice is a short one
    generator = torch.Generator().manual_seed(2)
    partial = torch.randn(samples, splits, channels, 2, generator=generator).exp()
    partial[1, 2, 3, 0] = partial[2, 0, 1, 1] = float("inf")
    partial[3, 1, 4, 0] = float("nan")
    blocks = {"BLOCK_N": 8, "BLOCK_C": 8}
    scanned, controlled = [], []
    for split_count, row_count in ((splits, rows), (1, pixels)):
        tables, state = torch.zeros(2, samples, channels, 2), torch.ones(4, channels)
        moments, gradients = partial, partial
        if split_count == 1:
            moments, gradients = torch.empty(2, samples, 1, channels, 2)
            forward.merge_moments_kernel[samples, 1](partial, moments, channels, splits, rows, pixels, BLOCK_C=8)
            backward.merge_gradients_kernel[samples, 1](partial, gradients, channels, splits, BLOCK_C=8)
        forward.forward_scan_kernel[(1,)](
            moments, *tables, *state[:2], samples, channels, split_count, row_count, pixels, 0.9, 0.1, **blocks
        )
        control, weights = torch.zeros(samples, channels, 2), torch.zeros(2, channels)
        backward.backward_scan_kernel[(1,)](
            gradients, *torch.ones(2, samples, channels, 2), None, None, None, None, *state[2:], control, *weights,
            None, samples, 0, 1, channels, 1, channels, split_count, pixels, 1e-5, 0.9, 0.1, 1.0, 10.0, **blocks,
        )  # fmt: skip
        scanned.append([*tables, *state[:2]])
        controlled.append([control, *weights, *state[2:]])
    for found in (scanned, controlled):
        torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)
    assert all(table.isfinite().any() for table in scanned[0] + controlled[0])
