# SPDX-License-Identifier: Apache-2.0
"""A grid as plain data: scales and zero points per channel (a row of the weight) or per chunk of its columns.

A value is scale · (q - zero_point) with an integer q from -2^(b-1) to 2^(b-1) - 1. `zero_point` is one of those
integers, so zero is always on the grid and a pruned weight stays exactly zero. A symmetric grid has zero_point 0.
Scales are float32, as formats store them: what is decoded later equals what was solved for, to the last bit.

One bit is a case of its own (Rastegari et al. 2016, XNOR-Net): scale · (2q + 1), plus or minus the scale. It has no
zero, so a method must refuse it for a weight that was pruned.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from featherweight.errors import OptionError

__all__ = ["MOST_BITS", "Grid", "GridSpec"]

MOST_BITS = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
    """Scales (rows, chunks) in float32 and zero points (rows, chunks) in int32 for weights of `d` columns.

    A chunk is `chunk` consecutive columns, the last one what is left; per channel, chunk is d.

    >>> grid = Grid(torch.tensor([[0.5]]), torch.tensor([[0]], dtype=torch.int32), bits=2, chunk=3)
    >>> grid.nearest(torch.tensor([[-3.0, 0.2, 0.6]]))
    tensor([[-1.0000,  0.0000,  0.5000]])
    """

    scale: Tensor
    zero_point: Tensor
    bits: int
    chunk: int

    @property
    def low(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def at(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Step and zero point of each column, (rows, columns), in float64: a value is step · (q - zero_point).

        The step is the scale. One bit has no value at zero: its step is twice the scale, its zero point -1/2.
        """
        chunks = columns // self.chunk
        scale = self.scale[:, chunks].double()
        if self.bits == 1:
            return 2 * scale, torch.full_like(scale, -0.5)
        return scale, self.zero_point[:, chunks].double()

    def integers(self, weights: Tensor) -> Tensor:
        """The nearest q for weights (rows, d), int32; ties go to the even integer."""
        step, zero_point = self.at(torch.arange(weights.shape[1], device=weights.device))
        return (weights.double() / step + zero_point).round_().clamp_(self.low, self.high).to(torch.int32)

    def values(self, integers: Tensor) -> Tensor:
        """step · (q - zero_point) for q (rows, d), in float64, exact; each is a float32 number but for a rounding."""
        step, zero_point = self.at(torch.arange(integers.shape[1], device=integers.device))
        return step * (integers.double() - zero_point)

    def nearest(self, weights: Tensor) -> Tensor:
        """Weights (rows, d) rounded to the grid, in their own dtype: half types by way of float32, as torch casts."""
        return self.values(self.integers(weights)).to(weights.dtype)


@dataclasses.dataclass(frozen=True)
class GridSpec:
    """What a grid is to be: `bits` (1 to 16), symmetric or not, and how many columns share a scale (None: a whole row).

    How far its range goes is the `search`'s to say. `minmax` covers all values. `percentile` covers those between the
    100 - `percentile`-th and the `percentile`-th of each chunk (symmetric: that percentile of the magnitudes), with
    linear interpolation as NumPy's. `mse` shrinks the range of all, in steps of a hundredth down to a fifth, to where Σ
    importance · |w - nearest(w)|^norm is least (the search and norm of OBC).

    One bit takes scale = Σ importance · |w| / Σ importance, the mean magnitude (Rastegari et al. 2016, eq. 6), whatever
    the search; it has no zero, and refuses none.
    """

    bits: int
    symmetric: bool = False
    chunk: int | None = None
    search: Literal["mse", "minmax", "percentile"] = "mse"
    norm: float = 2.4
    percentile: float = 99.9

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 1 <= self.bits <= MOST_BITS:
            raise OptionError(f"bits must be 1 to {MOST_BITS}; got {self.bits!r}.")
        if self.chunk is not None and self.chunk < 1:
            raise OptionError(f"chunk is the number of columns that share a scale, 1 or more; got {self.chunk!r}.")
        if self.search not in ("mse", "minmax", "percentile"):
            raise OptionError(f"search is 'mse', 'minmax' or 'percentile'; got {self.search!r}.")
        if not 50 < self.percentile <= 100:
            raise OptionError(f"percentile is above 50 and at most 100; got {self.percentile!r}.")
