# SPDX-License-Identifier: Apache-2.0
"""Tensors on a grid or a codebook, entropy-coded: near the information that their numbers hold, in a single part.

The numbers (`symbols`) are written densely, or, for pruned weights, as Deep Compression does (Han et al. 2016): how
many zeros stand before each non-zero, and which number it is; whichever takes fewer bytes. `huffman` and `rans` have
static tables and decode at memory-like speed in NumPy; `adaptive` learns its statistics on the way, in contexts of
neighbours, rows and columns, and is the smallest and the slowest. All that a tensor needs stands in one part, since a
part's entry in the header takes 80 bytes, more than many a bias.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featherweight.errors import ArtefactError
from featherweight.pack import adaptive
from featherweight.pack.source import Source
from featherweight.pack.streams import CODERS, Reader, information, read_stream, varint, write_stream
from featherweight.pack.symbols import Symbols, check_tables, symbols, words_of
from featherweight.pack.words import Spec, Words, slices, typed, words

__all__ = ["PARTS", "check", "decode", "encode", "propose"]

PARTS: tuple[str, ...] = ("coded",)

VERSION = 1
_DENSE, _SPARSE = 0, 1
_WORDS_A_BYTE = 1 << 16  # a tensor larger than this many words for each of its bytes is left to other codecs
# What `adaptive` is tried on unasked, with a non-zero as six zeros: a quarter of a second. It must save 3 % then.
_WORK, _NONZERO, _GAIN = 1 << 17, 6, 0.97
_MEDIUM = 1 << 20
_LARGEST = 1 << 24  # and those that it codes at all
_LARGEST_NUMBER = 1 << 30
_TABLES = {"int": "scale", "codebook": "codebook"}
_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # by number


def propose(source: Source, hint: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """True sizes: of the view that the static coders make least of, and of those with few levels for `adaptive`.

    What was encoded to know is kept until it is written. `adaptive` is tried where the hint ends in its name, and on
    small tensors, where it must save what its slowness costs. Huffman codes are not tried on large ones: there a table
    is nothing, and rANS is closer to the entropy.
    """
    views = sorted(symbols(source), key=_information)
    if not views or _information(views[0]) >= source.spec.length * source.width:
        return
    count, asked = source.spec.length, "adaptive" in hint
    trials = [("rans", views[0]), *((("huffman", views[0]),) if count <= _MEDIUM else ())]
    if count + _NONZERO * source.nonzeros <= _WORK or (asked and count <= _LARGEST):
        fewest = min(_levels(view) for view in views)
        trials += [("adaptive", view) for view in views if _levels(view) <= 2 * fewest]
    least = math.inf
    for coder, view in trials:
        coded = _encode(source.spec, view, coder)
        if coder != "adaptive":
            least = min(least, len(coded))
        elif not asked and len(coded) > _GAIN * least:
            continue
        if count <= len(coded) * _WORDS_A_BYTE:
            text = ":".join((view.kind, *view.params, coder))
            source.kept[text] = coded
            yield text, len(coded)


def encode(source: Source, params: tuple[str, ...]) -> dict[str, Tensor]:
    coded = source.kept.get(":".join(params))
    if coded is None:
        view = next(view for view in symbols(source) if (view.kind, *view.params) == params[:-1])
        coded = _encode(source.spec, view, params[-1])
    return {"coded": torch.frombuffer(bytearray(coded), dtype=torch.uint8)}


def _information(view: Symbols) -> float:
    """Bytes that a static coder will need, about: the scales or entries, and all tokens by their entropy."""
    return information(_unsigned(view.signed), 0)[0] + sum(table.nbytes for table in view.tables.values())


def _levels(view: Symbols) -> int:
    return max(int(view.signed.max()), -int(view.signed.min()))


def _encode(spec: Spec, view: Symbols, coder: str) -> bytes:
    [table] = view.tables.values()
    head = bytes([VERSION, _TYPES.index(table.dtype)]) + varint(table.numel()) + words(table).tobytes()
    if coder == "adaptive":
        return head + adaptive.encode(view.signed, _columns(spec))
    count, at = len(view.signed), np.flatnonzero(view.signed)
    dense, values = _unsigned(view.signed), _unsigned(view.signed[at]) - 1
    runs = np.diff(at, prepend=-1) - 1
    sizes = [information(stream, count)[0] for stream in (dense, runs, values)]
    if not 0 < len(at) < count or sizes[0] <= sizes[1] + sizes[2]:
        return head + bytes([_DENSE]) + write_stream(dense, coder, count)
    sparse = write_stream(runs, coder, count) + write_stream(values, coder, count)
    return head + bytes([_SPARSE]) + varint(len(at)) + sparse


def _unsigned(signed: NDArray[np.int32]) -> NDArray[np.int64]:
    """0, 1, -1, 2, -2, ... as 0, 1, 2, 3, 4, ..."""
    wide = signed.astype(np.int64)
    return np.where(wide > 0, 2 * wide - 1, -2 * wide)


def _signed(unsigned: NDArray[np.integer[Any]]) -> NDArray[np.int32]:
    signed = np.empty(len(unsigned), np.int32)
    for part in slices(len(unsigned)):
        wide = unsigned[part].astype(np.int32)
        half = (wide + 1) >> 1
        signed[part] = np.where(wide & 1, half, -half)
    return signed


def _columns(spec: Spec) -> int:
    """Words in a row: whatever stands behind the first axis. A vector is a row."""
    return spec.length // spec.shape[0] if len(spec.shape) > 1 and spec.length else spec.length


def check(spec: Spec, params: tuple[str, ...], parts: Mapping[str, Spec]) -> None:
    """Bounds the tensor by its bytes, and the adaptive coder's time by its own limit."""
    if params[0] not in _TABLES or params[-1] not in (*CODERS, "adaptive"):
        raise ArtefactError(f"entropy takes a kind, its parameters and a coder, not {':'.join(params)!r}")
    part = parts["coded"]
    if part.dtype != torch.uint8 or len(part.shape) != 1:
        raise ArtefactError(f"coded data {part} are not a row of bytes")
    most = part.shape[0] * _WORDS_A_BYTE if params[-1] != "adaptive" else min(_LARGEST, part.shape[0] * _WORDS_A_BYTE)
    if spec.length > most:
        raise ArtefactError(f"{part.shape[0]} bytes of {params[-1]} cannot stand for {spec.length} words")


def decode(spec: Spec, params: tuple[str, ...], parts: Mapping[str, Tensor]) -> Words:
    kind, own, coder = params[0], params[1:-1], params[-1]
    reader = Reader(words(parts["coded"]).view(np.uint8))
    if (version := reader.byte()) != VERSION:
        raise ArtefactError(f"version {version} of entropy coding is not {VERSION}: install the release that wrote it")
    tables = {_TABLES[kind]: _read_table(reader)}
    check_tables(spec, kind, own, {name: Spec(tuple(table.shape), table.dtype) for name, table in tables.items()})
    if coder == "adaptive":
        signed = adaptive.decode(reader, spec.length, _columns(spec))
    else:
        signed = _read_numbers(reader, spec.length, coder)
    if reader.at < len(reader.data):
        raise ArtefactError(f"{len(reader.data) - reader.at} bytes are left over behind the numbers")
    return words_of(spec, kind, own, signed, tables)


def _read_numbers(reader: Reader, count: int, coder: str) -> NDArray[np.int32]:
    form = reader.byte()
    if form == _DENSE:
        return _signed(_bounded(read_stream(reader, count, coder, count)))
    stored = reader.varint()
    if form != _SPARSE or not 0 < stored < count:
        raise ArtefactError(f"no form {form} of {count} numbers has {stored} that are stored")
    runs = read_stream(reader, stored, coder, count)
    values = read_stream(reader, stored, coder, count)
    # Each run by itself first: the sum of forged ones could go round and come out small.
    if int(runs.max()) >= count or int(runs.sum(dtype=np.int64)) + stored > count:
        raise ArtefactError(f"the runs between {stored} numbers lead beyond the {count} that there are")
    signed = np.zeros(count, np.int32)
    signed[np.cumsum(runs.astype(np.int64) + 1) - 1] = _signed(_bounded(values).astype(np.int64) + 1)
    return signed


def _bounded(values: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
    if int(values.max(initial=0)) >= _LARGEST_NUMBER:
        raise ArtefactError(f"the coded data hold a number of {int(values.max()).bit_length()} bits")
    return values


def _read_table(reader: Reader) -> Tensor:
    code, count = reader.byte(), reader.varint()
    if code >= len(_TYPES):
        raise ArtefactError(f"no table is of type {code}")
    return typed(reader.take(count * _TYPES[code].itemsize).copy(), _TYPES[code])
