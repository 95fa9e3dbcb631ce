# SPDX-License-Identifier: Apache-2.0
"""Clusters that pay for their bits: error plus a price times the length of an entropy coder's words (Chou et al. 1989).

A value goes where its error and its word together cost least, so that frequent numbers take in more than is nearest to
them, and rare ones die out. It is what makes weights with many zeros small: zero's word is a tenth of a bit, and some
small weights are not worth theirs (DeepCABAC, arXiv 1907.11900, section 3).

What a centroid costs is a parabola over the line, and all have the same width where values weigh alike: clusters are
then runs, cut where the lower envelope of lines bends, and an iteration is a matter of k.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from featherweight.solvers.kmeans_points import Floats, Points

__all__ = ["assign", "settle"]

_ITERATIONS, _TOLERANCE = 1000, 1e-7
_CHUNK = 1 << 16


def settle(points: Points, centroids: Floats, price: float) -> tuple[Floats, Floats]:
    """Centroids of a least error + price · bits near the ones given, and the lengths of their words in bits.

    Points count as if all weighed the same when it is decided where they go, and by their weights in means.
    """
    each = price * points.counted / float(points.weights[-1]) if points.counted else price
    cuts = points.cuts(centroids)
    best, lengths = np.inf, np.zeros(len(centroids))
    for _ in range(_ITERATIONS):
        centroids = points.means(cuts, centroids)
        number = np.diff(points.counts[cuts])
        zero = (centroids == 0) & points.pinned
        number = number + np.where(zero, points.zeros, 0)
        kept = (number > 0) | zero
        cuts = np.append(cuts[:-1][kept], cuts[-1])
        centroids, number = centroids[kept], number[kept]
        lengths = word_lengths(number)
        cost = points.error(cuts, centroids) + price * float(number @ lengths)
        if cost >= best * (1 - _TOLERANCE):
            break
        best = cost
        cuts = np.concatenate([[0], np.searchsorted(points.x, _bends(centroids, each * lengths)), [len(points.x)]])
    return centroids, lengths


def word_lengths(number: NDArray[np.integer]) -> Floats:
    """-log2 of each one's share; of one that never occurs, as if it did once."""
    lengths: Floats = np.log2(max(1, int(number.sum()))) - np.log2(np.maximum(number, 1))
    return lengths


def _bends(centroids: Floats, prices: Floats) -> Floats:
    """Where each centroid becomes cheapest, from the second on, ascending; one that never is begins with the next."""
    constants = centroids**2 + prices
    hull, starts = [0], [-np.inf]
    for j in range(1, len(centroids)):
        start = -np.inf
        while hull:
            i = hull[-1]
            start = (constants[j] - constants[i]) / (2 * (centroids[j] - centroids[i]))
            if start > starts[-1]:
                break
            hull.pop()
            starts.pop()
        hull.append(j)
        starts.append(start)
    begins = np.full(len(centroids), np.inf)
    begins[hull] = starts
    return np.minimum.accumulate(begins[::-1])[::-1][1:]


def assign(x: Floats, weight: Floats | None, centroids: Floats, prices: Floats) -> NDArray[np.unsignedinteger]:
    """Where each value costs least: importance · (value - centroid)² and the price of that centroid's word."""
    if weight is None:
        return np.searchsorted(_bends(centroids, prices), x).astype(np.min_scalar_type(len(centroids) - 1))
    index = np.zeros(len(x), np.min_scalar_type(len(centroids) - 1))
    for begin in range(0, len(x), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        own, scale = x[part], weight[part]
        least = np.full(len(own), np.inf)
        for j, (centroid, price) in enumerate(zip(centroids, prices, strict=True)):
            cost = scale * (own - centroid) ** 2 + price
            better = cost < least
            least = np.where(better, cost, least)
            index[part][better] = j
    return index
