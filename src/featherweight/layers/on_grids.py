# SPDX-License-Identifier: Apache-2.0
"""Grids that an earlier stage put weights on, read from the values, as zeros are."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from featherweight.grids import Grid, read_grid
from featherweight.layers.weights import Weight, to_matrix, weights
from featherweight.layers.zeros import unwrap

__all__ = ["existing_grids"]

_FEWEST = 8  # values that share a scale: so many ordinary floats are on no grid by chance


def existing_grids(
    model: nn.Module, formats: Mapping[str, str] | None = None, *, most_bits: int = 8
) -> list[tuple[Weight, Grid]]:
    """Weights that lie on a grid of at most `most_bits`, one scale per row, each with it.

    `formats` are a plan's hints; `int:bits:chunk` says how many columns share a scale. Left out are weights of one
    magnitude, which start so (zeros, ones), and rows too short to tell a grid from chance.

    >>> import torch
    >>> layer = nn.Linear(8, 1)
    >>> _ = layer.weight.data.copy_(torch.arange(-4, 4) * 0.1)
    >>> [(weight.name, grid.bits) for weight, grid in existing_grids(layer)]
    [('weight', 3)]
    """
    found = []
    for weight in weights(unwrap(model))[0]:
        matrix = to_matrix(weight, weight.parameter.detach())
        chunk = _chunk((formats or {}).get(weight.name, ""))
        if min(matrix.shape[1], chunk or matrix.shape[1]) < _FEWEST:
            continue
        grid = read_grid(matrix, most_bits=most_bits, chunk=chunk)
        if grid is not None and not bool(((matrix.abs() == matrix.abs().amax()) | (matrix == 0)).all()):
            found.append((weight, grid))
    return found


def _chunk(hint: str) -> int | None:
    kind, *numbers = hint.split(":")
    return int(numbers[1]) or None if kind == "int" and len(numbers) == 2 and numbers[1].isdigit() else None
