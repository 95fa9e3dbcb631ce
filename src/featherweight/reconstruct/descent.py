# SPDX-License-Identifier: Apache-2.0
"""Polish for weights on a grid: single columns, then small sets of columns, are solved anew with all others fixed.

With R = (V - W) H the best value of column j is v_j - R_j / H_jj, rounded; it never raises the loss. Where no single change
helps, sets of columns are freed together and rounded by GPTQ on their own small problem; a row takes the answer if it is
better. Both cost about rows d² a sweep, whatever made the start, and never move a weight that is held at zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.reconstruct.gptq import upper_factor
from featherweight.reconstruct.problem import Quantization

__all__ = ["coordinate_descent", "set_descent"]

_BLOCK = 64


def coordinate_descent(problem: Quantization, integers: Tensor, sweeps: int = 10) -> Tensor:
    """Integers after at most `sweeps` rounds over all columns, each set to its best with the others fixed (QuantEase)."""
    H, grid = problem.damped.H, problem.grid
    columns = torch.arange(problem.d, device=H.device)
    step, zero_point = grid.at(columns)
    q = integers.double()
    residual = (step * (q - zero_point) - problem.W) @ H
    diagonal = H.diagonal()
    for _ in range(sweeps):
        moved = False
        for start in range(0, problem.d, _BLOCK):
            block = slice(start, min(start + _BLOCK, problem.d))
            own, inner = residual[:, block].clone(), H[block, block]
            before = q[:, block].clone()
            for i, j in enumerate(range(block.start, block.stop)):
                best = (q[:, j] - own[:, i] / (diagonal[j] * step[:, j])).round_().clamp_(grid.low, grid.high)
                best = torch.where(problem.held[:, j], q[:, j], best)
                own += ((best - q[:, j]) * step[:, j])[:, None] * inner[i]
                q[:, j] = best
            change = (q[:, block] - before) * step[:, block]
            if bool(change.any()):
                moved = True
                residual += change @ H[block]
        if not moved:
            break
    return q.to(torch.int32)


def set_descent(problem: Quantization, integers: Tensor, passes: int = 4, width: int = 32, seed: int = 0) -> Tensor:
    """Integers after `passes` random partitions of the columns into sets of `width`, each set solved anew by GPTQ.

    The partitions come from `seed` on the CPU, so that every device draws the same.
    """
    H, grid = problem.damped.H, problem.grid
    generator = torch.Generator().manual_seed(seed)
    step, zero_point = grid.at(torch.arange(problem.d, device=H.device))
    V = step * (integers.double() - zero_point)
    residual = (V - problem.W) @ H
    for _ in range(passes):
        order = torch.randperm(problem.d, generator=generator).to(H.device)
        for chosen in torch.split(order, width):
            chosen = chosen[H.diagonal()[chosen].argsort(descending=True, stable=True)]
            own = H[chosen][:, chosen]
            best = V[:, chosen] - torch.cholesky_solve(residual[:, chosen].T, torch.linalg.cholesky(own)).T
            now = (V[:, chosen] - best) @ own * (V[:, chosen] - best)
            trial, loss = _round_set(problem, chosen, best, upper_factor(own), step, zero_point)
            better = loss < now.sum(1) * (1 - 1e-12)
            change = torch.where(better[:, None], trial - V[:, chosen], 0.0)
            V[:, chosen] += change
            residual += change @ H[chosen]
    return (V / step + zero_point).round_().to(torch.int32)


def _round_set(
    problem: Quantization, chosen: Tensor, best: Tensor, factor: Tensor, step: Tensor, zero_point: Tensor
) -> tuple[Tensor, Tensor]:
    """GPTQ on the columns `chosen` whose free optimum is `best` (rows, k): values, and twice their loss above it."""
    grid, left = problem.grid, best.clone()
    values, loss = torch.empty_like(best), best.new_zeros(len(best))
    step, zero_point, held = step[:, chosen], zero_point[:, chosen], problem.held[:, chosen]
    for i in range(len(chosen)):
        q = (left[:, i] / step[:, i] + zero_point[:, i]).round_().clamp_(grid.low, grid.high) - zero_point[:, i]
        values[:, i] = torch.where(held[:, i], 0.0, step[:, i] * q)
        error = (left[:, i] - values[:, i]) / factor[i, i]
        left[:, i:] -= error[:, None] * factor[i, i:]
        loss += error.square()
    return values, loss
