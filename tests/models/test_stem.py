import copy

import pytest
import torch
from torch import nn

from onlinenorm import models
from onlinenorm.models.stem import StemConv2d

BLOCKS = ("space_to_depth", "space_to_depth_2x4")


def pair(in_channels, out_channels=8, stem="space_to_depth"):
    """Two ways to compute one convolution, sharing its weight, in float64."""
    as_it_is = StemConv2d(in_channels, out_channels, "conv7x7").double()
    rearranged = StemConv2d(in_channels, out_channels, stem).double()
    rearranged.weight = as_it_is.weight
    return as_it_is, rearranged


@pytest.mark.parametrize("in_channels", [1, 3, 4, 5])
@pytest.mark.parametrize("size", [(2, 2), (6, 4), (30, 46), (64, 64)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("stem", BLOCKS)
def test_space_to_depth_gives_the_values_and_gradients_of_the_7x7_convolution(in_channels, size, memory_format, stem):
    torch.manual_seed(0)
    x = torch.randn(3, in_channels, *size, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    grad, found = None, []
    for conv in pair(in_channels, stem=stem):
        y = conv(x)
        grad = torch.randn_like(y) if grad is None else grad
        found.append((y, *torch.autograd.grad(y, (x, conv.weight), grad)))
    for exact, other in zip(*found, strict=True):
        torch.testing.assert_close(other, exact, rtol=1e-12, atol=1e-12)
    widths = {"space_to_depth": size[1], "space_to_depth_2x4": size[1] // 4}  # of one channel or column formats are one
    if in_channels > 1 and widths[stem] > 1 and (memory_format is torch.channels_last or stem == "space_to_depth"):
        assert found[1][0].is_contiguous(memory_format=memory_format)


def test_pairs_of_columns_are_where_they_belong_without_a_copy():
    _, conv = pair(3, stem="space_to_depth_2x4")
    y = conv(torch.randn(2, 3, 8, 12, dtype=torch.float64).to(memory_format=torch.channels_last))
    assert y._is_view() and y.shape == (2, 8, 4, 6) and y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("stem", BLOCKS)
def test_no_images_make_no_outputs(stem):
    as_it_is, rearranged = pair(3, stem=stem)
    x = torch.empty(0, 3, 8, 12, dtype=torch.float64)
    assert rearranged(x).shape == as_it_is(x).shape == (0, 8, 4, 6)


def test_widths_that_are_even_need_not_be_multiples_of_four():
    side = 2 * torch.export.Dim("half", min=2, max=64)
    x = torch.randn(1, 3, 12, 12, dtype=torch.float64)
    _, rearranged = pair(3)
    exported = torch.export.export(rearranged, (x,), dynamic_shapes=({2: side, 3: side},)).module()
    x = torch.randn(1, 3, 14, 14, dtype=torch.float64)
    torch.testing.assert_close(exported(x), rearranged(x))


@pytest.mark.parametrize("size", [(7, 8), (8, 7), (1, 1)])
@pytest.mark.parametrize("stem", BLOCKS)
def test_odd_images_are_convolved_as_they_are(size, stem):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    as_it_is, rearranged = pair(3, stem=stem)
    assert torch.equal(as_it_is(x), rearranged(x))


def test_auto_leaves_the_cpu_alone_and_takes_16_bits_on_a_gpu():
    conv = StemConv2d(3, 8)
    x = torch.randn(2, 3, 16, 16)
    plain = nn.functional.conv2d(x, conv.weight, stride=2, padding=3)
    assert torch.equal(conv(x), plain)
    with torch.device("meta"):
        assert not conv._rearranges(torch.empty(2, 3, 16, 16, dtype=torch.bfloat16))


def test_networks_exchange_weights_whatever_their_stem():
    torch.manual_seed(1)
    usual = models.resnet18(nn.BatchNorm2d, num_classes=5, stem="conv7x7")
    drawn = torch.rand(1)
    torch.manual_seed(1)
    other = models.resnet18(nn.BatchNorm2d, num_classes=5, stem="space_to_depth")
    assert torch.equal(drawn, torch.rand(1))  # nothing more was drawn
    assert other.state_dict().keys() == usual.state_dict().keys()
    assert all(torch.equal(value, usual.state_dict()[name]) for name, value in other.state_dict().items())
    twin = copy.deepcopy(other).double().eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(twin(x), usual.double().eval()(x), rtol=1e-9, atol=1e-9)
    gray = models.resnet18(nn.BatchNorm2d, in_channels=1, stem="space_to_depth")
    assert gray.conv1.weight.shape == (64, 1, 7, 7) and gray.conv1.weight.std() > 0


def test_another_word_is_refused():
    with pytest.raises(
        ValueError, match="stem: 'patchify' is not one of auto, conv7x7, space_to_depth, space_to_depth_2x4"
    ):
        models.resnet50(nn.BatchNorm2d, stem="patchify")


def test_the_rearranged_network_is_one_graph():
    model = models.resnet18(nn.BatchNorm2d, num_classes=3, stem="space_to_depth")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(compiled(x), copy.deepcopy(model)(x), rtol=1e-4, atol=1e-4)
