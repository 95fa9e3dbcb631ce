# SPDX-License-Identifier: Apache-2.0
"""Which units go: by their scores, or by how much each row's next removal costs.

For recorded eliminations the paper takes, again and again, the row whose next loss is smallest. Losses within a row
fall as often as they rise, so a dear step hides the cheap ones behind it. Pooling a step with those behind it wherever
that lowers the average (the slopes of the greatest convex minorant of the row's running loss) shows the true price;
rows of ascending losses are also what makes the greedy choice optimal, but for the one pool that is cut where the count
is met.
"""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from featherweight.solvers.units import Units

__all__ = ["allocate", "ascending", "cheapest"]


def ascending(losses: Tensor, sizes: Tensor | None = None) -> Tensor:
    """Each row's losses (rows, steps), divided by the steps' sizes and pooled so that they never fall.

    Sums over a pool, each value times its size, are kept.

    >>> ascending(torch.tensor([[3.0, 1.0, 5.0]])).tolist()
    [[2.0, 2.0, 5.0]]
    """
    ones = torch.ones_like(losses) if sizes is None else sizes
    pooled = [_pool(*pair) for pair in zip(losses.cpu().tolist(), ones.cpu().tolist(), strict=True)]
    return torch.tensor(pooled, dtype=torch.float64).view(losses.shape).to(losses.device)


def allocate(prices: Tensor, count: int, sizes: Tensor | None = None) -> Tensor:
    """How many steps each row takes until sizes of all steps taken reach `count`, cheapest next step first: (rows,).

    `prices` (rows, steps) are a step's loss over its size; for this to be the cheapest choice they must ascend within a
    row (see `ascending`). Ties go to the upper row. Without sizes every step counts one.

    >>> allocate(torch.tensor([[1.0, 4.0], [2.0, 3.0]]), 3).tolist()
    [1, 2]
    """
    rows = prices.cpu().tolist()
    weights = None if sizes is None else sizes.cpu().tolist()
    taken = [0] * len(rows)
    heap = [(row[0], i) for i, row in enumerate(rows) if row]
    heapq.heapify(heap)
    reached = 0
    while heap and reached < count:
        i = heap[0][1]
        reached += 1 if weights is None else weights[i][taken[i]]
        taken[i] += 1
        if taken[i] < len(rows[i]):
            heapq.heapreplace(heap, (rows[i][taken[i]], i))
        else:
            heapq.heappop(heap)
    return torch.tensor(taken).to(prices.device)


def cheapest(scores: Tensor, units: Units, rows: int, zeros: int, per_row: bool = False) -> Tensor:
    """The units of lowest score (row groups, n) whose weights together reach `zeros`; for N:M each group's quota.

    Scores of units of different sizes are compared by the weight. With `per_row` each row group loses an equal share.

    >>> units = Units(torch.tensor([[0], [1]]))
    >>> cheapest(torch.tensor([[1.0, 4.0], [2.0, 3.0]]), units, rows=2, zeros=2).tolist()
    [[True, False], [True, False]]
    """
    if units.group is not None and units.quota is not None:
        return _lowest_of_groups(scores, units.group.to(scores.device), units.quota.to(scores.device))
    sizes = units.weights_of_each(len(scores), rows).to(scores.device)
    prices = scores / sizes
    if per_row:
        order = prices.argsort(dim=1, stable=True)
        before = sizes.gather(1, order).cumsum(1) - sizes.gather(1, order)
        reached = (zeros * sizes.sum(1).cumsum(0) / sizes.sum()).round()
        share = reached.diff(prepend=reached.new_zeros(1))[:, None]
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, before < share)
    if bool((sizes == sizes[0, 0]).all()):
        return _lowest(prices, -(-zeros // int(sizes[0, 0])))
    order = prices.flatten().argsort(stable=True)
    before = sizes.flatten()[order].cumsum(0) - sizes.flatten()[order]
    chosen = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    return chosen.scatter_(0, order, before < zeros).view_as(scores)


def _lowest(prices: Tensor, count: int) -> Tensor:
    """The `count` lowest of all prices (rows, n), of equals the first: what a stable sort gives, many times faster."""
    if not 0 < count < prices.numel():
        return torch.full_like(prices, count > 0, dtype=torch.bool)
    flat = prices.flatten()
    threshold = flat.kthvalue(count).values
    chosen = flat < threshold
    ties = (flat == threshold).nonzero()[:, 0]
    chosen[ties[: count - int(chosen.sum())]] = True
    return chosen.view(prices.shape)


def _lowest_of_groups(scores: Tensor, group: Tensor, quota: Tensor) -> Tensor:
    """The `quota` (groups,) lowest scores (rows, n) of each group, of consecutive columns; of equals the first."""
    m, rest = divmod(len(group), len(quota))
    if not rest and m <= 16 and bool((group == torch.arange(len(group), device=group.device) // m).all()):
        # Small groups are ranked by comparing all pairs, several times faster than sorting them.
        values = scores.view(len(scores), -1, m)
        rank = torch.zeros_like(values, dtype=torch.uint8)
        for j in range(m):
            one = values[..., j : j + 1]
            rank[..., :j] += one < values[..., :j]
            rank[..., j + 1 :] += one <= values[..., j + 1 :]
        return (rank < quota[:, None]).view(scores.shape)
    by_score = scores.argsort(dim=1, stable=True)
    by_group = by_score.gather(1, group[by_score].argsort(dim=1, stable=True))
    sizes = torch.bincount(group)
    place = torch.arange(len(group), device=group.device) - (sizes.cumsum(0) - sizes)[group.sort().values]
    goes = place < quota[group.sort().values]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, by_group, goes.expand_as(scores))


def _pool(losses: list[float], sizes: list[float]) -> list[float]:
    pools: list[tuple[float, float, int]] = []  # loss, size, steps
    for loss, size in zip(losses, sizes, strict=True):
        steps = 1
        while pools and pools[-1][0] * size > loss * pools[-1][1]:
            before = pools.pop()
            loss, size, steps = loss + before[0], size + before[1], steps + before[2]
        pools.append((loss, size, steps))
    return [loss / size for loss, size, steps in pools for _ in range(steps)]
