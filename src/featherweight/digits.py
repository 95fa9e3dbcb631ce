# SPDX-License-Identifier: Apache-2.0
"""Real handwritten digits and a small network for them: what the demo, and first tries of your own, run on.

The 1,797 digits of 8 x 8 pixels that scikit-learn brings (UCI's optical recognition set, 13 writers), in one fixed
split: training, validation (for choices, such as those behind the demo's recipe) and test (for nothing but reporting).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from featherweight.errors import OptionError, require
from featherweight.task import Task

__all__ = ["Digits", "DigitsNet", "digits", "digits_task"]

_SPLITS = {"train": slice(0, 1197), "validation": slice(1197, 1397), "test": slice(1397, 1797)}


class DigitsNet(nn.Sequential):
    """A plain network for 8 x 8 images: three convolutions with batch norm and ReLU, a linear layer; 68,362 parameters.

    >>> sum(p.numel() for p in DigitsNet().parameters())
    68362
    """

    def __init__(self) -> None:
        super().__init__(
            *_convolution(1, 32),
            nn.MaxPool2d(2),
            *_convolution(32, 64),
            *_convolution(64, 80),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(320, 10),
        )


def _convolution(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def digits(split: str) -> tuple[Tensor, Tensor]:
    """Images (n, 1, 8, 8) from 0 to 1 and labels (n,) of one split: 1,197 for train, 200 for validation, 400 for test.

    Raises `MissingExtra` without scikit-learn.

    >>> images, labels = digits("test")
    >>> images.shape, labels.shape
    (torch.Size([400, 1, 8, 8]), torch.Size([400]))
    """
    if split not in _SPLITS:
        raise OptionError(f"There is no split {split!r}; there are {', '.join(_SPLITS)}.")
    pixels, labels = require("sklearn.datasets", extra="data").load_digits(return_X_y=True)
    # RandomState's stream is frozen for all versions of NumPy, so that the split is the same everywhere.
    chosen = np.random.RandomState(0).permutation(len(labels))[_SPLITS[split]]
    images = torch.from_numpy(pixels[chosen]).float().view(-1, 1, 8, 8) / 16
    return images, torch.from_numpy(labels[chosen]).long()


class Digits:
    """Batches of training digits in a new order each epoch, each batch shifted by up to a pixel: a re-iterable."""

    def __init__(self, batch: int = 64) -> None:
        self.images, self.labels = digits("train")
        self.batch = batch

    def __len__(self) -> int:
        return len(self.labels) // self.batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.labels))
        for start in range(0, len(self) * self.batch, self.batch):
            chosen = order[start : start + self.batch]
            down, right = torch.randint(0, 3, (2,)).tolist()
            images = pad(self.images[chosen], (1, 1, 1, 1))[:, :, down : down + 8, right : right + 8]
            yield images.contiguous(), self.labels[chosen]


def digits_task(model: nn.Module | None = None, split: str = "test") -> Task:
    """A task: train `model` (a new `DigitsNet` of seed 0 by default) on the digits, score accuracy on a split.

    >>> task = digits_task()
    >>> task.metric, task.samples
    ('accuracy', 400)
    """
    if model is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = DigitsNet()
    images, labels = digits(split)

    def accuracy(answer: Callable[..., Any]) -> float:
        return float((answer(images).argmax(1) == labels).double().mean())

    return Task(
        model,
        (images[:1],),
        train=Digits(),
        loss=lambda outputs, batch: cross_entropy(outputs, batch[1]),
        evaluate=accuracy,
        metric="accuracy",
        samples=len(labels),
    )
