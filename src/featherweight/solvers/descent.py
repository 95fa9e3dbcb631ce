# SPDX-License-Identifier: Apache-2.0
"""Polish for weights on a grid: single columns, then small sets of columns, are solved anew with all others fixed.

With R = (V - W) H the best value of column j is v_j - R_j / H_jj, rounded; it never raises the loss. Where no single
change helps, sets of columns are freed together and rounded by GPTQ on their own small problem; a row takes the answer
if it is better. Both cost about rows d² a sweep, whatever made the start, and never move a weight that is held at zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.solvers.gptq import upper_factor
from featherweight.solvers.problem import Quantization

__all__ = ["coordinate_descent", "set_descent"]

_BLOCK = 64


def coordinate_descent(problem: Quantization, integers: Tensor, sweeps: int = 10) -> Tensor:
    """Integers after at most `sweeps` rounds over all columns, each set to its best with others fixed (QuantEase)."""
    H, grid = problem.damped.H, problem.grid
    layout = _Layout(problem)
    q = integers.double().T.contiguous()
    residual = H @ (layout.step * (q - layout.zero_point) - problem.W.T)
    gain = 1 / (H.diagonal()[:, None] * layout.step)
    for _ in range(sweeps):
        moved = False
        for start in range(0, problem.d, _BLOCK):
            block = slice(start, min(start + _BLOCK, problem.d))
            own, inner, before = residual[block].clone(), H[block, block], q[block].clone()
            for i, j in enumerate(range(block.start, block.stop)):
                best = torch.addcmul(q[j], own[i], gain[j], value=-1).round_().clamp_(grid.low, grid.high)
                if layout.held is not None:
                    best = torch.where(layout.held[j], q[j], best)
                own.addr_(inner[i], (best - q[j]).mul_(layout.step[j]))
                q[j] = best
            change = (q[block] - before).mul_(layout.step[block])
            if bool(change.any()):
                moved = True
                residual.addmm_(H[:, block], change)
        if not moved:
            break
    return q.T.to(torch.int32).contiguous()


def set_descent(problem: Quantization, integers: Tensor, passes: int = 4, width: int = 32, seed: int = 0) -> Tensor:
    """Integers after `passes` random partitions of the columns into sets of `width`, each set solved anew by GPTQ.

    The partitions come from `seed` on the CPU, so that every device draws the same.
    """
    H = problem.damped.H
    generator = torch.Generator().manual_seed(seed)
    layout = _Layout(problem)
    V = layout.step * (integers.double().T - layout.zero_point)
    residual = H @ (V - problem.W.T)
    for _ in range(passes):
        order = torch.randperm(problem.d, generator=generator).to(H.device)
        for chosen in torch.split(order, width):
            chosen = chosen[H.diagonal()[chosen].argsort(descending=True, stable=True)]
            own, now = H[chosen][:, chosen], V[chosen]
            move = torch.cholesky_solve(residual[chosen], torch.linalg.cholesky(own))
            trial, loss = _round_set(problem, layout, chosen, now - move, upper_factor(own))
            better = loss < ((own @ move) * move).sum(0) * (1 - 1e-12)
            change = torch.where(better, trial - now, 0.0)
            V[chosen] = now + change
            residual.addmm_(H[:, chosen], change)
    return (V / layout.step + layout.zero_point).round_().T.to(torch.int32).contiguous()


class _Layout:
    """A problem's grid and mask as (d, rows): work column by column then reads and writes memory in one piece."""

    def __init__(self, problem: Quantization) -> None:
        columns = torch.arange(problem.d, device=problem.W.device)
        self.step, self.zero_point = (values.T.contiguous() for values in problem.grid.at(columns))
        self.inverse_step = 1 / self.step
        self.held = problem.held.T.contiguous() if bool(problem.held.any()) else None


def _round_set(
    problem: Quantization, layout: _Layout, chosen: Tensor, best: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """GPTQ on the columns `chosen` whose free optimum is `best` (k, rows): values, and twice their loss above it."""
    grid, left = problem.grid, best.clone()
    values, loss = torch.empty_like(best), torch.zeros_like(best[0])
    step, zero_point, inverse_step = layout.step[chosen], layout.zero_point[chosen], layout.inverse_step[chosen]
    held = None if layout.held is None else layout.held[chosen]
    for i in range(len(chosen)):
        q = torch.addcmul(zero_point[i], left[i], inverse_step[i]).round_().clamp_(grid.low, grid.high)
        torch.mul(q.sub_(zero_point[i]), step[i], out=values[i])
        if held is not None:
            values[i].masked_fill_(held[i], 0.0)
        error = (left[i] - values[i]) / factor[i, i]
        left[i + 1 :].addr_(factor[i, i + 1 :], error, alpha=-1)
        loss.addcmul_(error, error)
    return values, loss
