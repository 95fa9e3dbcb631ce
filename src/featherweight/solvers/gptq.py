# SPDX-License-Identifier: Apache-2.0
"""GPTQ (arXiv 2210.17323): one order of columns for all rows, so that one Cholesky factor serves them all.

Rows d² work instead of OBQ's rows d³, by blocks of columns: within a block each column's rounding error is passed on at
once, to the columns beyond it in one matrix product. Columns go by falling [H]_jj (activation order), so that the
inputs that matter most are rounded while most others can still make up for it; grids are fixed beforehand, whatever the
order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.solvers.problem import Quantization

__all__ = ["gptq", "upper_factor"]

_BLOCK = 128


def gptq(problem: Quantization, activation_order: bool = True) -> Tensor:
    """Integers (rows, d) on the problem's grid, int32. Weights held at zero stay; their change is passed on as well."""
    d, grid = problem.d, problem.grid
    order = torch.arange(d, device=problem.W.device)
    if activation_order:
        order = problem.damped.H.diagonal().argsort(descending=True, stable=True)
    factor = upper_factor(problem.damped.H[order][:, order])
    # (d, rows) from here on: what is done column by column then reads and writes memory in one piece.
    step, zero_point = (values.T.contiguous() for values in grid.at(order))
    W, held = problem.W[:, order].T.contiguous(), problem.held[:, order].T.contiguous()
    rounded = torch.empty_like(W)
    for start in range(0, d, _BLOCK):
        stop = min(start + _BLOCK, d)
        errors = torch.empty_like(W[start:stop])
        for j in range(start, stop):
            q = (W[j] / step[j] + zero_point[j]).round_().clamp_(grid.low, grid.high)
            rounded[j] = torch.where(held[j], zero_point[j], q)
            error = (W[j] - step[j] * (rounded[j] - zero_point[j])) / factor[j, j]
            W[j:stop].addr_(factor[j, j:stop], error, alpha=-1)
            errors[j - start] = error
        W[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    integers = torch.empty(len(problem.W), d, dtype=torch.int32, device=W.device)
    return integers.scatter_(1, order.expand(len(problem.W), -1), rounded.T.to(torch.int32))


def upper_factor(H: Tensor) -> Tensor:
    """The upper triangular U of H⁻¹ = Uᵀ U, without the inverse: H = R Rᵀ with R upper, and U = R⁻¹."""
    turned = torch.linalg.cholesky(H.flip(0, 1)).flip(0, 1)
    factor: Tensor = torch.linalg.solve_triangular(
        turned, torch.eye(len(H), dtype=H.dtype, device=H.device), upper=True
    )
    return factor
