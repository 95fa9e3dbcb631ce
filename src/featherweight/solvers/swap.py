# SPDX-License-Identifier: Apache-2.0
"""1-swap polish: a kept weight and a removed one change places where that, with all others refitted, lowers the loss.

For a row with kept columns S let A = (H_SS)⁻¹, v = w_S + w_P H_PS A its refitted weights, and for a removed column q
B_q = A H_Sq, s_q = H_qq - H_qS B_q, r_q = what is left of the gradient at q. Taking p out costs v_p² / A_pp, putting q
in then gains (r_q + B_pq v_p / A_pp)² / (s_q + B_pq² / A_pp), all over 2. One symmetric table holds A, B and s; moving
a column in or out of S is one rank-1 update of it (a principal pivot). Rows keep their counts, N:M groups theirs, so a
swap stays within its group there. Only removed columns of much promise have a place in the table; the search is local
in any case.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from featherweight.errors import OptionError
from featherweight.solvers import together
from featherweight.solvers.downdate import batches
from featherweight.solvers.problem import Pruning
from featherweight.solvers.refit import refit_rows

__all__ = ["swap"]

# Kept weights tried for removal each time, the cheapest first. Within N:M groups the partners are few, so more are
# tried.
_SHORTLIST, _SHORTLIST_IN_GROUPS = 8, 64
_GAIN = 1e-9


def swap(problem: Pruning, chosen: Tensor, most: int = 64) -> Tensor:
    """A mask (rows, d) of single weights after at most `most` swaps a row, each the best found; True where removed.

    Never raises the loss on the damped H. Patterns: weight and N:M; raises `OptionError` for others.
    """
    if problem.units.columns.shape[1] != 1 or problem.units.rows != 1:
        raise OptionError("swaps move single weights; tiles and columns are polished by no solver yet.")
    pruned = chosen.clone()
    kept = (~pruned).sum(1)
    active = ((kept > 0) & (kept < problem.d)).nonzero()[:, 0]
    by_size = together.own(active[kept[active].argsort(stable=True)])
    candidates = _promising(problem, pruned)
    width = int(kept.max()) + candidates.shape[1] + 1
    for batch in batches(len(by_size), 8 * 4 * width**2, problem.budget_bytes):
        rows = by_size[batch]
        _Table(problem, pruned, rows, candidates[rows]).run(most)
    return chosen ^ together.add_up((pruned ^ chosen).int()).bool()


def _promising(problem: Pruning, pruned: Tensor) -> Tensor:
    """For each row the removed columns whose return could gain most, at least 64 or half as many as are kept."""
    W, H = problem.W, problem.damped.H
    residual = (W - refit_rows(W, problem.damped, pruned, problem.budget_bytes)) @ H
    bound = torch.where(pruned, residual.square() * problem.damped.inverse.diagonal(), -1.0)
    wanted = max(64, int((~pruned).sum(1).max()) // 2)
    if problem.units.quota is not None:
        wanted = problem.d
    width = min(wanted, int(pruned.sum(1).max()))
    best = bound.topk(width, dim=1)
    return torch.where(best.values >= 0, best.indices, problem.d)


class _Table:
    """One batch: kept columns first, candidates after, as `index` (R, a); d stands for a place that holds no column."""

    def __init__(self, problem: Pruning, pruned: Tensor, rows: Tensor, candidates: Tensor) -> None:
        d = problem.d
        self.pruned, self.rows = pruned, rows
        columns = torch.where(~pruned[rows], torch.arange(d, device=rows.device), d).sort(dim=1).values
        columns = columns[:, : int((columns < d).sum(1).max())]
        k = columns.shape[1]
        self.index = torch.cat((columns, candidates), 1)
        self.inside = torch.zeros_like(self.index, dtype=torch.bool)
        self.inside[:, :k] = columns < d
        self.outside = torch.zeros_like(self.inside)
        self.outside[:, k:] = candidates < d
        H = functional.pad(problem.damped.H, (0, 1, 0, 1))
        gradient = functional.pad(problem.W @ problem.damped.H, (0, 1))[rows]
        self.least = _GAIN * (problem.W[rows] * gradient[:, :-1]).sum(1)
        whole = H[self.index[:, :, None], self.index[:, None, :]]
        whole.diagonal(dim1=1, dim2=2).add_(self.index == d)
        factor = torch.linalg.cholesky(whole[:, :k, :k])
        inverse = torch.cholesky_inverse(factor)
        beside = inverse @ whole[:, :k, k:]
        whole[:, k:, k:] -= whole[:, k:, :k] @ beside
        whole[:, :k, :k] = -inverse
        whole[:, :k, k:], whole[:, k:, :k] = beside, beside.mT
        self.table = whole
        self.line = gradient.gather(1, self.index)
        outer = self.line[:, k:] - (beside.mT @ self.line[:, :k, None])[:, :, 0]
        self.line = torch.cat(((inverse @ self.line[:, :k, None])[:, :, 0], outer), 1)
        group = problem.units.group
        self.group = None if group is None else functional.pad(group.to(rows.device), (0, 1), value=-1)[self.index]

    def run(self, most: int) -> None:
        for _ in range(most):
            out, into, gain = self._best()
            better = gain > self.least
            if not bool(better.any()):
                return
            self._write(out, into, better)
            if 2 * int(better.sum()) <= len(better):
                self._only(better)
                out, into, better = out[better], into[better], better[better]
            self._pivot(out, better)
            self._pivot(into, better)

    def _best(self) -> tuple[Tensor, Tensor, Tensor]:
        """Each row's best swap among its cheapest to take out and all candidates: places out and in, twice the gain."""
        diagonal = self.table.diagonal(dim1=1, dim2=2)
        price = torch.where(self.inside, self.line.square() / -diagonal, torch.inf)
        length = _SHORTLIST if self.group is None else _SHORTLIST_IN_GROUPS
        short = price.topk(min(length, price.shape[1]), dim=1, largest=False)
        each = torch.arange(len(price), device=price.device)[:, None]
        beside = self.table[each, short.indices]
        own = -diagonal.gather(1, short.indices)[:, :, None]
        value = self.line.gather(1, short.indices)[:, :, None]
        gain = (self.line[:, None] + beside * value / own).square() / (diagonal[:, None] + beside.square() / own)
        allowed = self.outside[:, None].expand_as(gain)
        if self.group is not None:
            allowed = allowed & (self.group.gather(1, short.indices)[:, :, None] == self.group[:, None])
        net = torch.where(allowed & short.values.isfinite()[:, :, None], gain - short.values[:, :, None], -torch.inf)
        best, place = net.flatten(1).max(1)
        a = net.shape[2]
        return short.indices.gather(1, (place // a)[:, None])[:, 0], place % a, best

    def _pivot(self, place: Tensor, active: Tensor) -> None:
        """Moves the column at `place` into the kept ones or out of them, in the rows that are active."""
        each = torch.arange(len(place), device=place.device)
        column = self.table[each, place]
        pivot = torch.where(active, column[each, place], 1.0)
        sign = torch.where(self.inside[each, place], -1.0, 1.0)
        scaled = torch.where(active[:, None], column / pivot[:, None], 0.0)
        self.table.baddbmm_(scaled[:, :, None], column[:, None, :], alpha=-1)
        new = torch.where(active[:, None], scaled * sign[:, None], column)
        new[each, place] = torch.where(active, -1 / pivot, column[each, place])
        self.table[each, place] = new
        self.table[each, :, place] = new
        value = self.line[each, place]
        self.line -= scaled * value[:, None]
        self.line[each, place] = torch.where(active, value / pivot * sign, value)
        self.inside[each, place] ^= active
        self.outside[each, place] ^= active

    def _write(self, out: Tensor, into: Tensor, active: Tensor) -> None:
        rows = self.rows[active]
        each = torch.arange(len(out), device=out.device)[active]
        self.pruned[rows, self.index[each, out[active]]] = True
        self.pruned[rows, self.index[each, into[active]]] = False

    def _only(self, active: Tensor) -> None:
        for name in ("rows", "index", "inside", "outside", "least", "table", "line"):
            setattr(self, name, getattr(self, name)[active])
        if self.group is not None:
            self.group = self.group[active]
