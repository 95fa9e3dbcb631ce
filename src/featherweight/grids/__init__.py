# SPDX-License-Identifier: Apache-2.0
"""Grids: the values that a quantizer may take, as plain data; fitted to weights, and read from weights that lie on one.

Nobody hands a scale from room to room. Whoever rounds leaves plain float weights on a grid, and whoever stores, checks
or exports them reads it from the values, as sparsity is read from zeros.
"""

from __future__ import annotations

from featherweight.grids.fit import fit_grid
from featherweight.grids.grid import Grid, GridSpec
from featherweight.grids.read import read_grid

__all__ = ["Grid", "GridSpec", "fit_grid", "read_grid"]
