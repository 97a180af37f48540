"""A package of a user's own: a normalizer, a network and images, and the files that name them."""

import sys

CODE = '''
import torch
from torch import nn

from onlinenorm.data import Synthetic


class Tanh(nn.Module):
    """Moving mean, by a rule of its own, and an output that its backward pass needs."""

    statistics_depend_on = ("processes", "accumulation")

    def __init__(self, num_features, rate: float = 0.1):
        super().__init__()
        self.rate = rate
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("level", torch.zeros(num_features))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("last", torch.zeros(()), persistent=False)
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)  # a statistic too

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.level.lerp_(x.detach().mean((0, 2, 3)), self.rate)
                self.scale.lerp_(x.detach().abs().mean().view(1), self.rate)
                self.steps += 1
                self.last.fill_(float(len(x)))
        shape = (1, -1, 1, 1)
        return torch.tanh((x - self.level.view(shape)) / self.scale * self.weight.view(shape) + self.bias.view(shape))


class Alone(Tanh):
    averages_statistics = False


class Net(nn.Module):
    def __init__(self, normalizer, num_classes, in_channels, width: int = 4):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(in_channels, width, 3, stride=2), normalizer(width), nn.ReLU())
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


class WrongNet(Net):
    def forward(self, x):
        return self.body(x)


def no_net(normalizer, num_classes, in_channels):
    return num_classes


class Flowers(Synthetic):
    scale = "flowers"


class Mislabelled(Synthetic):
    scale = "a | b"


class Flattered(Synthetic):
    scale = "imagenet"


class Unlicensed(Synthetic):
    scale = "flowers"
    licence = ""


class Unlabelled(Synthetic):
    @property
    def scale(self):
        raise NotImplementedError
'''
FILES = {
    "normalizer": {"own": "_target_: {package}.Tanh\n_partial_: true\nrate: 0.2 # share of a batch\n",
                   "alone": "_target_: {package}.Alone\n_partial_: true\n"},
    "model": {"own": "_target_: {package}.Net\nwidth: 4\n", "wrong": "_target_: {package}.WrongNet\n",
              "none": "_target_: {package}.no_net\n"},
    "data": {name: f"_target_: {{package}}.{cls}\nnum_train: 70\nnum_val: 21\nimage_size: 8\nin_channels: 3\n"
             for name, cls in {"flowers": "Flowers", "bars": "Mislabelled", "flattered": "Flattered",
                               "unlabelled": "Unlabelled", "unlicensed": "Unlicensed"}.items()},
}  # fmt: skip


def write(folder, package="own_package_code"):
    """Writes the package into `folder` and the files into `folder`/configs; returns that, for --config-dir."""
    (folder / f"{package}.py").write_text(CODE)
    for group, files in FILES.items():
        for name, text in files.items():
            path = folder / "configs" / group / f"{name}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.format(package=package))
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return folder / "configs"
