# SPDX-License-Identifier: Apache-2.0
"""Which couplings go: pure functions of scores, floors and costs. No model, no data, no options.

Every ranking is an order in which couplings would go, and a target is how far to go in it. In a group the lowest score
goes first, always; rankings differ in how groups take turns:

- greedy: the lowest score per freed cost, counted anew after every removal (Comb, Prune, Distill, arXiv 2408.03046).
- global: the lowest score per freed cost, as it is before the first removal.
- local: every group loses the same share.
- isomorphic: groups of the same structure share one ranking, and every structure loses the same share (Isomorphic
  Pruning, arXiv 2407.04616): scores of unlike layers are not compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence

import numpy as np

__all__ = ["RANKINGS", "Ladder", "counts_after", "greedy", "ladder", "nearest_to", "ranked"]

RANKINGS = ("greedy", "global", "local", "isomorphic")
# Divides scores: of the couplings kept and those about to go in each group (groups,), to what a score is divided by.
Divide = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Ladder:
    """One group's couplings in the order in which they would go, and the rungs at which it may stop.

    `order` are indices of couplings, the lowest score first; after rung i, `ends[i]` of them are gone, which cost the
    sum of their `scores`, `weights[i]` for the rung by itself. `kept` couplings are there before the first.
    """

    size: int
    kept: int
    order: np.ndarray
    ends: np.ndarray
    weights: np.ndarray


def ladder(scores: np.ndarray, gone: np.ndarray, least: int = 1, multiple: int = 1) -> Ladder:
    """The ladder of a group with `scores` (size,), of which some are `gone` (bool, size) for good.

    At least `least` stay, and never none. With a `multiple`, rungs are where a multiple of it is kept; a group that is
    no larger than it stays whole. Equal scores go in order of position.

    >>> found = ladder(np.array([3.0, 1.0, 2.0, 0.5, 9.0]), np.zeros(5, dtype=bool), multiple=2)
    >>> found.order.tolist(), found.ends.tolist(), found.weights.tolist()
    ([3, 1, 2], [1, 3], [0.5, 3.0])
    """
    kept = len(scores) - int(gone.sum())
    floor = max(1, least)
    first = (kept - 1) // multiple * multiple
    counts = np.arange(first, floor - 1, -multiple)
    counts = counts[counts >= max(floor, multiple)]
    ends = kept - counts
    order = np.argsort(np.where(gone, np.inf, scores), kind="stable")[: int(ends[-1]) if len(ends) else 0]
    order = order[~gone[order]]
    sums = np.concatenate([[0.0], np.cumsum(scores[order])])
    return Ladder(len(scores), kept, order, ends, np.diff(sums[np.concatenate([[0], ends]).astype(np.intp)]))


def counts_after(ladders: Sequence[Ladder], path: Sequence[int] | np.ndarray) -> np.ndarray:
    """Couplings kept of each group (groups,) once the rungs of a path are gone."""
    rungs = np.bincount(np.asarray(path, dtype=np.intp), minlength=len(ladders))
    kept = [ladder.kept - (int(ladder.ends[n - 1]) if n else 0) for ladder, n in zip(ladders, rungs, strict=True)]
    return np.array(kept, dtype=np.float64)


def greedy(ladders: Sequence[Ladder], divide: Divide) -> np.ndarray:
    """The path, as group numbers in the order in which each loses its next rung: always the lowest score per cost.

    What a group's next rung costs is counted anew after every removal. A rung that frees nothing goes last.
    """
    rungs = np.zeros(len(ladders), dtype=np.intp)
    total = np.array([len(ladder.ends) for ladder in ladders])
    kept = np.array([float(ladder.kept) for ladder in ladders])
    going, scores = np.zeros(len(ladders)), np.full(len(ladders), np.inf)
    for i in range(len(ladders)):
        going[i], scores[i] = _next(ladders[i], 0)
    path = np.empty(int(total.sum()), dtype=np.intp)
    for step in range(len(path)):
        chosen = int(np.argmin(_per_cost(scores, divide(kept, going), rungs < total)))
        path[step] = chosen
        kept[chosen] -= going[chosen]
        rungs[chosen] += 1
        going[chosen], scores[chosen] = _next(ladders[chosen], int(rungs[chosen]))
    return path


def _next(ladder: Ladder, rung: int) -> tuple[float, float]:
    """How many couplings a group's next rung takes, and their score."""
    if rung >= len(ladder.ends):
        return 0.0, np.inf
    return float(ladder.ends[rung] - (ladder.ends[rung - 1] if rung else 0)), float(ladder.weights[rung])


def _per_cost(scores: np.ndarray, cost: np.ndarray, open_: np.ndarray) -> np.ndarray:
    """Scores per cost; where a rung frees nothing larger than any number, where there is none left infinite."""
    frees = cost > 0
    ratio = np.where(frees, scores / np.where(frees, cost, 1.0), np.finfo(np.float64).max)
    return np.where(open_, ratio, np.inf)


def ranked(ladders: Sequence[Ladder], ranking: str, divide: Divide, alike: Sequence[Hashable]) -> np.ndarray:
    """The path by `ranking`; `alike` names each group's structure, equal for groups that are ranked together."""
    if ranking == "greedy":
        return greedy(ladders, divide)
    kept = np.array([float(ladder.kept) for ladder in ladders])
    keys = []
    if ranking == "global":
        unit = divide(kept, np.ones(len(ladders)))
        for ladder, cost in zip(ladders, unit, strict=True):
            each = np.diff(ladder.ends, prepend=0)
            keys.append(_per_cost(ladder.weights, cost * each, np.ones(len(each), dtype=bool)))
    elif ranking == "local":
        keys = [(ladder.size - ladder.kept + ladder.ends) / ladder.size for ladder in ladders]
    else:
        keys = _by_structure(ladders, alike)
    # A later rung of a group never goes before an earlier one, whatever the scores of whole rungs.
    flat = np.concatenate([np.maximum.accumulate(key) for key in keys]) if keys else np.empty(0)
    groups = np.repeat(np.arange(len(ladders)), [len(ladder.ends) for ladder in ladders])
    return groups[np.argsort(flat, kind="stable")]


def _by_structure(ladders: Sequence[Ladder], alike: Sequence[Hashable]) -> list[np.ndarray]:
    """For each rung the share of its structure's couplings gone with it, ranked by score within the structure."""
    keys = [np.zeros(len(ladder.ends)) for ladder in ladders]
    for structure in dict.fromkeys(alike):
        members = [i for i, own in enumerate(alike) if own == structure]
        size = sum(ladders[i].size for i in members)
        before = size - sum(ladders[i].kept for i in members)
        each = [np.diff(ladders[i].ends, prepend=0) for i in members]
        mean = [np.maximum.accumulate(ladders[i].weights / n) for i, n in zip(members, each, strict=True)]
        order = np.argsort(np.concatenate(mean), kind="stable")
        shares = np.empty(len(order))
        shares[order] = (before + np.cumsum(np.concatenate(each)[order])) / size
        for i, own in zip(members, np.split(shares, np.cumsum([len(n) for n in each])[:-1]), strict=True):
            keys[i] = own
    return keys


def nearest_to(
    path: np.ndarray, ladders: Sequence[Ladder], ratio: Callable[[np.ndarray], float], tolerance: float
) -> np.ndarray:
    """The part of a path after which `ratio(kept)`, which falls along it, is 1, or as near as it gets.

    The shortest part with a ratio of at most 1, unless one rung less is within `tolerance` above 1 and nearer; where a
    large last rung overshoots by more than `tolerance`, smaller ones are tried in its place. The whole path where none
    reaches 1.
    """
    low, high = 0, len(path)
    while low < high:
        middle = (low + high) // 2
        if ratio(counts_after(ladders, path[:middle])) <= 1:
            high = middle
        else:
            low = middle + 1
    best = path[:low]
    if low == 0 or (reached := ratio(counts_after(ladders, best))) >= 1 - tolerance:
        return best
    others = [path[: low - 1]]
    rungs = np.bincount(others[0], minlength=len(ladders))
    for group in dict.fromkeys(path[low:].tolist()):
        if rungs[group] < len(ladders[group].ends):
            others.append(np.append(path[: low - 1], group))
    for other in others:
        found = ratio(counts_after(ladders, other))
        if found <= 1 + tolerance and abs(found - 1) < abs(reached - 1):
            best, reached = other, found
    return best
