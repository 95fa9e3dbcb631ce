# SPDX-License-Identifier: Apache-2.0
"""What the networks are for: batches, a loss, a metric, and what a difference of two metrics is worth.

A metric is a summary of rows. Fashion-MNIST: a row an image, right or wrong; accuracy. Land cover: a row a block of
tiles (neighbouring tiles are right or wrong together), the pixels of each class that were found, claimed and there; mean
IoU over classes. Two networks are judged on the same rows, drawn anew together, so that what is hard for both cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.comb.data import IGNORED, LandCover, Tiles, land_cover
from benchmarks.gradual import data as fashion
from benchmarks.reconstruct.subjects.resnet import augmented
from benchmarks.reconstruct.subjects.subject import answers

Batch = tuple[Tensor, Tensor]
Rows = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Work:
    """`rows(model, split)` of "validation" or "test"; `summary` of all rows or of a bootstrap's choice of them."""

    name: str
    metric: str
    classes: tuple[str, ...]
    example: Tensor
    batch: Callable[[int, int], Batch]  # of step and seed
    loss: Callable[[Any, Batch], Tensor]
    rows: Callable[[Any, str], Rows]
    summary: Callable[[Rows], float]

    def batches(self, steps: int, seed: int = 0) -> Batches:
        return Batches(self, steps, seed)


@dataclass(frozen=True, eq=False)
class Batches:
    """As many batches as there are steps, the same ones each time that they are asked for."""

    work: Work
    steps: int
    seed: int

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        return (self.work.batch(step, self.seed) for step in range(self.steps))


@cache
def work(name: str) -> Work:
    """`fashion`, `land 5` or `land 7`."""
    return _fashion() if name == "fashion" else _land(name, land_cover(int(name.split()[1])))


def _fashion(size: int = 64) -> Work:
    splits = fashion.load()

    def batch(step: int, seed: int) -> Batch:
        per_epoch = len(splits.train.labels) // size
        chance = torch.Generator().manual_seed(1_000_003 * seed + step // per_epoch)
        chosen = torch.randperm(len(splits.train.labels), generator=chance)[step % per_epoch * size :][:size]
        x = augmented(splits.train.images[chosen], 1_000_003 * seed + step).contiguous()
        return x, splits.train.labels[chosen]

    def rows(model: Any, split: str) -> Rows:
        images, labels = getattr(splits, split)
        scores = answers(model, (fashion.as_input(part) for part in images.split(500)))
        return (torch.cat([s.argmax(1) for s in scores]) == labels).numpy()

    def loss(scores: Any, batch: Batch) -> Tensor:
        return cross_entropy(scores, batch[1])

    example = fashion.as_input(splits.train.images[:2])
    names = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
    return Work("fashion", "accuracy", names, example, batch, loss, rows, lambda rows: float(rows.mean()))


def _land(name: str, land: LandCover, size: int = 16) -> Work:
    classes = len(land.names)
    weights = land.train.weights(classes)

    def rows(model: Any, split: str) -> Rows:
        tiles: Tiles = getattr(land, split)
        counts = torch.zeros(int(tiles.blocks.max()) + 1, 3, classes, dtype=torch.long)
        parts = [(corners, *tiles.cut(corners)) for corners in tiles.corners.split(32)]
        found = torch.cat([s.argmax(1) for s in answers(model, (x for _, x, _ in parts))])
        for block, mine, truth in zip(tiles.blocks, found, torch.cat([y for *_, y in parts]), strict=True):
            judged = truth != IGNORED
            for i, chosen in enumerate((truth[judged & (mine == truth)], mine[judged], truth[judged])):
                counts[block, i] += torch.bincount(chosen, minlength=classes)
        return counts[tiles.blocks.unique()].numpy()

    def loss(scores: Any, batch: Batch) -> Tensor:
        return cross_entropy(scores, batch[1], weights, ignore_index=IGNORED)

    example = land.train.cut(land.train.corners[:2])[0]
    return Work(name, "mIoU", land.names, example, lambda step, seed: land.train.batch(size, step, seed), loss, rows,
                lambda rows: float(np.nanmean(ious(rows))))  # fmt: skip


def ious(rows: Rows) -> Rows:
    """The IoU of each class, from [blocks, (found, claimed, there), classes]; NaN where nobody has seen it."""
    found, claimed, there = rows.sum(0).astype(float)
    with np.errstate(invalid="ignore"):
        return np.asarray(found / (claimed + there - found))


def paired(task: Work, dense: Rows, other: Rows, resamples: int = 1000) -> dict[str, float]:
    """Points (100 x the metric) that `other` has more than `dense`, with a 95 % interval over rows drawn in pairs.

    `low` is what it loses at worst, as far as the test rows can tell: one training run is behind each figure, and the
    chance of another run is not in the interval.
    """
    chance = np.random.default_rng(0)
    drawn = np.empty(resamples)
    for i in range(resamples):
        chosen = chance.integers(len(dense), size=len(dense))
        drawn[i] = task.summary(other[chosen]) - task.summary(dense[chosen])
    low, high = np.percentile(100 * drawn, [2.5, 97.5])
    change = 100 * (task.summary(other) - task.summary(dense))
    return {"change": change, "low": float(low), "high": float(high), "n": len(dense)}


def packed(rows: Rows) -> Any:
    """Rows as JSON: bits as hexadecimal digits, counts as nested lists."""
    return np.packbits(rows).tobytes().hex() if rows.dtype == bool else rows.tolist()


def unpacked(found: Any, count: int) -> Rows:
    """What `packed` was given."""
    if isinstance(found, str):
        return np.unpackbits(np.frombuffer(bytes.fromhex(found), np.uint8), count=count).astype(bool)
    return np.asarray(found)
