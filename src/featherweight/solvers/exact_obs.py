# SPDX-License-Identifier: Apache-2.0
"""ExactOBS (Optimal Brain Compression, arXiv 2208.11580): every row loses its cheapest unit, again and again.

Removing columns P of a row w costs ½ w_P ((H⁻¹)_PP)⁻¹ w_Pᵀ, moves w by -w_P ((H⁻¹)_PP)⁻¹ (H⁻¹)_P:, and takes P out of
H⁻¹. The paper keeps the weights at every step, or runs again to the counts that the global choice gives. Here only the
order and the losses are kept, rows x d small integers and floats, and the weights come from an exact refit: the same
weights, a thousandth of the memory of the one and half the time of the other, and no rounding that builds up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from featherweight.solvers import together
from featherweight.solvers.allocate import allocate, ascending
from featherweight.solvers.downdate import COMPACT_BELOW, Inverses, batches, bytes_per_matrix
from featherweight.solvers.units import Units

__all__ = ["Elimination", "eliminate", "eliminate_again", "eliminate_with_traces"]

Observe = Callable[[slice, int, Tensor], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Elimination:
    """For each row group the units in the order in which they went (int32), and what each step cost (the ½ included).

    It is all that a sparsity needs, whichever: `counts` says how many units each row group loses, `chosen` which,
    `Units.mask` where they lie, `refit` what the others become. To store it, `order` fits int16 where a row has at most
    32768 units, and `losses` float32; the units follow from the pattern and the shape (`units_of`). W goes in with the
    columns of dead inputs at zero (`Damped.dead`), in float64.

    >>> H = torch.tensor([[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]])
    >>> W = torch.tensor([[1.0, 2.0, 0.1], [0.3, 0.2, 3.0]])
    >>> units = Units(torch.tensor([[0], [1], [2]]))
    >>> made = eliminate(W, torch.linalg.inv(H), units)
    >>> stored = made.order.to(torch.int16), made.losses.float()
    >>> again = Elimination(*stored, units)
    >>> units.mask(again.chosen(again.counts(zeros=3, rows=2)), rows=2, d=3)
    tensor([[False, False,  True],
            [ True,  True, False]])
    """

    order: Tensor
    losses: Tensor
    units: Units

    def chosen(self, counts: Tensor) -> Tensor:
        """The units that are gone once each row group has lost `counts` of them: (row groups, n), True where gone."""
        gone = torch.arange(self.order.shape[1], device=self.order.device) < counts[:, None]
        chosen = torch.zeros(len(self.order), len(self.units.columns), dtype=torch.bool, device=self.order.device)
        return chosen.scatter_(1, self.order.long(), gone)

    def counts(self, zeros: int, rows: int) -> Tensor:
        """How many units each row group loses until `zeros` weights are gone in all, at the least recorded loss."""
        sizes = self.units.weights_of_each(len(self.order), rows).to(self.order.device).gather(1, self.order.long())
        return allocate(ascending(self.losses, sizes), zeros, sizes)


def eliminate(
    W: Tensor,
    inverse: Tensor,
    units: Units,
    *,
    steps: int | None = None,
    budget_bytes: int = 1 << 30,
    observe: Observe | None = None,
) -> Elimination:
    """Runs each row of W (rows, d) through `steps` removals (default: all that the units allow), given H⁻¹ (d, d).

    It works in W's dtype. Rows are taken in batches whose inverse Hessians fit `budget_bytes`. `observe` gets, after
    each step, the batch's slice of row groups, the number of units gone, and its weights (row groups, rows of a unit,
    d).

    >>> found = eliminate(torch.tensor([[3.0, 1.0]]), torch.eye(2), Units(torch.tensor([[0], [1]])))
    >>> found.order.tolist(), found.losses.tolist()
    ([[1, 0]], [[0.5, 4.5]])
    """
    d = W.shape[1]
    n, c = units.columns.shape
    most = n if units.quota is None else int(units.quota.sum())
    steps = most if steps is None else min(steps, most)
    columns = units.columns.to(W.device).flatten()
    # Units lie side by side from here on, padded columns being free variables of their own, coupled to nothing.
    padded = columns < 0
    start = inverse.to(W.dtype)[columns][:, columns]
    start[padded] = 0.0
    start[:, padded] = 0.0
    start.diagonal()[padded] = 1.0
    weights = _by_groups(W[:, columns].masked_fill_(padded, 0.0), units)
    groups = len(weights)
    order = torch.zeros(groups, steps, dtype=torch.int32, device=W.device)
    losses = torch.zeros(groups, steps, dtype=W.dtype, device=W.device)
    own = together.own(torch.arange(groups, device=W.device))
    for batch in batches(len(own), bytes_per_matrix(n * c, W.dtype), budget_bytes):
        rows = own[batch]
        run = _Run(weights[rows], start, units)
        for step in range(steps):
            order[rows, step], losses[rows, step] = run.step()
            if observe is not None:
                observe(batch, step + 1, run.weights(columns, d))
        del run  # before the next batch takes its memory
    return Elimination(together.add_up(order), together.add_up(losses), units)


def eliminate_with_traces(
    W: Tensor, inverse: Tensor, units: Units, *, steps: int | None = None, budget_bytes: int = 1 << 30
) -> tuple[Elimination, Tensor]:
    """`eliminate`, and the weights after every step (row groups, steps + 1, rows of a unit, d), on the CPU.

    The paper's form of more memory and less compute: any number of removals can be read off. rows x d x steps numbers.
    Not for N:M, which has one level alone.
    """
    start = _by_groups(W, units)
    steps = len(units.columns) if steps is None else min(steps, len(units.columns))
    traces = torch.empty(len(start), steps + 1, units.rows, W.shape[1], dtype=W.dtype)
    traces[:, 0] = start.cpu()

    def keep(batch: slice, step: int, weights: Tensor) -> None:
        traces[batch, step] = weights.cpu()

    found = eliminate(W, inverse, units, steps=steps, budget_bytes=budget_bytes, observe=keep)
    return found, traces


def eliminate_again(W: Tensor, inverse: Tensor, units: Units, counts: Tensor, budget_bytes: int = 1 << 30) -> Tensor:
    """The weights (rows, d) where each row group has lost `counts` units, by running the elimination once more.

    The paper's form of less memory and more compute: nothing is kept of the first run but its losses. Not for N:M.
    """
    weights = _by_groups(W, units)

    def stop(batch: slice, step: int, now: Tensor) -> None:
        there = counts[batch] == step
        weights[batch][there] = now[there]

    eliminate(W, inverse, units, steps=int(counts.max()), budget_bytes=budget_bytes, observe=stop)
    return weights.flatten(0, 1)[: len(W)]


def _by_groups(W: Tensor, units: Units) -> Tensor:
    """W (rows, d) as (row groups, rows of a unit, d), in fresh memory; rows of zeros fill the last group."""
    groups = -(-len(W) // units.rows)
    return torch.nn.functional.pad(W, (0, 0, 0, groups * units.rows - len(W))).view(groups, units.rows, -1).clone()


class _Run:
    """One batch under way: `w` (G, r, n c), the diagonal blocks of H⁻¹ (G, n, c, c), and which units are closed."""

    def __init__(self, w: Tensor, start: Tensor, units: Units) -> None:
        n, self.c = units.columns.shape
        self.w = w
        self.inverses = Inverses(start.expand(len(w), -1, -1).clone())
        blocks = start.view(n, self.c, n, self.c).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        self.blocks = blocks.expand(len(w), -1, -1, -1).clone()
        self.each = torch.arange(len(w), device=w.device)
        self.name = torch.arange(n, device=w.device).expand(len(w), -1)
        self.closed = w.new_zeros(len(w), n)
        self.open = n
        # Units of different sizes are compared by what each of their columns costs.
        self.sizes = None if bool((units.columns >= 0).all()) else units.sizes.to(w).expand(len(w), -1)
        self.group = self.left = None
        if units.group is not None and units.quota is not None:
            self.group = units.group.to(w.device).expand(len(w), -1)
            self.left = units.quota.to(w.device).expand(len(w), -1).clone()
            self.closed.masked_fill_(self.left.gather(1, self.group) == 0, torch.inf)

    def step(self) -> tuple[Tensor, Tensor]:
        """Removes each row group's cheapest unit; which one it was and what it cost."""
        score = _scores(self.blocks, self.w.view(*self.w.shape[:2], -1, self.c))
        unit = (score if self.sizes is None else score / self.sizes).add(self.closed).argmin(1)
        cost = score[self.each, unit]
        at = unit[:, None] * self.c + torch.arange(self.c, device=unit.device)
        rows = self.inverses.rows(at)
        moved = self.w.gather(2, at[:, None].expand(-1, self.w.shape[1], -1))
        if self.c == 1:
            root = rows.gather(2, at[:, None]).sqrt_()
            u, moved = rows.div_(root), moved / root
        else:
            root = torch.linalg.cholesky(rows.gather(2, at[:, None].expand(-1, self.c, -1)))
            u = torch.linalg.solve_triangular(root, rows, upper=False)
            moved = torch.linalg.solve_triangular(root.mT, moved, upper=True, left=False)
        self.inverses.remove(u)
        self.w.baddbmm_(moved, u, alpha=-1)
        self.w.scatter_(2, at[:, None].expand(-1, self.w.shape[1], -1), 0.0)
        _downdate_blocks(self.blocks, u)
        self.blocks[self.each, unit] = torch.eye(self.c, dtype=u.dtype, device=u.device)
        name = self.name.gather(1, unit[:, None])[:, 0]
        self._close(unit)
        if self.open <= COMPACT_BELOW * self.closed.shape[1]:
            self._compact()
        return name.to(torch.int32), cost / 2

    def weights(self, columns: Tensor, d: int) -> Tensor:
        """The batch's weights in the original order of columns (G, r, d)."""
        slots = columns.view(-1, self.c)[self.name].flatten(1)
        slots = torch.where(slots < 0, d, slots)[:, None].expand(-1, self.w.shape[1], -1)
        return self.w.new_zeros(*self.w.shape[:2], d + 1).scatter_(2, slots, self.w)[:, :, :d]

    def _close(self, unit: Tensor) -> None:
        self.closed[self.each, unit] = torch.inf
        if self.group is None or self.left is None:
            self.open -= 1
            return
        group = self.group.gather(1, unit[:, None])
        left = self.left.gather(1, group) - 1
        self.left.scatter_(1, group, left)
        self.closed.masked_fill_((self.group == group) & (left == 0), torch.inf)
        self.open = int((self.closed == 0).sum(1).max())

    def _compact(self) -> None:
        # Rows of an N:M run may differ in how many columns are open; the shorter are filled up with closed ones.
        # What is closed but kept may go too: H⁻¹ on open columns evolves without it, and the refit sets its weights.
        if self.open == 0:
            return
        keep = self.closed.sort(dim=1, stable=True).indices[:, : self.open].sort(dim=1).values
        at = (keep[:, :, None] * self.c + torch.arange(self.c, device=keep.device)).flatten(1)
        self.inverses.keep(at)
        self.w = self.w.gather(2, at[:, None].expand(-1, self.w.shape[1], -1))
        self.blocks = self.blocks.gather(1, keep[:, :, None, None].expand(-1, -1, self.c, self.c))
        self.name, self.closed = self.name.gather(1, keep), self.closed.gather(1, keep)
        if self.group is not None:
            self.group = self.group.gather(1, keep)
        if self.sizes is not None:
            self.sizes = self.sizes.gather(1, keep)


def _scores(blocks: Tensor, w: Tensor) -> Tensor:
    """Σ over rows of w_P ((H⁻¹)_PP)⁻¹ w_Pᵀ for all units at once (G, n), from w (G, r, n, c)."""
    c = blocks.shape[-1]
    if c == 1:
        squares = w[:, 0, :, 0].square() if w.shape[1] == 1 else w[..., 0].square().sum(1)
        return squares.div(blocks[:, :, 0, 0])
    if c > 16:
        factor = torch.linalg.cholesky(blocks)
        whitened: Tensor = torch.linalg.solve_triangular(factor, w.permute(0, 2, 3, 1), upper=False)
        return whitened.square().sum((2, 3))
    score = torch.zeros_like(blocks[:, :, 0, 0])
    for _ in range(c):
        pivot, head = blocks[..., 0, 0], w[..., 0]
        score += head.square().sum(1) / pivot
        factor = blocks[..., 0, 1:] / pivot[..., None]
        w = w[..., 1:] - head[..., None] * factor[:, None]
        blocks = blocks[..., 1:, 1:] - factor[..., :, None] * blocks[..., 0, None, 1:]
    return score


def _downdate_blocks(blocks: Tensor, u: Tensor) -> None:
    c = blocks.shape[-1]
    if c == 1:
        blocks[:, :, 0, 0].addcmul_(u[:, 0], u[:, 0], value=-1)
        return
    own = u.view(len(u), c, -1, c).transpose(1, 2)  # (G, n, c removed, c of each unit)
    blocks.sub_(own.mT @ own)
