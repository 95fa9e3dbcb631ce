# SPDX-License-Identifier: Apache-2.0
"""Grids: the values that a quantizer may take, per channel (a row of the weight) or per chunk of its columns.

A value is scale · (q - zero_point) with an integer q from -2^(b-1) to 2^(b-1) - 1. `zero_point` is one of those integers,
so zero is always on the grid and a pruned weight stays exactly zero. A symmetric grid has zero_point 0. Scales are float32,
as formats store them: what is decoded later equals what was solved for, to the last bit.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from featherweight.errors import NumericalError, OptionError

__all__ = ["Grid", "GridSpec", "fit_grid"]

# The search tries ranges from all of a chunk's values down to a fifth.
_SHRINK = tuple(1 - i / 100 for i in range(80))


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
        """Scale and zero point of each column, (rows, columns), in float64."""
        chunks = columns // self.chunk
        return self.scale[:, chunks].double(), self.zero_point[:, chunks].double()

    def integers(self, weights: Tensor) -> Tensor:
        """The nearest q for weights (rows, d), int32; ties go to the even integer."""
        scale, zero_point = self.at(torch.arange(weights.shape[1], device=weights.device))
        return (weights.double() / scale + zero_point).round_().clamp_(self.low, self.high).to(torch.int32)

    def values(self, integers: Tensor) -> Tensor:
        """scale · (q - zero_point) for q (rows, d), in float64; each is a float32 number's worth of rounding from exact."""
        scale, zero_point = self.at(torch.arange(integers.shape[1], device=integers.device))
        return scale * (integers.double() - zero_point)

    def nearest(self, weights: Tensor) -> Tensor:
        """Weights (rows, d) rounded to the grid, in their own dtype."""
        return self.values(self.integers(weights)).to(weights.dtype)


@dataclasses.dataclass(frozen=True)
class GridSpec:
    """What a grid is to be: `bits` (2 to 8), symmetric or not, and how many columns share a scale (None: the whole row).

    `minmax` covers all values. `mse` shrinks that range, in steps of a hundredth down to a fifth, to where
    Σ importance · |w - nearest(w)|^norm is least (the search and norm of OBC).
    """

    bits: int
    symmetric: bool = False
    chunk: int | None = None
    search: Literal["mse", "minmax"] = "mse"
    norm: float = 2.4

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 2 <= self.bits <= 8:
            raise OptionError(f"bits must be 2 to 8; got {self.bits!r}.")
        if self.chunk is not None and self.chunk < 1:
            raise OptionError(f"chunk is the number of columns that share a scale, 1 or more; got {self.chunk!r}.")
        if self.search not in ("mse", "minmax"):
            raise OptionError(f"search is 'mse' or 'minmax'; got {self.search!r}.")


def fit_grid(W: Tensor, spec: GridSpec, importance: Tensor | None = None) -> Grid:
    """The grid of a kind that fits W (rows, d) best by itself; `importance` (d,) weighs columns, 1 if not given.

    Saves 32 / bits of the weights' bytes before scales; a runtime must know the format to gain speed.
    Raises `NumericalError` for NaN or infinity.

    >>> W = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    >>> grid = fit_grid(W, GridSpec(bits=2, search="minmax"))
    >>> grid.scale.item(), grid.zero_point.item(), grid.integers(W).tolist()
    (1.0, -2, [[-2, -1, 0, 1]])
    """
    rows, d = W.shape
    bits, symmetric = spec.bits, spec.symmetric
    chunk = d if spec.chunk is None else min(spec.chunk, d)
    if not bool(torch.isfinite(W).all()):
        raise NumericalError(f"W ({rows} x {d}) holds NaN or infinity.")
    chunks = -(-d // chunk)
    # Zeros that fill up the last chunk are on every grid, so they weigh nothing.
    pieces = functional.pad(W.detach().double(), (0, chunks * chunk - d)).view(rows, chunks, chunk)
    scale, zero_point = _grid(pieces, bits, symmetric, 1.0)
    if spec.search == "mse":
        weight = torch.ones(d, dtype=torch.float64, device=W.device) if importance is None else importance.double()
        weight = functional.pad(weight, (0, chunks * chunk - d)).view(chunks, chunk)
        least = torch.full_like(scale, torch.inf, dtype=torch.float64)
        for share in _SHRINK:
            trial = _grid(pieces, bits, symmetric, share)
            error = _error(pieces, *trial, bits).pow(spec.norm).mul(weight).sum(2)
            better = error < least
            least = torch.where(better, error, least)
            scale = torch.where(better, trial[0], scale)
            zero_point = torch.where(better, trial[1], zero_point)
    return Grid(scale, zero_point, bits, chunk)


def _grid(pieces: Tensor, bits: int, symmetric: bool, share: float) -> tuple[Tensor, Tensor]:
    """Scale and zero point (rows, chunks) that cover `share` of each piece's range, zero included."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    smallest, largest = pieces.amin(2).clamp_max(0) * share, pieces.amax(2).clamp_min(0) * share
    if symmetric:
        scale = torch.maximum(-smallest, largest) / high
        zero_point = torch.zeros_like(scale)
    else:
        scale = (largest - smallest) / (high - low)
        zero_point = low + (-smallest / scale).round()
    # A piece of nothing but zeros, or of values that float32 cannot scale, takes any grid.
    scale = scale.float()
    empty = scale < torch.finfo(torch.float32).tiny
    return scale.masked_fill(empty, 1.0), zero_point.masked_fill(empty, 0).to(torch.int32)


def _error(pieces: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    step, offset = scale.double()[:, :, None], zero_point.double()[:, :, None]
    return (((pieces / step + offset).round_().clamp_(low, high) - offset) * step - pieces).abs_()
