# SPDX-License-Identifier: Apache-2.0
"""What goes together: a weight tensor as (units, entries in each), for each pattern, and back.

A unit is a single weight, an N:M position, a tile, a row or a column. All units of a layer have the same size, so that
choosing is one-dimensional. Everything here is a permutation of entries; nothing is padded, and a layer whose sizes do
not divide is refused with the reason rather than handled in part.
"""

from __future__ import annotations

from torch import Tensor

from featherweight.layers import Weight, from_matrix, to_matrix
from featherweight.patterns import Pattern

__all__ = ["from_units", "misfit", "rows", "to_units"]


def rows(weight: Weight) -> int:
    """Outputs of a layer: the rows of its matrix."""
    shape = weight.parameter.shape
    return shape[1] * weight.groups if weight.kind.startswith("transposed") else shape[0]


def misfit(weight: Weight, pattern: Pattern) -> str | None:
    """Why a pattern cannot be laid over a weight, or None where it can."""
    channels, per_group = weight.columns_per_tap, rows(weight) // weight.groups
    if weight.kind == "bare" and weight.parameter.ndim > 2 and pattern.kind in ("n:m", "tile", "column"):
        return f"a bare parameter of {weight.parameter.ndim} axes does not say which are its input channels"
    length = {"n:m": pattern.m, "tile": pattern.c}.get(pattern.kind, 1)
    if channels % length:
        seen = "1 input channel" if channels == 1 else f"{channels} input channels"
        return f"its rows see {seen} at one position, which do not divide into {pattern} groups of {length}"
    if pattern.kind == "tile" and per_group % pattern.r:
        where = " in each conv group" if weight.groups > 1 else ""
        return f"its {per_group} rows{where} do not divide into {pattern} tiles"
    return None


def to_units(weight: Weight, pattern: Pattern, tensor: Tensor, block: int = 1) -> Tensor:
    """A tensor of the weight's shape (scores, a mask) as (units, entries in each).

    N:M gives one unit an entry, in an order where each m consecutive units are one group. `block` is for columns: how
    many consecutive columns one input is (the positions of a channel that was flattened).
    """
    if pattern.kind == "weight":
        return tensor.reshape(-1, 1)
    matrix = to_matrix(weight, tensor)
    if pattern.kind == "n:m":
        return matrix.reshape(-1, 1)
    if pattern.kind == "tile":
        tiles = matrix.reshape(len(matrix) // pattern.r, pattern.r, -1, pattern.c)
        return tiles.transpose(1, 2).reshape(-1, pattern.r * pattern.c)
    if pattern.kind in ("row", "neuron"):
        return matrix
    # Columns of conv group g are inputs of that group alone: (group, row, tap, input, position) -> one unit an input.
    groups, inputs = weight.groups, weight.columns_per_tap // block
    split = matrix.reshape(groups, len(matrix) // groups, -1, inputs, block)
    return split.permute(0, 3, 1, 2, 4).reshape(groups * inputs, -1)


def from_units(weight: Weight, pattern: Pattern, units: Tensor, block: int = 1) -> Tensor:
    """The inverse of `to_units`; `units` of shape (units,) stand for all their entries.

    >>> import torch
    >>> from featherweight.layers import weights
    >>> [w], _ = weights(torch.nn.Linear(4, 2))
    >>> from_units(w, Pattern("column"), torch.tensor([True, False, False, True])).tolist()
    [[True, False, False, True], [True, False, False, True]]
    """
    shape = weight.parameter.shape
    size = shape.numel() // len(units)
    units = units.reshape(len(units), -1).expand(-1, size)
    if pattern.kind == "weight":
        return units.reshape(shape)
    height = rows(weight)
    if pattern.kind == "tile":
        tiles = units.reshape(height // pattern.r, -1, pattern.r, pattern.c)
        units = tiles.transpose(1, 2)
    elif pattern.kind == "column":
        groups, inputs = weight.groups, weight.columns_per_tap // block
        split = units.reshape(groups, inputs, height // groups, -1, block)
        units = split.permute(0, 2, 3, 1, 4)
    return from_matrix(weight, units.reshape(height, -1))
