# SPDX-License-Identifier: Apache-2.0
"""Convolutional networks for 28 x 28 grey images beside the ResNet: grouped (ResNeXt) and depthwise-separable (MobileNetV2)."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn.functional import relu


def normed(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """A convolution that keeps the size at stride 1, and its BatchNorm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(outputs)


class Grouped(nn.Module):
    """ResNeXt's block (Xie et al. 2017): narrow, 3 x 3 in groups, wide, and a way around."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        inner = outputs // 2
        self.conv1, self.bn1 = normed(inputs, inner, 1)
        self.conv2, self.bn2 = normed(inner, inner, 3, stride, groups)
        self.conv3, self.bn3 = normed(inner, outputs, 1)
        same = stride == 1 and inputs == outputs
        self.shortcut: nn.Module = nn.Identity() if same else nn.Sequential(*normed(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        inner = relu(self.bn1(self.conv1(x)))
        inner = relu(self.bn2(self.conv2(inner)))
        return relu(self.bn3(self.conv3(inner)) + self.shortcut(x))


def resnext(width: int = 64, groups: int = 8) -> nn.Sequential:
    """Three stages of two grouped blocks, `width` channels in the first and twice as many in each next."""
    blocks = OrderedDict[str, nn.Module]()
    inputs = width // 2
    stem = OrderedDict(zip(("conv", "bn"), normed(1, inputs, 3, 2), strict=True))
    for stage in range(3):
        outputs = width << stage
        blocks[f"block{stage}a"] = Grouped(inputs, outputs, 2 if stage else 1, groups)
        blocks[f"block{stage}b"] = Grouped(outputs, outputs, 1, groups)
        inputs = outputs
    return nn.Sequential(OrderedDict({**stem, "relu": nn.ReLU(), **blocks, **head(inputs)}))


class Inverted(nn.Module):
    """MobileNetV2's block (Sandler et al. 2018): wide, 3 x 3 by channel, narrow without an activation."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, expand: int = 4, kernel: int = 3) -> None:
        super().__init__()
        inner = inputs * expand
        self.conv1, self.bn1 = normed(inputs, inner, 1)
        self.conv2, self.bn2 = normed(inner, inner, kernel, stride, inner)
        self.conv3, self.bn3 = normed(inner, outputs, 1)
        self.around = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        inner = nn.functional.relu6(self.bn1(self.conv1(x)))
        inner = nn.functional.relu6(self.bn2(self.conv2(inner)))
        result: Tensor = self.bn3(self.conv3(inner))
        return x + result if self.around else result


def mobilenet(width: int = 24) -> nn.Sequential:
    """A stem of stride 2, eight inverted residuals at three sizes, a 1 x 1 convolution and the head."""
    blocks = OrderedDict[str, nn.Module]()
    inputs = width
    stem = OrderedDict(zip(("conv", "bn"), normed(1, width, 3, 2), strict=True))
    for stage, (outputs, repeats) in enumerate(((width, 2), (2 * width, 3), (4 * width, 3))):
        for i in range(repeats):
            blocks[f"block{stage}{'abc'[i]}"] = Inverted(inputs, outputs, 2 if stage and not i else 1)
            inputs = outputs
    last = OrderedDict(zip(("conv_last", "bn_last"), normed(inputs, 8 * width, 1), strict=True))
    parts = {**stem, "relu": nn.ReLU6(), **blocks, **last, "relu_last": nn.ReLU6(), **head(8 * width)}
    return nn.Sequential(OrderedDict(parts))


def head(inputs: int, classes: int = 10) -> dict[str, nn.Module]:
    return {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "linear": nn.Linear(inputs, classes)}
