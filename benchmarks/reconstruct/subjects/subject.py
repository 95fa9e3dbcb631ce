# SPDX-License-Identifier: Apache-2.0
"""What is compressed and how it is judged: a network in evaluation mode, unlabelled calibration batches, a metric.

A metric is a summary of rows, one for each sample of the test set. Rows of two networks are of the same samples, so
that their difference is judged by pairs: `difference` draws samples anew and gives an interval.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from featherweight import Task
from featherweight.task import default_forward

Model = Callable[..., Any]


def mean(rows: np.ndarray) -> float:
    return float(rows.mean())


@dataclass(frozen=True, eq=False)
class Subject:
    """A network, what it is calibrated on, and what it is measured by. No test sample is in `calibration`.

    `per_sample(model)` gives the rows [samples, ...] of any callable that answers as the model does, and
    `summary(rows)` their metric: of all, or of a bootstrap's choice. `others` are further figures of the same rows.
    Networks that are there for cost alone have no metric: `samples` is 0 then, and `per_sample` gives no rows.
    """

    name: str
    model: nn.Module
    calibration: list[Any]
    example_inputs: tuple[Any, ...]
    metric: str
    samples: int
    per_sample: Callable[[Model], np.ndarray]
    summary: Callable[[np.ndarray], float] = mean
    higher_is_better: bool = True
    forward: Callable[[Any, Any], Any] = default_forward
    others: Mapping[str, Callable[[np.ndarray], float]] = field(default_factory=dict)

    def evaluate(self, model: Model) -> float:
        """The metric of a model, on all samples."""
        return self.summary(self.per_sample(model))

    def task(self) -> Task:
        """The same as a task of the library."""
        return Task(
            self.model, self.example_inputs, calibration=self.calibration, evaluate=self.evaluate,
            forward=self.forward, metric=self.metric, higher_is_better=self.higher_is_better, samples=self.samples,
        )  # fmt: skip


def answers(
    model: Model, batches: Iterable[Any], forward: Callable[[Any, Any], Any] = default_forward
) -> Iterator[Any]:
    """What a model says to each batch, in evaluation mode and without gradients; its mode is as it was afterwards."""
    mode = model.training if isinstance(model, nn.Module) else None
    if isinstance(model, nn.Module):
        model.eval()
    try:
        for batch in batches:
            with torch.no_grad():
                answer = forward(model, batch)
            yield answer
    finally:
        if isinstance(model, nn.Module) and mode is not None:
            model.train(mode)


def difference(subject: Subject, dense: np.ndarray, other: np.ndarray, resamples: int = 1000) -> dict[str, Any]:
    """How the metric of `other`'s rows differs from that of `dense`'s, with a 95 % bootstrap interval over samples.

    Both are of `subject.per_sample`: the same samples in the same order, drawn together, so that what is hard for both
    cancels. `change` is in the metric's own units: other minus dense.
    """
    if len(dense) != len(other):
        raise ValueError(f"{len(dense)} rows against {len(other)}: not of the same samples.")
    chance = np.random.default_rng(0)
    drawn = np.empty(resamples)
    for i in range(resamples):
        chosen = chance.integers(len(dense), size=len(dense))
        drawn[i] = subject.summary(other[chosen]) - subject.summary(dense[chosen])
    low, high = np.percentile(drawn, [2.5, 97.5])
    change = subject.summary(other) - subject.summary(dense)
    return {"change": change, "low": float(low), "high": float(high), "n": len(dense)}
