# SPDX-License-Identifier: Apache-2.0
"""The networks by name, in sizes of one family: `NETWORKS["vit"].build()` is one without its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from benchmarks.comb.networks.convolutions import mobilenet, resnext
from benchmarks.comb.networks.seaformer import SeaFormer
from benchmarks.comb.networks.unet import UNet
from benchmarks.comb.networks.vit import ViT
from benchmarks.reconstruct.subjects import resnet

__all__ = ["NETWORKS", "Network"]


@dataclass(frozen=True)
class Network:
    """How one is built and trained: by SGD with momentum, or by AdamW where there is attention.

    `task` is "fashion", or "land 5" and "land 7" by the number of classes. `sibling` is a larger one of its family.
    """

    name: str
    task: str
    build: Callable[[], nn.Module]
    optimizer: str
    lr: float
    steps: int
    sibling: str = ""


_ALL = (
    Network("resnet", "fashion", lambda: resnet.network(32), "sgd", 0.2, 2145),
    Network("resnet small", "fashion", lambda: resnet.network(16), "sgd", 0.1, 4290, "resnet"),
    Network("resnext", "fashion", lambda: resnext(48), "sgd", 0.1, 1800),
    Network("mobilenet", "fashion", lambda: mobilenet(16), "sgd", 0.1, 1800),
    Network("vit", "fashion", lambda: ViT(64, 4, 4), "adamw", 3e-3, 1600),
    Network("vit-long", "fashion", lambda: ViT(64, 4, 4), "adamw", 3e-3, 4290),  # five epochs rather than two
    Network("unet", "land 5", lambda: UNet(5, 12), "adamw", 3e-3, 700),
    Network("unet small", "land 5", lambda: UNet(5, 6), "adamw", 3e-3, 700, "unet"),
    Network("unet 7", "land 7", lambda: UNet(7, 12), "adamw", 3e-3, 700),
    Network("seaformer", "land 5", lambda: SeaFormer(5, 16), "adamw", 3e-3, 900),
)
NETWORKS = {network.name: network for network in _ALL}
