# SPDX-License-Identifier: Apache-2.0
"""A U-Net (Ronneberger et al. 2015) for land cover: down to a sixteenth and up again, what was on the way down beside it.

The first convolution halves the picture and the last step doubles the scores, since the labels are coarser than the
photograph: a quarter of the work, for one more step of interpolation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d, relu

from benchmarks.comb.networks.convolutions import normed


class Twice(nn.Module):
    """Two 3 x 3 convolutions."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = normed(inputs, outputs, 3)
        self.conv2, self.bn2 = normed(outputs, outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.bn2(self.conv2(relu(self.bn1(self.conv1(x))))))


class UNet(nn.Module):
    """Pictures [n, 3, height, width] in, sides divisible by 16; scores [n, classes, height, width] out."""

    def __init__(self, classes: int = 5, width: int = 16) -> None:
        super().__init__()
        self.stem, self.bn = normed(3, width, 3, 2)
        self.down0, self.down1 = Twice(width, width), Twice(width, 2 * width)
        self.down2, self.bottom = Twice(2 * width, 4 * width), Twice(4 * width, 8 * width)
        self.up2, self.up1 = Twice(12 * width, 4 * width), Twice(6 * width, 2 * width)
        self.up0, self.head = Twice(3 * width, width), nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        at0 = self.down0(relu(self.bn(self.stem(x))))
        at1 = self.down1(max_pool2d(at0, 2))
        at2 = self.down2(max_pool2d(at1, 2))
        x = self.bottom(max_pool2d(at2, 2))
        x = self.up2(torch.cat((_doubled(x), at2), 1))
        x = self.up1(torch.cat((_doubled(x), at1), 1))
        x = self.up0(torch.cat((_doubled(x), at0), 1))
        return interpolate(self.head(x), scale_factor=2.0, mode="bilinear", align_corners=False)


def _doubled(x: Tensor) -> Tensor:
    return interpolate(x, scale_factor=2.0, mode="nearest")
