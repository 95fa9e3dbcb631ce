# SPDX-License-Identifier: Apache-2.0
"""What is tried: how many weights go from each layer, how many numbers stay, how long it trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way from a dense network to a small file. `name` is the row of the table; `rate` is that of `Cluster`."""

    name: str
    network: str
    sparsity: Mapping[str, float]
    clusters: int
    biases: int
    rate: float
    prune_steps: int
    tune_steps: int


_300 = {"fc1": 0.9, "fc2": 0.85, "fc3": 0.4}
_300_FEWER = {"fc1": 0.86, "fc2": 0.8, "fc3": 0.3}
_5_FEWER = {"conv1": 0.3, "conv2": 0.88, "fc1": 0.97, "fc2": 0.75}
_5 = {"conv1": 0.4, "conv2": 0.93, "fc1": 0.985, "fc2": 0.85}

SETTINGS = (
    Setting("86 % pruned", "lenet_300_100", _300_FEWER, 16, 16, 0.01, 7000, 2000),
    Setting("90 % pruned", "lenet_300_100", _300, 16, 16, 0.01, 7000, 2000),
    Setting("96 % pruned", "lenet_5", _5_FEWER, 16, 16, 0.01, 2500, 500),
    Setting("98 % pruned", "lenet_5", _5, 16, 16, 0.01, 2000, 500),
)
