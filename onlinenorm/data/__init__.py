"""Images in: ImageNet, small sets of its images, CIFAR, Fashion-MNIST and synthetic images behind one interface."""

from onlinenorm.data.cifar import CIFAR10, CIFAR100
from onlinenorm.data.fashion_mnist import FashionMNIST
from onlinenorm.data.imagenet import ImageNet
from onlinenorm.data.imagenette import Imagenette
from onlinenorm.data.module import ImageDataModule
from onlinenorm.data.sampler import GlobalBatchSampler, ValidationSampler
from onlinenorm.data.synthetic import Synthetic
from onlinenorm.data.tiny_imagenet import TinyImageNet
from onlinenorm.errors import DataError, UnreadableImageError

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "DataError",
    "FashionMNIST",
    "GlobalBatchSampler",
    "ImageDataModule",
    "ImageNet",
    "Imagenette",
    "Synthetic",
    "TinyImageNet",
    "UnreadableImageError",
    "ValidationSampler",
]
