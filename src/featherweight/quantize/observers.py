# SPDX-License-Identifier: Apache-2.0
"""Observers: what a stream of activations looks like, in constant memory, and the grid that suits it.

Smallest and largest are exact. Everything else is read off a histogram of 8192 bins over [-reach, reach], where reach
is a power of two: when a value falls outside, reach doubles and bins merge in pairs, so that no count is ever split and
the result does not depend on the order of the batches.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

__all__ = ["OBSERVERS", "Histogram", "Range", "grid_of", "range_of"]

OBSERVERS = ("minmax", "percentile", "mse")
_BINS = 8192
_PIECE = 1 << 22  # values at a time: float32 counts are exact up to 2^24
_SHARES = torch.linspace(1.0, 0.01, 100, dtype=torch.float64)


@dataclasses.dataclass(frozen=True)
class Range:
    """Where a layer's values are taken to lie; zero is always within."""

    low: float
    high: float


class Histogram:
    """What was seen of one tensor over all batches: `low`, `high`, how many values, and roughly where they lie.

    >>> seen = Histogram()
    >>> seen.add(torch.tensor([-1.0, 0.0, 3.0])), seen.add(torch.tensor([8.0]))
    (True, True)
    >>> seen.low, seen.high, seen.seen
    (-1.0, 8.0, 4)
    """

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf
        self.seen = 0
        self._zeros = 0
        self._exponent: int | None = None
        self._counts = torch.zeros(_BINS, dtype=torch.float64)

    def add(self, values: Tensor) -> bool:
        """Takes values in; False, and nothing is taken in, where any of them is NaN or infinite."""
        flat = values.detach().flatten().float()
        if not len(flat):
            return True
        low, high = (float(end) for end in torch.aminmax(flat))
        if not (math.isfinite(low) and math.isfinite(high)):
            return False
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.seen += len(flat)
        most = max(-low, high)
        if most > 0:
            self._reach(math.frexp(most)[1])  # most < 2^exponent
        for piece in torch.split(flat, _PIECE):
            piece = piece[piece != 0]
            if len(piece):
                edge = self.reach
                self._counts += torch.histc(piece, _BINS, -edge, edge).double().cpu()
        self._zeros = self.seen - int(self._counts.sum())
        return True

    @property
    def reach(self) -> float:
        """The histogram's outer edge; 0 where nothing but zeros was seen."""
        return 0.0 if self._exponent is None else math.ldexp(1.0, self._exponent)

    def _reach(self, exponent: int) -> None:
        if self._exponent is None:
            self._exponent = exponent
        while self._exponent < exponent:
            merged = torch.zeros_like(self._counts)
            merged[_BINS // 4 : _BINS - _BINS // 4] = self._counts.view(-1, 2).sum(1)
            self._counts, self._exponent = merged, self._exponent + 1

    def bins(self) -> tuple[Tensor, Tensor]:
        """Centres of the bins that hold values, and their counts; zeros, which are on every grid, left out."""
        width = 2 * self.reach / _BINS
        held = self._counts.nonzero()[:, 0]
        return (held.double() + 0.5) * width - self.reach, self._counts[held]

    def percentile(self, share: float) -> Range:
        """The range beyond either end of which lie at most `100 - share` percent of values, to the width of a bin."""
        centres, counts = self.bins()
        beyond = (1 - share / 100) * self.seen
        half = self.reach / _BINS
        low, high = self.low, self.high
        below, above = centres < 0, centres > 0
        if low < 0:
            inner = centres[below][counts[below].cumsum(0) > beyond]
            low = max(low, float(inner[0]) - half) if len(inner) else 0.0
        if high > 0:
            inner = centres[above][counts[above].flip(0).cumsum(0).flip(0) > beyond]
            high = min(high, float(inner[-1]) + half) if len(inner) else 0.0
        return Range(min(low, 0.0), max(high, 0.0))


def range_of(seen: Histogram, observer: str, bits: int, symmetric: bool, percentile: float = 99.99) -> Range:
    """The range that an observer takes: all values, a percentile of them, or where rounding errs least.

    `mse` searches each end in steps of a hundredth for the least Σ (x - nearest(x))² over the histogram, one end after
    the other until neither moves. Above 8 bits nothing is gained by leaving values out, and it is `minmax`.
    """
    everything = Range(min(seen.low, 0.0), max(seen.high, 0.0)) if seen.seen else Range(0.0, 0.0)
    if observer == "percentile" and seen.seen:
        return seen.percentile(percentile)
    if observer == "mse" and bits <= 8 and everything.high > everything.low:
        return _least_error(seen, everything, bits, symmetric)
    return everything


def _least_error(seen: Histogram, everything: Range, bits: int, symmetric: bool) -> Range:
    centres, counts = seen.bins()
    if symmetric:
        most = max(-everything.low, everything.high)
        errors = _errors(centres, counts, -most * _SHARES, most * _SHARES, bits, symmetric)
        most *= float(_SHARES[int(errors.argmin())])
        return Range(max(-most, everything.low), min(most, everything.high))
    low, high = everything.low, everything.high
    for _ in range(4):
        before = low, high
        if everything.high > 0:
            ends = everything.high * _SHARES
            high = float(ends[int(_errors(centres, counts, ends * 0 + low, ends, bits, symmetric).argmin())])
        if everything.low < 0:
            ends = everything.low * _SHARES
            low = float(ends[int(_errors(centres, counts, ends, ends * 0 + high, bits, symmetric).argmin())])
        if (low, high) == before:
            break
    return Range(low, high)


def _errors(centres: Tensor, counts: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Σ counts · (x - nearest(x))² for each pair of ends."""
    scale, zero_point = _grids(low, high, bits, symmetric)
    least, most = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    scale, zero_point = scale[:, None], zero_point[:, None]
    nearest = ((centres / scale + zero_point).round_().clamp_(least, most) - zero_point) * scale
    return (nearest - centres).square_() @ counts


def _grids(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    least, most = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if symmetric:
        scale = torch.maximum(-low, high) / max(most, 1)
        zero_point = torch.zeros_like(scale)
    else:
        scale = (high - low) / (most - least)
        zero_point = (least - low / scale).round()
    scale = scale.float().double()
    flat = ~(scale >= torch.finfo(torch.float32).tiny)
    return scale.masked_fill(flat, 1.0), zero_point.masked_fill(flat, 0.0)


def grid_of(within: Range, bits: int, symmetric: bool) -> tuple[float, int]:
    """Scale (a float32 number) and zero point of the grid over a range; one of no width gets scale 1.

    >>> grid_of(Range(0.0, 25.5), 8, symmetric=False)
    (0.10000000149011612, -128)
    """
    low, high = (torch.tensor([end], dtype=torch.float64) for end in (within.low, within.high))
    scale, zero_point = _grids(low, high, bits, symmetric)
    return float(scale), int(zero_point)
