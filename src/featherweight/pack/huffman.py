# SPDX-License-Identifier: Apache-2.0
"""Canonical Huffman codes over interleaved lanes: whole bits a symbol, the shortest tables, decoded by NumPy.

Deep Compression's coder (Han et al. 2016). Only the lengths of the codes are kept: codes of one length are consecutive
numbers in the order of their symbols (Moffat & Turpin 1997), and no length is over 15, by the package-merge algorithm
of Larmore & Hirschberg 1990, which is optimal under that limit. Symbol i goes to lane i mod L, each lane is a stream of
bits from the lowest on, and the lanes' 16-bit words stand in the order in which decoding all lanes at once comes to
need them. A lane so costs two bytes and no table of places.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from featherweight.errors import ArtefactError

__all__ = ["LONGEST", "code_lengths", "codes", "decode", "encode"]

LONGEST = 15

Lengths = NDArray[np.uint8]


def code_lengths(counts: NDArray[np.integer]) -> Lengths:
    """Bits of each symbol's code, at most `LONGEST`: the fewest in all for these counts. 0 for what never occurs.

    A symbol that is alone takes one bit.

    >>> code_lengths(np.array([5, 1, 0, 2])).tolist()
    [1, 2, 0, 2]
    """
    used = np.flatnonzero(counts)
    lengths = np.zeros(len(counts), np.uint8)
    if len(used) < 2:
        lengths[used] = 1
        return lengths
    leaves = sorted((int(counts[symbol]), (int(symbol),)) for symbol in used)
    packages: list[tuple[int, tuple[int, ...]]] = []
    for _ in range(LONGEST):
        merged = sorted(leaves + packages, key=lambda package: package[0])
        packages = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(merged[::2], merged[1::2], strict=False)]
    for _, symbols in packages[: len(used) - 1]:
        np.add.at(lengths, list(symbols), 1)
    return lengths


def codes(lengths: Lengths) -> NDArray[np.uint32]:
    """The canonical code of each symbol, first bit lowest, as a stream of bits takes it.

    >>> [f"{code:0{length}b}" for code, length in zip(codes(np.array([1, 2, 2])), [1, 2, 2])]
    ['0', '01', '11']
    """
    found = np.zeros(len(lengths), np.uint32)
    code, last = 0, 0
    for symbol in np.lexsort((np.arange(len(lengths)), lengths)):
        if length := int(lengths[symbol]):
            code <<= length - last
            found[symbol] = int(f"{code:0{length}b}"[::-1], 2)
            code, last = code + 1, length
    return found


def encode(
    symbols: NDArray[np.integer], contexts: NDArray[np.integer], lengths: NDArray[np.uint8], lanes: int
) -> NDArray[np.uint8]:
    """Symbols as words: the first of each lane, then each where a lane has less than 16 bits left before a symbol.

    `lengths` is (contexts, symbols); a symbol's context chooses its row.
    """
    steps = -(-len(symbols) // lanes)
    table = np.stack([codes(row) for row in lengths])
    code, length = np.zeros((2, steps * lanes), np.uint64)
    code[: len(symbols)] = table[contexts, symbols]
    length[: len(symbols)] = lengths[contexts, symbols]
    length = length.reshape(steps, lanes)
    end = np.cumsum(length, axis=0, dtype=np.int64)
    start = end - length.astype(np.int64)
    # Words that have been read before each step; words 0 are there from the beginning.
    read = (start + 15) >> 4
    words = np.zeros((lanes, int(end[-1].max()) // 16 + 2 if steps else 1), np.uint64)
    lane = np.broadcast_to(np.arange(lanes), (steps, lanes)).reshape(-1)
    shifted = code << (start.reshape(-1) & 15).astype(np.uint64)
    np.add.at(words, (lane, start.reshape(-1) >> 4), shifted & np.uint64(0xFFFF))
    np.add.at(words, (lane, (start.reshape(-1) >> 4) + 1), shifted >> np.uint64(16))
    grown = np.diff(read, axis=0, prepend=0) > 0
    if steps:
        grown[-1, len(symbols) - (steps - 1) * lanes :] = False
    at_step, at_lane = np.nonzero(grown)
    stream = np.concatenate([words[:, 0], words[at_lane, read[at_step, at_lane]]])
    return stream.astype("<u2").view(np.uint8)


def decode(
    data: NDArray[np.uint8], count: int, contexts: NDArray[np.integer], lengths: NDArray[np.uint8], lanes: int
) -> NDArray[np.uint16]:
    """The symbols again. Raises `ArtefactError` where the data are not as `encode` makes them."""
    if len(data) < 2 * lanes or len(data) % 2:
        raise ArtefactError(f"{len(data)} bytes of Huffman codes cannot be {lanes} lanes of words of two bytes")
    longest = max(1, int(lengths.max(initial=0)))
    table = np.concatenate([_table(row, longest) for row in lengths])
    words = data.view("<u2").astype(np.uint32)
    x, left, at = words[:lanes].copy(), np.full(lanes, 16, np.uint32), lanes
    out = np.empty(count, np.uint16)
    rows = contexts.astype(np.uint32) << np.uint32(longest) if len(lengths) > 1 else None
    mask = np.uint32((1 << longest) - 1)
    for first in range(0, count, lanes):
        last = min(first + lanes, count)
        x, left = x[: last - first], left[: last - first]
        empty = np.flatnonzero(left < 16)
        if len(empty):
            following = words[at : at + len(empty)]
            if len(following) < len(empty):
                raise ArtefactError("the words of Huffman codes end before their symbols")
            x[empty] |= following << left[empty]
            left[empty] += np.uint32(16)
            at += len(empty)
        slot = x & mask
        if rows is not None:
            slot += rows[first:last]
        entry = table.take(slot)
        out[first:last] = entry >> np.uint32(4)
        entry &= np.uint32(15)
        x >>= entry
        left -= entry
    if at != len(words):
        raise ArtefactError("the symbols of Huffman codes end before their words")
    return out


def _table(lengths: Lengths, longest: int) -> NDArray[np.uint32]:
    """For each `longest` bits the symbol that they begin with, times 16, and its length."""
    used = np.flatnonzero(lengths)
    table = np.zeros(1 << longest, np.uint32)
    found = codes(lengths)
    for symbol in used:
        length = int(lengths[symbol])
        table[int(found[symbol]) :: 1 << length] = symbol << 4 | length
    return table
