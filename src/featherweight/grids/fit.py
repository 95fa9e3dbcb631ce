# SPDX-License-Identifier: Apache-2.0
"""The grid of a kind that fits a weight best by itself: every value covered, most of them, or the least error.

All chunks of all rows at once, in float64; only the scales are rounded, to float32. A search over eighty ranges costs
eighty passes over the weight and is the default, for a grid is fitted once and used for good.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from featherweight.errors import NumericalError
from featherweight.grids.grid import Grid, GridSpec

__all__ = ["fit_grid"]

# The search tries ranges from all of a chunk's values down to a fifth.
_SHRINK = tuple(1 - i / 100 for i in range(80))
_TINY = torch.finfo(torch.float32).tiny


def fit_grid(W: Tensor, spec: GridSpec, importance: Tensor | None = None) -> Grid:
    """The grid of a kind that fits W (rows, d) best by itself; `importance` (d,) weighs columns, 1 if not given.

    Saves 32 / bits of the weights' bytes before scales; a runtime must know the format to gain speed. A chunk of
    nothing but zeros, or of values too small for a float32 scale, gets scale 1 (at one bit, which has no zero: the
    smallest normal float32). Raises `NumericalError` for NaN or infinity.

    >>> W = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    >>> grid = fit_grid(W, GridSpec(bits=2, search="minmax"))
    >>> grid.scale.item(), grid.zero_point.item(), grid.integers(W).tolist()
    (1.0, -2, [[-2, -1, 0, 1]])
    """
    rows, d = W.shape
    chunk = max(1, d if spec.chunk is None else min(spec.chunk, d))
    if not bool(torch.isfinite(W).all()):
        raise NumericalError(f"W ({rows} x {d}) holds NaN or infinity.")
    chunks = -(-d // chunk)
    # Zeros that fill up the last chunk are on every grid, so they weigh nothing.
    pieces = functional.pad(W.detach().double(), (0, chunks * chunk - d)).view(rows, chunks, chunk)
    weight = torch.ones(d, dtype=torch.float64, device=W.device) if importance is None else importance.double()
    weight = functional.pad(weight, (0, chunks * chunk - d)).view(chunks, chunk)
    if spec.bits == 1:
        scale = pieces.abs().mul(weight).sum(2) / weight.sum(1).clamp_min(_TINY)
        return Grid(scale.float().clamp_min(_TINY), torch.zeros_like(scale, dtype=torch.int32), 1, chunk)
    if spec.search == "percentile":
        smallest, largest = _percentiles(pieces, spec, d - (chunks - 1) * chunk)
    else:
        smallest, largest = pieces.amin(2), pieces.amax(2)
    smallest, largest = smallest.clamp_max(0), largest.clamp_min(0)
    scale, zero_point = _grid(smallest, largest, spec)
    if spec.search == "mse":
        least = torch.full_like(scale, torch.inf, dtype=torch.float64)
        for share in _SHRINK:
            trial = _grid(smallest * share, largest * share, spec)
            error = _error(pieces, *trial, spec.bits).pow(spec.norm).mul(weight).sum(2)
            better = error < least
            least = torch.where(better, error, least)
            scale = torch.where(better, trial[0], scale)
            zero_point = torch.where(better, trial[1], zero_point)
    return Grid(scale, zero_point, spec.bits, chunk)


def _percentiles(pieces: Tensor, spec: GridSpec, last: int) -> tuple[Tensor, Tensor]:
    """The ends of the range (rows, chunks); `last` is how many columns the last chunk really has."""
    parts = [(pieces[:, :-1], spec.percentile / 100), (pieces[:, -1:, :last], spec.percentile / 100)]
    if spec.symmetric:
        largest = torch.cat([_quantile(part.abs(), share) for part, share in parts], 1)
        return -largest, largest
    return (
        torch.cat([-_quantile(-part, share) for part, share in parts], 1),
        torch.cat([_quantile(part, share) for part, share in parts], 1),
    )


def _quantile(values: Tensor, share: float) -> Tensor:
    """Along the last axis, with linear interpolation. torch.quantile refuses more than 2^24 values."""
    place = share * (values.shape[2] - 1)
    below = min(int(place), values.shape[2] - 1)
    ordered = values.sort(2).values
    low, high = ordered[..., below], ordered[..., min(below + 1, values.shape[2] - 1)]
    return low + (high - low) * (place - below)


def _grid(smallest: Tensor, largest: Tensor, spec: GridSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point (rows, chunks) for ranges from `smallest` to `largest`, which hold zero."""
    low, high = -(1 << (spec.bits - 1)), (1 << (spec.bits - 1)) - 1
    if spec.symmetric:
        scale = torch.maximum(-smallest, largest) / high
        zero_point = torch.zeros_like(scale)
    else:
        scale = (largest - smallest) / (high - low)
        zero_point = low + (-smallest / scale).round()
    # A piece of nothing but zeros, or of values that float32 cannot scale, takes any grid.
    scale = scale.float()
    empty = ~(scale >= _TINY)
    return scale.masked_fill(empty, 1.0), zero_point.masked_fill(empty, 0).to(torch.int32)


def _error(pieces: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    step, offset = scale.double()[:, :, None], zero_point.double()[:, :, None]
    return (((pieces / step + offset).round_().clamp_(low, high) - offset) * step - pieces).abs_()
