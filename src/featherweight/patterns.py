# SPDX-License-Identifier: Apache-2.0
"""Which zeros may stand where: single weights, N:M, tiles, rows, columns, neurons. Words only; methods choose."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from featherweight.errors import OptionError

__all__ = ["Pattern", "parse_pattern"]

Kind = Literal["weight", "n:m", "tile", "row", "column", "neuron"]


@dataclasses.dataclass(frozen=True)
class Pattern:
    """A pattern of zeros in a weight read as rows (outputs) x columns (inputs).

    - weight: any single entry.
    - n:m: of every m consecutive input channels of a row at one kernel position, n are kept.
    - tile: r x c tiles, r rows by c consecutive input channels, aligned, all kept or all zero.
    - row, column: a whole output, a whole input channel at all kernel positions.
    - neuron: a row and the column that it feeds in the next layer, together.
    """

    kind: Kind
    n: int = 0
    m: int = 0
    r: int = 1
    c: int = 1

    def __str__(self) -> str:
        if self.kind == "n:m":
            return f"{self.n}:{self.m}"
        return f"{self.r}x{self.c}" if self.kind == "tile" else self.kind


def parse_pattern(text: str) -> Pattern:
    """Reads `weight`, `2:4` (keeps 2 of 4), `1x4`, `row`, `column` or `neuron`. Raises `OptionError`.

    >>> parse_pattern("2:4")
    Pattern(kind='n:m', n=2, m=4, r=1, c=1)
    >>> str(parse_pattern("1x4"))
    '1x4'
    """
    for kind in ("weight", "row", "column", "neuron"):
        if text == kind:
            return Pattern(kind)
    match = re.fullmatch(r"(\d+)([:x])(\d+)", text)
    if match and match[2] == ":" and 0 < int(match[1]) < int(match[3]):
        return Pattern("n:m", n=int(match[1]), m=int(match[3]))
    if match and match[2] == "x" and int(match[1]) * int(match[3]) > 1:
        return Pattern("tile", r=int(match[1]), c=int(match[3]))
    raise OptionError(
        f"pattern {text!r} is none of: weight, N:M (keeps N of M, 0 < N < M: '2:4'), RxC tiles ('1x4'), row, column, neuron."
    )
