# SPDX-License-Identifier: Apache-2.0
"""One entry a class at the least loss within a budget: the multiple-choice knapsack, by a dynamic program on fronts.

The usual program divides the budget into buckets and rounds every cost to one: rounded to the nearest it overshoots,
rounded up it wastes a bucket a class. Here a state keeps its exact cost, and the states after some classes are the
front of those that no other beats in both cost and loss. Only a front of more than 10 000 states is thinned, to the
best of each of so many buckets, so that small problems are solved exactly and no answer ever exceeds the budget.

The multiplier of Lagrange that a greedy walk down the convex hulls ends with bounds what any state can still become.
What cannot beat the greedy answer is dropped, which leaves few states in practice, and bounds how far the answer is
from best.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Pick", "cheapest", "pick"]

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

# What sums of floats may be off by, relative to the budget or to the loss.
_ROUNDING = 1e-12


@dataclasses.dataclass(frozen=True)
class Pick:
    """The index chosen in each class, what the choice costs and loses, and the least loss that any choice could have.

    `bound == loss` where the choice is proved to be the best.
    """

    indices: tuple[int, ...]
    cost: float
    loss: float
    bound: float


def cheapest(costs: Sequence[ArrayLike], losses: Sequence[ArrayLike]) -> Pick:
    """The least that can be spent, and of equally cheap entries the least loss.

    >>> cheapest([[4.0, 1.0, 1.0]], [[0.0, 3.0, 2.0]]).indices
    (2,)
    """
    classes = _classes(costs, losses)
    indices = tuple(int(np.lexsort((loss, cost))[0]) for cost, loss in classes)
    cost, loss = _totals(classes, indices)
    return Pick(indices, cost, loss, loss)


def pick(costs: Sequence[ArrayLike], losses: Sequence[ArrayLike], budget: float, states: int = 10_000) -> Pick | None:
    """The entry of each class with the least sum of losses at a sum of costs within `budget`; None if there is none.

    `costs[i]` and `losses[i]` are those of class i's entries: any finite numbers, costs of zero and losses below zero
    too. Never worse than the greedy walk down the convex hulls. Takes about classes x states x entries steps at worst.

    >>> pick([[4.0, 1.0], [4.0, 2.0]], [[0.0, 3.0], [0.0, 2.0]], budget=6.0)
    Pick(indices=(0, 1), cost=6.0, loss=2.0, bound=2.0)
    """
    classes = _classes(costs, losses)
    allowed = budget + _ROUNDING * max(abs(budget), *(float(np.abs(cost).max()) for cost, _ in classes), 0.0)
    if sum(float(cost.min()) for cost, _ in classes) > allowed:
        return None
    greedy, price = _walk(classes, allowed)
    greedy = _fill(classes, greedy, allowed)
    found, thinned = _program(classes, allowed, _totals(classes, greedy)[1], price, states)
    indices = greedy if found is None else _fill(classes, found, allowed)
    cost, loss = _totals(classes, indices)
    bound = min(loss, _dual(classes, price) - price * allowed) if thinned else loss
    return Pick(tuple(int(i) for i in indices), cost, loss, bound)


def _classes(costs: Sequence[ArrayLike], losses: Sequence[ArrayLike]) -> list[tuple[Floats, Floats]]:
    return [
        (np.asarray(cost, np.float64), np.asarray(loss, np.float64)) for cost, loss in zip(costs, losses, strict=True)
    ]


def _totals(classes: Sequence[tuple[Floats, Floats]], indices: Sequence[int] | Indices) -> tuple[float, float]:
    return (
        float(sum(cost[i] for (cost, _), i in zip(classes, indices, strict=True))),
        float(sum(loss[i] for (_, loss), i in zip(classes, indices, strict=True))),
    )


def _front(cost: Floats, loss: Floats) -> Indices:
    """Indices of what nothing else beats or equals in both, by ascending cost (and so by falling loss)."""
    order = np.lexsort((loss, cost))
    falling = loss[order]
    before = np.minimum.accumulate(np.concatenate(([np.inf], falling[:-1])))
    return order[falling < before]


def _hull(cost: Floats, loss: Floats) -> list[int]:
    """The corners of the lower convex hull, from the least loss down to the least cost."""
    hull: list[int] = []
    for i in _front(cost, loss)[::-1]:
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            # b lies on or above the line from a to i.
            if (loss[b] - loss[a]) * (cost[a] - cost[i]) < (loss[i] - loss[a]) * (cost[a] - cost[b]):
                break
            hull.pop()
        hull.append(int(i))
    return hull


def _walk(classes: Sequence[tuple[Floats, Floats]], allowed: float) -> tuple[Indices, float]:
    """From the least losses, the step of least loss a unit of cost, again and again, until the budget holds.

    Returns the entries and the last step's price, which is the multiplier of the best Lagrangian bound.
    """
    steps = []
    hulls = [_hull(cost, loss) for cost, loss in classes]
    for i, hull in enumerate(hulls):
        cost, loss = classes[i]
        steps += [((loss[b] - loss[a]) / (cost[a] - cost[b]), i, b) for a, b in itertools.pairwise(hull)]
    chosen = np.array([hull[0] for hull in hulls], np.intp)
    spent, price = _totals(classes, chosen)[0], 0.0
    for slope, i, entry in sorted(steps):
        if spent <= allowed:
            break
        spent += classes[i][0][entry] - classes[i][0][chosen[i]]
        chosen[i], price = entry, float(slope)
    return chosen, price


def _fill(classes: Sequence[tuple[Floats, Floats]], chosen: Indices, allowed: float) -> Indices:
    """Spends what is left on the single change that lowers the loss most, until none does."""
    chosen = chosen.copy()
    while True:
        slack = allowed - _totals(classes, chosen)[0]
        best, change = 0.0, None
        for i, (cost, loss) in enumerate(classes):
            fits = cost <= cost[chosen[i]] + slack
            entry = int(np.where(fits, loss, np.inf).argmin())
            gain = float(loss[chosen[i]] - loss[entry])
            if gain > best:
                best, change = gain, (i, entry)
        if change is None:
            return chosen
        chosen[change[0]] = change[1]


def _dual(classes: Sequence[tuple[Floats, Floats]], price: float) -> float:
    return float(sum((loss + price * cost).min() for cost, loss in classes))


def _program(
    classes: Sequence[tuple[Floats, Floats]], allowed: float, incumbent: float, price: float, states: int
) -> tuple[Indices | None, bool]:
    """The best choice that is better than `incumbent` (None if no state is), and whether any front was thinned."""
    worth = incumbent - _ROUNDING * abs(incumbent)
    least = np.array([cost.min() for cost, _ in classes])
    duals = np.array([(loss + price * cost).min() for cost, loss in classes])
    cost, loss = np.zeros(1), np.zeros(1)
    steps: list[tuple[Indices, Indices]] = []
    thinned = False
    for i, (costs, losses) in enumerate(classes):
        entries = _front(costs, losses)
        total_cost = (cost[:, None] + costs[entries]).ravel()
        total_loss = (loss[:, None] + losses[entries]).ravel()
        reach = total_loss + price * (total_cost - allowed) + duals[i + 1 :].sum()
        kept = np.flatnonzero((total_cost + least[i + 1 :].sum() <= allowed) & (reach < worth))
        kept = kept[_front(total_cost[kept], total_loss[kept])]
        if len(kept) > states:
            kept, thinned = _thin(kept, total_cost[kept], states), True
        if not len(kept):
            return None, thinned
        steps.append((kept // len(entries), entries[kept % len(entries)]))
        cost, loss = total_cost[kept], total_loss[kept]
    state = len(loss) - 1  # a front ends with its least loss
    chosen = np.empty(len(classes), np.intp)
    for i in range(len(classes) - 1, -1, -1):
        parent, entry = steps[i]
        chosen[i], state = entry[state], parent[state]
    return chosen, thinned


def _thin(kept: Indices, cost: Floats, states: int) -> Indices:
    """Of a front by ascending cost, the last in each of so many buckets of cost: the one of least loss."""
    bucket = np.floor((cost - cost[0]) * (states / (cost[-1] - cost[0]))).clip(max=states - 1)
    last: Indices = kept[np.append(bucket[1:] != bucket[:-1], True)]
    return last
