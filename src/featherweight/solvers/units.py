# SPDX-License-Identifier: Apache-2.0
"""What may be removed in one piece: single weights, tiles, columns, sets of columns, and N:M groups that close.

A unit is some columns of some rows. Every solver sees a pattern only through these tables, so a new pattern is a new
table. Tiles and N:M groups run along the input channels of one kernel position (`run` columns, see
`layers.to_matrix`) and never across two; what is left over at the end of a run is a shorter tile, and a shorter group
that keeps at most N.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from featherweight.errors import OptionError
from featherweight.patterns import Pattern, parse_pattern

__all__ = ["ColumnSets", "Units", "units_of"]

ColumnSets = Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True, eq=False)
class Units:
    """`columns` (n, c) are each unit's columns, -1 where a unit is shorter than the longest; `rows` rows share a unit.

    For N:M, `group` (n,) is each column's group and `quota` how many of each group go; both are None otherwise.
    """

    columns: Tensor
    rows: int = 1
    group: Tensor | None = None
    quota: Tensor | None = None

    @property
    def sizes(self) -> Tensor:
        """Columns of each unit (n,)."""
        return (self.columns >= 0).sum(1)

    def weights_of_each(self, groups: int, rows: int) -> Tensor:
        """How many weights each unit of each row group is (groups, n); the last group may hold fewer rows."""
        height = torch.full((groups,), self.rows)
        height[-1:] = rows - (groups - 1) * self.rows
        return height[:, None] * self.sizes

    def sums(self, values: Tensor) -> Tensor:
        """Sums of values (rows, d) over each unit: (row groups, n)."""
        rows, d = values.shape
        groups = -(-rows // self.rows)
        spread = values.new_zeros(groups * self.rows, d + 1)
        spread[:rows, :d] = values
        columns = self.columns.to(values.device)
        tall = spread.view(groups, self.rows, d + 1).sum(1)
        return tall[:, torch.where(columns < 0, d, columns)].sum(2)

    def mask(self, chosen: Tensor, rows: int, d: int) -> Tensor:
        """Chosen units (row groups, n) as a mask over weights (rows, d)."""
        spread = torch.zeros(len(chosen), d + 1, dtype=torch.bool, device=chosen.device)
        columns = self.columns.to(chosen.device)
        columns = torch.where(columns < 0, d, columns)
        spread[:, columns] = chosen[:, :, None].expand(-1, -1, columns.shape[1])
        return spread[:, :d].repeat_interleave(self.rows, 0)[:rows]


def units_of(pattern: str | Pattern | ColumnSets, rows: int, d: int, run: int | None = None) -> Units:
    """The units of a pattern on a weight of `rows` x `d`, whose taps are `run` input channels each (default: one tap).

    `weight`, `N:M` and `RxC` are as in `patterns`; `column` is an input channel at all taps; a sequence of column sets
    is taken as given: disjoint, and columns in none of them stay. Raises `OptionError`.

    >>> units_of("1x4", rows=2, d=6).columns.tolist()
    [[0, 1, 2, 3], [4, 5, -1, -1]]
    >>> units_of("2:4", rows=2, d=6).quota.tolist()
    [2, 0]
    """
    run = d if run is None else run
    if run < 1 or d % run:
        raise OptionError(f"run is the number of input channels at one kernel position and divides d = {d}; got {run}.")
    if not isinstance(pattern, str | Pattern):
        return Units(_padded([list(columns) for columns in pattern], d), rows=rows)
    pattern = parse_pattern(pattern) if isinstance(pattern, str) else pattern
    column = torch.arange(d)
    if pattern.kind == "weight":
        return Units(column[:, None])
    if pattern.kind == "n:m":
        per_tap = -(-run // pattern.m)
        group = column // run * per_tap + column % run // pattern.m
        quota = (torch.bincount(group) - pattern.n).clamp_min(0)
        return Units(column[:, None], group=group, quota=quota)
    if pattern.kind == "tile":
        tiles = [
            list(range(start, min(start + pattern.c, tap + run)))
            for tap in range(0, d, run)
            for start in range(tap, tap + run, pattern.c)
        ]
        return Units(_padded(tiles, d), rows=pattern.r)
    if pattern.kind == "column":
        return Units(column.view(d // run, run).T.contiguous(), rows=rows)
    raise OptionError(
        f"pattern {pattern}: whole outputs are not chosen by a layer's own error; layer solvers take weight, N:M, RxC, "
        "column, or column sets."
    )


def _padded(sets: list[list[int]], d: int) -> Tensor:
    flat = [column for columns in sets for column in columns]
    if not sets or not all(sets) or len(set(flat)) != len(flat) or min(flat) < 0 or max(flat) >= d:
        raise OptionError(f"column sets must be non-empty, disjoint, and within 0 to {d - 1}; got {len(sets)} sets.")
    longest = max(len(columns) for columns in sets)
    return torch.tensor([columns + [-1] * (longest - len(columns)) for columns in sets])
