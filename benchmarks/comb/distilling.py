# SPDX-License-Identifier: Apache-2.0
"""Ways to distill, by the names that the tables have."""

from __future__ import annotations

from typing import Any

from torch import nn

from featherweight.distill import CIRKD, CWD, KL, Distill, Features

# The features that are compared: those before the classifier. CIRKD compares all pairs of positions of a batch, so maps
# are averaged to 12 x 12 first.
FEATURES = {"resnet": "block2b", "resnet small": "block2b", "unet": "up0", "unet small": "up0", "unet 7": "up0"}
POOL = 4


def distiller(way: str, network: str, classes: int, teacher: nn.Module) -> Any:
    """What `Train(distill=...)` takes; None for "none"."""
    if way == "none":
        return None
    losses = {
        "kl": lambda: [KL()],
        "cwd": lambda: [CWD()],
        "features": lambda: [KL(), Features(FEATURES[network])],
        "cirkd": lambda: [KL(temperature=1.0), CIRKD(FEATURES[network], classes=classes, pool=POOL)],
    }[way]()
    return Distill(losses, teacher=teacher)
