# SPDX-License-Identifier: Apache-2.0
"""One layer to prune or to quantize, checked and made ready once: what every solver is a function of."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from featherweight.errors import OptionError
from featherweight.grids import Grid
from featherweight.patterns import Pattern
from featherweight.solvers.hessian import Damped, check_weights, damp
from featherweight.solvers.units import ColumnSets, Units, units_of

__all__ = ["Pruning", "Quantization", "pruning"]


@dataclasses.dataclass(frozen=True, eq=False)
class Pruning:
    """W (rows, d) in float64, the damped H, the units that may go, and how many weights must (at least) be zero.

    Columns of W whose inputs are dead are zero here; what a solver does not remove of them is put back in the end.
    `budget_bytes` bounds the memory that a solver uses at one time beyond a few matrices of W's and H's size.
    """

    W: Tensor
    damped: Damped
    units: Units
    zeros: int
    budget_bytes: int

    @property
    def rows(self) -> int:
        return self.W.shape[0]

    @property
    def d(self) -> int:
        return self.W.shape[1]

    def mask(self, chosen: Tensor) -> Tensor:
        """Chosen units (row groups, n) as a mask over the weights (rows, d)."""
        return self.units.mask(chosen, self.rows, self.d)


@dataclasses.dataclass(frozen=True, eq=False)
class Quantization:
    """W (rows, d) in float64, the damped H, the grid, what is held at zero (rows, d), and whether scales may move."""

    W: Tensor
    damped: Damped
    grid: Grid
    held: Tensor
    free_scales: bool
    budget_bytes: int

    @property
    def rows(self) -> int:
        return self.W.shape[0]

    @property
    def d(self) -> int:
        return self.W.shape[1]


def pruning(
    W: Tensor,
    H: Tensor,
    pattern: str | Pattern | ColumnSets = "weight",
    sparsity: float | None = None,
    *,
    run: int | None = None,
    damping: float = 1e-4,
    budget_bytes: int = 1 << 30,
) -> Pruning:
    """Checks a layer and what is asked of it. Raises `OptionError` and `NumericalError`; see `prune` for the meaning.

    >>> import torch
    >>> pruning(torch.ones(2, 8), torch.eye(8), "2:4").zeros
    8
    """
    damped = damp(H, damping)
    # Weights of dead inputs are free: as zeros they are the first that every solver removes.
    work = check_weights(W, H).masked_fill(damped.dead, 0.0)
    rows, d = work.shape
    units = units_of(pattern, rows, d, run)
    if units.quota is not None:
        if sparsity is not None:
            raise OptionError(
                f"pattern {pattern} says itself how many weights go; leave sparsity out (got {sparsity!r})."
            )
        return Pruning(work, damped, units, rows * int(units.quota.sum()), budget_bytes)
    if sparsity is None or not 0 <= sparsity <= 1:
        raise OptionError(f"sparsity is the share of zeros, from 0 to 1; got {sparsity!r}.")
    zeros = round(sparsity * rows * d)
    most = rows * int(units.sizes.sum())
    if zeros > most:
        raise OptionError(
            f"sparsity {sparsity:g} needs {zeros} zeros, and the column sets hold {most} of {rows * d} weights: "
            f"at most sparsity {most / (rows * d):.4g}, or give more sets."
        )
    return Pruning(work, damped, units, zeros, budget_bytes)
