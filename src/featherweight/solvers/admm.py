# SPDX-License-Identifier: Apache-2.0
"""What ADMM projects on: weights with a pattern's zeros, weights on a grid, and both at once.

The nearest sparse weights keep the units of largest squares. The nearest weights on a grid are rounded ones. The
nearest that are both keep the units whose rounded values come nearer than zero by most: Σ w² - (w - round(w))².
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from featherweight.grids import Grid
from featherweight.solvers.allocate import cheapest
from featherweight.solvers.consensus import consensus, natural_scale
from featherweight.solvers.problem import Pruning, Quantization

__all__ = ["admm_grid", "admm_joint", "admm_mask"]

Rounding = Callable[[Tensor], Tensor]


def admm_mask(problem: Pruning, stages: int = 12, each: int = 10) -> Tensor:
    """The mask (rows, d) of what to remove, of any pattern; the weights are left to a refit."""
    marks = _marks(problem)

    def project(weights: Tensor) -> Tensor:
        return weights.masked_fill(marks(weights.square()), 0.0)

    scale = natural_scale(problem.damped)
    _, meeting = consensus(problem.W, problem.damped, scale, project, stages, each)
    return problem.mask(cheapest(problem.units.sums(meeting.square()), problem.units, problem.rows, problem.zeros))


def admm_grid(problem: Quantization, stages: int = 12, each: int = 10) -> Tensor:
    """Integers (rows, d) on the problem's grid; weights that are held at zero stay there."""
    scale = natural_scale(problem.damped)
    rounded = _rounding(problem.grid, scale)

    def project(weights: Tensor) -> Tensor:
        return rounded(weights).masked_fill_(problem.held, 0.0)

    allowed, _ = consensus(problem.W, problem.damped, scale, project, stages, each)
    return problem.grid.integers(allowed.double() / scale)


def admm_joint(problem: Pruning, grid: Grid, stages: int = 12, each: int = 10) -> tuple[Tensor, Tensor]:
    """Integers (rows, d) on the grid and the mask of zeros of the problem's pattern, found together."""
    scale = natural_scale(problem.damped)
    rounded, marks = _rounding(grid, scale), _marks(problem)

    def project(weights: Tensor) -> Tensor:
        values = rounded(weights)
        return values.masked_fill_(marks(weights.square() - (weights - values).square()), 0.0)

    _, meeting = consensus(problem.W, problem.damped, scale, project, stages, each)
    worth = meeting.square() - (meeting - rounded(meeting)).square()
    pruned = problem.mask(cheapest(problem.units.sums(worth), problem.units, problem.rows, problem.zeros))
    return grid.integers(rounded(meeting).masked_fill_(pruned, 0.0).double() / scale), pruned


def _rounding(grid: Grid, scale: Tensor) -> Rounding:
    """Scaled weights (rows, d) to the nearest on the grid."""
    step, zero_point = grid.at(torch.arange(len(scale), device=scale.device))
    step, zero_point = (step * scale).float(), zero_point.float()

    def rounded(weights: Tensor) -> Tensor:
        return (weights / step).add_(zero_point).round_().clamp_(grid.low, grid.high).sub_(zero_point).mul_(step)

    return rounded


def _marks(problem: Pruning) -> Callable[[Tensor], Tensor]:
    """From what each weight is worth (rows, d) to the mask (rows, d) of the units worth least."""
    units = problem.units
    single = units.rows == 1 and units.columns.shape == (problem.d, 1)
    if single and units.quota is None and 0 < problem.zeros < problem.W.numel():
        return _Threshold(problem.zeros)
    return lambda worth: problem.mask(cheapest(units.sums(worth), units, problem.rows, problem.zeros))


class _Threshold:
    """Marks the `count` smallest of many values that change little from call to call: the threshold moves little, too.

    The values near the last threshold are picked out and the new one is sought among them; exact, but for ties.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.last: float | None = None

    def __call__(self, values: Tensor) -> Tensor:
        flat = values.flatten()
        threshold = None
        if self.last is not None:
            low, high = sorted((0.8 * self.last, 1.25 * self.last))
            below = int((flat < low).sum())
            near = flat[(flat >= low) & (flat <= high)]
            if 0 < self.count - below <= len(near):
                threshold = near.kthvalue(self.count - below).values
        if threshold is None:
            threshold = flat.kthvalue(self.count).values
        self.last = float(threshold)
        return values <= threshold
