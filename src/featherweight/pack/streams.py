# SPDX-License-Identifier: Apache-2.0
"""A stream of non-negative integers, entropy-coded with its own table: Huffman or rANS over tokens, then plain bits.

An integer below 2^split is its own token. A larger one, of n bits, is a token that tells n and the two bits below the
first, and the other n - 3 bits stand as they are: their distribution is nearly flat (the hybrid integers of JPEG XL,
ISO/IEC 18181-1). So tables stay small for offsets of any length, and lose some hundredths of a bit.

A step of NumPy costs 15 µs however few lanes it has, and a lane two to four bytes. So a stream that stands for `words`
words of the tensor has as many lanes as make a step for each 256 of them, and no more than make 1024 steps of a small
one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featherweight.errors import ArtefactError
from featherweight.pack import huffman, rans
from featherweight.pack.bits import bytes_of, pack_fields, unpack_fields

__all__ = ["CODERS", "Reader", "information", "lanes_for", "read_stream", "varint", "write_stream"]

CODERS = ("huffman", "rans")
SPLITS = (3, 8)
_COUNTED = 1 << 20  # integers below this are counted in a table
_MOST_TOKENS = 1 << 10
_FEWEST_STEPS = 1024
_WORDS_A_STEP = 256
_MOST_LANES = 1 << 12
_LONGEST = 40  # bits of the largest integer

# Frequencies are kept to a fifth of an octave: 6 bits each, and 0.12 % of the coded bits lost by it.
_LEVELS = np.array([0, *(round(2 ** (k / 5)) for k in range(63))], np.int64)
_LEVEL_BITS = 6


@dataclasses.dataclass
class Reader:
    """Bytes that are taken from the front; `ArtefactError` where there are not enough."""

    data: NDArray[np.uint8]
    at: int = 0

    def take(self, count: int) -> NDArray[np.uint8]:
        if not 0 <= count <= len(self.data) - self.at:
            raise ArtefactError(f"the coded data end after {len(self.data)} bytes, before byte {self.at + count}")
        self.at += count
        return self.data[self.at - count : self.at]

    def byte(self) -> int:
        return int(self.take(1)[0])

    def varint(self) -> int:
        """An integer below 2^42, seven bits a byte, low ones first; the top bit says that more follow."""
        value = 0
        for shift in range(0, 42, 7):
            byte = self.byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ArtefactError("a number of the coded data has more than 42 bits")


def varint(value: int) -> bytes:
    """What `Reader.varint` reads.

    >>> varint(300), Reader(np.frombuffer(varint(300), np.uint8)).varint()
    (b'\\xac\\x02', 300)
    """
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def lanes_for(count: int, words: int) -> int:
    """Lanes for `count` symbols that stand for `words` words: a power of two. Readers and writers agree on it."""
    steps = max(_FEWEST_STEPS, words // _WORDS_A_STEP)
    return min(_MOST_LANES, 1 << max(0, (-(-count // steps) - 1).bit_length()))


def information(values: NDArray[np.integer[Any]], words: int) -> tuple[float, int]:
    """Bytes that a stream of these integers will take, lanes included, about; and the split that makes it so."""
    counts = np.bincount(values) if values.max(initial=0) < _COUNTED else None
    unique = np.flatnonzero(counts) if counts is not None else np.unique(values)
    found = counts[unique] if counts is not None else np.unique(values, return_counts=True)[1]
    lanes = 3.0 * lanes_for(len(values), words)
    splits = SPLITS if unique.max(initial=0) >= 1 << SPLITS[0] else SPLITS[:1]
    return min((lanes + _cost(unique, found, split), split) for split in splits)


def _cost(unique: NDArray[np.integer[Any]], counts: NDArray[np.integer[Any]], split: int) -> float:
    tokens, width = _tokens(unique, split)
    by_token = np.bincount(tokens, counts)
    used = by_token[by_token > 0]
    bits = float((used * np.log2(used.sum() / used)).sum() + (counts * width).sum())
    return bits / 8 + len(by_token) * _LEVEL_BITS / 8


def write_stream(values: NDArray[np.integer[Any]], coder: str, words: int) -> bytes:
    """The integers as bytes that tell their table, and not their count. `words` is how many words they restore."""
    _, split = information(values, words)
    tokens, width = _tokens(values, split)
    counts = np.bincount(tokens)
    lanes = lanes_for(len(values), words)
    context = np.zeros(len(tokens), np.uint8)
    if coder == "huffman":
        lengths = huffman.code_lengths(counts)
        table, coded = pack_fields(lengths, 4), huffman.encode(tokens, context, lengths[None], lanes)
    else:
        levels = _nearest_levels(rans.normalise(counts[None])[0])
        table, coded = pack_fields(levels, _LEVEL_BITS), rans.encode(tokens, context, _frequencies(levels), lanes)
    plain = [_pack_wide(values[width == bits], bits) for bits in range(1, int(width.max(initial=0)) + 1)]
    head = bytes([split]) + varint(len(counts))
    return head + table.tobytes() + varint(len(coded)) + coded.tobytes() + b"".join(plain)


def read_stream(reader: Reader, count: int, coder: str, words: int) -> NDArray[np.integer[Any]]:
    """`count` integers. Raises `ArtefactError` for bytes that `write_stream` does not write."""
    lanes, split, tokens = lanes_for(count, words), reader.byte(), reader.varint()
    if split not in SPLITS or tokens > _MOST_TOKENS:
        raise ArtefactError(f"no stream has {tokens} tokens and a split of {split}")
    bits = 4 if coder == "huffman" else _LEVEL_BITS
    table = unpack_fields(reader.take(bytes_of(tokens, bits)), tokens, bits)
    coded = reader.take(reader.varint())
    if not count:
        found = np.empty(0, np.uint16)
    elif not table.any():
        raise ArtefactError("a stream has symbols and an empty table")
    elif coder == "huffman":
        found = huffman.decode(coded, count, np.zeros(count, np.uint8), _lengths(table)[None], lanes)
    else:
        found = rans.decode(coded, count, np.zeros(count, np.uint8), _frequencies(table), lanes)
    return _integers(found, split, reader)


def _tokens(values: NDArray[np.integer[Any]], split: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The token of each integer, and how many plain bits follow it."""
    large = values >= 1 << split
    bits = np.zeros(len(values), np.int64)
    bits[large] = np.frexp(values[large].astype(np.float64))[1]
    width = np.where(large, bits - 3, 0)
    token = np.where(large, (1 << split) + ((bits - 1 - split) << 2) + ((values >> width) & 3), values)
    return token, width


def _integers(tokens: NDArray[np.uint16], split: int, reader: Reader) -> NDArray[np.integer[Any]]:
    """As 16 bits where none is larger than its token: of a large tensor, memory is what takes the time."""
    large = np.flatnonzero(tokens >= 1 << split)
    values: NDArray[np.integer[Any]] = tokens
    if len(large):
        values = tokens.astype(np.int64)
        code = values[large] - (1 << split)
        width = (code >> 2) + split - 2
        if int(width.max()) > _LONGEST - 3:
            raise ArtefactError("a stream tells of integers that no tensor needs")
        found = ((code & 3) + 4) << width
        for bits in range(1, int(width.max()) + 1):
            alike = np.flatnonzero(width == bits)
            found[alike] += _unpack_wide(reader, len(alike), bits)
        values[large] = found
    return values


def _pack_wide(values: NDArray[np.integer[Any]], bits: int) -> bytes:
    """The lowest `bits` of each; those above 16 as fields of their own behind the others."""
    low = pack_fields((values & ((1 << min(bits, 16)) - 1)).astype(np.uint64), min(bits, 16)).tobytes()
    return low if bits <= 16 else low + _pack_wide(values >> 16, bits - 16)


def _unpack_wide(reader: Reader, count: int, bits: int) -> NDArray[np.int64]:
    width = min(bits, 16)
    low = unpack_fields(reader.take(bytes_of(count, width)), count, width).astype(np.int64)
    return low if bits <= 16 else low | _unpack_wide(reader, count, bits - 16) << 16


def _nearest_levels(frequencies: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """For each frequency the number of the level nearest by ratio; 0 only for 0."""
    middle = np.sqrt(_LEVELS[1:-1] * _LEVELS[2:].astype(np.float64))
    level = 1 + np.searchsorted(middle, frequencies)
    # Levels 1 to 3 are all 1: the first of them stands for it.
    level = np.where(frequencies == 1, 1, level)
    return np.where(frequencies > 0, level, 0).astype(np.uint8)


def _frequencies(levels: NDArray[np.integer]) -> NDArray[np.uint32]:
    return rans.normalise(_LEVELS[levels][None])


def _lengths(table: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """Lengths of codes that fill all numbers, as Huffman's do (Kraft's equality); or one code of one bit."""
    used = table[table > 0].astype(np.int64)
    if (1 << (huffman.LONGEST - used)).sum() != 1 << huffman.LONGEST and used.tolist() != [1]:
        raise ArtefactError("the lengths of the Huffman codes contradict each other")
    return table.astype(np.uint8)
