"""Residual networks that take any normalizer: a callable ``num_features -> nn.Module``."""

from functools import partial

from onlinenorm.models.cifar import CifarResNet, cifar_resnet
from onlinenorm.models.imagenet import ImageNetResNet, resnet

resnet18 = partial(resnet, 18)
resnet34 = partial(resnet, 34)
resnet50 = partial(resnet, 50)
resnet101 = partial(resnet, 101)
resnet152 = partial(resnet, 152)

cifar_resnet8 = partial(cifar_resnet, 8)
cifar_resnet14 = partial(cifar_resnet, 14)
cifar_resnet20 = partial(cifar_resnet, 20)
cifar_resnet32 = partial(cifar_resnet, 32)
cifar_resnet56 = partial(cifar_resnet, 56)
cifar_resnet110 = partial(cifar_resnet, 110)

__all__ = [
    "CifarResNet",
    "ImageNetResNet",
    "cifar_resnet",
    "cifar_resnet8",
    "cifar_resnet14",
    "cifar_resnet20",
    "cifar_resnet32",
    "cifar_resnet56",
    "cifar_resnet110",
    "resnet",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
]
