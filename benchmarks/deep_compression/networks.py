# SPDX-License-Identifier: Apache-2.0
"""The two networks of Deep Compression and DeepCABAC, as Caffe had them."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


def lenet_300_100() -> nn.Sequential:
    """Three linear layers of 784, 300, 100 and 10: 266,610 parameters, 1,066,440 bytes in fp32."""
    layers: list[tuple[str, nn.Module]] = [
        ("flat", nn.Flatten()),
        ("fc1", nn.Linear(784, 300)),
        ("relu1", nn.ReLU()),
        ("fc2", nn.Linear(300, 100)),
        ("relu2", nn.ReLU()),
        ("fc3", nn.Linear(100, 10)),
    ]
    return nn.Sequential(OrderedDict(layers))


def lenet_5() -> nn.Sequential:
    """Two convolutions of 20 and 50 channels, 5 x 5, and two linear layers: 431,080 parameters, 1,724,320 bytes."""
    layers: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(1, 20, 5)),
        ("pool1", nn.MaxPool2d(2)),
        ("conv2", nn.Conv2d(20, 50, 5)),
        ("pool2", nn.MaxPool2d(2)),
        ("flat", nn.Flatten()),
        ("fc1", nn.Linear(800, 500)),
        ("relu", nn.ReLU()),
        ("fc2", nn.Linear(500, 10)),
    ]
    return nn.Sequential(OrderedDict(layers))


NETWORKS = {"lenet_300_100": lenet_300_100, "lenet_5": lenet_5}
