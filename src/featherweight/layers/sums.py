# SPDX-License-Identifier: Apache-2.0
"""What is summed over tokens for problems that are fed by one input: X Xᵀ, and what the outputs still lack times X."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from featherweight.layers.inputs import Input
from featherweight.layers.problems import Problem
from featherweight.layers.products import TOKENS, Products
from featherweight.layers.sliding import Slides, sliding_axis

__all__ = ["Counts", "Sums"]

# Numbers in one chunk of patches: 4 MiB of float32, which a cache holds; more where that would be less than two
# products, but 64 MiB at most.
_CHUNK, _MOST = 1 << 20, 1 << 24


class Sums:
    """Sums of problems that one input feeds: the wanted conv groups of a weight, or one part, or one block of channels.

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
        self._slides: Slides | None = None
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
        start, size = 0, min(_MOST, max(_CHUNK, 2 * TOKENS * len(self.groups) * self.problems[0].d))
        gram = None if self.leader is not None else self._gram_of(read, size)
        for X in read.patches(self.groups, self.channels, size):
            if gram is not None:
                gram.add(X)
            if gap is not None:
                self._gap.add(gap[:, start : start + X.shape[1]], X)
            start += X.shape[1]

    def _gram_of(self, read: Input, size: int) -> Products | Slides:
        """What sums X Xᵀ of this call: all products, or where that is much less those that sliding leaves."""
        axis = sliding_axis(read, self.problems[0].d)
        if axis is None:
            return self._gram
        if self._slides is None:
            self._slides = Slides(read, axis)
        self._slides.ends(read, self.groups, self.channels, size)
        return self._slides

    def hessians(self) -> list[Tensor]:
        """H (d, d) of each problem; followers have their leader's very tensors."""
        if self.leader is not None:
            return self.leader.hessians()
        if self._hessians is None:
            total, slid = self._gram.total(), None if self._slides is None else self._slides.total()
            if total is None or slid is None:
                total = cast(Tensor, slid if total is None else total)
            else:
                total += slid
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
