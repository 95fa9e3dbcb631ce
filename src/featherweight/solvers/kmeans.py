# SPDX-License-Identifier: Apache-2.0
"""k-means on a line: the few numbers that stand for many, with weights, a number fixed at zero, and a price on bits.

Values are sorted once. A cluster is then a run of them, and prefix sums give its mean and its error at once, so that an
iteration costs k searches however many values there are, and the very best clusters are a shortest path
(`kmeans_exact`). Codes of fixed width want the least error. An entropy coder that follows makes frequent numbers cheap:
`rate` weighs error against those bits (`kmeans_rate`). NumPy, in float64, on the processor.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

from featherweight.errors import NumericalError, OptionError, check_whole, check_word
from featherweight.solvers.kmeans_exact import best_centroids
from featherweight.solvers.kmeans_points import Floats, Points, points_of
from featherweight.solvers.kmeans_rate import assign, settle, word_lengths

__all__ = ["STARTS", "Clustering", "kmeans"]

STARTS = ("linear", "density", "random", "exact")
_MOST_CLUSTERS = 1 << 16
_ITERATIONS = 10_000
# The exact optimum takes time in clusters x points: at most so many, and no fewer points than would serve anyone.
_WORK, _LEAST_POINTS, _MOST_EXACT = 1 << 21, 1 << 12, 1 << 10
_ROUNDS = 3
# Up to so many centroids, values are compared with each; a chunk of them stays in a cache.
_FEW, _CHUNK = 64, 1 << 15


@dataclasses.dataclass(frozen=True, eq=False)
class Clustering:
    """`centroids` (k,) ascending, float64; `index` (n,) of each value's own, in the smallest unsigned type.

    `error` is Σ importance · (value - centroid)², and `bits` what an ideal entropy coder makes of `index`, for each
    value.
    """

    centroids: Floats
    index: NDArray[np.unsignedinteger]
    error: float
    bits: float

    @property
    def values(self) -> Floats:
        """What stands for each value now, (n,)."""
        values: Floats = self.centroids[self.index]
        return values


def kmeans(
    values: NDArray[np.floating],
    clusters: int,
    *,
    importance: NDArray[np.floating] | None = None,
    start: str = "linear",
    zero: bool = False,
    rate: float = 0.0,
    seed: int = 0,
) -> Clustering:
    """At most `clusters` numbers for `values` (n,), so that Σ importance · (value - number)² is small.

    - start: `linear` spreads the first centroids evenly between the least and the largest value (best in Deep
      Compression, arXiv 1510.00149, section 3.1), `density` at quantiles, `random` on values drawn by `seed`; each ends
      in a local optimum (Lloyd 1982). `exact` is the global one, by dynamic programming (Wang & Song 2011), where there
      are at most 2²¹ / clusters distinct values (no fewer than 4096); of more it is that of so many cells of a
      histogram, and then Lloyd's from there.
    - zero: one centroid is 0 and stays there. Zeros are its own, and weigh nothing on others.
    - rate: minimises error + rate · bits instead (entropy-constrained, Chou, Lookabaugh & Gray 1989), where the error
      is a share of Σ importance · value² and the bits are those of an entropy coder, both per value that is not zero.
      Clusters that do not pay for themselves go. At 0.01, say, a bit must bring the error down by 1 % of the values'
      own square.

    With no more distinct values than clusters and no `rate`, these are the centroids and the error is 0. No value gives
    no centroid. Raises `NumericalError` for NaN or infinity, `OptionError` for clusters outside 1 to 65536 or
    importance that is negative.

    >>> found = kmeans(np.array([0.0, 0.9, 1.1, 5.0]), 3, zero=True)
    >>> found.centroids, found.values
    (array([0., 1., 5.]), array([0., 1., 1., 5.]))
    >>> found.bits
    1.5
    """
    _check(clusters, start, rate)
    flat = np.asarray(values).reshape(-1)
    if not np.isfinite(flat).all():
        raise NumericalError(
            f"{np.count_nonzero(~np.isfinite(flat))} of {len(flat)} values are NaN or infinite; none was clustered."
        )
    weight = None if importance is None else _importance(importance, flat)
    if not len(flat):
        return Clustering(np.empty(0), np.empty(0, np.uint8), 0.0, 0.0)
    # A power of two brings squares into reach of float64 and changes no digit.
    _, exponent = math.frexp(float(np.abs(flat).max()))
    points = points_of(flat, weight, -exponent, zero)
    if rate:
        scaled = np.ldexp(flat.astype(np.float64), -exponent)
        centroids, index = _priced(points, scaled, weight, _fit(points, clusters, start, seed), rate)
    else:
        centroids = _fit(points, clusters, start, seed)
        index = _nearest(flat, np.ldexp(centroids, exponent), len(points.x) + points.pinned <= clusters)
    return _clustering(flat, weight, np.ldexp(centroids, exponent), index)


def _check(clusters: int, start: str, rate: float) -> None:
    check_whole("kmeans", "clusters", clusters, least=1)
    if clusters > _MOST_CLUSTERS:
        raise OptionError(f"kmeans: clusters must be at most {_MOST_CLUSTERS}; got {clusters}.")
    check_word("kmeans", "start", start, STARTS)
    if start == "exact" and clusters > _MOST_EXACT:
        raise OptionError(f"kmeans: start='exact' is for at most {_MOST_EXACT} clusters; got {clusters}.")
    if not 0 <= rate < math.inf:
        raise OptionError(f"kmeans: rate must be 0 or more, 0.01 say; got {rate!r}.")


def _importance(importance: NDArray[np.floating], flat: NDArray[np.floating]) -> Floats | None:
    weight = np.asarray(importance, np.float64).reshape(-1)
    if weight.shape != flat.shape:
        raise OptionError(f"kmeans: importance has {weight.size} entries for {flat.size} values.")
    if not np.isfinite(weight).all() or (weight < 0).any():
        raise OptionError("kmeans: importance must be finite and nowhere below 0.")
    return weight if weight.any() else None


def _fit(points: Points, clusters: int, start: str, seed: int) -> Floats:
    """Centroids, ascending, of scaled points; 0 among them where the points have one that is fixed."""
    free = clusters - points.pinned
    if len(points.x) <= free:
        centroids = points.x
    elif not free:
        centroids = np.empty(0)
    elif start == "exact":
        coarse = points.within(max(_LEAST_POINTS, _WORK // clusters))
        centroids = best_centroids(coarse, free)
    else:
        centroids = _START[start](points, free, np.random.default_rng(seed))
    centroids = np.union1d(centroids, 0.0) if points.pinned else np.unique(centroids)
    return centroids if len(points.x) <= free else _lloyd(points, centroids, clusters)


def _priced(
    points: Points, x: Floats, weight: Floats | None, centroids: Floats, rate: float
) -> tuple[Floats, NDArray[np.unsignedinteger]]:
    """Centroids that are worth their words, and each value's; the price is relative to the values' own square."""
    price = rate * points.energy / max(1, points.counted)
    centroids, lengths = settle(points, centroids, price)
    # Values that weigh differently go to different centroids from one place: a few rounds with each value's own weight.
    for _ in range(0 if weight is None else _ROUNDS):
        index = _assigned(points, x, weight, centroids, lengths * price)
        number, mass = np.bincount(index, minlength=len(centroids)), np.bincount(index, weight, len(centroids))
        total = np.bincount(index, weight * x if weight is not None else x, len(centroids))
        moves = (mass > 0) & ~((centroids == 0) & points.pinned)
        centroids = np.where(moves, total / np.where(moves, mass, 1.0), centroids)
        lengths = word_lengths(number)
    return centroids, _assigned(points, x, weight, centroids, lengths * price)


def _assigned(
    points: Points, x: Floats, weight: Floats | None, centroids: Floats, prices: Floats
) -> NDArray[np.unsignedinteger]:
    index = assign(x, weight, centroids, prices)
    if points.pinned:
        index[x == 0] = np.searchsorted(centroids, 0.0)  # however rare zeros are: they stay
    return index


def _linear(points: Points, free: int, chance: np.random.Generator) -> Floats:
    return np.linspace(points.x[0], points.x[-1], free)


def _density(points: Points, free: int, chance: np.random.Generator) -> Floats:
    shares = (np.arange(free) + 0.5) / free * points.weights[-1]
    at = np.searchsorted(points.weights, shares, side="right").clip(1, len(points.x)) - 1
    return np.asarray(points.x[at])


def _random(points: Points, free: int, chance: np.random.Generator) -> Floats:
    weight = np.diff(points.weights)
    likely = int(np.count_nonzero(weight))
    drawn = chance.choice(len(points.x), min(free, likely), replace=False, p=weight / float(weight.sum()))
    return np.sort(points.x[drawn])


_START = {"linear": _linear, "density": _density, "random": _random}


def _lloyd(points: Points, centroids: Floats, clusters: int) -> Floats:
    """Means of what is nearest, until nothing moves; a cluster that has nothing is cut out of the worst one."""
    before = np.empty(0, np.intp)
    for _ in range(_ITERATIONS):
        cuts = points.cuts(centroids)
        means: Floats = points.means(cuts, centroids)
        empty = np.diff(cuts) == 0
        if points.pinned:
            empty &= centroids != 0
        means = np.asarray(means[~empty])
        missing = clusters - len(means)
        if missing and (grown := points.split(means, missing)) is not None:
            means = grown
        elif np.array_equal(cuts, before):
            return means
        before, centroids = cuts, np.unique(means)
    return centroids


def _nearest(flat: NDArray[np.floating], centroids: Floats, exact: bool) -> NDArray[np.unsignedinteger]:
    kind = np.min_scalar_type(len(centroids) - 1)
    if exact:  # between two neighbours of float64 there is no middle
        return np.asarray(np.searchsorted(centroids, flat).astype(kind))
    middles = (centroids[1:] + centroids[:-1]) / 2
    if len(middles) > _FEW or flat.dtype != np.float32:
        return np.asarray(np.searchsorted(middles, flat).astype(kind))
    # Comparing all at once beats searching for each; rounded down, a middle parts the same floats.
    narrow = middles.astype(np.float32)
    narrow = np.where(narrow > middles, np.nextafter(narrow, np.float32(-np.inf)), narrow)
    index = np.zeros(len(flat), np.uint8)
    for begin in range(0, len(flat), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        for middle in narrow:
            index[part] += flat[part] > middle
    return index


def _clustering(
    flat: NDArray[np.floating], weight: Floats | None, centroids: Floats, index: NDArray[np.unsignedinteger]
) -> Clustering:
    counts = np.bincount(index, minlength=len(centroids))
    used = counts > 0
    if not used.all():
        index = (np.cumsum(used) - 1).astype(np.min_scalar_type(max(0, int(used.sum()) - 1)))[index]
        centroids, counts = centroids[used], counts[used]
    gaps = flat - centroids[index]
    error = float(gaps @ gaps) if weight is None else float((gaps * gaps) @ weight)
    shares = counts / len(flat)
    return Clustering(centroids, index, error, float(-(shares * np.log2(shares)).sum()))
