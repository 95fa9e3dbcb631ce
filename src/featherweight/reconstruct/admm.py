# SPDX-License-Identifier: Apache-2.0
"""ADMM search for a mask: weights and zeros are kept apart, each solved for exactly, and pulled together.

ALPS (arXiv 2406.07831) splits V = D, where V minimizes the layer's loss and D carries the zeros, with a penalty ρ that
grows. Two things are ours. Inputs are scaled by 1 / sqrt([H⁻¹]_jj), not by sqrt(H_jj): the size of an entry is then
what its removal costs after the others have made up for it, the score of ExactOBS, and the search ends below ExactOBS
where ALPS's scaling ends above it. ρ runs through a fixed ladder around the geometric mean of the eigenvalues, so that the
cost is known beforehand: one matrix product W H-sized an iteration, and no eigenvectors.

Unlike an elimination the search can take a decision back, sees all rows at once, and costs rows d² and not rows d³.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from featherweight.reconstruct.allocate import cheapest
from featherweight.reconstruct.problem import Pruning

__all__ = ["admm"]

_LOWEST, _HIGHEST = 0.3, 3.0


def admm(problem: Pruning, stages: int = 12, each: int = 10) -> Tensor:
    """The units to remove (row groups, n), after `stages` values of ρ with `each` iterations; weights are left to a refit.

    Any pattern. Work: stages (d³ + each rows d²) multiply-adds, the iterations in float32.
    """
    H, scale = problem.damped.H, problem.damped.inverse.diagonal().rsqrt()
    scaled = H / scale / scale[:, None]
    mean_log = 2 * (problem.damped.factor.diagonal().log() - scale.log()).mean()
    target = (problem.W * scale).float()
    pull = (problem.W * scale @ scaled).float()
    project = _projection(problem)
    zeroed = torch.where(project(target), 0.0, target)
    dual = torch.zeros_like(target)
    meeting = target
    for stage in range(stages):
        rho = float(mean_log.exp()) * _LOWEST * (_HIGHEST / _LOWEST) ** (stage / max(1, stages - 1))
        shifted = scaled.clone()
        shifted.diagonal().add_(rho)
        solve = torch.cholesky_inverse(torch.linalg.cholesky(shifted)).float()
        for _ in range(each):
            free = (pull - dual + rho * zeroed) @ solve
            meeting = free + dual / rho
            zeroed = torch.where(project(meeting), 0.0, meeting)
            dual += rho * (free - zeroed)
    return cheapest(problem.units.sums(meeting.square()), problem.units, problem.rows, problem.zeros)


def _projection(problem: Pruning) -> Callable[[Tensor], Tensor]:
    """What marks, of any weights (rows, d), those that the nearest weights with the pattern's zeros set to zero."""
    units = problem.units
    single = units.rows == 1 and units.columns.shape == (problem.d, 1)
    if single and units.quota is None and 0 < problem.zeros < problem.W.numel():
        select = _Threshold(problem.zeros)
        return lambda values: select(values.square())

    def project(values: Tensor) -> Tensor:
        return problem.mask(cheapest(units.sums(values.square()), units, problem.rows, problem.zeros))

    return project


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
            low, high = 0.8 * self.last, 1.25 * self.last
            below = int((flat < low).sum())
            near = flat[(flat >= low) & (flat <= high)]
            if 0 < self.count - below <= len(near):
                threshold = near.kthvalue(self.count - below).values
        if threshold is None:
            threshold = flat.kthvalue(self.count).values
        self.last = float(threshold)
        return values <= threshold
