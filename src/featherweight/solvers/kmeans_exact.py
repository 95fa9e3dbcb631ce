# SPDX-License-Identifier: Apache-2.0
"""The best clusters of points on a line, by dynamic programming: a shortest path over where runs end.

The least error of the first i points in j runs is a minimum over where the last run begins, and that beginning never
moves left as i grows (Grønlund et al. 2017, arXiv 1701.07204): each layer j is found by halving, all places of one
level at once, in O(k n log n) and k n numbers of memory.

With a centroid fixed at zero the problem falls apart: what is negative and what is positive each end in a run that goes
to zero, and only how many centroids either side gets joins them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from featherweight.solvers.kmeans_points import Floats, Points

__all__ = ["best_centroids"]

Places = NDArray[np.intp]
Sums = tuple[Floats, Floats, Floats]  # weights, sums and squares before each place


def best_centroids(points: Points, clusters: int) -> Floats:
    """The `clusters` centroids (or fewer, where that is no worse) of least error, besides the zero that is pinned."""
    whole = (points.weights, points.sums, points.squares)
    if not points.pinned:
        _, starts = _layers(whole, clusters)
        return points.means(_path(starts, min(clusters, len(points.x)), len(points.x)))
    middle = int(np.searchsorted(points.x, 0.0))
    # Both sides from their far end inwards: the positive one is turned around.
    left: Sums = (whole[0][: middle + 1], whole[1][: middle + 1], whole[2][: middle + 1])
    right: Sums = tuple((part[-1] - part[middle:])[::-1] for part in whole)
    sides = [(_layers(side, clusters), side[2]) for side in (left, right)]
    # With j centroids: the least error of a side, and where its run to zero begins.
    ends = [[int(np.argmin(cost + (squares[-1] - squares))) for cost in costs] for (costs, _), squares in sides]
    errors = [
        [float(cost[end] + squares[-1] - squares[end]) for cost, end in zip(costs, own, strict=True)]
        for ((costs, _), squares), own in zip(sides, ends, strict=True)
    ]
    shares = [
        (errors[0][j] + errors[1][min(clusters - j, len(errors[1]) - 1)], j)
        for j in range(min(clusters, len(errors[0]) - 1) + 1)
    ]
    j = min(shares)[1]
    other = min(clusters - j, len(errors[1]) - 1)
    below = _path(sides[0][0][1], j, ends[0][j])
    above = len(points.x) - _path(sides[1][0][1], other, ends[1][other])[::-1]
    return np.concatenate([points.means(cuts) for cuts in (below, above) if len(cuts) > 1] or [np.empty(0)])


def _path(starts: list[Places], clusters: int, end: int) -> Places:
    """Where the runs of the best `clusters` over the first `end` points begin, and the end."""
    cuts = [end]
    for j in range(clusters, 0, -1):
        cuts.append(int(starts[j][cuts[-1]]))
    return np.unique(cuts)  # an empty run is none


def _layers(before: Sums, clusters: int) -> tuple[list[Floats], list[Places]]:
    """For each number of runs from 0: least error of the first i points, and where the last run begins, (n + 1,)."""
    n = len(before[0]) - 1
    cost = np.full(n + 1, np.inf)
    cost[0] = 0.0
    costs, starts = [cost], [np.zeros(n + 1, np.intp)]
    for _ in range(min(clusters, n)):
        cost, start = _layer(before, costs[-1], starts[-1])
        costs.append(cost)
        starts.append(start)
    return costs, starts


def _layer(before: Sums, least: Floats, floor: Places) -> tuple[Floats, Places]:
    """One run more: `least` is the error with one fewer, and no run begins before that of `floor`."""
    n = len(least) - 1
    cost, start = np.empty(n + 1), np.zeros(n + 1, np.intp)
    cost[0] = 0.0
    stride = 1 << max(0, n.bit_length() - 1)
    while stride:
        i = np.arange(stride, n + 1, 2 * stride)
        low = np.maximum(start[i - stride], floor[i])
        beyond = i + stride
        high = np.minimum(np.where(beyond <= n, start[np.minimum(beyond, n)], i), i)
        lengths = np.maximum(high, low) - low + 1
        first = np.cumsum(lengths) - lengths
        begin = np.arange(int(lengths.sum())) - np.repeat(first - low, lengths)
        error = least[begin] + _error(before, begin, np.repeat(i, lengths))
        cost[i] = np.minimum.reduceat(error, first)
        hits = np.flatnonzero(error == np.repeat(cost[i], lengths))
        start[i] = begin[hits[np.searchsorted(hits, first)]]
        stride >>= 1
    return cost, start


def _error(before: Sums, begin: Places, end: Places) -> Floats:
    """Σ importance · (x - mean)² of runs."""
    weights, sums, squares = before
    weight, total = weights[end] - weights[begin], sums[end] - sums[begin]
    error = squares[end] - squares[begin] - total * total / np.where(weight > 0, weight, 1.0)
    return np.maximum(error, 0.0, out=error)
