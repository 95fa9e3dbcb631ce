# SPDX-License-Identifier: Apache-2.0
"""The grid that values lie on to the last bit, found from the values alone.

Every value of a row is fl(s k) for one scale s and integers k. The least magnitude a of a row is j·s for some small
integer j, and the range of the row allows few such j: an ordinary row of 768 floats has none at 8 bits, one on a grid
nearly always has j = 1. For each j from 1 on, s is a / j to within the rounding of a, so k = round(w j / a) wherever
that rounding is below half a step; the first j for which all w j / a are that close to integers gives the coarsest
grid. Each k then bounds s by the half-units above and below w; what is in all these intervals is one float32 or a few,
of which the one with most trailing zeros is taken. The grid is then rounded to and compared, bit for bit: what is
returned is never wrong.

What can be missed: a value w = k s that is known to a relative u only (2^-24 in float32, 2^-11 in float16, 2^-8 in
bfloat16) tells k where 2 u k < 1/2, which holds for all 16 bits in float32. In half precisions the scale is narrowed
down by small k before large k are read, as far as the type's own precision goes: 11 bits in float16, 8 in bfloat16,
where a few grids of 7 and 8 bits are not found because k stays ambiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from featherweight.errors import OptionError
from featherweight.grids.grid import MOST_BITS, Grid

__all__ = ["read_grid"]

_PROBES = 8  # values of a row that a candidate is first tried on
_MANY = 4096  # candidates tried at once, at most
_ROUNDS = 8  # of narrowing a scale down from values of half precision
_ENDS = 3  # float32 numbers that may be too many at an end of a scale's interval
_BLOCK = 1 << 17  # elements of a block of rows: its temporaries stay in the cache
_BUDGET = 1 << 20  # elements of a block of candidates, or of a part of a long chunk
_LONG = 1 << 18  # columns of a chunk beyond which its distinct values are found first
_SAMPLE = 16, 1024  # rows and columns that are looked at first
_PRECISION = {torch.float16: 11, torch.bfloat16: 8}
_UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24, torch.float64: 2.0**-52}


def read_grid(W: Tensor, *, most_bits: int = 8, chunk: int | None = None) -> Grid | None:
    """The coarsest grid of at most `most_bits` (1 to 16) that all of W (rows, d) lies on, or None where there is none.

    One scale per row, or per `chunk` columns of it. W is on it to the last bit: `grid.nearest(W)` is W, but for the
    sign of zeros, which a grid has not. `bits` are the fewest that hold every row's integers; zero points are 0 where
    that takes no more bits. Rows whose integers share a factor come back with a larger scale and smaller integers; a
    row of zeros has scale 1. One bit is found where no value is zero and each chunk has one magnitude.

    Ordinary floats are told from a few rows, at once; 22 million values on a grid take about a second. A row of one or
    two magnitudes is on many grids, by chance: what it is worth to store it so is for the caller to count.

    >>> W = torch.tensor([[0.5, -1.5, 0.0], [0.0, 0.2, 0.1]])
    >>> grid = read_grid(W)
    >>> grid.bits, grid.scale.tolist(), grid.integers(W).tolist()
    (3, [[0.5], [0.10000000149011612]], [[1, -3, 0], [0, 2, 1]])
    >>> read_grid(torch.randn(4, 100)) is None
    True
    """
    if type(most_bits) is not int or not 1 <= most_bits <= MOST_BITS:
        raise OptionError(f"most_bits must be 1 to {MOST_BITS}; got {most_bits!r}.")
    if chunk is not None and chunk < 1:
        raise OptionError(f"chunk is the number of columns that share a scale, 1 or more; got {chunk!r}.")
    W = W.detach()
    rows, d = W.shape
    if W.dtype not in _UNIT or not W.numel():
        return None
    chunk = d if chunk is None else min(chunk, d)
    some = W[:: -(-rows // _SAMPLE[0])]
    # An odd stride, lest a pattern of zeros is all that is seen.
    some = some[:, : _SAMPLE[1] // chunk * chunk] if chunk <= _SAMPLE[1] else some[:, : chunk : chunk // _SAMPLE[1] | 1]
    most_bits = min(most_bits, _PRECISION.get(W.dtype, MOST_BITS))
    if _read(some, min(chunk, some.shape[1]), most_bits) is None:
        return None
    if chunk > _LONG:
        # Temporaries of such chunks would be large, and their distinct values say it all.
        distinct = _distinct(W, chunk, 1 << most_bits)
        found = None if distinct is None else _read(distinct, distinct.shape[1], most_bits)
    else:
        found = _read(W, chunk, most_bits)
    if found is None:
        return None
    scale, least, most = (each.view(rows, -1) for each in found)
    if bool(((least >= -1) & (most <= 1)).all()) and bool((W != 0).all()):
        return Grid(scale, torch.zeros_like(least), 1, chunk)
    bits = max(2, int((most - least).max()).bit_length())
    if bits > most_bits:
        return None
    low = -(1 << (bits - 1))
    return Grid(scale, torch.where((least >= low) & (most < -low), 0, low - least), bits, chunk)


def _distinct(W: Tensor, chunk: int, most: int) -> Tensor | None:
    """The distinct values of each chunk, a row each, filled up with zeros; None where there are more than `most`."""
    found = []
    for piece in (piece for row in W for piece in row.split(chunk)):
        values = piece.new_empty(0)
        for part in piece.split(_BUDGET):
            values = torch.unique(torch.cat((values, part)))
            if len(values) > most:
                return None
        found.append(values)
    return nn.utils.rnn.pad_sequence(found, batch_first=True)


def _read(W: Tensor, chunk: int, most_bits: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Scale, least and largest integer (zero among them) of each piece, flat; block by block, the first ones small."""
    rows, d = W.shape
    fill, found = -d % chunk, []
    start, step = 0, 16
    while start < rows:
        pieces = functional.pad(W[start : start + step], (0, fill)).reshape(-1, chunk)
        scale = _scales(pieces, most_bits)
        if scale is None:
            return None
        ends = (torch.stack((pieces.amin(1).clamp_max(0), pieces.amax(1).clamp_min(0))).double() / scale).round_()
        found.append((scale, *ends.to(torch.int32)))
        start, step = start + step, max(1, min(4 * step, _BLOCK // d))
    scale, least, most = (torch.cat(parts) for parts in zip(*found, strict=True))
    return scale, least, most


class _Known(NamedTuple):
    """Magnitudes in float64, and the least and the most that they may have been before being rounded to their type."""

    values: Tensor
    low: Tensor
    high: Tensor

    def rows(self, index: Tensor) -> _Known:
        return _Known(*(t[index] for t in self))

    def map(self, function: Callable[[Tensor], Tensor]) -> _Known:
        return _Known(*map(function, self))


def _known(pieces: Tensor) -> _Known:
    values = pieces.abs().double()
    mantissa = torch.frexp(values).mantissa
    # Half the distance to the next number; below a power of two it is half of that. Subnormal numbers are evenly apart.
    half = values / mantissa * (_UNIT[pieces.dtype] / 2)
    if pieces.dtype.itemsize == 2:
        half.clamp_min_(torch.finfo(pieces.dtype).tiny * _UNIT[pieces.dtype])
    half.masked_fill_(values == 0, 0.0)
    # What is halved was rounded before: our own quotients to float64, a float32 product on its way to a half type.
    slack = values * (2.0**-48 if pieces.dtype.itemsize > 2 else 2.0**-24)
    return _Known(values, values - torch.where(mantissa == 0.5, half / 2, half) - slack, values + half + slack)


def _scales(pieces: Tensor, most_bits: int) -> Tensor | None:
    """The largest scale (float32) of each piece; 1 where all is zero, None where a piece has none."""
    if not bool(pieces.isfinite().all()):
        return None
    every, unit = _known(pieces), _UNIT[pieces.dtype]
    # The anchor is the least value of full precision: few multiples of the scale are so small.
    tiny = torch.finfo(pieces.dtype).tiny if pieces.dtype.itemsize == 2 else 0.0
    least = torch.where(every.values > tiny, every.values, torch.inf).min(1)
    at = torch.where(least.values.isinf(), every.values.argmax(1), least.indices)[:, None]
    anchor = every.map(lambda t: t.gather(1, at))
    span = (pieces.amax(1).clamp_min(0).double() - pieces.amin(1).clamp_max(0).double())[:, None]
    most = max((1 << most_bits) - 1, 2) + 0.5
    limit = (most * anchor.high / (span * (1 - 4 * unit)).clamp_min(1e-300)).floor_().clamp_max_(most)
    probes = every.map(_probes)
    scale, trial = torch.ones(len(pieces), device=pieces.device), torch.ones_like(limit)
    left = every.values.amax(1).nonzero()[:, 0]
    while len(left):
        count = max(1, min(_MANY, _BUDGET // (16 * _PROBES * len(left))))
        j = trial[left] + torch.arange(count, device=pieces.device)
        own, tried_on = anchor.rows(left), probes.rows(left).map(lambda t: t[:, None])
        near = _integers(tried_on, (own.low / j)[:, :, None], (own.high / j)[:, :, None])
        fits = (near[1] >= near[0]).all(2) & (j <= limit[left])
        hit = fits.any(1)
        trial[left] += torch.where(hit, fits.to(torch.uint8).argmax(1), count)[:, None]
        tried = left[hit]
        low, high = (end[tried] / trial[tried] for end in (anchor.low, anchor.high))
        first, last = _integers(every.rows(tried), low, high)
        # A value that a candidate fails on is a probe from now on, for the next candidates are like it.
        missed = (last < first).to(torch.uint8).max(1)
        failed = missed.values.bool()
        at = torch.stack((tried, missed.indices))[:, failed]
        for known, probe in zip(every, probes, strict=True):
            probe[at[0], trial[at[0], 0].long() % probe.shape[1]] = known[at[0], at[1]]
        trial[at[0]] += 1
        tried, low, high = tried[~failed], low[~failed], high[~failed]
        fitted, exact = _fit(pieces[tried].abs(), every.rows(tried), low, high)
        scale[tried[exact]] = fitted[exact]
        trial[tried[~exact]] += 1
        left = torch.cat((left[~hit], at[0], tried[~exact]))
        if bool((trial[left] > limit[left]).any()):
            return None
    return scale


def _probes(values: Tensor) -> Tensor:
    """The largest of each eighth of the columns: few of them are zero, however sparse the row."""
    width = -(-values.shape[1] // _PROBES)
    return functional.pad(values, (0, -values.shape[1] % width)).view(len(values), -1, width).amax(2)


def _integers(known: _Known, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest integer that a value may be, in units of a scale between `low` and `high`."""
    return (known.low / high).ceil_(), (known.high / low).floor_()


def _fit(magnitudes: Tensor, known: _Known, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The scale (pieces,) between `low` and `high` that magnitudes are multiples of, and whether they are exactly."""
    for _ in range(_ROUNDS if magnitudes.dtype.itemsize == 2 else 1):
        first, last = _integers(known, low, high)
        sure = (first == last) & (first > 0)
        new_low = torch.where(sure, known.low / first, 0.0).amax(1, keepdim=True)
        new_high = torch.where(sure, known.high / first, torch.inf).amin(1, keepdim=True)
        low, high = torch.maximum(low, new_low), torch.minimum(high, new_high)
        if bool((first == last).all()):
            break
    # The bits of positive float32 numbers are in their order.
    least = low.float().view(torch.int32) + (low.float().double() < low).to(torch.int32)
    most = high.float().view(torch.int32) - (high.float().double() > high).to(torch.int32)
    found = _simplest(least, most)
    exact = _is_on(magnitudes, found)
    for _ in range(_ENDS):
        if bool(exact.all()):
            break
        # An end of the interval belongs to it or not, as ties and the slack go.
        least += (~_is_on(magnitudes, least)).to(torch.int32)
        most -= (~_is_on(magnitudes, most)).to(torch.int32)
        found = torch.where(exact, found, _simplest(least, most))
        exact = _is_on(magnitudes, found)
    return found.view(torch.float32)[:, 0], exact[:, 0]


def _simplest(least: Tensor, most: Tensor) -> Tensor:
    """The bits between `least` and `most` that end in the most zeros."""
    place = torch.frexp(((least - 1) ^ most).double()).exponent.sub_(1).clamp_(0, 30)
    return most >> place << place


def _is_on(magnitudes: Tensor, bits: Tensor) -> Tensor:
    """Whether each row (rows, 1) is of multiples of these bits' scale, and of no two multiples that are as near."""
    scale = bits.view(torch.float32).double()
    ratio = magnitudes.double().div_(scale)
    k = ratio.round()
    near = ratio.sub_(k).abs_() < 0.49
    return (near & (k.mul_(scale).to(magnitudes.dtype) == magnitudes)).all(1, keepdim=True)
