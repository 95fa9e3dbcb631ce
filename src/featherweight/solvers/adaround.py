# SPDX-License-Identifier: Apache-2.0
"""AdaRound (arXiv 2004.10568): each weight learns whether it is rounded up or down.

With v = s (floor(w / s) + h) and h = clip(1.2 sigmoid(θ) - 0.1, 0, 1) (eq. 23), Adam minimizes ½ Σ (v - w) H (v - w)ᵀ
plus λ Σ 1 - |2 h - 1|^β (eqs. 21, 24), β falling from 20 to 2, so that h ends at 0 or 1. The paper draws batches of
layer inputs; a linear layer's error is known exactly from H, so every step here sees all samples at once, at rows d²
however many they were. Only neighbours of w are reached: where the grid is so coarse that the best value lies beyond
them, OBQ or the descents do better. Reconstruction of whole blocks (BRECQ) needs the block's own outputs and belongs to
the walk.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from featherweight.solvers.hessian import row_losses
from featherweight.solvers.problem import Quantization

__all__ = ["STEPS", "adaround"]

STEPS = 1000
_STRETCH, _SHIFT = 1.2, 0.1
_WARM = 0.2
_BETA = 20.0, 2.0
_LEARNING_RATE = 0.1
_PENALTY = 2.0


def adaround(problem: Quantization, steps: int = STEPS) -> Tensor:
    """Integers (rows, d) on the problem's grid, int32, each next to its weight; weights held at zero stay there.

    A row that ends above its nearest rounding (on the damped H) takes that instead. Work: `steps` rows d² multiply-adds
    in float32.
    """
    grid, W = problem.grid, problem.W.masked_fill(problem.held, 0.0)
    step, zero_point = grid.at(torch.arange(problem.d, device=W.device))
    exact = (W / step + zero_point).clamp_(grid.low, grid.high)
    below = exact.floor().clamp_(max=grid.high - 1)
    share = _learned(problem, below, (exact - below).float(), step, zero_point, steps)
    learned = torch.where(problem.held, zero_point, below + (share >= 0.5))
    nearest = exact.round()
    losses = [row_losses(problem.W, step * (q - zero_point), problem.damped.H) for q in (learned, nearest)]
    return torch.where((losses[0] <= losses[1])[:, None], learned, nearest).to(torch.int32)


def _learned(
    problem: Quantization, below: Tensor, share: Tensor, step: Tensor, zero_point: Tensor, steps: int
) -> Tensor:
    """h (rows, d) after `steps` of Adam from h = the share of a step that lies below each weight."""
    # A weight's step costs s² / [H⁻¹]_jj once others have made up for it. Their mean is the unit in which the loss is
    # weighed against the penalty, so that neither the layer's size nor its scale matters.
    unit = float((step.square() / problem.damped.inverse.diagonal()).mean())
    H, step_size = (problem.damped.H / unit).float(), step.float()
    offset = (step * (below - zero_point) - problem.W).float()
    free = ~problem.held
    # At 0 and 1 themselves h has no slope; a little inside, a weight that lies on the grid may still leave it.
    theta = -torch.log(_STRETCH / (share.clamp(0.01, 0.99) + _SHIFT) - 1)
    mean, square = torch.zeros_like(theta), torch.zeros_like(theta)
    for i in range(steps):
        soft = torch.sigmoid(theta)
        h = (_STRETCH * soft - _SHIFT).clamp_(0, 1)
        slope = ((offset + step_size * h) @ H).mul_(step_size)
        progress = (i / steps - _WARM) / (1 - _WARM)
        if progress > 0:
            beta = _BETA[1] + (_BETA[0] - _BETA[1]) * (1 + math.cos(math.pi * progress)) / 2
            away = 2 * h - 1
            slope -= 2 * _PENALTY * beta * away.abs().pow_(beta - 1) * away.sign()
        inside = (h > 0) & (h < 1) & free
        slope = torch.where(inside, slope * _STRETCH * soft * (1 - soft), 0.0)
        mean.lerp_(slope, 0.1)
        square.lerp_(slope.square(), 0.001)
        corrected = (square / (1 - 0.999 ** (i + 1))).sqrt_().add_(1e-8)
        theta -= _LEARNING_RATE / (1 - 0.9 ** (i + 1)) * mean / corrected
    return _STRETCH * torch.sigmoid(theta) - _SHIFT
