# SPDX-License-Identifier: Apache-2.0
"""Weights onto grids, one tensor at a time: plain float values in, plain float values out.

Rows are output channels, so that what is pruned, depthwise, grouped or transposed is treated alike. A weight that lies
on a grid of at most so many bits already keeps it: whoever solved for that grid (OBQ, GPTQ, training) did better than
rounding once more would.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from featherweight.edits.effective import reshape_in_place
from featherweight.errors import NumericalError
from featherweight.grids import Grid, GridSpec, fit_grid, read_grid
from featherweight.layers import Weight, from_matrix, to_matrix

__all__ = ["HALVES", "Rounded", "Rounding", "on_grid", "round_weight", "scale_rows"]

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_BLOCK = 1 << 20  # values of whole rows that a grid is fitted to at a time


@dataclasses.dataclass(frozen=True)
class Rounding:
    """To what one weight is rounded: `spec`, or a half precision by name; `whole` gives all its rows one scale."""

    spec: GridSpec | None
    half: str = ""
    whole: bool = False


@dataclasses.dataclass(frozen=True)
class Rounded:
    """What became of a weight: the hint to its codec, whether it stayed as is, and why or how. No hint: it is kept."""

    hint: str
    reason: str
    stays: bool = False


def round_weight(weight: Weight, rounding: Rounding) -> Rounded:
    """Rounds your model's weight in place, in new memory. Zeros stay zeros. Saves nothing before it is packed.

    At 1 bit, which has no zero, a weight with zeros is kept as it is. Raises `NumericalError`, naming the weight, for
    NaN, infinity, and what float16 cannot hold.
    """
    values = weight.parameter.detach()
    if not bool(torch.isfinite(values).all()):
        raise NumericalError(f"{weight.name} holds NaN or infinity; nothing was changed. Look at how it was trained.")
    if rounding.spec is None:
        return _to_half(weight, values, rounding.half)
    spec = rounding.spec
    matrix = to_matrix(weight, values)
    known = on_grid(weight, rounding)
    if known is not None:
        if bool((values == 0).logical_and(torch.signbit(values)).any()):
            reshape_in_place(weight.parameter, values + 0.0)  # -0.0, which no integer is
        return Rounded(f"int:{known.bits}:{known.chunk}", f"keeps its grid of {_bits(known.bits)}", stays=True)
    if spec.bits == 1 and bool((matrix == 0).any()):
        return Rounded("", "has zeros, which 1 bit cannot hold; give 2 or more")
    chunk = matrix.shape[1] if spec.chunk is None else min(spec.chunk, matrix.shape[1])
    nearest = _nearest(matrix, spec, rounding.whole)
    reshape_in_place(weight.parameter, _laid_out(values, from_matrix(weight, nearest)))
    per = "tensor" if rounding.whole else "row" if spec.chunk is None else f"{chunk} columns"
    return Rounded(f"int:{spec.bits}:{chunk}", f"{_bits(spec.bits)}, a scale per {per}")


def on_grid(weight: Weight, rounding: Rounding) -> Grid | None:
    """The grid that your model's weight lies on already, if it is one that rounding would keep."""
    if rounding.spec is None:
        return None
    matrix = to_matrix(weight, weight.parameter.detach())
    return read_grid(matrix, most_bits=rounding.spec.bits, chunk=rounding.spec.chunk)


def _bits(count: int) -> str:
    return f"{count} bit{'s' * (count != 1)}"


def _to_half(weight: Weight, values: Tensor, half: str) -> Rounded:
    nearest = values.to(HALVES[half]).to(values.dtype)
    if not bool(torch.isfinite(nearest).all()):
        raise NumericalError(
            f"{weight.name} holds values beyond 65504, which float16 cannot; nothing was changed. Give bits='bf16'."
        )
    reshape_in_place(weight.parameter, nearest)
    return Rounded(half, half)


def _nearest(matrix: Tensor, spec: GridSpec, whole: bool) -> Tensor:
    """All values on their grids, in their own dtype."""
    if whole:
        return fit_grid(matrix.reshape(1, -1), spec).nearest(matrix.reshape(1, -1)).view(matrix.shape)
    return torch.cat([fit_grid(rows, spec).nearest(rows) for rows in _blocks(matrix)])


def _blocks(matrix: Tensor) -> Iterator[Tensor]:
    columns = matrix.shape[1]
    yield from torch.split(matrix, max(1, _BLOCK // max(columns, 1)))


@torch.no_grad()
def scale_rows(weight: Weight, grid: Grid, factor: Tensor) -> None:
    """Multiplies each row of your weight, which lies on `grid`, by `factor` (rows,) in a way that leaves it on a grid.

    The scales are multiplied and rounded, and the values made anew from the same integers: each is within a rounding of
    the product. Where the factor is negative, integers q become -1 - q, and so does the zero point.
    """
    matrix = to_matrix(weight, weight.parameter.detach())
    integers, flip = grid.integers(matrix), (factor < 0)[:, None]
    scale = (grid.scale.double() * factor.abs()[:, None]).float()
    turned = torch.where(flip, -1 - grid.zero_point, grid.zero_point) if grid.bits > 1 else grid.zero_point
    moved = dataclasses.replace(grid, scale=scale, zero_point=turned)
    values = moved.values(torch.where(flip, -1 - integers, integers)).to(matrix.dtype) + 0.0
    reshape_in_place(weight.parameter, _laid_out(weight.parameter.detach(), from_matrix(weight, values)))


def _laid_out(like: Tensor, values: Tensor) -> Tensor:
    """The values in the memory layout of another tensor: kernels go by strides, those of axes of one entry too."""
    return torch.empty_like(like).copy_(values)
