"""Small ResNets for images of about 32 x 32 (He et al. 2015, section 4.2), with any normalizer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onlinenorm.errors import ArgumentError
from onlinenorm.models.blocks import (
    BasicBlock,
    Normalizer,
    NormSite,
    ResNet,
    check_sizes,
    init_convolutions,
    norm_act,
    plug_in,
    zero_last_gammas,
)

WIDTHS = (16, 32, 64)
SHORTCUTS = ("A", "B")


class ZeroPadShortcut(nn.Module):
    """Shortcut without parameters: every second row and column, and zeros as the new channels.

    Args:
        extra_channels: channels of zeros appended after those of x.
        stride: step in rows and columns.
    """

    def __init__(self, extra_channels: int, stride: int):
        super().__init__()
        self.extra_channels = extra_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra_channels))

    def extra_repr(self) -> str:
        return f"extra_channels={self.extra_channels}, stride={self.stride}"


class CifarResNet(ResNet, nn.Module):
    """A 3x3 stem, three stages of 16, 32 and 64 channels, global average pool; build it with ``cifar_resnet``."""

    layers_alone_read_weights = True

    def __init__(self, blocks_per_stage: int, num_classes: int, in_channels: int, shortcut: str):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, WIDTHS[0], kernel_size=3, padding=1, bias=False)
        self.bn1 = NormSite(WIDTHS[0])
        stages = []
        width_in = WIDTHS[0]
        for width in WIDTHS:
            blocks = []
            for _ in range(blocks_per_stage):
                stride = 1 if width == width_in else 2
                downsample: nn.Module | None = None
                if stride != 1 and shortcut == "A":
                    downsample = ZeroPadShortcut(width - width_in, stride)
                elif stride != 1:
                    projection = nn.Conv2d(width_in, width, kernel_size=1, stride=stride, bias=False)
                    downsample = nn.Sequential(projection, NormSite(width))
                blocks.append(BasicBlock(width_in, width, stride, downsample, norm_layer=NormSite))
                width_in = width
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(WIDTHS[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = norm_act(self.bn1, self.conv1(x))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def cifar_resnet(
    depth: int,
    normalizer: Normalizer,
    num_classes: int = 10,
    in_channels: int = 3,
    shortcut: str = "B",
    zero_init_last_gamma: bool = False,
    compile: bool = False,
) -> CifarResNet:
    """ResNet of depth 6n + 2 for small images, for (N, C, H, W) -> (N, num_classes), H and W about 28 to 32.

    Parameters are named as in the ImageNet networks; initialisation as there, and equal for all normalizers with the
    same torch seed. ``cifar_resnet8`` to ``cifar_resnet110`` fix the depth.

    Args:
        depth: 6n + 2 with n >= 1 blocks a stage: 8, 14, 20, 32, 56, 110, ...
        normalizer: callable num_features -> nn.Module; called once a norm site (21 in ResNet-20, 19 with shortcut "A").
        num_classes: width of the output, at least 1.
        in_channels: channels of the images, at least 1.
        shortcut: where a stage halves the resolution: "B", a 1x1 convolution and a norm, as the Online Normalization
            reference code has it; "A", subsampling and zero channels, as He et al. 2015 had it for CIFAR-10.
        zero_init_last_gamma: start the last gamma of each residual branch at 0 (Goyal et al. 2017).
        compile: compile the network in place with torch.compile at its first call; parameter names stay.

    Raises:
        ValueError: an argument out of its range, or a normalizer that does not return a new nn.Module at each call.

    Source: He et al. 2015, arXiv 1512.03385, section 4.2.
    """
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 8 or depth % 6 != 2:
        raise ArgumentError("depth", f"{depth!r} is not 6n + 2 with n >= 1, such as 8, 14, 20, 32, 56 or 110")
    if shortcut not in SHORTCUTS:
        raise ArgumentError("shortcut", f"{shortcut!r} is not one of {', '.join(SHORTCUTS)}")
    check_sizes(num_classes, in_channels)
    model = CifarResNet((depth - 2) // 6, num_classes, in_channels, shortcut)
    init_convolutions(model)
    plug_in(model, normalizer)
    if zero_init_last_gamma:
        zero_last_gammas(model)
    if compile:
        model.compile()
    return model
