"""Training in half precision with a loss scale that is too large at first."""

from functools import cache, partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from onlinenorm import OnlineNorm2d
from onlinenorm.normalizers import rescale_controls

SAMPLES, STEPS = 32, 60


def network(backend="auto", width=16):
    torch.manual_seed(0)
    sizes = (3, width, 1), (width, width, 1), (width, 2 * width, 2)
    convs = [nn.Conv2d(inputs, outputs, 3, stride, 1) for inputs, outputs, stride in sizes]
    blocks = [nn.Sequential(conv, OnlineNorm2d(conv.out_channels, backend=backend), nn.ReLU()) for conv in convs]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


def train(scale=None, follow=None, left_out=0, model=None, steps=STEPS):
    """Mean loss of the last steps, steps that the scaler discarded, and the network; ``left_out`` are done without."""
    model = network() if model is None else model
    device = model[0][0].weight.device
    norms = [module for module in model.modules() if isinstance(module, OnlineNorm2d)]
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9)
    scaler = torch.amp.GradScaler(device.type, init_scale=scale or 1.0, enabled=scale is not None)
    generator = torch.Generator().manual_seed(1)
    centres, losses, discarded = torch.randn(10, 3, 12, 12, generator=generator), [], 0
    for step in range(steps):
        labels = torch.randint(10, (SAMPLES,), generator=generator)
        x = centres[labels] + 0.5 * torch.randn(SAMPLES, 3, 12, 12, generator=generator)
        x, labels = x.to(device, memory_format=torch.channels_last), labels.to(device)
        before = scaler.get_scale()
        if follow == "gradient_scale":
            for norm in norms:
                norm.gradient_scale = 1 / before
        with torch.autocast(device.type, torch.float16):
            loss = F.cross_entropy(model(x).float(), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if scale is not None or step >= left_out:
            scaler.step(optimizer)
            scaler.update()
        discarded += scaler.get_scale() < before
        if follow == "rescale_controls":
            rescale_controls(model, scaler.get_scale() / before)
        losses.append(loss.item())
    return sum(losses[-5:]) / 5, discarded, model


@cache
def loss_without(left_out):
    """Of a run without a scaler that leaves out so many steps."""
    return train(left_out=left_out)[0]


def standard_loop(kind, overflow_at=None, scale=2.0**16, device="cpu"):
    """Loss of the last ten of 60 steps that knows nothing of controls; it falls from 1.4 to about 1."""
    torch.manual_seed(0)
    norm = partial(OnlineNorm2d, error_compensation=kind)
    convs = [nn.Conv2d(inputs, outputs, 3, outputs // 16, 1, bias=False) for inputs, outputs in ((3, 16), (16, 32))]
    blocks = [nn.Sequential(conv, norm(conv.out_channels), nn.ReLU()) for conv in convs]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.06, 0.9)
    scaler = torch.amp.GradScaler(device, init_scale=scale)
    generator = torch.Generator().manual_seed(100)
    centres, losses = 0.3 * torch.randn(4, 3, 12, 12, generator=generator), []
    for step in range(STEPS):
        labels = torch.randint(4, (SAMPLES,), generator=generator)
        x = centres[labels] + torch.randn(SAMPLES, 3, 12, 12, generator=generator)
        x, labels = x.to(device, memory_format=torch.channels_last), labels.to(device)
        with torch.autocast(device, torch.float16):
            loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        (scaler.scale(loss) * (2.0**20 if step == overflow_at else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert (scaler.get_scale() < scale) == (overflow_at is not None)
    return sum(losses[-10:]) / 10


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["clamp", "layer_scaling", "none"])
def test_one_overflow_in_a_standard_loop_costs_at_most_five_percent(kind, device):
    undisturbed = standard_loop(kind, device=device)
    assert undisturbed < 1.2
    assert standard_loop(kind, overflow_at=20, device=device) < 1.05 * undisturbed


def test_overflow_costs_the_steps_that_are_discarded_and_no_more():
    """Controls that follow the scale, either way, lead where a run leads that leaves out as many steps."""
    loss, discarded, rescaled = train(2.0**24, "rescale_controls")
    same_loss, _, told = train(2.0**24, "gradient_scale")
    assert discarded > 5 and loss == same_loss
    assert loss == pytest.approx(loss_without(discarded), rel=0.05)
    scale = told[0][1].gradient_scale
    assert torch.equal(rescaled[0][1].control_v * scale, told[0][1].control_v)


@pytest.mark.parametrize("scale", [2.0**16, 2.0**24])
def test_training_goes_on_after_an_overflow_that_no_control_follows(scale):
    """A standard loop: its first losses are 2.3; what it lags behind wears off with the controls of the large scale."""
    loss, discarded, model = train(scale)
    assert (discarded > 1) == (scale > 2.0**16)
    assert loss < 1.7 * loss_without(discarded) and loss < 1.5
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_scale_that_never_overflows_changes_nothing(backend):
    plain, scaled = (train(scale, model=network(backend), steps=4) for scale in (None, 2.0**8))
    assert scaled[0] == pytest.approx(plain[0], rel=1e-3)


def test_only_controls_are_rescaled():
    model = network()
    model(torch.randn(4, 3, 6, 6)).sum().backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rescale_controls(model, 0.25)
    assert any("control" in name and value.any() for name, value in before.items())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] * (0.25 if "control" in name else 1)), name


@pytest.mark.gpu
@pytest.mark.parametrize("width", [16, 64])
def test_overflow_on_a_gpu_costs_the_steps_that_are_discarded_and_no_more(width):
    """Two-pass kernels, and single-read ones, whose gradients are float16 and overflow."""
    models = [network(width=width).to("cuda", memory_format=torch.channels_last) for _ in range(3)]
    loss, discarded, _ = train(2.0**24, "rescale_controls", model=models[0])
    expected = train(left_out=discarded, model=models[1])[0]
    assert discarded > 5 and loss == pytest.approx(expected, rel=0.1)
    assert train(2.0**24, model=models[2])[0] < 2 * expected
    assert all(value.isfinite().all() for value in models[2].state_dict().values())
