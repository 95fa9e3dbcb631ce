# SPDX-License-Identifier: Apache-2.0
"""A wide weight's inputs, and what its outputs still lack, held in memory: statistics of its blocks without the model.

Solving a weight in blocks asks for statistics once a block, and streaming would run both models each time. What they
depend on is small where d is large: the input, taps times smaller than its patches, and the gap Y - W X, as many
numbers as outputs. When a block's weights change, only that block's share of the gap is computed anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from featherweight.layers.calls import quiet
from featherweight.layers.inputs import Input
from featherweight.layers.problems import Problem
from featherweight.layers.statistics import Forward, Statistics, prepare, statistics_of, stream
from featherweight.layers.sums import Sums
from featherweight.layers.weights import to_matrix
from featherweight.layers.zeros import unwrap

__all__ = ["Held", "hold"]

_CHUNK = 1 << 22


class Held:
    """A weight's calls, each with its input and the gap (groups, tokens, rows) between the reference and the model."""

    def __init__(self, model: nn.Module, problem: Problem, calls: list[tuple[Input, Tensor]], samples: int) -> None:
        self._model, self._weight, self._calls, self._samples = model, problem.weight, calls, samples
        self._now = self._matrix()
        self._first = self._now, [gap.clone() for _, gap in calls]

    def statistics(self, blocks: Sequence[Problem]) -> dict[str, Statistics]:
        """What `collect` would give for these blocks of the weight, with the values that it has now."""
        self._keep_up()
        found: dict[str, Statistics] = {}
        for block in blocks:
            sums = Sums([block])
            for read, gap in self._calls:
                sums.add(read, gap)
            sums.samples = self._samples
            found.update(statistics_of(sums, self._model))
        return found

    def _matrix(self) -> Tensor:
        return to_matrix(self._weight, self._weight.parameter.detach()).clone()

    def _changed(self, moved: Tensor) -> Tensor:
        """The input channels whose weights moved."""
        return moved.view(len(moved), -1, self._weight.columns_per_tap).abs().amax((0, 1)).nonzero()[:, 0]

    def _keep_up(self) -> None:
        """Takes what the weights moved by since last time out of the gaps."""
        now, (first, gaps) = self._matrix(), self._first
        if len(self._changed(now - first)) < len(self._changed(now - self._now)):
            # Nearer to where it began, as when all of a weight was tried out and put back.
            self._now = first
            for (_, gap), before in zip(self._calls, gaps, strict=True):
                gap.copy_(before)
        moved, self._now = now - self._now, now
        changed = self._changed(moved)
        if not len(changed):
            return
        by_channel = moved.view(len(moved), -1, self._weight.columns_per_tap)
        channels = slice(int(changed[0]), int(changed[-1]) + 1)
        few = self._weight.groups == 1 and 2 * (channels.stop - channels.start) <= self._weight.columns_per_tap
        for read, gap in self._calls:
            if not few:
                gap -= read.outputs(moved.to(read.x.dtype))
                continue
            own = by_channel[:, :, channels].flatten(1).to(read.x.dtype)
            start = 0
            for X in read.patches([0], channels, _CHUNK):
                gap[0, start : start + X.shape[1]] -= X[0] @ own.T
                start += X.shape[1]


def hold(
    model: nn.Module,
    problem: Problem,
    batches: Iterable[Any],
    forward: Forward,
    *,
    reference: nn.Module | None,
    most_bytes: int,
) -> Held | None:
    """Runs both models once and holds a weight's inputs and gaps; None where they take more than `most_bytes`.

    Without a `reference` the model as it is now is what is to be answered, and only that is run. For weights that read
    one input a call: not for fused attention projections, whose parts read three, nor embeddings. Also None where the
    data never reached it.

    >>> import torch
    >>> from featherweight.layers import problems
    >>> layer = nn.Linear(4, 2, bias=False)
    >>> [problem], _ = problems(layer)
    >>> data = [torch.ones(3, 4)]
    >>> held = hold(layer, problem, data, lambda model, batch: model(batch), reference=layer, most_bytes=10**6)
    >>> held.statistics([problem])["weight"].tokens
    3
    """
    if problem.weight.kind in ("attention", "embedding"):
        return None
    model, reference = unwrap(model), None if reference is None else unwrap(reference)
    kept = _Calls(problem, most_bytes)
    with quiet(*(one for one in (model, reference) if one is not None)):
        run = prepare(model, reference, [problem], share=False)
        run.sums[problem.weight.name] = [kept]
        try:
            stream(run, batches, forward)
        except _Full:
            return None
    return Held(model, problem, kept.found, kept.samples) if kept.found else None


class _Full(Exception):
    """What is held would take more than it may."""


class _Calls(Sums):
    """Takes the place of sums in a pass over the data, and keeps what they would be fed."""

    def __init__(self, problem: Problem, most_bytes: int) -> None:
        super().__init__([problem])
        self.found: list[tuple[Input, Tensor]] = []
        self._room = most_bytes
        self._outputs = len(to_matrix(self.weight, self.weight.parameter))

    def add(self, read: Input, gap: Tensor | None) -> None:
        if not read.tokens:
            return
        if gap is None:
            gap = read.x.new_zeros(read.groups, read.tokens, self._outputs // read.groups)
        # An activation that is a view of the model's may be changed in place by what comes next.
        shares = read.x.untyped_storage().data_ptr() == read.origin.untyped_storage().data_ptr()
        x = read.x.clone() if shares else read.x
        self._room -= x.nbytes + 2 * gap.nbytes
        if self._room < 0:
            raise _Full
        self.tokens += read.tokens
        self.found.append((dataclasses.replace(read, x=x, origin=x.new_empty(0), given=None), gap.clone()))
