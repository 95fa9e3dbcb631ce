# SPDX-License-Identifier: Apache-2.0
"""Tensors as small integers and what they stand for: multiples of scales, or entries of a codebook.

Both are read from the values. A grid comes from rounding to scale · k (`grids.read_grid`): k is the number, and a scale
is kept for all of the tensor, for each row, or for chunks of a row, whichever takes the fewest bytes. A codebook is
nothing but the tensor's distinct values, where they are few. What a method did, or said, does not matter: a tensor that
lies on a grid by chance is stored so, and one that lost its grid to a later stage is not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featherweight.errors import ArtefactError
from featherweight.grids import Grid, read_grid
from featherweight.pack.layout import Layout, layout_of
from featherweight.pack.narrow import check_values, narrow, narrowest, widen
from featherweight.pack.source import Source
from featherweight.pack.words import Spec, Words, blank, slices, typed, words

__all__ = ["FLOATS", "MOST_ENTRIES", "Symbols", "check_tables", "indices_of", "read_symbols", "symbols", "words_of"]

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MOST_ENTRIES = 1 << 12
_MOST_BITS = 16
_FEWEST = 16  # elements; a smaller tensor gains nothing
_CHUNKS = 256, 128, 64, 32  # tried where no hint names one
_GOOD = 8  # bits; finer layouts are tried as long as a coarser one needs more
_EVIDENCE = 8  # non-zeros a scale, on average, from which on grids of more bits than that are looked for
_BLOCK = 1 << 18


@dataclasses.dataclass(frozen=True, eq=False)
class Symbols:
    """A tensor as numbers and tables.

    `kind` "int", `params` (bits, layout): `signed` are k = q - zero_point, the word is that of fl(scale · k); at one
    bit k is -1 or 1. The table is `scale`, flat, one for each piece of the layout. A product is rounded to float32 (not
    at all for float64 tensors), and from there to the tensor's type. `kind` "codebook", `params` (entries,): the table
    is `codebook`, the distinct values in order, with zero among them if the tensor has one; `signed` counts from zero
    on, or from the place where it would stand and there is then no 0. Tables are narrowed as values are. `signed` is in
    C order, and 0 exactly where the word is 0.
    """

    kind: str
    params: tuple[str, ...]
    signed: NDArray[np.int32]
    tables: dict[str, Tensor]


def symbols(source: Source) -> Iterator[Symbols]:
    """The views that fit this tensor, best first; none for ordinary floats. Found once for each source.

    >>> from featherweight.pack.source import look
    >>> for view in symbols(look(torch.tensor([0.0, 0.2, -0.1, 0.1] * 8))):
    ...     print(view.kind, view.params, view.signed[:4])
    int ('2', 'all') [ 0  2 -1  1]
    codebook ('4',) [ 0  2 -1  1]
    """
    yield from source.symbols


def read_symbols(source: Source) -> Iterator[Symbols]:
    """What `symbols` gives, found anew."""
    if source.spec.dtype not in FLOATS or source.spec.length < _FEWEST:
        return
    found = [view for view in (_on_grid(source), _in_codebook(source)) if view is not None]
    yield from sorted(found, key=lambda view: _bits(view) + 8 * sum(table.nbytes for table in view.tables.values()))


def _bits(view: Symbols) -> int:
    width = int(view.params[0]) if view.kind == "int" else (int(view.params[0]) - 1).bit_length()
    return width * len(view.signed)


def words_of(
    spec: Spec, kind: str, params: tuple[str, ...], signed: NDArray[np.int32], tables: Mapping[str, Tensor]
) -> Words:
    """The words that numbers stand for. Raises `ArtefactError` for numbers or tables that stand for none.

    What `check_tables` says of the tables is taken for granted.
    """
    if len(signed) != spec.length:
        raise ArtefactError(f"{len(signed)} numbers for {spec.length} words")
    if kind == "int":
        return _multiples(spec, layout_of(params[1], spec.shape), signed, tables["scale"])
    return _entries(spec, signed, tables["codebook"])


def check_tables(spec: Spec, kind: str, params: tuple[str, ...], tables: Mapping[str, Spec]) -> None:
    """Raises `ArtefactError` where such tables cannot belong to such a tensor. Allocates nothing."""
    if spec.dtype not in FLOATS:
        raise ArtefactError(f"a {spec} is not stored as {kind}")
    if kind == "int":
        if len(params) != 2 or params[0] not in map(str, range(1, _MOST_BITS + 1)):
            raise ArtefactError(f"int takes 1 to {_MOST_BITS} bits and a layout, not {':'.join(params)!r}")
        rows, chunks = layout_of(params[1], spec.shape).pieces(spec.shape)
        count, table = rows * chunks, "scale"
        check_values(Spec((), torch.float32), tables[table].dtype)
    else:
        if len(params) != 1 or params[0] not in map(str, range(1, MOST_ENTRIES + 1)):
            raise ArtefactError(f"codebook takes 1 to {MOST_ENTRIES} entries, not {':'.join(params)!r}")
        count, table = int(params[0]), "codebook"
        check_values(spec, tables[table].dtype)
    if tables[table].shape != (count,):
        raise ArtefactError(f"a {table} of shape {list(tables[table].shape)} where {count} values belong")


# Grids


def _on_grid(source: Source) -> Symbols | None:
    found: dict[Layout, Grid] = {}
    for layout in _layouts(source):
        grid = _grid(source, layout)
        if grid is not None:
            found[layout] = grid
            if grid.bits <= _GOOD:
                break
    if not found:
        return None
    sizes = {layout: grid.bits * source.spec.length + 32 * grid.scale.numel() for layout, grid in found.items()}
    layout = min(sizes, key=sizes.__getitem__)
    grid = found[layout]
    signed = _numbers(source, layout, grid.scale.numpy())
    if np.count_nonzero(signed) != source.nonzeros:
        return None  # it has a -0.0, which no multiple is
    scale = words(grid.scale)
    tables = {"scale": narrow(scale, narrowest(scale, torch.float32))}
    return Symbols("int", (str(grid.bits), str(layout)), signed, tables)


def _layouts(source: Source) -> Iterator[Layout]:
    """Layouts worth a trial: for each way to make rows, from few scales to many. A few rows tell which to leave out."""
    shape = source.spec.shape
    yield Layout()
    ways = [Layout(0), Layout(1)]
    if len(shape) > 2:
        ways += [Layout(1, groups) for groups in _divisors(shape[0])]
    for way in ways:
        if not way.fits(shape):
            continue
        columns = way.size(shape)[1]
        chunks = [chunk for chunk in (*_CHUNKS, 0) if chunk < columns]
        # Each of our own chunks is made of the next ones, so that the finest tells of all; a hint's is none of them.
        if _grid(source, dataclasses.replace(way, chunk=min(filter(None, chunks), default=0)), sample=True) is not None:
            yield from (dataclasses.replace(way, chunk=chunk) for chunk in sorted(chunks, key=lambda n: -n or -columns))
        chunk = _hinted(source.hint)
        if 0 < chunk < columns and chunk not in chunks:
            finest = dataclasses.replace(way, chunk=chunk)
            if _grid(source, finest, sample=True) is not None:
                yield finest


def _hinted(hint: tuple[str, ...]) -> int:
    """The chunk of a hint as ("int", "4", "128"), 0 where it names none."""
    word = hint[2] if len(hint) == 3 and hint[0] == "int" else ""
    return int(word) if word.isascii() and word.isdecimal() and len(word) < 19 else 0


def _divisors(count: int) -> list[int]:
    """Numbers of groups that convs have: powers of two and as many as there are channels."""
    return [g for g in (*(1 << i for i in range(1, count.bit_length())), count) if count % g == 0 and g > 1]


def _grid(source: Source, layout: Layout, sample: bool = False) -> Grid | None:
    pick = layout.few_rows if sample else layout.matrix
    rows = pick(source.words, source.spec.shape)
    matrix = typed(rows, source.spec.dtype, rows.shape)
    if sample:
        matrix = matrix[:, : 2 * (layout.chunk or 64)]
    # Two or three values are on some fine grid by chance: it takes long to find and saves nothing.
    few = source.nonzeros < _EVIDENCE * math.prod(layout.pieces(source.spec.shape))
    return read_grid(matrix, most_bits=_GOOD if few else _MOST_BITS, chunk=layout.chunk or None)


def _numbers(source: Source, layout: Layout, scale: NDArray[np.float32]) -> NDArray[np.int32]:
    shape = source.spec.shape
    matrix = layout.matrix(source.words, shape)
    signed = np.empty(matrix.shape, np.int32)
    for rows, columns in _blocks(layout, shape):
        values = typed(matrix[rows, columns].reshape(-1), source.spec.dtype).double().numpy()
        step = layout.columns(scale[rows], shape)
        np.rint(values.reshape(step.shape[0], -1) / step, out=signed[rows, columns], casting="unsafe")
    return layout.flat(signed, shape)


def _blocks(layout: Layout, shape: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
    """Slices of the matrix that stay in the cache: of rows, or of the columns of the one row."""
    rows, columns = layout.size(shape)
    if layout.axis is None:
        yield from ((slice(0, 1), part) for part in slices(columns, _BLOCK))
    else:
        yield from ((part, slice(0, columns)) for part in slices(rows, max(1, _BLOCK // max(1, columns))))


def _multiples(spec: Spec, layout: Layout, signed: NDArray[np.int32], table: Tensor) -> Words:
    scale = typed(widen(table, torch.float32), torch.float32).numpy().reshape(layout.pieces(spec.shape))
    if not bool(np.all((scale > 0) & np.isfinite(scale))):
        raise ArtefactError("a scale is not a positive number")
    matrix = layout.matrix(signed, spec.shape)
    if matrix.size and max(-int(matrix.min()), int(matrix.max())) >= 1 << _MOST_BITS:
        raise ArtefactError(f"a number is beyond {_MOST_BITS} bits")
    work = np.float64 if spec.dtype == torch.float64 else np.float32
    out = blank(spec.length, spec.word).reshape(matrix.shape)
    for rows, columns in _blocks(layout, spec.shape):
        values = matrix[rows, columns].astype(work) * layout.columns(scale[rows], spec.shape)
        out[rows, columns] = words(torch.from_numpy(values).to(spec.dtype)).reshape(values.shape)
    return layout.flat(out, spec.shape)


# Codebooks


def _in_codebook(source: Source) -> Symbols | None:
    table = _distinct(source)
    if table is None:
        return None
    ordered = np.argsort(_rank(table), kind="stable")
    place = np.empty(len(table), np.int32)
    place[ordered] = _offsets(table[ordered])
    signed = np.empty(len(source.words), np.int32)
    for part in slices(len(signed)):
        signed[part] = place[np.searchsorted(table, source.words[part])]
    book = narrow(table[ordered], narrowest(table, source.spec.dtype))
    return Symbols("codebook", (str(len(table)),), signed, {"codebook": book})


def _distinct(source: Source) -> Words | None:
    """The distinct words as numbers in ascending order; None where they are too many to gain by it."""
    flat, most = source.words, min(MOST_ENTRIES, source.nonzeros // 2 + 1)
    # A stretch from the middle first: the beginning may be padding.
    table, middle = flat[:0], len(flat) // 2
    for part in (slice(middle, middle + 8 * most), *slices(len(flat), 1 << 18)):
        # Sorting is several times faster here than the hashing of numpy.unique.
        ordered = np.sort(np.concatenate((table, flat[part])))
        table = ordered[np.concatenate(([True], ordered[1:] != ordered[:-1]))[: len(ordered)]]
        if len(table) > most:
            return None
    bits = (len(table) - 1).bit_length() * source.spec.length + 8 * len(table) * source.width
    return table if bits < 8 * source.width * source.spec.length else None


def _is_negative(table: Words) -> NDArray[np.bool_]:
    return np.asarray(table >> (8 * table.itemsize - 1), np.bool_)


def _rank(table: Words) -> NDArray[np.float64]:
    """A number larger for larger values, of whatever words: magnitude and sign, exact to float64 for 64-bit words."""
    magnitude = table & table.dtype.type((1 << (8 * table.itemsize - 1)) - 1)
    return np.where(_is_negative(table), -magnitude.astype(np.float64) - 1, magnitude.astype(np.float64))


def _offsets(table: Words) -> NDArray[np.int32]:
    """The numbers of a codebook's entries, in their order: 0 is the word zero, or the gap where it would stand."""
    negative = int(np.count_nonzero(_is_negative(table)))
    offsets = np.arange(-negative, len(table) - negative, dtype=np.int32)
    if 0 not in table:
        offsets[negative:] += 1
    return offsets


def indices_of(spec: Spec, signed: NDArray[np.int32], book: Tensor) -> NDArray[np.int32]:
    """The places in the codebook that numbers stand for. Raises `ArtefactError` where one stands for none."""
    table = widen(book, spec.dtype)
    if np.any(np.diff(_rank(table)) <= 0):
        raise ArtefactError("a codebook is not in ascending order")
    offsets = _offsets(table)
    # The gap at zero, where the codebook has none, stands for no entry.
    low, high = min(0, int(offsets[0])), max(0, int(offsets[-1]))
    place = np.full(high - low + 1, -1, np.int32)
    place[offsets - low] = np.arange(len(table), dtype=np.int32)
    if len(signed) and not low <= int(signed.min()) <= int(signed.max()) <= high:
        raise ArtefactError(f"a number stands for none of the {len(table)} entries of the codebook")
    indices = place[signed - low]
    if len(indices) and int(indices.min()) < 0:
        raise ArtefactError("a number stands for zero, which the codebook has not")
    return indices


def _entries(spec: Spec, signed: NDArray[np.int32], book: Tensor) -> Words:
    out, table, indices = blank(spec.length, spec.word), widen(book, spec.dtype), indices_of(spec, signed, book)
    for part in slices(spec.length):
        np.take(table, indices[part], out=out[part], mode="clip")
    return out
