# SPDX-License-Identifier: Apache-2.0
"""ADMM between the layer's loss, which is quadratic, and a set of allowed weights, which is anything but.

ALPS (arXiv 2406.07831) splits V = D: V minimizes the loss, D is allowed (sparse, on a grid, or both), and a penalty ρ
that grows pulls them together; D is found by projection, V by one matrix product. Two things are ours. Inputs are
scaled by 1 / sqrt([H⁻¹]_jj), not by sqrt(H_jj): a distance is then what a change costs after all other weights have
made up for it, the score of ExactOBS and OBQ, and the search ends below them where ALPS's scaling ends above. And ρ
runs up a fixed ladder around the geometric mean of the eigenvalues, so the cost is known beforehand and no eigenvectors
are needed.

Factorizations run in float32 too, in a third of the time, where the shifted Hessian is conditioned for it.

Unlike an elimination the search takes decisions back, sees all rows at once, and costs rows d² an iteration, not rows
d³.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from featherweight.solvers.hessian import Damped

__all__ = ["Project", "consensus", "natural_scale"]

# Scaled weights (rows, d) in float32 to the nearest allowed ones.
Project = Callable[[Tensor], Tensor]

_LOWEST, _HIGHEST = 0.3, 3.0
# Up to this ratio of the largest eigenvalue to ρ an inverse in float32 is right to a few per cent in its worst
# direction, and masks found with it are as good: losses within 0.1 % of those in float64, on either side.
_SINGLE = 1e5


def consensus(
    W: Tensor, damped: Damped, scale: Tensor, project: Project, stages: int = 12, each: int = 10
) -> tuple[Tensor, Tensor]:
    """The last allowed weights D and what they were projected from (rows, d), both scaled: column j times `scale[j]`.

    `scale` (d,) is `natural_scale(damped)`. Work: stages (d³ + each rows d²) multiply-adds; iterations run in float32.
    """
    scaled = damped.H / scale / scale[:, None]
    mean_log = 2 * (damped.factor.diagonal().log() - scale.log()).mean()
    largest = float(scaled.norm())
    target = (W * scale).float()
    pull = (W * scale @ scaled).float()
    allowed, dual = project(target), torch.zeros_like(target)
    meeting = target
    for stage in range(stages):
        rho = float(mean_log.exp()) * _LOWEST * (_HIGHEST / _LOWEST) ** (stage / max(1, stages - 1))
        solve = _inverse(scaled, rho, torch.float32 if largest <= _SINGLE * rho else torch.float64)
        for _ in range(each):
            free = (pull - dual + rho * allowed) @ solve
            meeting = free + dual / rho
            allowed = project(meeting)
            dual += rho * (free - allowed)
    return allowed, meeting


def _inverse(scaled: Tensor, rho: float, dtype: torch.dtype) -> Tensor:
    """(scaled + ρ I)⁻¹ in float32, computed in `dtype`."""
    shifted = scaled.to(dtype, copy=True)
    shifted.diagonal().add_(rho)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    if int(failed) and dtype == torch.float32:
        return _inverse(scaled, rho, torch.float64)
    return torch.cholesky_inverse(factor).float()


def natural_scale(damped: Damped) -> Tensor:
    """1 / sqrt([H⁻¹]_jj) (d,): the square of a scaled change is twice what it costs once others have compensated."""
    return damped.inverse.diagonal().rsqrt()
