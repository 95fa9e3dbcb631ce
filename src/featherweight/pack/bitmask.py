# SPDX-License-Identifier: Apache-2.0
"""One bit a word, then the words that are not zero. Size: ceil(N / 8) + K * v bytes, K non-zeros of v bytes.

The index costs the same at any sparsity and with any pattern, so this is the form for 5 to 80 % zeros; beyond, counting
the zeros between values (`csr`) is smaller.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from featherweight.errors import ArtefactError
from featherweight.pack.bits import bytes_of
from featherweight.pack.narrow import check_values, narrow, widen
from featherweight.pack.source import Source
from featherweight.pack.words import Spec, Words, blank, slices, words

__all__ = ["PARTS", "check", "decode", "encode", "propose"]

PARTS: tuple[str, ...] = ("mask", "values")


def propose(source: Source, hint: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    yield "", bytes_of(source.spec.length, 1) + source.nonzeros * source.width


def encode(source: Source, params: tuple[str, ...]) -> dict[str, Tensor]:
    mask = np.empty(bytes_of(source.spec.length, 1), np.uint8)
    values = np.empty(source.nonzeros, source.words.dtype)
    done = 0
    for part in slices(source.spec.length):
        chunk = source.words[part]
        nonzero = chunk != 0
        mask[part.start // 8 : -(-part.stop // 8)] = np.packbits(nonzero, bitorder="little")
        # Positions, not the mask itself: a boolean index is up to nine times slower where zeros are scattered.
        at = np.flatnonzero(nonzero)
        values[done : done + len(at)] = chunk[at]
        done += len(at)
    return {"mask": torch.from_numpy(mask), "values": narrow(values, source.stored)}


def check(spec: Spec, params: tuple[str, ...], parts: Mapping[str, Spec]) -> None:
    check_values(spec, parts["values"].dtype)
    size = bytes_of(spec.length, 1)
    if params or parts["mask"] != Spec((size,), torch.uint8):
        raise ArtefactError(f"a mask of {spec.length} words takes {size} bytes, not {parts['mask']}")
    if len(parts["values"].shape) != 1 or parts["values"].shape[0] > spec.length:
        raise ArtefactError(f"values of shape {list(parts['values'].shape)} do not fit into {spec.length} words")


def decode(spec: Spec, params: tuple[str, ...], parts: Mapping[str, Tensor]) -> Words:
    mask, values = words(parts["mask"]), widen(parts["values"], spec.dtype)
    out, done = blank(spec.length, spec.word), 0
    for part in slices(spec.length):
        bits = np.unpackbits(
            mask[part.start // 8 : -(-part.stop // 8)].view(np.uint8), count=part.stop - part.start, bitorder="little"
        )
        at = np.flatnonzero(bits.view(np.bool_))
        if done + len(at) > len(values):
            raise ArtefactError(f"the mask has more ones than the {len(values)} values that are there")
        out[part][at] = values[done : done + len(at)]
        done += len(at)
    if done != len(values):
        raise ArtefactError(f"the mask has {done} ones for {len(values)} values")
    return out
