# SPDX-License-Identifier: Apache-2.0
"""CSR with relative offsets of b bits: each stored value with the count of zeros before it, row after row as one row.

The CSR(C) of Zhu & Gupta 2017 (after Deep Compression, Han et al. 2016): where a run of zeros is longer than b bits can
count, a filler, a stored zero, stands in it. Few bits mean many fillers; b is chosen by counting, for b = 1 to 16.

Size: E * v + ceil(E * b / 8) bytes with E = K + sum over the K + 1 runs of zeros of floor(run / 2**b). For zeros
scattered at random with sparsity s, E is about K / (1 - s**(2**b)): 38.04 bits a value at s = 0.9, b = 6, v = 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featherweight.errors import ArtefactError
from featherweight.pack.bits import bytes_of, pack_fields, unpack_fields
from featherweight.pack.narrow import check_values, narrow, widen
from featherweight.pack.source import Source
from featherweight.pack.words import Spec, Words, blank, slices, words

__all__ = ["MOST_BITS", "PARTS", "check", "decode", "encode", "propose"]

PARTS: tuple[str, ...] = ("offsets", "values")
MOST_BITS = 16


def _runs(flat: Words) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Slice by slice: positions of the non-zeros, and the length of the run of zeros before each."""
    last = -1
    for part in slices(len(flat)):
        at = np.flatnonzero(flat[part] != 0)
        if len(at):
            at += part.start
            run = np.empty_like(at)
            run[0] = at[0] - last
            np.subtract(at[1:], at[:-1], out=run[1:])
            run -= 1
            yield at, run
            last = int(at[-1])


def _fillers(flat: Words, budget: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each b the number of fillers, counted until all b are over their budgets, and not a slice further.

    The zeros after the last non-zero are a run like any other.
    """
    fillers, last = np.zeros(len(budget), np.int64), -1
    for at, run in _runs(flat):
        last = int(at[-1])
        for bits in range(1, len(budget)):
            run = run >> 1  # now floor(run / 2**bits)
            total = int(run.sum())
            fillers[bits] += total
            if total < len(run) // 8:
                run = run[run > 0]
        if (fillers > budget)[1:].all():
            return fillers
    tail = len(flat) - 1 - last
    return fillers + (tail >> np.arange(len(budget)))


def propose(source: Source, hint: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """The b that takes the fewest bytes, the smallest such b. Nothing where a bitmask is as small for every b."""
    length, values, width = source.spec.length, source.nonzeros, source.width
    # K values of b bits and F fillers are more than the N bits of a mask where b * K + (8 * v + b) * F > N.
    bits = np.arange(1 + min(MOST_BITS, (length - 1) // max(1, values)))
    budget = (length - values * bits) // (8 * width + bits)
    fillers = _fillers(source.words, budget) if len(bits) > 1 else budget
    entries = {b: values + int(fillers[b]) for b in range(1, len(bits)) if fillers[b] <= budget[b]}
    sizes = {b: count * width + bytes_of(count, b) for b, count in entries.items()}
    if sizes:
        best = min(sizes, key=sizes.__getitem__)
        yield str(best), sizes[best]


def encode(source: Source, params: tuple[str, ...]) -> dict[str, Tensor]:
    bits, flat, last = int(params[0]), source.words, -1
    small = np.uint8 if bits <= 8 else np.uint16
    longest = small((1 << bits) - 1)
    offsets, values = [np.empty(0, small)], [np.empty(0, flat.dtype)]
    for at, run in _runs(flat):
        # Entry i of a slice stands behind the fillers of its runs 0 to i; an entry that is not written is a filler.
        place = np.arange(len(at)) + np.cumsum(run >> bits)
        offsets.append(np.full(place[-1] + 1, longest, small))
        offsets[-1][place] = run & longest
        values.append(np.zeros(place[-1] + 1, flat.dtype))
        values[-1][place] = flat[at]
        last = int(at[-1])
    fillers = (len(flat) - 1 - last) >> bits
    offsets.append(np.full(fillers, longest, small))
    values.append(np.zeros(fillers, flat.dtype))
    packed = pack_fields(np.concatenate(offsets), bits)
    return {"offsets": torch.from_numpy(packed), "values": narrow(np.concatenate(values), source.stored)}


def check(spec: Spec, params: tuple[str, ...], parts: Mapping[str, Spec]) -> None:
    """Bounds what entries can stand for: E of them reach at most E * 2**b words, and fewer than 2**b zeros follow."""
    if len(params) != 1 or params[0] not in map(str, range(1, MOST_BITS + 1)):
        raise ArtefactError(f"csr takes one number of bits from 1 to {MOST_BITS}, not {':'.join(params)!r}")
    check_values(spec, parts["values"].dtype)
    bits, shape = int(params[0]), parts["values"].shape
    if len(shape) != 1 or parts["offsets"] != Spec((bytes_of(shape[0], bits),), torch.uint8):
        raise ArtefactError(f"offsets {parts['offsets']} do not go with values of shape {list(shape)} and {bits} bits")
    if not shape[0] <= spec.length < (shape[0] + 1) << bits:
        raise ArtefactError(f"{shape[0]} entries of {bits} bits cannot stand for {spec.length} words")


def decode(spec: Spec, params: tuple[str, ...], parts: Mapping[str, Tensor]) -> Words:
    bits, values = int(params[0]), widen(parts["values"], spec.dtype)
    offsets = unpack_fields(words(parts["offsets"]).view(np.uint8), len(values), bits)
    out, last = blank(spec.length, spec.word), -1
    for part in slices(len(values)):
        at = np.cumsum(offsets[part], dtype=np.int64) + np.arange(last + 1, last + 1 + part.stop - part.start)
        last = int(at[-1])
        if last >= spec.length:
            raise ArtefactError(f"the offsets lead to word {last} of {spec.length}")
        out[at] = values[part]
    if spec.length - 1 - last >= 1 << bits:
        raise ArtefactError(f"the offsets end at word {last} of {spec.length}, too early for {bits} bits")
    return out
