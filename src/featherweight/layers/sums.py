# SPDX-License-Identifier: Apache-2.0
"""Sums of products over tokens, in float64 of float32 products, for problems that are fed by one input.

A float32 product over 256 tokens errs by 1e-7 of itself on a CPU (relative, Frobenius; 6e-7 over thousands of tokens),
and at d of 500 and more takes a quarter of float64's time. X Xᵀ is symmetric: only stripes of its upper triangle are
computed. Calls of few tokens wait until there are enough for one product.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any, cast

import torch
from torch import Tensor

from featherweight.layers.inputs import Input
from featherweight.layers.problems import Problem

__all__ = ["Counts", "Products", "Sums"]

_TOKENS = 256  # of one float32 product
# Numbers in one chunk of patches: 4 MiB of float32, which a cache holds; more where that would be less than two products,
# but 64 MiB at most.
_CHUNK, _MOST = 1 << 20, 1 << 24
_STRIPE = 128


class Products:
    """Σ Aᵀ B over tokens for A (groups, tokens, left) and B (groups, tokens, right); of A with itself where B is None."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._waiting: list[tuple[Tensor, Tensor | None]] = []
        self._symmetric = True

    def add(self, A: Tensor, B: Tensor | None = None) -> None:
        if A.shape[1] >= _TOKENS:
            self._multiply(A, B)
            return
        # What waits must not change with the activation that it is a view of.
        self._waiting.append((A.clone(), None if B is None else B.clone()))
        if sum(a.shape[1] for a, _ in self._waiting) >= _TOKENS:
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
        total, pieces = self._total, ceil(A.shape[1] / _TOKENS)
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


class Sums:
    """The sums of problems that one input feeds: the wanted conv groups of a weight, or one part, or one block of channels.

    `groups` are the conv groups, in the order of `problems`; `slot` is which of a call's inputs feeds them. `leader`
    is other sums over the very same columns, whose X Xᵀ serves these too.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        first = problems[0]
        self.problems, self.weight, self.channels = tuple(problems), first.weight, first.channels
        parts = self.weight.kind == "attention"
        self.slot = first.part if parts else 0
        self.groups = [0] if parts else [problem.part for problem in problems]
        # Rows of the whole matrix that answer to the input: those of the part, or of all groups.
        self.rows = first.rows if parts else slice(None)
        self.leader: Sums | None = None
        self.calls = self.calls_before = self.tokens = self.samples = self.unpaired = 0
        self.gap_energy = torch.zeros(len(problems), dtype=torch.float64)
        self._gram, self._gap = Products(), Products()
        self._hessians: list[Tensor] | None = None

    @property
    def block(self) -> tuple[Any, ...]:
        """Which of the input's columns are read."""
        return (None if self.channels is None else (self.channels.start, self.channels.stop), *self.groups)

    def add(self, read: Input, gap: Tensor | None) -> None:
        """One call's X Xᵀ, and with a `gap` (groups, tokens, rows) of Y - W X also (Y - W X) Xᵀ and ||Y - W X||²."""
        self.tokens += read.tokens
        if gap is not None:
            gap = gap if self.groups == list(range(len(gap))) else gap[self.groups]
            self.gap_energy += torch.linalg.vector_norm(gap, dim=2).double().square().sum(1).cpu()
        if read.tokens == 0 or (self.leader is not None and gap is None):
            return
        start, size = 0, min(_MOST, max(_CHUNK, 2 * _TOKENS * len(self.groups) * self.problems[0].d))
        for X in read.patches(self.groups, self.channels, size):
            if self.leader is None:
                self._gram.add(X)
            if gap is not None:
                self._gap.add(gap[:, start : start + X.shape[1]], X)
            start += X.shape[1]

    def hessians(self) -> list[Tensor]:
        """H (d, d) of each problem; followers have their leader's very tensors."""
        if self.leader is not None:
            return self.leader.hessians()
        if self._hessians is None:
            total = cast(Tensor, self._gram.total())
            self._hessians = list(total.mul_(2 / self.tokens))
        return self._hessians

    def gaps(self) -> list[Tensor | None]:
        """2 (Y - W X) Xᵀ / tokens (rows, d) of each problem, in memory of their own; None without a reference."""
        total = self._gap.total()
        return [None] * len(self.problems) if total is None else list(total.mul_(2 / self.tokens))


class Counts:
    """How often each row of an embedding was looked up: all that a solver needs, for its rows answer one by one."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.slot = problem, 0
        self.calls = self.calls_before = self.tokens = self.samples = self.unpaired = 0
        rows = problem.weight.parameter
        self._seen = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)

    def add(self, read: Input, gap: Tensor | None) -> None:
        """One call's rows (tokens, 1)."""
        self._seen += torch.bincount(read.x.flatten(), minlength=len(self._seen))
        self.tokens += read.tokens

    def hessian_and_scale(self) -> tuple[Tensor, Tensor]:
        """H = 2 I (d, d), and the root of each row's share of all tokens (rows,)."""
        share = self._seen.to(torch.float64) / self.tokens
        return 2 * torch.eye(self.problem.d, dtype=torch.float64, device=share.device), share.sqrt()
