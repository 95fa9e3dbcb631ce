# SPDX-License-Identifier: Apache-2.0
"""Classifiers of the first years: chains, branches that are joined, everything joined to everything."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 7


def conv(
    inputs: int, outputs: int, kernel: int | tuple[int, int] = 3, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    padding = kernel // 2 if isinstance(kernel, int) else (kernel[0] // 2, kernel[1] // 2)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class AlexNet(nn.Module):
    """A flatten of maps larger than one pixel, into wide linear layers (Krizhevsky et al., 2012)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 7, stride=2, padding=2),
            nn.ReLU(inplace=True),
            nn.LocalResponseNorm(5),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(16, 24, 5, padding=2, groups=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(24, 40, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(40, 32, 3, padding=1, groups=2),
            nn.ReLU(inplace=True),
        )
        self.pool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(
            nn.Dropout(),
            nn.Linear(32 * 4, 96),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(96, 72),
            nn.ReLU(),
            nn.Linear(72, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.pool(self.features(x)), 1))


class VGG(nn.Module):
    """Pairs of convs with batch norms, then three linear layers (Simonyan and Zisserman, 2015)."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3, 16, 16, 24, 24, 32, 40]
        layers: list[nn.Module] = []
        for index, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
            layers += [nn.MaxPool2d(2)] if index % 2 else []
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(40 * 16, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, CLASSES)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.classifier(x.view(x.size(0), -1))


class _Branches(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.one = conv(inputs, width, 1)
        self.three = nn.Sequential(conv(inputs, width - 2, 1), conv(width - 2, width + 4))
        self.five = nn.Sequential(
            conv(inputs, width - 4, 1), conv(width - 4, width, (1, 5)), conv(width, width + 2, (5, 1))
        )
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(inputs, width - 6, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)


class Inception(nn.Module):
    """Branches of several kernels, joined along channels (Szegedy et al., 2015 and 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 16, stride=2), conv(16, 20))
        self.first = _Branches(20, 12)
        self.second = _Branches(48, 16)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.first(self.stem(x)), 2)
        return self.head(F.adaptive_avg_pool2d(self.second(x), 1).flatten(1))


class _DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, earlier: list[Tensor]) -> Tensor:
        x = self.conv1(F.relu(self.norm1(torch.cat(earlier, 1))))
        return self.conv2(F.relu(self.norm2(x)))


class DenseNet(nn.Module):
    """Each layer reads all earlier ones; a norm of its own sees each join (Huang et al., 2017)."""

    def __init__(self, growth: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = nn.ModuleList(_DenseLayer(16 + growth * i, growth) for i in range(3))
        self.shrink_norm, self.shrink = nn.BatchNorm2d(40), nn.Conv2d(40, 20, 1, bias=False)
        self.block2 = nn.ModuleList(_DenseLayer(20 + growth * i, growth) for i in range(3))
        self.norm = nn.BatchNorm2d(44)
        self.head = nn.Linear(44, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self._block(self.stem(x), self.block1)
        x = F.avg_pool2d(self.shrink(F.relu(self.shrink_norm(x))), 2)
        x = self._block(x, self.block2)
        return self.head(F.relu(self.norm(x)).mean((2, 3)))

    @staticmethod
    def _block(x: Tensor, layers: nn.ModuleList) -> Tensor:
        features = [x]
        for layer in layers:
            features.append(layer(features))
        return torch.cat(features, 1)


class _Fire(nn.Module):
    def __init__(self, inputs: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.one, self.three = nn.Conv2d(squeeze, expand, 1), nn.Conv2d(squeeze, expand + 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.one(x)), F.relu(self.three(x))], 1)


class SqueezeNet(nn.Module):
    """No linear layer: the last conv makes the classes, and they are averaged (Iandola et al., 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2)
        self.fires = nn.Sequential(_Fire(16, 8, 16), nn.MaxPool2d(3, 2, ceil_mode=True), _Fire(36, 12, 20))
        self.classes = nn.Conv2d(44, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classes(self.fires(F.relu(self.stem(x)))).mean((2, 3))
