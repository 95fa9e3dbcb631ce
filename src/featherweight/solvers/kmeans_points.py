# SPDX-License-Identifier: Apache-2.0
"""Values on a line as points in order, each with its weight, and prefix sums by which any run is summed at once."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

__all__ = ["Floats", "Points", "points_of"]

Floats = NDArray[np.float64]
Places = NDArray[np.intp]

# Of more distinct values than this, neighbours count as one: 100 MB of sums, and no mean that moves by anything.
_MOST_POINTS = 1 << 22


@dataclasses.dataclass(frozen=True, eq=False)
class Points:
    """`x` (m,) ascending, and sums over the points before each place, (m + 1,).

    `weights` are Σ importance, `sums` Σ importance · (x - center), `squares` Σ importance · (x - center)², `counts` how
    many values there are. `energy` is Σ importance · value². Where a centroid is `pinned` at zero, the center is 0 and
    the `zeros` are not among the points.
    """

    x: Floats
    weights: Floats
    sums: Floats
    squares: Floats
    counts: NDArray[np.int64]
    center: float
    energy: float
    pinned: bool
    zeros: int

    @property
    def counted(self) -> int:
        """How many values the points stand for."""
        return int(self.counts[-1])

    def cuts(self, centroids: Floats) -> Places:
        """Where each centroid's run begins, and the end: (k + 1,). A point half way between two is the left one's."""
        middles = (centroids[1:] + centroids[:-1]) / 2
        return np.concatenate([[0], np.searchsorted(self.x, middles, side="right"), [len(self.x)]]).astype(np.intp)

    def means(self, cuts: Places, centroids: Floats | None = None) -> Floats:
        """The mean of each run; one that weighs nothing has its centroid's, or first point. A pinned zero stays 0."""
        weight, total = np.diff(self.weights[cuts]), np.diff(self.sums[cuts])
        weighs = weight > 0
        means = self.center + total / np.where(weighs, weight, 1.0)
        other = self.x[np.minimum(cuts[:-1], len(self.x) - 1)] if centroids is None else centroids
        if centroids is not None and self.pinned:
            weighs &= centroids != 0
        return np.where(weighs, means, other)

    def error(self, cuts: Places, centroids: Floats) -> float:
        """Σ importance · (x - centroid)² over all runs."""
        weight, total = np.diff(self.weights[cuts]), np.diff(self.sums[cuts])
        middle = centroids - self.center
        return float((np.diff(self.squares[cuts]) - middle * (2 * total - middle * weight)).sum())

    def split(self, centroids: Floats, more: int) -> Floats | None:
        """The centroids with `more` added (or as many as there is room for), the worst runs each cut in two; None where
        no run has two points and an error."""
        cuts = self.cuts(centroids)
        weight, total = np.diff(self.weights[cuts]), np.diff(self.sums[cuts])
        middle = centroids - self.center
        error = np.diff(self.squares[cuts]) - middle * (2 * total - middle * weight)
        error[np.diff(cuts) < 2] = 0.0
        worst = np.argsort(-error, kind="stable")[:more]
        worst = worst[error[worst] > 0]
        if not len(worst):
            return None
        halves = np.searchsorted(self.x, centroids[worst], side="right").clip(cuts[worst] + 1, cuts[worst + 1] - 1)
        left, right = (self._means(*ends) for ends in ((cuts[worst], halves), (halves, cuts[worst + 1])))
        kept = np.delete(centroids, worst) if not self.pinned else np.delete(centroids, worst[centroids[worst] != 0])
        if self.pinned and (at := np.flatnonzero(centroids[worst] == 0)).size:
            # Of zero's run the heavier side goes: zero itself stays where it is.
            lost = self.squares[[cuts[worst[at]][0], halves[at][0], cuts[worst[at] + 1][0]]]
            (left if lost[1] - lost[0] < lost[2] - lost[1] else right)[at] = 0.0
        return np.unique(np.concatenate([kept, left, right]))

    def _means(self, starts: Places, stops: Places) -> Floats:
        weight, total = self.weights[stops] - self.weights[starts], self.sums[stops] - self.sums[starts]
        weighs = weight > 0
        return np.where(weighs, self.center + total / np.where(weighs, weight, 1.0), self.x[starts])

    def within(self, most: int) -> Points:
        """About `most` points at most, each standing for neighbours: half of the cells by count, half by width."""
        if len(self.x) <= most:
            return self
        by_count = np.linspace(0, len(self.x), most // 2 + 1).astype(np.intp)
        by_width = np.searchsorted(self.x, np.linspace(self.x[0], self.x[-1], most // 2)[1:-1])
        marks = np.zeros(len(self.x) + 1, bool)
        for places in (by_count, by_width, np.searchsorted(self.x, 0.0)):
            marks[places] = True
        edges = np.flatnonzero(marks)
        return dataclasses.replace(
            self,
            x=self._means(edges[:-1], edges[1:]),
            weights=self.weights[edges],
            sums=self.sums[edges],
            squares=self.squares[edges],
            counts=self.counts[edges],
        )


def points_of(flat: NDArray[np.floating], weight: Floats | None, exponent: int, pinned: bool) -> Points:
    """The distinct values times 2^exponent, without zeros if one is `pinned` there; of very many, neighbours as one."""
    total = len(flat)
    if pinned:
        other = flat != 0
        flat, weight = flat[other], None if weight is None else weight[other]
    if weight is not None and not weight.any():
        weight = None  # all that weighs is zero
    if weight is None:
        ordered = np.sort(flat)
    else:
        order = np.argsort(flat)
        ordered, weight = flat[order], weight[order]
    first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(ordered) else np.empty(0, int)
    counts = np.append(first, len(ordered)).astype(np.int64)
    x = np.ldexp(ordered[first].astype(np.float64), exponent)
    weights = counts.astype(np.float64) if weight is None else _before(weight)[counts]
    own = np.diff(weights)
    center = 0.0 if pinned or not weights[-1] else float(own @ x) / float(weights[-1])
    moved = x - center
    energy = float(own @ (x * x))
    sums, squares = _before(own * moved), _before(own * moved * moved)
    zeros = total - len(ordered)
    return Points(x, weights, sums, squares, counts, center, energy, pinned, zeros).within(_MOST_POINTS)


def _before(values: Floats) -> Floats:
    """Sums of all that stands before each place, (n + 1,)."""
    sums = np.empty(len(values) + 1)
    sums[0] = 0.0
    np.cumsum(values, out=sums[1:])
    return sums
