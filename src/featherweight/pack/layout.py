# SPDX-License-Identifier: Apache-2.0
"""Which elements of a stored tensor share a scale: all, those of a row, or a chunk of a row's columns.

Methods work on weights as rows x columns, rows being outputs and input channels running fastest among the columns
(`layers.to_matrix`); the file knows tensors alone. A layout says how one becomes the other, in a word:

    layout = "all" | axis ["x" groups] ["/" chunk]

Axis 0 is for linear and conv weights, embeddings and recurrent weights; axis 1 for transposed convs, with as many
groups as the conv has, and for linear layers that are stored as inputs x outputs.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from featherweight.errors import ArtefactError

__all__ = ["Layout", "layout_of"]

T = TypeVar("T", bound=np.generic)

_WORD = re.compile(r"(?:all|([01])(?:x([1-9]\d{0,17}))?(?:/([1-9]\d{0,17}))?)", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A tensor as rows x columns: `axis` None is one row of all. `chunk` 0 is a scale a row.

    >>> layout = Layout(axis=1)
    >>> layout.matrix(np.arange(6), (2, 3)).tolist()
    [[0, 3], [1, 4], [2, 5]]
    >>> layout.flat(layout.matrix(np.arange(6), (2, 3)), (2, 3)).tolist()
    [0, 1, 2, 3, 4, 5]
    """

    axis: int | None = None
    groups: int = 1
    chunk: int = 0

    def __str__(self) -> str:
        if self.axis is None:
            return "all"
        return f"{self.axis}{f'x{self.groups}' if self.groups > 1 else ''}{f'/{self.chunk}' if self.chunk else ''}"

    def size(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of a tensor of such a shape, without a tensor."""
        rows = 1 if self.axis is None else shape[self.axis] * self.groups
        return rows, math.prod(shape) // max(1, rows)

    def pieces(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The shape of the scales: rows, and chunks in each."""
        rows, columns = self.size(shape)
        return rows, -(-columns // self.chunk) if self.chunk else 1

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of such a shape has rows of this kind."""
        if self.axis is None:
            return self.groups == 1 and not self.chunk
        if len(shape) < 2 or 0 in shape:
            return False
        return shape[0] % self.groups == 0 and self.chunk < self.size(shape)[1] and (self.axis == 1 or self.groups == 1)

    def matrix(self, flat: NDArray[T], shape: tuple[int, ...]) -> NDArray[T]:
        """A tensor's elements in C order as rows x columns; a view where the order is the same."""
        split, order = self._order(shape)
        return flat.reshape(split).transpose(order).reshape(self.size(shape))

    def few_rows(self, flat: NDArray[T], shape: tuple[int, ...]) -> NDArray[T]:
        """Some four rows of the matrix from all over it (of four groups, if it has several), without the rest."""
        split, order = self._order(shape)
        view = flat.reshape(split).transpose(order)
        lead = 2 if self.axis == 1 else 1
        view = view[tuple(slice(None, None, -(-length // 4)) for length in view.shape[:lead])]
        return view.reshape(math.prod(view.shape[:lead]), -1)

    def flat(self, matrix: NDArray[T], shape: tuple[int, ...]) -> NDArray[T]:
        """The inverse of `matrix`."""
        split, order = self._order(shape)
        back = np.argsort(order)
        return matrix.reshape([split[i] for i in order]).transpose(back).reshape(-1)

    def _order(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The tensor's axes, the groups split off, and the order in which they make rows and columns."""
        if self.axis is None or (self.axis == 0 and not self.chunk):
            return shape, tuple(range(len(shape)))
        if self.axis == 0:
            return shape, (0, *range(2, len(shape)), 1)
        split = (self.groups, shape[0] // self.groups, *shape[1:])
        return split, (0, 2, *range(3, len(split)), 1)

    def columns(self, per_piece: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """What stands for each piece (some rows, chunks), for each column of it, or in one column if rows are whole."""
        return np.repeat(per_piece, self.chunk, axis=1)[:, : self.size(shape)[1]] if self.chunk else per_piece


def layout_of(word: str, shape: tuple[int, ...]) -> Layout:
    """The layout that a word names. Raises `ArtefactError` for a word that is none, or none of such a tensor.

    >>> layout_of("0/128", (64, 512)).pieces((64, 512))
    (64, 4)
    """
    match = _WORD.fullmatch(word)
    if match:
        axis, groups, chunk = match.groups()
        layout = Layout(None if axis is None else int(axis), int(groups or 1), int(chunk or 0))
        if str(layout) == word and layout.fits(shape):
            return layout
    raise ArtefactError(f"a tensor of shape {list(shape)} has no rows of the kind {word[:60]!r}")
