# SPDX-License-Identifier: Apache-2.0
"""Exact refit: once it is settled which weights are zero, the best values of the others have a closed form.

For a row w with kept columns S and removed columns P, the loss ½ (w - v) H (w - v)ᵀ is least at
v_S = w_S + w_P H_PS (H_SS)⁻¹, which is also v = w - w_P ((H⁻¹)_PP)⁻¹ (H⁻¹)_P:. The first costs |S|³ / 3 a row, the
second |P|³ / 3, and the cheaper is taken. Whatever chose the zeros, nothing that keeps them does better on H.

Where a factorization a row would cost more than some twelve products with H (from d = 2048 on, of a fifth of the
weights), all rows are refitted together by such products until none can gain a millionth of its loss; rows that do not
get there are factorized after all.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from featherweight.errors import OptionError
from featherweight.solvers import together
from featherweight.solvers.deflation import ITERATIONS, Deflated
from featherweight.solvers.downdate import batches
from featherweight.solvers.hessian import Damped, check_weights, damp

__all__ = ["products_work", "refit", "refit_rows"]

# Systems that a core solves together should fit its cache; on a GPU the more the better.
_CACHE_BYTES = 8 << 20
# Rows that are refitted together by products, and the least d for that.
_TOGETHER, _LEAST = 1024, 512


def refit(W: Tensor, H: Tensor, pruned: Tensor, damping: float = 1e-4, budget_bytes: int = 1 << 30) -> Tensor:
    """The weights (rows, d), in W's dtype, of least loss that are zero where `pruned` (bool, W's shape) is True.

    Saves nothing by itself: the zeros are the caller's. Rows go in batches within `budget_bytes`; rows with equal masks
    share one factorization. Many masks of many weights are refitted to within a millionth of the least loss, all others
    to rounding. `damping` is a ridge toward W, see `damp`. Raises `OptionError` and `NumericalError`.

    >>> H = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    >>> refit(torch.tensor([[1.0, 1.0]]), H, torch.tensor([[True, False]]), damping=0.0)
    tensor([[0.0000, 1.5000]])
    """
    damped = damp(H, damping)
    work = check_weights(W, H)
    if pruned.shape != W.shape or pruned.dtype != torch.bool:
        raise OptionError(
            f"pruned must be a bool mask of W's shape {tuple(W.shape)}; got {tuple(pruned.shape)}, {pruned.dtype}."
        )
    return refit_rows(work, damped, pruned.to(W.device), budget_bytes).to(W.dtype)


def refit_rows(W: Tensor, damped: Damped, pruned: Tensor, budget_bytes: int = 1 << 30) -> Tensor:
    """`refit` for a damped H and W in float64."""
    masks = torch.unique(pruned, dim=0)
    removed = masks.sum(1)
    smaller = torch.minimum(removed, W.shape[1] - removed).double()
    # Small factorizations run at half the speed of products.
    if 2 / 3 * float((smaller**3).sum()) <= products_work(*W.shape):
        return _by_factors(W, damped, pruned, budget_bytes)
    V, done = _by_products(W, damped, pruned, budget_bytes)
    if not bool(done.all()):
        V[~done] = _by_factors(W[~done], damped, pruned[~done], budget_bytes)
    return V


def products_work(rows: int, d: int) -> float:
    """Multiply-adds of a refit by products, in float64's (those in float32 count half); infinity if d is too small."""
    return (ITERATIONS / 2 * rows + 256) * d**2 if d >= _LEAST else float("inf")


def _by_products(W: Tensor, damped: Damped, pruned: Tensor, budget_bytes: int) -> tuple[Tensor, Tensor]:
    """Refitted rows, and which of them (rows,) are as good as exact."""
    deflated = Deflated(damped)
    # Of a size that does not depend on the number of processes, nor does any last bit then.
    size = max(1, min(_TOGETHER, budget_bytes // deflated.bytes_of_row()))
    V, done = torch.zeros_like(W), torch.zeros(len(W), dtype=torch.int32, device=W.device)
    for start in together.own(torch.arange(0, len(W), size)).tolist():
        rows = slice(start, start + size)
        V[rows], done[rows] = deflated.refit(W[rows], pruned[rows])
    return together.add_up(V), together.add_up(done).bool()


def _by_factors(W: Tensor, damped: Damped, pruned: Tensor, budget_bytes: int) -> Tensor:
    """Refitted rows, by a factorization for each mask."""
    if W.device.type == "cpu":
        budget_bytes = min(budget_bytes, _CACHE_BYTES)
    masks, owner = torch.unique(pruned, dim=0, return_inverse=True)
    removed, shared = masks.sum(1), torch.bincount(owner, minlength=len(masks))
    gone = torch.where(pruned, W, 0.0)
    V = W.clone()
    for by_inverse in (True, False):
        columns = masks if by_inverse else ~masks
        which = ((2 * removed < W.shape[1]) == by_inverse) & (removed > 0)
        if not bool(which.any()):
            continue
        # Column d pads masks that are shorter than others of their batch: an equation of its own, x = 0.
        source = functional.pad(damped.inverse if by_inverse else damped.H, (0, 1, 0, 1))
        right = functional.pad(gone if by_inverse else gone @ damped.H, (0, 1))
        right[:, -1] = 0.0
        move = torch.zeros_like(right)
        for alike in map(together.own, _alike(which, columns.sum(1), shared)):
            if not len(alike):
                continue
            most, each = int(columns[alike[-1]].sum()), int(shared[alike[0]])
            for batch in batches(len(alike), 8 * (3 * most**2 + 2 * most * each + 1), budget_bytes):
                rows = _rows_of(owner, alike[batch], each)
                _solve(move, right, source, rows, _indices(columns[alike[batch]]))
        move = together.add_up(move)
        V += -(move[:, :-1] @ damped.inverse) if by_inverse else move[:, :-1]
    return V.masked_fill_(pruned, 0.0)


def _solve(move: Tensor, right: Tensor, source: Tensor, rows: Tensor, index: Tensor) -> None:
    """Solves source[S, S] x = right[S] for S in `index` (masks, k), each for its `rows` (masks, m); x into `move`."""
    system = source[index[:, :, None], index[:, None, :]]
    system.diagonal(dim1=1, dim2=2).add_(index == len(source) - 1)
    factor = torch.linalg.cholesky(system)
    at = (rows[:, :, None], index[:, None, :])
    move[at] = torch.cholesky_solve(right[at].mT, factor).mT


def _indices(columns: Tensor) -> Tensor:
    """The True positions of each row of `columns` (n, d), ascending, and d where a row has fewer than others."""
    d = columns.shape[1]
    most = int(columns.sum(1).max())
    index = torch.where(columns, torch.arange(d, device=columns.device), d)
    return index.sort(dim=1).values[:, :most]


def _rows_of(owner: Tensor, masks: Tensor, each: int) -> Tensor:
    """The rows (masks, each) that have each of these masks."""
    by_mask = owner.argsort(stable=True)
    first = torch.searchsorted(owner[by_mask], masks)
    return by_mask[first[:, None] + torch.arange(each, device=owner.device)]


def _alike(which: Tensor, size: Tensor, shared: Tensor) -> list[Tensor]:
    """Masks in runs that one batched solve may pad: shared by as many rows each, sizes ascending and within a fifth."""
    runs = []
    for count in torch.unique(shared[which]):
        index = (which & (shared == count)).nonzero()[:, 0]
        index = index[size[index].argsort(stable=True)]
        step = torch.log(size[index].double() + 8).div(0.2).floor()
        runs += [index[step == one] for one in torch.unique(step)]
    return runs
