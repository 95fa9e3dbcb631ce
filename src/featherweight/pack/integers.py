# SPDX-License-Identifier: Apache-2.0
"""Values on a grid as integers of b bits, with a scale for all, for each row or for each chunk (`layout`).

Size: ceil(b * (N + Z) / 8) + S * v bytes, N elements, S scales of v bytes (2 where all are fp16 or bf16 numbers, else
4), Z zero points: S, or none where every row's integers lie around zero. Fixed-width fields are no smaller for numbers
that are frequent; `entropy` is. They are what a kernel would read, and decode the fastest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featherweight.errors import ArtefactError
from featherweight.pack.bits import bytes_of, pack_fields, unpack_fields
from featherweight.pack.layout import Layout, layout_of
from featherweight.pack.source import Source
from featherweight.pack.symbols import Symbols, check_tables, words_of
from featherweight.pack.words import Spec, Words, words

__all__ = ["PARTS", "check", "decode", "encode", "propose"]

PARTS: tuple[str, ...] = ("integers", "scale")

_SHIFTED = "z"


def _view(source: Source) -> Symbols | None:
    return next((view for view in source.symbols if view.kind == "int"), None)


def propose(source: Source, hint: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """The bits and the layout of the tensor's grid, and whether it has zero points; nothing where it has no grid."""
    view = _view(source)
    if view is not None:
        bits, half = int(view.params[0]), 1 << (int(view.params[0]) - 1)
        shifted = bits > 1 and not -half <= int(view.signed.min()) <= int(view.signed.max()) < half
        fields = source.spec.length + (view.tables["scale"].numel() if shifted else 0)
        yield ":".join((*view.params, *[_SHIFTED] * shifted)), bytes_of(fields, bits) + view.tables["scale"].nbytes


def encode(source: Source, params: tuple[str, ...]) -> dict[str, Tensor]:
    view, bits = _view(source), int(params[0])
    if view is None:
        raise ArtefactError("the tensor lies on no grid")
    if bits == 1:
        fields = (view.signed > 0).astype(np.uint8)
    elif len(params) == 2:
        fields = (view.signed + (1 << (bits - 1))).astype(np.uint16)
    else:
        layout = layout_of(params[1], source.spec.shape)
        least = _least(layout.matrix(view.signed, source.spec.shape), layout)
        up = layout.matrix(view.signed, source.spec.shape) - layout.columns(least, source.spec.shape)
        fields = np.concatenate((-least.reshape(-1), layout.flat(up, source.spec.shape))).astype(np.uint16)
    return {"integers": torch.from_numpy(pack_fields(fields, bits)), "scale": view.tables["scale"]}


def _least(matrix: NDArray[np.int32], layout: Layout) -> NDArray[np.int32]:
    """The least number of each piece, 0 at most, (rows, chunks): what becomes the grid's lowest integer."""
    starts = range(0, matrix.shape[1], layout.chunk or matrix.shape[1])
    return np.minimum(np.minimum.reduceat(matrix, starts, axis=1), 0)


def check(spec: Spec, params: tuple[str, ...], parts: Mapping[str, Spec]) -> None:
    bits, shifted = params[0] if params else "", params[2:]
    if shifted and (shifted != (_SHIFTED,) or bits == "1"):
        raise ArtefactError(f"int takes bits, a layout and perhaps a {_SHIFTED!r}, not {':'.join(params)!r}")
    check_tables(spec, "int", params[:2], {"scale": parts["scale"]})
    size = bytes_of(spec.length + (parts["scale"].length if shifted else 0), int(bits))
    if parts["integers"] != Spec((size,), torch.uint8):
        raise ArtefactError(f"{spec.length} integers of {bits} bits take {size} bytes, not {parts['integers']}")


def decode(spec: Spec, params: tuple[str, ...], parts: Mapping[str, Tensor]) -> Words:
    bits, layout = int(params[0]), layout_of(params[1], spec.shape)
    first = parts["scale"].numel() if len(params) == 3 else 0
    fields = unpack_fields(words(parts["integers"]).view(np.uint8), first + spec.length, bits)
    signed = fields[first:].astype(np.int32)
    if bits == 1:
        signed = 2 * signed - 1
    elif not first:
        signed -= 1 << (bits - 1)
    else:
        zero_point = fields[:first].astype(np.int32).reshape(layout.pieces(spec.shape))
        signed = layout.flat(layout.matrix(signed, spec.shape) - layout.columns(zero_point, spec.shape), spec.shape)
    return words_of(spec, "int", params[:2], signed, {"scale": parts["scale"]})
