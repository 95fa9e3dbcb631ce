# SPDX-License-Identifier: Apache-2.0
"""Ways to distill, by the names that the tables have."""

from __future__ import annotations

from typing import Any

from torch import nn

from featherweight.distill import CIRKD, CWD, KL, Distill, Features

# The features that are compared: those before the classifier. CIRKD compares all positions with each other and with
# thousands that are remembered, so it takes a deeper map of 12 x 12, and a smaller memory than the paper.
FEATURES = {"resnet": "block2b", "resnet small": "block2b"}
RELATIONS = {"unet": "up2", "unet small": "up2", "unet 7": "up2"}


def distiller(way: str, network: str, classes: int, teacher: nn.Module) -> Any:
    """What `Train(distill=...)` takes; None for "none"."""
    if way == "none":
        return None
    losses = {
        "kl": lambda: [KL()],
        "cwd": lambda: [CWD()],
        "features": lambda: [KL(), Features(FEATURES[network])],
        "cirkd": lambda: [KL(temperature=1.0), _cirkd(RELATIONS[network], classes)],
    }[way]()
    return Distill(losses, teacher=teacher)


def _cirkd(layer: str, classes: int) -> CIRKD:
    return CIRKD(layer, classes=classes, pixel_contrast=1024, region_contrast=256, pixel_queue=500, region_queue=500)
