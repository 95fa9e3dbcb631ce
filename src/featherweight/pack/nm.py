# SPDX-License-Identifier: Apache-2.0
"""N:M: of every m consecutive entries along one axis at most n are not zero; n values and the number of their pattern.

The C(m, n) patterns are numbered in ceil(log2 C(m, n)) bits: 3 for 2:4, where a bitmask takes 4. Only tried where a
hint names n, m and the axis; a group with fewer than n non-zeros stores zeros, and one with more rules the codec out.

Size: G * n * v + ceil(G * w / 8) bytes for G groups, w = ceil(log2 C(m, n)); the axis is padded to a multiple of m.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featherweight.errors import ArtefactError
from featherweight.pack.bits import bytes_of, pack_fields, unpack_fields
from featherweight.pack.narrow import check_values, narrow, widen
from featherweight.pack.source import Source
from featherweight.pack.words import Spec, Words, blank, slices, words

__all__ = ["MOST", "PARTS", "check", "decode", "encode", "propose"]

PARTS: tuple[str, ...] = ("positions", "values")
MOST = 16  # the widest group: its pattern fits into 16 bits

Index = NDArray[np.integer[Any]]


class _Groups(NamedTuple):
    """A tensor as groups: (rows, m, inner), where a group is m entries `inner` apart."""

    n: int
    m: int
    axis: int
    outer: int  # product of the axes before
    length: int  # of the axis itself
    per_row: int  # groups along the axis
    inner: int  # product of the axes behind

    @property
    def rows(self) -> int:
        return self.outer * self.per_row

    @property
    def total(self) -> int:
        return self.rows * self.inner

    @property
    def width(self) -> int:
        return (math.comb(self.m, self.n) - 1).bit_length()

    @property
    def step(self) -> int:
        """Rows in a slice of about 2**15 groups."""
        return max(1, (1 << 15) // max(1, self.inner))


def _groups(spec: Spec, params: tuple[str, ...]) -> _Groups:
    """Reads `n:m:axis`. Raises `ArtefactError` where it does not describe groups of this tensor."""
    if len(params) != 3 or not all(len(number) <= 3 and number.isascii() and number.isdigit() for number in params):
        raise ArtefactError(f"nm takes three numbers n:m:axis, not {':'.join(params)!r}")
    n, m, axis = map(int, params)
    if not 0 < n < m <= MOST or axis >= len(spec.shape) or spec.dtype.itemsize > 8:
        raise ArtefactError(f"nm:{n}:{m}:{axis} needs 0 < n < m <= {MOST} and an axis of {list(spec.shape)}")
    length = spec.shape[axis]
    outer, inner = math.prod(spec.shape[:axis]), math.prod(spec.shape[axis + 1 :])
    return _Groups(n, m, axis, outer, length, -(-length // m), inner)


def _values_shape(spec: Spec, groups: _Groups) -> tuple[int, ...]:
    """The tensor's shape with n entries left of every m: the compact tensor that sparse tensor cores take."""
    return (*spec.shape[: groups.axis], groups.per_row * groups.n, *spec.shape[groups.axis + 1 :])


@lru_cache(maxsize=16)
def _patterns(n: int, m: int) -> tuple[NDArray[np.uint16], Index]:
    """All m-bit numbers with n ones, ascending, and the positions of the ones of each: (C(m, n),) and (C(m, n), n)."""
    numbers = np.arange(1 << m, dtype=np.uint32)
    chosen = numbers[np.bitwise_count(numbers) == n].astype(np.uint16)
    ones = (chosen[:, None] >> np.arange(m, dtype=np.uint16)) & 1
    return chosen, np.nonzero(ones)[1].reshape(-1, n)


def _rows(flat: Words, groups: _Groups) -> Words:
    """The words as (rows, m, inner); a copy only where the axis is no multiple of m and so is padded with zeros."""
    if groups.length == groups.per_row * groups.m:
        return flat.reshape(groups.rows, groups.m, groups.inner)
    padded = np.zeros((groups.outer, groups.per_row * groups.m, groups.inner), flat.dtype)
    padded[:, : groups.length] = flat.reshape(groups.outer, groups.length, groups.inner)
    return padded.reshape(groups.rows, groups.m, groups.inner)


def _ones(rows: Words, groups: _Groups) -> Index:
    """The pattern of each group of a slice of rows, bit j for its j-th entry."""
    nonzero = (rows != 0).view(np.uint8)
    pattern = np.zeros((len(rows), groups.inner), np.uint32)
    for j in range(groups.m):
        pattern |= nonzero[:, j].astype(np.uint32) << np.uint32(j)
    return pattern


def propose(source: Source, hint: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """What the hint says, if the tensor is so; `nm:2:4` without an axis means axis 1, the input axis of a weight."""
    if hint and len(hint) == 2:
        hint = (*hint, "1")
    try:
        groups = _groups(source.spec, hint)
    except ArtefactError:
        return
    if source.nonzeros > groups.total * groups.n:
        return
    rows = _rows(source.words, groups)
    for part in slices(groups.rows, groups.step):
        if (np.bitwise_count(_ones(rows[part], groups)) > groups.n).any():
            return
    size = groups.total * groups.n * source.width + bytes_of(groups.total, groups.width)
    yield f"{groups.n}:{groups.m}:{groups.axis}", size


def encode(source: Source, params: tuple[str, ...]) -> dict[str, Tensor]:
    groups = _groups(source.spec, params)
    chosen, places = _patterns(groups.n, groups.m)
    number = np.zeros(1 << groups.m, np.uint16)
    number[chosen] = np.arange(len(chosen))
    rows = _rows(source.words, groups)
    ranks = np.empty((groups.rows, groups.inner), np.uint16)
    values = np.empty((groups.rows, groups.n, groups.inner), source.words.dtype)
    for part in slices(groups.rows, groups.step):
        pattern = _ones(rows[part], groups)
        while (short := np.bitwise_count(pattern) < groups.n).any():
            pattern[short] |= pattern[short] + 1  # the lowest zero becomes a one: its value, a zero, is stored
        ranks[part] = number[pattern]
        chunk, first = rows[part].reshape(-1), _first(rows[part])
        for i in range(groups.n):
            values[part, i] = chunk[first + (places[:, i] * groups.inner)[ranks[part]]]
    shape = _values_shape(source.spec, groups)
    packed = pack_fields(ranks.reshape(-1), groups.width)
    return {
        "positions": torch.from_numpy(packed),
        "values": narrow(values.reshape(-1), source.stored).reshape(shape),
    }


def check(spec: Spec, params: tuple[str, ...], parts: Mapping[str, Spec]) -> None:
    groups = _groups(spec, params)
    check_values(spec, parts["values"].dtype)
    shape, size = _values_shape(spec, groups), bytes_of(groups.total, groups.width)
    if parts["values"].shape != shape or parts["positions"] != Spec((size,), torch.uint8):
        raise ArtefactError(f"nm:{':'.join(params)} of {list(spec.shape)} has values {list(shape)}, positions [{size}]")


def decode(spec: Spec, params: tuple[str, ...], parts: Mapping[str, Tensor]) -> Words:
    groups = _groups(spec, params)
    _, places = _patterns(groups.n, groups.m)
    values = widen(parts["values"], spec.dtype).reshape(groups.rows, groups.n, groups.inner)
    ranks = unpack_fields(words(parts["positions"]).view(np.uint8), groups.total, groups.width)
    if len(ranks) and int(ranks.max()) >= len(places):
        raise ArtefactError(f"there are {len(places)} patterns {groups.n}:{groups.m}, and no number {int(ranks.max())}")
    out = blank(groups.total * groups.m, spec.word).reshape(groups.rows, groups.m, groups.inner)
    numbers = ranks.reshape(groups.rows, groups.inner)
    for part in slices(groups.rows, groups.step):
        chunk, first = out[part].reshape(-1), _first(out[part])
        for i in range(groups.n):
            chunk[first + (places[:, i] * groups.inner)[numbers[part]]] = values[part, i]
    whole = out.reshape(groups.outer, groups.per_row * groups.m, groups.inner)
    return np.ascontiguousarray(whole[:, : groups.length]).reshape(-1)


def _first(rows: Words) -> Index:
    """Flat positions, in a contiguous slice of rows, of the first entry of each group; the others are `inner` apart."""
    row, column = np.arange(rows.shape[0])[:, None], np.arange(rows.shape[2])
    return np.asarray(row * (rows.shape[1] * rows.shape[2]) + column)
