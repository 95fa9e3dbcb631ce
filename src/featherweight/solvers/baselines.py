# SPDX-License-Identifier: Apache-2.0
"""What others use, to be measured against: magnitude, Wanda (arXiv 2306.11695), SparseGPT (arXiv 2301.00774).

Each costs far less than an elimination. Wanda and magnitude leave the kept weights as they are; SparseGPT moves those
to the right of each pruned one. An exact refit of their masks is the largest cheap gain there is, and is offered by
name: `magnitude+refit` is what AdaPrune (arXiv 2102.08124), which tunes magnitude's kept weights by Adam, would end at.
"""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.errors import OptionError
from featherweight.solvers.allocate import cheapest
from featherweight.solvers.problem import Pruning

__all__ = ["magnitude", "sparsegpt", "wanda"]

_BLOCK = 128


def magnitude(problem: Pruning) -> tuple[Tensor, Tensor]:
    """Removes the units of smallest squared weights over the whole layer. Returns weights and chosen units."""
    chosen = cheapest(problem.units.sums(problem.W.square()), problem.units, problem.rows, problem.zeros)
    return problem.W.masked_fill(problem.mask(chosen), 0.0), chosen


def wanda(problem: Pruning) -> tuple[Tensor, Tensor]:
    """Removes in each row the same share of units, those of smallest Σ (w ||x||)². Returns weights and chosen units."""
    scores = problem.units.sums(problem.W.square() * problem.damped.H.diagonal())
    chosen = cheapest(scores, problem.units, problem.rows, problem.zeros, per_row=True)
    return problem.W.masked_fill(problem.mask(chosen), 0.0), chosen


def sparsegpt(problem: Pruning) -> tuple[Tensor, Tensor]:
    """Columns from left to right, masks by blocks of 128, kept weights to the right compensate (its algorithm 1).

    Returns weights and chosen units. Patterns: weight and N:M; raises `OptionError` for others.
    """
    units = problem.units
    if units.columns.shape[1] != 1 or units.rows != 1:
        raise OptionError(
            "sparsegpt chooses single weights and N:M only; take solver 'exact_obs' for tiles and columns."
        )
    W = problem.W.clone()
    pruned = torch.zeros_like(W, dtype=torch.bool)
    factor = torch.linalg.cholesky(problem.damped.inverse, upper=True)
    start = 0
    for stop in _block_ends(problem):
        block, inner = W[:, start:stop], factor[start:stop, start:stop]
        if units.quota is None:
            before = problem.zeros * start // problem.d
            scores = (block / inner.diagonal()).square().flatten()
            lowest = scores.argsort(stable=True)[: problem.zeros * stop // problem.d - before]
            pruned[:, start:stop] = torch.zeros_like(scores, dtype=torch.bool).scatter_(0, lowest, True).view_as(block)
        errors = torch.zeros_like(block)
        for i in range(stop - start):
            _open_group(problem, block, inner, pruned, start, i)
            errors[:, i] = torch.where(pruned[:, start + i], block[:, i], 0.0) / inner[i, i]
            block[:, i:] -= errors[:, i, None] * inner[i, i:]
        W[:, stop:] -= errors @ factor[start:stop, stop:]
        start = stop
    return W.masked_fill_(pruned, 0.0), pruned


def _block_ends(problem: Pruning) -> list[int]:
    """Ends of blocks of about 128 columns that cut no N:M group."""
    group = problem.units.group
    ends = [end for end in range(1, problem.d) if group is None or group[end] != group[end - 1]]
    chosen, last = [], 0
    for end in ends:
        if end - last >= _BLOCK:
            chosen.append(end)
            last = end
    return [*chosen, problem.d]


def _open_group(problem: Pruning, block: Tensor, inner: Tensor, pruned: Tensor, start: int, i: int) -> None:
    """At the first column of an N:M group, marks those of its columns that go."""
    group, quota = problem.units.group, problem.units.quota
    if group is None or quota is None or (i > 0 and group[start + i] == group[start + i - 1]):
        return
    width = int((group == group[start + i]).sum())
    scores = (block[:, i : i + width] / inner.diagonal()[i : i + width]).square()
    lowest = scores.argsort(dim=1, stable=True)[:, : int(quota[group[start + i]])]
    pruned[:, start + i : start + i + width] = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, lowest, True)
