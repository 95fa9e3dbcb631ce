# SPDX-License-Identifier: Apache-2.0
"""Many inverse Hessians, each losing its own columns one after the other: the arithmetic under ExactOBS and OBQ.

Removing column j turns H⁻¹ into H⁻¹ - uᵀu with u = H⁻¹[j] / sqrt(H⁻¹[j, j]). Done at once, each step reads and writes
every matrix; here u waits in a buffer, a row that is asked for is corrected by what waits, and `rank` updates are
applied as one matrix product. Columns that are gone are dropped from the stack whenever a fifth of it is dead weight.
Both change no result, only its cost: about d³ multiply-adds a matrix, at the speed of a matrix product, for all of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["Inverses", "batches", "bytes_per_matrix"]

_RANK = 32
COMPACT_BELOW = 0.8


class Inverses:
    """A stack (G, a, a) of inverse Hessians under lazy downdates. The stack handed in is overwritten."""

    def __init__(self, stack: Tensor, rank: int = _RANK) -> None:
        self._stack = stack.contiguous()
        self._waiting = stack.new_empty(len(stack), rank, stack.shape[1])
        self._count = 0
        self._each = torch.arange(len(stack), device=stack.device)

    def rows(self, at: Tensor) -> Tensor:
        """The rows `at` (G, c) of each matrix as it is now: (G, c, a)."""
        each = self._each[:, None]
        rows = self._stack[each, at]
        if self._count:
            waiting = self._waiting[:, : self._count]
            rows = torch.baddbmm(rows, waiting.transpose(1, 2)[each, at], waiting, alpha=-1)
        return rows

    def remove(self, u: Tensor) -> None:
        """Subtracts uᵀu, u (G, c, a), from each matrix."""
        c = u.shape[1]
        if self._count + c > self._waiting.shape[1]:
            self._flush()
        if c > self._waiting.shape[1]:
            self._stack.baddbmm_(u.transpose(1, 2), u, alpha=-1)
            return
        self._waiting[:, self._count : self._count + c] = u
        self._count += c

    def keep(self, index: Tensor) -> None:
        """Drops every column but `index` (G, a'), ascending."""
        self._flush()
        count, a = index.shape
        # In place: matrix g moves to where it overlaps none but itself and those before it. Fresh memory would have to
        # be mapped page by page, which costs more than the copy.
        flat = self._stack.view(-1)
        for g, columns in enumerate(index):
            chosen = self._stack[g].index_select(0, columns)
            torch.index_select(chosen, 1, columns, out=flat[g * a * a : (g + 1) * a * a].view(a, a))
        self._stack = flat[: count * a * a].view(count, a, a)
        rank = self._waiting.shape[1]
        self._waiting = self._waiting.view(-1)[: count * rank * a].view(count, rank, a)

    def _flush(self) -> None:
        if self._count:
            waiting = self._waiting[:, : self._count]
            self._stack.baddbmm_(waiting.transpose(1, 2), waiting, alpha=-1)
            self._count = 0


def bytes_per_matrix(d: int, dtype: torch.dtype) -> int:
    """Peak bytes that one matrix of the stack costs: itself, what waits, and a few vectors of a step."""
    return (d + _RANK + 16) * d * dtype.itemsize


def batches(count: int, each_bytes: int, budget_bytes: int) -> Iterator[slice]:
    """Slices of 0..count, as even as they come, whose items together stay within the budget (one item at least)."""
    size = max(1, budget_bytes // max(1, each_bytes))
    pieces = -(-count // size)
    start = 0
    for piece in range(pieces):
        stop = start + (count - start) // (pieces - piece)
        yield slice(start, stop)
        start = stop
