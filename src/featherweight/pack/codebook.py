# SPDX-License-Identifier: Apache-2.0
"""Few distinct values as a table of them, and an index for each element. Size: ceil(N * w / 8) + E * v bytes.

E entries of v bytes take indices of w = ceil(log2 E) bits, at least 1. Zero is an entry like any other, so that what
was pruned before it was clustered stays so. `entropy` takes fewer bits where some values are more frequent than others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from featherweight.errors import ArtefactError
from featherweight.pack.bits import bytes_of, pack_fields, unpack_fields
from featherweight.pack.narrow import widen
from featherweight.pack.source import Source
from featherweight.pack.symbols import Symbols, check_tables, indices_of
from featherweight.pack.words import Spec, Words, blank, slices, words

__all__ = ["PARTS", "check", "decode", "encode", "propose"]

PARTS: tuple[str, ...] = ("indices", "codebook")


def _view(source: Source) -> Symbols | None:
    return next((view for view in source.symbols if view.kind == "codebook"), None)


def _width(entries: int) -> int:
    return max(1, (entries - 1).bit_length())


def propose(source: Source, hint: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    view = _view(source)
    if view is not None:
        book = view.tables["codebook"]
        yield view.params[0], bytes_of(source.spec.length, _width(len(book))) + book.nbytes


def encode(source: Source, params: tuple[str, ...]) -> dict[str, Tensor]:
    view = _view(source)
    if view is None:
        raise ArtefactError("the tensor has too many values for a codebook")
    book = view.tables["codebook"]
    indices = indices_of(source.spec, view.signed, book).astype(np.uint16)
    return {"indices": torch.from_numpy(pack_fields(indices, _width(len(book)))), "codebook": book}


def check(spec: Spec, params: tuple[str, ...], parts: Mapping[str, Spec]) -> None:
    check_tables(spec, "codebook", params, {"codebook": parts["codebook"]})
    width = _width(int(params[0]))
    size = bytes_of(spec.length, width)
    if parts["indices"] != Spec((size,), torch.uint8):
        raise ArtefactError(f"{spec.length} indices of {width} bits take {size} bytes, not {parts['indices']}")


def decode(spec: Spec, params: tuple[str, ...], parts: Mapping[str, Tensor]) -> Words:
    table = widen(parts["codebook"], spec.dtype)
    indices = unpack_fields(words(parts["indices"]).view(np.uint8), spec.length, _width(len(table)))
    if len(indices) and int(indices.max()) >= len(table):
        raise ArtefactError(f"an index is {int(indices.max())}, of {len(table)} entries")
    out = blank(spec.length, spec.word)
    for part in slices(spec.length):
        np.take(table, indices[part], out=out[part], mode="clip")
    return out
