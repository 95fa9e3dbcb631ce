# SPDX-License-Identifier: Apache-2.0
"""Integers of a weight one by one, by decisions whose chances are learned on the way: the smallest coder and slowest.

As in DeepCABAC (Wiedemann et al. 2020, arXiv 1907.11900) a number is decisions: is it zero, its sign, is its magnitude
above 1, above 2, and so on, each coded at the chance that contexts give it. The chance is not looked up under a joint
context but is a logistic regression: the logits of four contexts add up, say of the column, of the row, of the
neighbours and of the tensor, and after each decision every one of them takes a step of Newton's method for its own
part,

    p = 1 / (1 + exp(-(a + b + c + d))),   h += p (1 - p),   a += RATE (bit - p) / h,

so that few weights teach it much. Neighbours are the numbers before and, at a distance `period` that the encoder finds
in the weight, "above": the pixel over this one in a layer on images, the row over this one in a kernel.

Everything is IEEE double arithmetic in a fixed order and a table of integers, so that each machine decodes the same.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from featherweight.errors import ArtefactError
from featherweight.pack.rangecoder import Flip, decoder, encoder
from featherweight.pack.streams import Reader, varint

__all__ = ["decode", "encode"]

RATE = 0.65
_STEPS = 64  # of the table of chances, per unit of logit
_END = 672  # its last entry: a logit of 10.5, a chance of 1 in 36,000
_NODES = 64  # magnitudes that have statistics of their own
_NEAR = 7  # larger magnitudes of neighbours count as this
_MOST_SHIFT = 12

Slot = list[float]
"""A context: its logit, and the curvature that it has seen, which begins with that of its prior."""


@cache
def _chances() -> tuple[list[int], list[float], list[float]]:
    """For logits from -10.5 to 10.5: the chance out of 65536, the chance, and the curvature p (1 - p).

    In integers, for an exponential in floats is not the same on all machines.
    """
    one = 1 << 96
    # exp(1/64) by its series, whose terms fall below 2^-96 after the 14th.
    ratio = term = one
    for n in range(1, 24):
        term //= _STEPS * n
        ratio += term
    odds = [one]
    for _ in range(_END):
        odds.append(odds[-1] * ratio >> 96)
    half = [(65536 * o + (one + o) // 2) // (one + o) for o in odds]
    chance = [65536 - c for c in half[:0:-1]] + half
    return chance, [c / 65536 for c in chance], [c * (65536 - c) / 2**32 for c in chance]


def encode(numbers: NDArray[np.int32], columns: int) -> bytes:
    """Numbers in C order of rows of `columns`; zero is what most of them should be. A second or so for each 300,000."""
    period = _period(numbers.reshape(-1, columns)) if columns else 1
    magnitude = np.abs(numbers.astype(np.int64))
    nonzero = magnitude[magnitude > 0]
    # Of large numbers the lowest bits are noise: with some 8 levels below the mean, these bits go as they are.
    shift = min(_MOST_SHIFT, max(0, int(nonzero.mean()).bit_length() - 4)) if len(nonzero) else 0
    most = int((magnitude.max(initial=1) - 1) >> shift) + 1
    flip, finish = encoder()
    _walk(flip, len(numbers), columns, period, shift, most, numbers.tolist())
    return varint(period) + varint(shift) + varint(most) + finish()


def decode(reader: Reader, count: int, columns: int) -> NDArray[np.int32]:
    """The numbers again; reads to the end. Raises `ArtefactError` where the data are not as `encode` makes them."""
    period, shift, most = reader.varint(), reader.varint(), reader.varint()
    if not 1 <= period <= max(1, columns) or shift > _MOST_SHIFT or not 1 <= most << shift <= 1 << 20:
        raise ArtefactError(f"no adaptively coded data have a period of {period} and {most} levels of {shift} bits")
    flip, finish = decoder(reader.take(len(reader.data) - reader.at).tobytes())
    numbers = _walk(flip, count, columns, period, shift, most, None)
    finish()
    return np.array(numbers, np.int32)


def _period(rows: NDArray[np.int32]) -> int:
    """The distance from 2 on where numbers tell most of each other: zeros and signs, in nats; the autocorrelation."""
    columns = rows.shape[1]
    if columns < 3 or not rows.size:
        return 1
    size = 1 << (2 * columns - 1).bit_length()
    signs, places = np.zeros((2, columns))
    for row in rows:
        power = np.abs(np.fft.rfft(np.stack([np.sign(row), row != 0]), size)) ** 2
        both = np.fft.irfft(power, size)[:, :columns]
        signs += both[0]
        places += both[1]
    share = np.fft.rfft((rows != 0).mean(0), size)
    expected = np.fft.irfft(np.abs(share) ** 2, size)[:columns] * len(rows) + 1e-3
    places = np.maximum(places, 1e-3)
    told = places * np.log(places / expected) - places + expected + signs**2 / (2 * np.maximum(places, 1))
    return 2 + int(told[2:].argmax())


def _walk(
    flip: Flip, count: int, columns: int, period: int, shift: int, most: int, given: list[int] | None
) -> list[int]:
    """Codes the numbers that are given, or decodes as many: one model for both, so that they cannot differ."""
    chances, shares, curvatures = _chances()

    def decide(bit: int, a: Slot, b: Slot, c: Slot, d: Slot) -> int:
        place = int((a[0] + b[0] + c[0] + d[0]) * _STEPS)
        place = _END + (-_END if place < -_END else _END if place > _END else place)
        bit = flip(chances[place], bit)
        step, curvature = RATE * (bit - shares[place]), curvatures[place]
        for slot in (a, b, c, d):
            slot[1] += curvature
            slot[0] += step / slot[1]
        return bit

    def slots(number: int, prior: float) -> list[Slot]:
        return [[0.0, prior] for _ in range(number)]

    zero, zero_column, zero_near = slots(1, 0.5)[0], slots(columns, 0.7), slots(16, 0.7)
    sign, sign_near, sign_sum = slots(1, 0.5)[0], slots(9, 0.5), slots(17, 0.5)
    node = slots(2 * _NODES, 0.3)
    size_column, size_near = slots(4 * 16, 0.5), slots(4 * 16, 0.5)
    total, found = [3.0] * columns, [1.0] * columns
    margin = period + 1
    out: list[int] = []
    for first in range(0, count, columns):
        zero_row, sign_row, size_row = [0.0, 1.0], [0.0, 4.0], [0.0, 3.0]
        levels = [0] * (margin + columns)  # signed, without their low bits; so many zeros before the row
        for j in range(columns):
            at = j + margin
            west, north = levels[at - 1], levels[at - period]
            north_west, north_east = levels[at - period - 1], levels[at - period + 1] if period > 1 else 0
            near = (west != 0) + 2 * (north != 0) + 4 * (north_west != 0) + 8 * (north_east != 0)
            number = given[first + j] if given else 0
            if not decide(int(number != 0), zero, zero_column[j], zero_row, zero_near[near]):
                out.append(0)
                continue
            signs = [
                (level > 0) - (level < 0)
                for level in (west, north, north_west, north_east, levels[at - 2] if at > 1 else 0)
            ]
            both, weighed = 3 * signs[0] + signs[1] + 4, 2 * (signs[0] + signs[1]) + sum(signs[2:]) + 8
            positive = decide(int(number > 0), sign, sign_near[both], sign_sum[weighed], sign_row)
            # The magnitude: levels upwards until it is met, then low bits that nothing is known of.
            largest = [min(_NEAR, abs(level)) for level in (west, north, north_west, north_east) if level]
            around = 1 + min(14, 2 * sum(largest) // len(largest)) if largest else 0
            before = min(15, int(2 * total[j] / found[j]))
            goal, level = ((abs(number) - 1) >> shift) + 1, 1
            while level < most:
                near_node, kind = 2 * min(level, _NODES - 1) + positive, min(level, 3)
                contexts = node[near_node], size_column[4 * before + kind], size_row, size_near[4 * around + kind]
                if not decide(int(goal > level), *contexts):
                    break
                level += 1
            low = 0
            for place in reversed(range(shift)):
                low = low << 1 | flip(1 << 15, (abs(number) - 1) >> place & 1)
            magnitude = ((level - 1) << shift | low) + 1
            total[j] += level
            found[j] += 1.0
            levels[at] = level if positive else -level
            out.append(magnitude if positive else -magnitude)
    return out
