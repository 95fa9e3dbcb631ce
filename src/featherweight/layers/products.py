# SPDX-License-Identifier: Apache-2.0
"""Sums of products over tokens, in float64 of float32 products.

A float32 product over 256 tokens errs by 1e-7 of itself on a CPU (relative, Frobenius; 6e-7 over thousands of tokens),
and at d of 500 and more takes a quarter of float64's time. X Xᵀ is symmetric: only stripes of its upper triangle are
computed. Calls of few tokens wait until there are enough for one product.
"""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

__all__ = ["TOKENS", "Products"]

TOKENS = 256  # of one float32 product
_STRIPE = 128


class Products:
    """Σ Aᵀ B over tokens for A (groups, tokens, left) and B (groups, tokens, right); of A with itself if B is None."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._waiting: list[tuple[Tensor, Tensor | None]] = []
        self._symmetric = True

    def add(self, A: Tensor, B: Tensor | None = None) -> None:
        if A.shape[1] >= TOKENS:
            self._multiply(A, B)
            return
        # What waits must not change with the activation that it is a view of.
        self._waiting.append((A.clone(), None if B is None else B.clone()))
        if sum(a.shape[1] for a, _ in self._waiting) >= TOKENS:
            self._flush()

    def total(self) -> Tensor | None:
        """(groups, left, right) in float64, or None if nothing was added. Call it once, at the end."""
        self._flush()
        total = self._total
        if total is not None and self._symmetric:
            for start, stop in _stripes(total.shape[1]):
                total[:, stop:, start:stop] = total[:, start:stop, stop:].mT
                block = total[:, start:stop, start:stop]
                block.copy_((block + block.mT) / 2)
        return total

    def _flush(self) -> None:
        if self._waiting:
            left, right = [a for a, _ in self._waiting], [b for _, b in self._waiting if b is not None]
            self._waiting = []
            self._multiply(torch.cat(left, 1), torch.cat(right, 1) if right else None)

    def _multiply(self, A: Tensor, B: Tensor | None) -> None:
        if self._total is None:
            self._symmetric = B is None
            right = A if B is None else B
            self._total = A.new_zeros(len(A), A.shape[2], right.shape[2], dtype=torch.float64)
        total, pieces = self._total, ceil(A.shape[1] / TOKENS)
        if B is not None:
            for a, b in zip(A.chunk(pieces, 1), B.chunk(pieces, 1), strict=True):
                total += a.mT @ b
            return
        for a in A.chunk(pieces, 1):
            for start, stop in _stripes(a.shape[2]):
                total[:, start:stop, start:] += a[:, :, start:stop].mT @ a[:, :, start:]


def _stripes(d: int) -> list[tuple[int, int]]:
    """At most four: more would save little of the other half and make narrow products."""
    width = max(_STRIPE, ceil(d / 4))
    return [(start, min(start + width, d)) for start in range(0, d, width)]
