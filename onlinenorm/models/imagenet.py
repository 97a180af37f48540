"""ImageNet ResNets: torchvision's networks and parameter names, with any normalizer."""

import torch
from torch import Tensor
from torchvision.models import resnet as torchvision_resnet

from onlinenorm.errors import ArgumentError
from onlinenorm.models.blocks import (
    BasicBlock,
    Bottleneck,
    BottleneckStride1x1,
    Normalizer,
    NormSite,
    ResNet,
    check_sizes,
    init_convolutions,
    norm_act_max_pool,
    plug_in,
    zero_last_gammas,
)
from onlinenorm.models.stem import StemConv2d

STAGE_BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
BOTTLENECKS = {"3x3": Bottleneck, "1x1": BottleneckStride1x1}


class ImageNetResNet(ResNet, torchvision_resnet.ResNet):
    """torchvision's ResNet with each norm site as one call; build it with ``resnet`` or ``resnet50``."""

    in_torchvision = True
    layers_alone_read_weights = True
    fuse_max_pool = True

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = norm_act_max_pool(self.bn1, self.conv1(x), self.maxpool, self.fuse_max_pool)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet(
    depth: int,
    normalizer: Normalizer,
    num_classes: int = 1000,
    in_channels: int = 3,
    bottleneck_stride: str = "3x3",
    zero_init_last_gamma: bool = False,
    stem: str = "auto",
    fuse_max_pool: bool = True,
    fuse_shortcut: bool = True,
    compile: bool = False,
) -> ImageNetResNet:
    """ResNet for images of about 224 x 224 with torchvision's parameter names, for (N, C, H, W) -> (N, num_classes).

    Convolutions start as kaiming_normal (fan_out, relu), gamma 1, beta 0, the classifier as torch's default; with the
    same torch seed equal for all normalizers, and equal to torchvision's. ``resnet18`` to ``resnet152`` fix the depth.

    Args:
        depth: 18, 34, 50, 101 or 152.
        normalizer: callable num_features -> nn.Module; called once a norm site (53 in ResNet-50).
        num_classes: width of the output, at least 1.
        in_channels: channels of the images, at least 1.
        bottleneck_stride: which convolution of a bottleneck carries the stride: "3x3" (torchvision, "v1.5") or "1x1"
            (He et al. 2015, "v1"). Depths 18 and 34 have no bottlenecks and take only "3x3".
        zero_init_last_gamma: start the last gamma of each residual branch at 0 (Goyal et al. 2017).
        stem: how the first convolution is computed: "conv7x7" as it is, "space_to_depth" as a 4x4 convolution on 2x2
            blocks, "space_to_depth_2x4" as a 4x3 one on 2x4 blocks, the same values up to the order of sums; "auto"
            which is fastest (see ``StemConv2d``).
        fuse_max_pool: in a compiled network, run the first norm, its ReLU and the max-pool in one kernel each way where
            the normalizer has one (OnlineNorm on Hopper GPUs in 16 bits).
        fuse_shortcut: in a compiled network, run the last norm of a residual block, the norm of its shortcut, their sum
            and its ReLU in one kernel each way where the normalizer has one (likewise).
        compile: compile the network in place with torch.compile at its first call; parameter names stay.

    Raises:
        ValueError: an argument out of its range, or a normalizer that does not return a new nn.Module at each call.

    Source: He et al. 2015, arXiv 1512.03385.
    """
    if depth not in STAGE_BLOCKS:
        raise ArgumentError("depth", f"{depth!r} is not one of {', '.join(map(str, STAGE_BLOCKS))}")
    if bottleneck_stride not in BOTTLENECKS:
        raise ArgumentError("bottleneck_stride", f"{bottleneck_stride!r} is not one of {', '.join(BOTTLENECKS)}")
    if depth < 50 and bottleneck_stride != "3x3":
        raise ArgumentError("bottleneck_stride", f"resnet{depth} has no bottleneck blocks; leave it at '3x3'")
    check_sizes(num_classes, in_channels)
    block = BasicBlock if depth < 50 else BOTTLENECKS[bottleneck_stride]
    model = ImageNetResNet(block, list(STAGE_BLOCKS[depth]), num_classes=num_classes, norm_layer=NormSite)
    conv1 = StemConv2d(in_channels, 64, stem, device="meta" if in_channels == 3 else None)
    if in_channels == 3:
        conv1.weight = model.conv1.weight  # drawn already
    else:
        init_convolutions(conv1)
    model.conv1, model.fuse_max_pool = conv1, fuse_max_pool
    for module in model.modules():
        if isinstance(module, (BasicBlock, Bottleneck)):
            module.fuse_shortcut = fuse_shortcut
    plug_in(model, normalizer)
    if zero_init_last_gamma:
        zero_last_gammas(model)
    if compile:
        model.compile()
    return model
