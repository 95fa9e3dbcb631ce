# SPDX-License-Identifier: Apache-2.0
"""OBQ (Optimal Brain Compression, arXiv 2208.11580): every row rounds its cheapest weight, again and again.

Rounding w_p to q costs ½ (q - w_p)² / [H⁻¹]_pp, moves the others by -(w_p - q) / [H⁻¹]_pp · H⁻¹_p:, and fixes p. A
weight that has been pushed off the grid, more than half a step from its nearest value, is rounded first, the worst
before all: left to the end nobody could make up for it (without that rule the 2-bit error is many times larger).
Weights held at zero are no variables: each row starts from the inverse of H on its own columns.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from featherweight.solvers import together
from featherweight.solvers.downdate import COMPACT_BELOW, Inverses, batches, bytes_per_matrix
from featherweight.solvers.problem import Quantization

__all__ = ["obq"]

# A half step, and a little for rounding: a value just between two grid points is no outlier.
_HALF = 0.25 * (1 + 1e-9)


def obq(problem: Quantization, outliers_first: bool = True) -> Tensor:
    """Integers (rows, d) on the problem's grid, int32. Rows go in batches within the problem's byte budget.

    Work: 0.41 rows d³ multiply-adds in float64, as `eliminate`.
    """
    free = (~problem.held).sum(1)
    start = problem.grid.integers(torch.zeros_like(problem.W))
    integers = start.clone()
    rows = (free > 0).nonzero()[:, 0]
    rows = together.own(rows[free[rows].argsort(stable=True)])
    each = bytes_per_matrix(int(free.max()), problem.W.dtype)
    if bool(problem.held.any()):
        each *= 3  # a row's own H, its factor and its inverse, two at a time, and the solver's workspace
    for batch in batches(len(rows), each, problem.budget_bytes):
        _Run(problem, rows[batch], outliers_first).fill(integers)
    return start + together.add_up(integers - start)


class _Run:
    """One batch under way; `name` (G, a) are the columns still there, d where a row has fewer free than others."""

    def __init__(self, problem: Quantization, rows: Tensor, outliers_first: bool) -> None:
        d, self.grid, self.rows, self.outliers_first = problem.d, problem.grid, rows, outliers_first
        held = problem.held[rows]
        columns = torch.arange(d, device=rows.device)
        self.name = torch.where(held, d, columns).sort(dim=1).values[:, : int((~held).sum(1).max())]
        real = self.name < d
        if bool(held.any()):
            H = functional.pad(problem.damped.H, (0, 1, 0, 1))[self.name[:, :, None], self.name[:, None, :]]
            H.diagonal(dim1=1, dim2=2).add_(~real)
            # What is held differs from zero where the weights were: their removal moves the others' best values.
            gone = functional.pad(torch.where(held, problem.W[rows], 0.0) @ problem.damped.H, (0, 1))
            H = torch.linalg.cholesky(H)
            stack = torch.cholesky_inverse(H).mT
            del H
            move = (stack @ torch.where(real, gone.gather(1, self.name), 0.0)[:, :, None])[:, :, 0]
        else:
            stack = problem.damped.inverse.expand(len(rows), -1, -1).clone()
            move = torch.zeros_like(problem.W[rows])
        self.w = functional.pad(problem.W[rows], (0, 1)).gather(1, self.name) + move
        self.diagonal = stack.diagonal(dim1=1, dim2=2).clone()
        self.inverses = Inverses(stack)
        step, zero_point = problem.grid.at(columns)
        self.step, self.zero_point = (
            functional.pad(t[rows], (0, 1), value=1.0).gather(1, self.name) for t in (step, zero_point)
        )
        # What fills up a row is rounded when nothing else is left of it, and written to a column that is thrown away.
        self.closed = torch.zeros_like(self.w).masked_fill_(~real, torch.finfo(self.w.dtype).max)
        self.each = torch.arange(len(rows), device=rows.device)

    def fill(self, integers: Tensor) -> None:
        """Rounds all columns and writes their integers."""
        left = self.name.shape[1]
        rows_of_d = functional.pad(integers[self.rows], (0, 1))
        for _ in range(left):
            column, value = self._step()
            rows_of_d[self.each, column] = value.to(torch.int32)
            left -= 1
            if 0 < left <= COMPACT_BELOW * self.closed.shape[1]:
                self._compact(left)
        integers[self.rows] = rows_of_d[:, :-1]

    def _step(self) -> tuple[Tensor, Tensor]:
        exact = self.w / self.step + self.zero_point
        rounded = exact.round().clamp_(self.grid.low, self.grid.high)
        off = (rounded - exact).square_()
        choice = (off * self.step.square()).div_(self.diagonal).add_(self.closed).argmin(1)
        if self.outliers_first:
            worst, place = off.sub_(self.closed).max(1)
            choice = torch.where(worst > _HALF, place, choice)
        value = rounded[self.each, choice]
        row = self.inverses.rows(choice[:, None])
        root = row.gather(2, choice[:, None, None]).sqrt_()
        u = row.div_(root)
        error = (exact[self.each, choice] - value) * self.step[self.each, choice]
        self.w.sub_(u[:, 0] * (error / root[:, 0, 0])[:, None])
        self.inverses.remove(u)
        self.diagonal.addcmul_(u[:, 0], u[:, 0], value=-1)
        # A closed column keeps finite numbers; they are never looked at again.
        self.diagonal[self.each, choice] = 1.0
        column = self.name[self.each, choice]
        self.closed[self.each, choice] = torch.inf
        return column, value

    def _compact(self, left: int) -> None:
        keep = self.closed.sort(dim=1, stable=True).indices[:, :left].sort(dim=1).values
        self.inverses.keep(keep)
        for name in ("name", "w", "diagonal", "step", "zero_point", "closed"):
            setattr(self, name, getattr(self, name).gather(1, keep))
