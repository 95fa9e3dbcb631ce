# SPDX-License-Identifier: Apache-2.0
"""The coders on plain integers: Huffman against a heap, rANS and the adaptive one against the entropy, and bad bytes."""

import heapq
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from featherweight.errors import ArtefactError
from featherweight.pack import adaptive, huffman, rans
from featherweight.pack.streams import CODERS, Reader, lanes_for, read_stream, write_stream

Ints = NDArray[np.integer[Any]]


def entropy_bytes(values: Ints) -> float:
    _, counts = np.unique(values, return_counts=True)
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


def heap_lengths(counts: list[int]) -> list[int]:
    """Huffman's own construction: the two rarest trees become one, and their leaves a bit longer."""
    order = itertools.count()
    heap = [(count, next(order), [symbol]) for symbol, count in enumerate(counts) if count]
    heapq.heapify(heap)
    lengths = [0] * len(counts)
    while len(heap) > 1:
        first, _, left = heapq.heappop(heap)
        second, _, right = heapq.heappop(heap)
        for symbol in left + right:
            lengths[symbol] += 1
        heapq.heappush(heap, (first + second, next(order), left + right))
    return lengths


@given(st.lists(st.integers(0, 50), min_size=2, max_size=60).filter(lambda counts: sum(map(bool, counts)) > 1))
def test_code_lengths_are_optimal_and_fill_all_codes(counts: list[int]) -> None:
    lengths = huffman.code_lengths(np.array(counts)).tolist()
    assert [length > 0 for length in lengths] == [count > 0 for count in counts]
    assert math.fsum(2.0**-length for length in lengths if length) == 1
    expected = heap_lengths(counts)
    if max(expected) <= huffman.LONGEST:
        assert sum(np.array(counts) * lengths) == sum(np.array(counts) * expected)


def test_lengths_beyond_the_limit_are_cut_at_the_least_cost() -> None:
    """Fibonacci counts make the deepest tree. With a limit of L bits and n = L + 2 symbols, brute force over the lengths."""
    counts = [1, 1]
    while len(counts) < huffman.LONGEST + 3:
        counts.append(counts[-1] + counts[-2])
    assert max(heap_lengths(counts)) > huffman.LONGEST
    lengths = huffman.code_lengths(np.array(counts))
    assert lengths.max() == huffman.LONGEST
    assert sum(2.0 ** -int(length) for length in lengths) == 1

    # Optimal lengths do not grow with the count, so a search over such sequences that fill all codes finds the optimum.
    def best(symbol: int, longest: int, room: int) -> float:
        if symbol < 0:
            return 0.0 if room == 0 else math.inf
        found = math.inf
        for length in range(longest, huffman.LONGEST + 1):
            rest = room - (1 << (huffman.LONGEST - length))
            if symbol <= rest <= symbol << (huffman.LONGEST - length):  # what the others can take
                found = min(found, counts[symbol] * length + cached(symbol - 1, length, rest))
        return found

    memory: dict[tuple[int, int, int], float] = {}

    def cached(symbol: int, longest: int, room: int) -> float:
        key = symbol, longest, room
        if key not in memory:
            memory[key] = best(*key)
        return memory[key]

    assert int((np.array(counts) * lengths).sum()) == cached(len(counts) - 1, 1, 1 << huffman.LONGEST)


def test_codes_are_canonical_and_no_code_begins_another() -> None:
    lengths = np.array([3, 1, 0, 3, 2], np.uint8)
    found = [f"{code:0{length}b}"[::-1] for code, length in zip(huffman.codes(lengths), lengths, strict=True) if length]
    assert found == ["110", "0", "111", "10"]  # by length, then by symbol, as in RFC 1951


values = st.lists(st.integers(0, 300), max_size=200) | st.lists(st.integers(0, (1 << 39) - 1), max_size=20)


@given(values, st.sampled_from(CODERS), st.integers(0, 1 << 30))
def test_streams_come_back_and_take_all_their_bytes(drawn: list[int], coder: str, more: int) -> None:
    numbers = np.array(drawn, np.int64)
    coded = write_stream(numbers, coder, len(drawn) + more)
    reader = Reader(np.frombuffer(coded + b"rest", np.uint8))
    assert read_stream(reader, len(drawn), coder, len(drawn) + more).tolist() == drawn
    assert len(reader.data) - reader.at == 4


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32), st.integers(0, 3000), st.sampled_from([1, 2, 3, 8, 64]), st.integers(1, 3))
def test_lanes_and_contexts_come_back(seed: int, count: int, lanes: int, contexts: int) -> None:
    rng = np.random.default_rng(seed)
    symbols = np.minimum(rng.geometric(0.3, count) - 1, 20)
    context = rng.integers(0, contexts, count)
    counts = np.zeros((contexts, 21), np.int64)
    np.add.at(counts, (context, symbols), 1)
    frequencies = rans.normalise(counts)
    assert set(frequencies.sum(1).tolist()) <= {0, 1 << rans.BITS}
    assert ((frequencies > 0) == (counts > 0)).all()
    coded = rans.encode(symbols, context, frequencies, lanes)
    assert (rans.decode(coded, count, context, frequencies, lanes) == symbols).all()
    lengths = np.stack([huffman.code_lengths(row) for row in counts])
    coded = huffman.encode(symbols, context, lengths, lanes)
    assert (huffman.decode(coded, count, context, lengths, lanes) == symbols).all()
    bits = int(lengths[context, symbols].sum())
    assert bits <= 8 * len(coded) <= bits + 32 * lanes


SOURCES: dict[str, Callable[[np.random.Generator], Ints]] = {
    "runs of zeros": lambda rng: rng.geometric(0.03, 50_000) - 1,
    "4-bit grid": lambda rng: np.abs(np.round(rng.standard_normal(200_000) * 2.5)).astype(np.int64),
    "8-bit grid": lambda rng: np.abs(np.round(rng.standard_normal(200_000) * 40)).astype(np.int64),
    "uniform": lambda rng: rng.integers(0, 16, 100_000),
    "one rare symbol": lambda rng: (rng.random(300_000) < 0.002).astype(np.int64),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_rans_is_within_one_percent_of_the_entropy(kind: str) -> None:
    """The allowance beyond 1 % is the table and the lanes' four bytes each."""
    numbers = SOURCES[kind](np.random.default_rng(0))
    words = len(numbers) * (30 if kind == "runs of zeros" else 1)
    size = len(write_stream(numbers, "rans", words))
    bound = entropy_bytes(numbers)
    assert bound * 0.999 < size < bound * 1.01 + 4 * lanes_for(len(numbers), words) + 150


def test_huffman_is_within_its_bound_of_the_entropy() -> None:
    numbers = SOURCES["4-bit grid"](np.random.default_rng(0))
    counts = np.bincount(numbers)
    bits = int((counts * heap_lengths(counts.tolist())).sum())
    size = len(write_stream(numbers, "huffman", len(numbers)))
    assert bits / 8 <= size <= bits / 8 + 4 * lanes_for(len(numbers), len(numbers)) + 20


def pruned(rng: np.random.Generator, rows: int, columns: int) -> NDArray[np.int32]:
    """Independent numbers: a tenth are not zero, +-1 to +-5."""
    magnitude = np.minimum(rng.geometric(0.4, (rows, columns)), 5)
    signs = rng.choice([-1, 1], (rows, columns))
    return np.asarray(magnitude * signs * (rng.random((rows, columns)) < 0.1), np.int32)


def test_the_adaptive_coder_learns_independent_numbers_to_three_percent_of_their_entropy() -> None:
    numbers = pruned(np.random.default_rng(0), 200, 150)
    assert (
        entropy_bytes(numbers) * 0.98 < len(adaptive.encode(numbers.reshape(-1), 150)) < entropy_bytes(numbers) * 1.03
    )


def test_the_adaptive_coder_learns_what_rows_columns_and_neighbours_tell() -> None:
    """Against the empirical conditional entropy, of a weight whose pixels and the pixels above them agree."""
    rng = np.random.default_rng(0)
    rows, side = 120, 12
    field = rng.standard_normal((rows, side + 4, side + 4))
    smooth = sum(field[:, a : a + side, b : b + side] for a in range(3) for b in range(3)) / 3
    smooth *= np.linspace(0.5, 1.5, side)[:, None]
    numbers = np.where(np.abs(smooth) > 1.5, np.sign(smooth), 0).astype(np.int32).reshape(rows, side * side)
    size = len(adaptive.encode(numbers.reshape(-1), side * side))
    west = np.pad(numbers, ((0, 0), (1, 0)))[:, :-1]
    north = np.pad(numbers, ((0, 0), (side, 0)))[:, :-side]
    joint = np.stack([numbers, west, north]).reshape(3, -1)
    given_both = joint_entropy(joint) - joint_entropy(joint[1:])
    assert size < 1.02 * given_both < 0.75 * entropy_bytes(numbers)


def joint_entropy(columns: NDArray[np.int32]) -> float:
    _, counts = np.unique(columns, axis=1, return_counts=True)
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.integers(0, 12), st.integers(1, 12), st.sampled_from([1, 5, 200, 70_000]))
def test_adaptive_numbers_come_back(seed: int, rows: int, columns: int, largest: int) -> None:
    rng = np.random.default_rng(seed)
    numbers = (rng.integers(-largest, largest + 1, rows * columns) * (rng.random(rows * columns) < 0.5)).astype(
        np.int32
    )
    coded = adaptive.encode(numbers, columns)
    assert (adaptive.decode(Reader(np.frombuffer(coded, np.uint8)), len(numbers), columns) == numbers).all()


def test_the_table_of_chances_is_the_logistic_function_to_its_last_integer() -> None:
    chances, shares, curvatures = adaptive._chances()
    logits = np.arange(-672, 673) / 64
    exact = 65536 / (1 + np.exp(-logits))
    assert len(chances) == len(logits)
    assert np.abs(np.array(chances) - exact).max() <= 0.5 + 1e-6
    assert min(chances) > 0
    assert max(chances) < 65536
    assert np.allclose(curvatures, np.array(shares) * (1 - np.array(shares)))


@pytest.mark.parametrize("coder", [*CODERS, "adaptive"])
def test_flipped_and_cut_bytes_end_in_an_error_or_in_other_numbers_and_never_otherwise(coder: str) -> None:
    rng = np.random.default_rng(0)
    numbers = pruned(rng, 20, 30).reshape(-1)
    coded = adaptive.encode(numbers, 30) if coder == "adaptive" else write_stream(np.abs(numbers) * 99, coder, 600)
    refused = 0
    for place in range(0, len(coded), 1 if coder == "adaptive" else 3):
        for damaged in (coded[:place], coded[:place] + bytes([coded[place] ^ 1 << place % 8]) + coded[place + 1 :]):
            reader = Reader(np.frombuffer(damaged, np.uint8))
            try:
                found = (
                    adaptive.decode(reader, 600, 30) if coder == "adaptive" else read_stream(reader, 600, coder, 600)
                )
            except ArtefactError:
                refused += 1
            else:
                assert len(found) == 600
    # Nearly all bytes of an adaptive stream are numbers of some tensor; that is what the file's checksum is for.
    assert refused > (4 if coder == "adaptive" else len(coded) // 6)
