# SPDX-License-Identifier: Apache-2.0
"""Classifiers whose channels are grouped, split, shuffled, gated or made cheaply; and one over space and time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.networks.classic import CLASSES, conv


class _Grouped(nn.Module):
    def __init__(self, inputs: int, width: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.down = conv(inputs, width, 1)
        self.grouped = conv(width, width, 3, stride, groups=4)
        self.up, self.norm = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.skip = nn.Identity() if stride == 1 and inputs == outputs else conv(inputs, outputs, 1, stride)[:2]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.up(self.grouped(self.down(x)))) + self.skip(x))


class ResNeXt(nn.Module):
    """Bottlenecks whose middle conv is in groups (Xie et al., 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 16, 3)
        self.blocks = nn.Sequential(
            _Grouped(16, 24, 32), _Grouped(32, 24, 32), _Grouped(32, 32, 40, 2), _Grouped(40, 32, 40)
        )
        self.head = nn.Linear(40, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class _Scales(nn.Module):
    def __init__(self, width: int, scales: int = 4) -> None:
        super().__init__()
        self.scales = scales
        self.down = conv(width, 32, 1)
        self.convs = nn.ModuleList(conv(32 // scales, 32 // scales) for _ in range(scales - 1))
        self.up, self.norm = nn.Conv2d(32, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        first, *parts = torch.chunk(self.down(x), self.scales, dim=1)
        done = [first]
        for part, layer in zip(parts, self.convs, strict=True):
            done.append(layer(part + done[-1]) if len(done) > 1 else layer(part))
        return F.relu(x + self.norm(self.up(torch.cat(done, 1))))


class Res2Net(nn.Module):
    """A bottleneck in slices, each added to the next one's input (Gao et al., 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 24, stride=2)
        self.blocks = nn.Sequential(_Scales(24), _Scales(24))
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def _shuffle(x: Tensor, groups: int = 2) -> Tensor:
    batch, channels, height, width = x.shape
    return (
        x.view(batch, groups, channels // groups, height, width).transpose(1, 2).reshape(batch, channels, height, width)
    )


class _ShuffleUnit(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half = outputs // 2
        self.stride = stride
        self.branch = nn.Sequential(
            conv(inputs if stride == 2 else half, half, 1),
            conv(half, half, 3, stride, groups=half)[:2],
            conv(half, half, 1),
        )
        self.shortcut = (
            nn.Sequential(conv(inputs, inputs, 3, 2, groups=inputs)[:2], conv(inputs, half, 1)) if stride == 2 else None
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.shortcut is not None:
            return _shuffle(torch.cat([self.shortcut(x), self.branch(x)], 1))
        left, right = x.chunk(2, dim=1)
        return _shuffle(torch.cat([left, self.branch(right)], 1))


class ShuffleNetV2(nn.Module):
    """Half of the channels pass by, and both halves are shuffled (Ma et al., 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 16)
        self.units = nn.Sequential(
            _ShuffleUnit(16, 24, 2), _ShuffleUnit(24, 24, 1), _ShuffleUnit(24, 40, 2), _ShuffleUnit(40, 40, 1)
        )
        self.last = conv(40, 64, 1)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.units(self.stem(x))).mean([2, 3]))


class _Squeeze(nn.Module):
    def __init__(self, width: int, reduced: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(width, reduced, 1), nn.Conv2d(reduced, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.expand(F.silu(self.reduce(F.adaptive_avg_pool2d(x, 1)))))


class _Inverted(nn.Module):
    def __init__(self, inputs: int, outputs: int, expand: int, kernel: int, stride: int) -> None:
        super().__init__()
        middle = inputs * expand
        self.add = stride == 1 and inputs == outputs
        self.body = nn.Sequential(
            nn.Conv2d(inputs, middle, 1, bias=False),
            nn.BatchNorm2d(middle),
            nn.SiLU(),
            nn.Conv2d(middle, middle, kernel, stride, kernel // 2, groups=middle, bias=False),
            nn.BatchNorm2d(middle),
            nn.SiLU(),
            _Squeeze(middle, max(4, inputs // 4)),
            nn.Conv2d(middle, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.add else self.body(x)


class EfficientNet(nn.Module):
    """Inverted residuals with squeeze and excitation (Tan and Le, 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 16, stride=2)
        self.blocks = nn.Sequential(
            _Inverted(16, 12, 1, 3, 1),
            _Inverted(12, 16, 4, 3, 2),
            _Inverted(16, 16, 4, 3, 1),
            _Inverted(16, 24, 3, 5, 1),
            _Inverted(24, 24, 3, 5, 1),
        )
        self.last = conv(24, 64, 1)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.blocks(self.stem(x))))


class _Ghost(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        half = (outputs + 1) // 2
        self.primary, self.cheap = conv(inputs, half, 1), conv(half, half, 3, groups=half)

    def forward(self, x: Tensor) -> Tensor:
        primary = self.primary(x)
        return torch.cat([primary, self.cheap(primary)], 1)[:, : self.outputs]


class GhostNet(nn.Module):
    """Half of the channels are made from the other half, and an odd one is dropped (Han et al., 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 16, stride=2)
        self.blocks = nn.Sequential(_Ghost(16, 24), _Ghost(24, 31), nn.MaxPool2d(2), _Ghost(31, 32))
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class _Block3d(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv3d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm3d(outputs)
        self.conv2, self.norm2 = nn.Conv3d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm3d(outputs)
        self.skip = None if stride == 1 else nn.Conv3d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + (x if self.skip is None else self.skip(x)))


class ResNet3d(nn.Module):
    """Residual blocks over space and time (Tran et al., 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 12, (3, 5, 5), (1, 2, 2), (1, 2, 2))
        self.blocks = nn.Sequential(_Block3d(12, 12, 1), _Block3d(12, 20, 2))
        self.head = nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool3d(F.relu(self.stem(x)), (1, 2, 2))
        return self.head(F.adaptive_avg_pool3d(self.blocks(x), 1).flatten(1))
