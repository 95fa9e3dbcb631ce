# SPDX-License-Identifier: Apache-2.0
"""Least-squares scales: with the integers settled, the best scale of each chunk has a closed form.

A row is Σ_k s_k c_k, where c_k are the integers (less the zero point) of chunk k, so its loss is quadratic in the
scales: (c_k H c_lᵀ)_kl s = (w H c_kᵀ)_k. Integers and scales in turn lower the loss until both stand still.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from featherweight.grids import Grid
from featherweight.solvers.downdate import batches
from featherweight.solvers.hessian import row_losses
from featherweight.solvers.problem import Quantization

__all__ = ["least_squares_scales"]


def least_squares_scales(problem: Quantization, integers: Tensor) -> Grid:
    """The problem's grid with each row's scales at the least loss for these integers; zero points stay.

    A row keeps its old scales where the new ones are no better after rounding to float32, or not all positive. Chunks
    whose integers are all at zero keep theirs.
    """
    chunks = problem.grid.scale.shape[1]
    scales = [
        _best_scales(problem, integers, rows)
        for rows in batches(problem.rows, 8 * (2 * chunks**2 + 4 * problem.d), problem.budget_bytes)
    ]
    return dataclasses.replace(problem.grid, scale=torch.cat(scales))


def _best_scales(problem: Quantization, integers: Tensor, rows: slice) -> Tensor:
    H, grid, d = problem.damped.H, problem.grid, problem.d
    columns = torch.arange(d, device=H.device)
    chunk_of = columns // grid.chunk
    old_scale = grid.scale[rows]
    chunks = old_scale.shape[1]
    W, levels = problem.W[rows], integers[rows].double() - grid.zero_point[rows][:, chunk_of].double()

    def by_chunk(values: Tensor) -> Tensor:
        return values.new_zeros(len(values), chunks).index_add_(1, chunk_of, values)

    system = torch.empty(len(W), chunks, chunks, dtype=H.dtype, device=H.device)
    for k in range(chunks):
        own = slice(k * grid.chunk, min((k + 1) * grid.chunk, d))
        system[:, k] = by_chunk(levels[:, own] @ H[own] * levels)
    idle = by_chunk(levels.abs()) == 0
    diagonal = system.diagonal(dim1=1, dim2=2)
    diagonal.add_(torch.where(idle, 1.0, 1e-12 * diagonal))
    right = torch.where(idle, old_scale.double(), by_chunk(W @ H * levels))
    best = torch.cholesky_solve(right[:, :, None], torch.linalg.cholesky(system))[:, :, 0].float()
    old, new = (row_losses(W, scale.double()[:, chunk_of] * levels, H) for scale in (old_scale, best))
    better = (new < old) & (best > 0).all(1) & best.isfinite().all(1)
    return torch.where(better[:, None], best, old_scale)
