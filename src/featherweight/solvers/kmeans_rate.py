# SPDX-License-Identifier: Apache-2.0
"""Clusters that pay for their bits: error plus a price times the length of an entropy coder's words (Chou et al. 1989).

A value goes where its error and its word together cost least, so that frequent numbers take in more than is nearest to
them, and rare ones die out. It is what makes weights with many zeros small: zero's word is a tenth of a bit, and some small
weights are not worth theirs (DeepCABAC, arXiv 1907.11900, section 3).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from featherweight.solvers.kmeans_points import Floats, Points

__all__ = ["assign_at", "reduce_rate"]

_ITERATIONS = 1000
_CHUNK = 1 << 16


def reduce_rate(points: Points, centroids: Floats, price: float) -> tuple[Floats, Floats]:
    """Centroids of a least error + price · bits near the ones given, and the lengths of their words in bits."""
    own, weight, count = points.x, np.diff(points.weights), np.diff(points.counts)
    cuts = points.cuts(centroids)
    index = np.repeat(np.arange(len(centroids)), np.diff(cuts))
    total = points.counted + points.zeros
    moments = weight * own
    best = np.inf
    lengths = np.zeros(len(centroids))
    for _ in range(_ITERATIONS):
        k = len(centroids)
        mass, moment = np.bincount(index, weight, k), np.bincount(index, moments, k)
        number = np.bincount(index, count, k)
        zero = (centroids == 0) & points.pinned
        number[zero] += points.zeros
        centroids = np.where((mass > 0) & ~zero, moment / np.where(mass > 0, mass, 1.0), centroids)
        kept = (number > 0) | zero
        centroids, number = centroids[kept], number[kept]
        lengths = np.log2(total) - np.log2(np.maximum(number, 1.0))
        index, cost = _cheapest(own, weight, count, centroids, lengths * price)
        if cost >= best * (1 - 1e-9):
            break
        best = cost
    return centroids, lengths


def _cheapest(
    x: Floats, weight: Floats, count: NDArray[np.int64], centroids: Floats, prices: Floats
) -> tuple[NDArray[np.intp], float]:
    """Where each point costs least, and what all cost together."""
    least = np.full(len(x), np.inf)
    index = np.zeros(len(x), np.intp)
    for j, (centroid, price) in enumerate(zip(centroids, prices, strict=True)):
        cost = weight * (x - centroid) ** 2 + count * price
        better = cost < least
        least = np.where(better, cost, least)
        index[better] = j
    return index, float(least.sum())


def assign_at(x: Floats, weight: Floats | None, centroids: Floats, prices: Floats) -> NDArray[np.unsignedinteger]:
    """Where each value costs least: importance · (value - centroid)² and the price of that centroid's word."""
    index = np.empty(len(x), np.min_scalar_type(max(0, len(centroids) - 1)))
    for begin in range(0, len(x), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        own = x[part]
        scale = np.ones(len(own)) if weight is None else weight[part]
        index[part] = _cheapest(own, scale, np.ones(len(own), np.int64), centroids, prices)[0]
    return index
